"""A trial of a closure: is it a function of the weights alone, as a step takes it to be?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .closure import Closure, Result, numbers
from .module_buffers import BufferMarks
from .optimizer import ZerothOrder
from .trial import trial

REORDERED = 64 * torch.finfo(torch.float32).eps
"""How far two float32 sums of the same terms in another order may be from each other, relative to
their size. An addition errs by up to eps / 2, and n of them, in random directions, by sqrt(n) times
that: 64 eps for n = 2^14, more terms than a row of most layers has."""


@torch.inference_mode(False)
@torch.no_grad()
def check_closure(
    optimizer: ZerothOrder, closure: Closure, *, tolerance: float | None = None
) -> float:
    """Evaluates a closure twice at the weights as they are, and wants the same loss both times.

    A step takes the difference of two losses for the effect of its perturbation. Whatever else
    makes them differ, such as a batch drawn in the closure, goes into the projected gradient, and
    nothing tells. Here nothing is perturbed. All else is as in a step: random numbers, the modules
    that read copies with ``perturbation="out_of_place"``, what is done to module buffers.

    Afterwards weights, history, the generators of torch and the global ones of Python and numpy
    are as they were before, and where the optimizer knows its model, module buffers and the
    modules' training modes too. So a run with a check has the bits of one without. What the closure
    itself keeps (generators of its own, an iterator over batches) is not known here, and has seen
    two evaluations.

    Args:
        optimizer: that is to step with it.
        closure: as for :meth:`~adamezo.AdaMeZO.step`. One for sampled labels is checked the same
            way.
        tolerance: how far the losses may differ, relative to the larger one. None allows what a
            function of the weights may have whose kernels sum in another order each time, as some
            multithreaded and GPU kernels do: REORDERED, or a unit in the last place of the loss's
            type, if that is more. Of either size is the rounding that each loss of a step has.

    Returns:
        The loss.

    Raises:
        ValueError: the losses differ; the message says by how much, what that does to the projected
            gradient, and what to look for. Two that are NaN do not differ.
    """
    if not isinstance(optimizer, ZerothOrder) or not callable(closure):
        raise TypeError(
            "expected an optimizer of adamezo and a closure, in this order; got "
            f"{type(optimizer).__name__} and {type(closure).__name__}"
        )
    wrote: list[str] = []
    with trial(optimizer, moves=False) as tried:
        model = optimizer.model
        marks = None if model is None else BufferMarks(model)
        results = tried.evaluate([closure] * 2, [(tried.first, 0.0)] * 2)
        if marks is not None and optimizer.module_buffers == "every":
            wrote = marks.written(lambda: tried.weights.plans)
    once, again = numbers(results)
    allowed = _tolerance(results) if tolerance is None else tolerance
    if not _alike(once, again, allowed):
        raise ValueError(_message(once, again, allowed, tried.options["zo_eps"], wrote))
    return once


def _tolerance(results: Sequence[Result]) -> float:
    last_places = [torch.finfo(r.dtype).eps for r in results if isinstance(r, Tensor)]
    return max([REORDERED, *last_places])


def _alike(once: float, again: float, tolerance: float) -> bool:
    if not (math.isfinite(once) and math.isfinite(again)):
        return once == again or (math.isnan(once) and math.isnan(again))
    return abs(again - once) <= tolerance * max(abs(once), abs(again))


def _message(once: float, again: float, tolerance: float, zo_eps: float, wrote: list[str]) -> str:
    difference = abs(again - once)
    buffers = (
        f"the module buffers that it writes ({', '.join(wrote)}), if the loss depends on them: "
        "`optimizer.module_buffers = 'last'` shows them alike to all evaluations; "
        if wrote
        else ""
    )
    return (
        f"the closure gave the loss {once!r} and then {again!r} at the same weights, on the same "
        "random numbers of torch, Python and numpy. They differ by "
        f"{difference:.3g}, expected {tolerance * max(abs(once), abs(again)):.3g} at most. A step "
        "takes a difference for the effect of its perturbation: this one would put "
        f"difference / (2 zo_eps) = {difference / (2 * zo_eps):.3g} into the projected gradient. "
        "Look for: a batch that is drawn in the closure (draw it before the step, so that all "
        "evaluations see the same one); a torch.Generator, random.Random or "
        "numpy.random.default_rng of its own (draw before the step, or seed it in the closure); "
        f"{buffers}a state that the closure advances, such as a counter, a cache or a schedule "
        "(advance it after the step); kernels that sum in another order each time "
        "(torch.use_deterministic_algorithms(True), or a larger `tolerance`)"
    )
