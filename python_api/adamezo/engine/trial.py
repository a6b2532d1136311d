"""Evaluations beside an optimizer's run, which leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import nn

from adamezo_kernels import PhiloxState

from .base import Probe
from .closure import Closure, Result
from .evaluation import evaluate
from .generators import ForkedGenerators
from .guard import Guard
from .module_buffers import KeptBuffers
from .optimizer import ZerothOrder
from .perturb import InPlace
from .signals import HeldSignals
from .weights import Weights


class Trial(NamedTuple):
    """What a trial works with."""

    first: PhiloxState
    """The direction of the next step."""
    options: dict[str, Any]
    weights: Weights
    evaluate: Callable[[Sequence[Closure], Sequence[Probe]], list[Result]]
    """Evaluates each closure at its probe."""


@contextmanager
def trial(optimizer: ZerothOrder, moves: bool) -> Iterator[Trial]:
    """Evaluations as in a step: random numbers, the modules that read copies with
    ``perturbation="out_of_place"``, what is done to module buffers.

    Afterwards weights, history, the generators of torch and the global ones of Python and numpy are
    as they were, and where the optimizer knows its model, module buffers and the modules' training
    modes too.

    Args:
        optimizer: whose run it is.
        moves: whether weights are moved. In place that leaves roundings, so it takes a copy of
            them, in the memory of the host.
    """
    step = optimizer._begin(*optimizer._next_probes())
    weights = optimizer._perturbation(step)
    model, plans = optimizer.model, step.weights.plans
    guard = Guard(step.weights)
    tensors = step.weights.tensors if moves and isinstance(weights, InPlace) else []
    copies = [p.detach().to("cpu", copy=True) for p in tensors]
    with ExitStack() as around:
        signals = around.enter_context(HeldSignals())
        around.enter_context(ForkedGenerators())
        around.enter_context(_kept_modes(model))
        between = optimizer._kept_buffers(plans)  # nothing, unless a step puts some back
        around.callback(KeptBuffers(model, plans).put_back)

        def evaluated(closures: Sequence[Closure], probes: Sequence[Probe]) -> list[Result]:
            points = optimizer._points(probes, step.options)
            return evaluate(closures, points, weights, guard, signals, between)

        try:
            yield Trial(step.first, step.options, step.weights, evaluated)
        finally:
            try:
                guard.put_back()
                weights.restore()
            finally:
                for p, copy in zip(tensors, copies, strict=True):
                    p.detach().copy_(copy)


@contextmanager
def _kept_modes(model: nn.Module | None) -> Iterator[None]:
    """Modules train afterwards that trained before, and others do not."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training
