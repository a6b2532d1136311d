"""Perturbation out of place: modules read perturbed copies, and the weights are never written."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from adamezo_kernels import Direction, Terms, run
from adamezo_kernels.backends import Backend

from ..memory import overlap
from .interface import forget_cached_weights
from .readers import Readers
from .scratch import Loan, Scratch, Weight
from .watch import Watch, written_by

_OTHERWISE = "Take perturbation='inplace'"


class OutOfPlace:
    """Shows a module ``theta + scale z`` in memory of its own while it runs.

    Args:
        readers: of the model.
        distribution, backend: see :func:`adamezo_kernels.perturb_`.
    """

    perturbations = 0
    broken = False

    def __init__(self, readers: Readers, distribution: str, backend: Backend) -> None:
        self._readers = readers
        self._distribution = distribution
        self._backend = backend
        self._direction: Terms | None = None
        self._scale = 0.0
        self._watched = readers.due
        self._thread = threading.get_ident()
        self._frames: list[_Frame] = []
        self._at_work = False
        self._watch = Watch(self._look)
        self._watching = False
        self._looked_at: dict[int, nn.Module] = {}
        self._refusal: RuntimeError | None = None

    def perturb(self, direction: Direction, scale: float) -> None:
        # In the form of the kernels, once and not for each module.
        self._direction = direction if isinstance(direction, Terms) else Terms.of([direction])
        self._scale = scale
        forget_cached_weights()

    def restoring(self, group: int) -> float:
        return -0.0

    def restored(self, group: int) -> None:
        # Not before: evaluations that were cut short, or whose losses were not finite, may have
        # left out what others read.
        if group == 0:
            self._readers.end_of_step(self._watched, self._looked_at)

    def restore(self) -> None:
        forget_cached_weights()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(self._unwind)
            self._readers.begin_evaluation()
            if "torch._dynamo" in sys.modules:
                # Compiled code may have been made without the hooks. Whether it is then made anew
                # differs between versions of torch.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            # Of all modules: hooks of one module would show in it, and torch's own modules choose
            # other kernels where they see some.
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            stack.callback(self._stop_watching)
            self._watch_or_not()
            yield
        if self._refusal is not None:  # even if the closure has caught it
            raise self._refusal

    def _enter(self, module: nn.Module, arguments: object) -> None:
        """A module is about to run."""
        weights = self._readers.read_by(module)
        if threading.get_ident() != self._thread:
            if weights:
                raise RuntimeError(
                    f"{weights[0].name} is read in a thread other than the step's: "
                    "perturbation='out_of_place' perturbs weights for one thread only. "
                    f"{_OTHERWISE}"
                )
            return
        frame = _Frame(module)
        around = self._frames[-1].watched if self._frames else False
        frame.watched = around or self._watched or not self._readers.has_seen(module)
        self._frames.append(frame)
        if frame.watched:
            self._looked_at[id(module)] = module
        if weights:
            self._show(frame, weights)
        self._watch_or_not()

    def _leave(self, module: nn.Module, arguments: object, result: object) -> None:
        """A module has run, or has raised."""
        frames = self._frames
        if threading.get_ident() != self._thread:
            return
        if frames and frames[-1].module is module:
            self._release(frames[-1])  # popped after: a signal may cut this short
            frames.pop()
        elif any([frame.module is module for frame in frames]):
            found = False
            while not found:  # modules above it were left without a call of this
                found = frames[-1].module is module
                self._release(frames[-1])
                frames.pop()
        else:
            return
        self._watch_or_not()

    def _unwind(self) -> None:
        while self._frames:
            self._release(self._frames[-1])
            self._frames.pop()
        self._readers.end_evaluation()

    def _show(self, frame: _Frame, weights: Sequence[Weight]) -> None:
        """Shows a module those weights perturbed that no module around it shows so already."""
        still: dict[Scratch, list[Weight]] = {}
        for weight in weights:
            if not weight.perturbed:
                still.setdefault(weight.scratch, []).append(weight)
        self._at_work = True
        assert self._direction is not None, "an evaluation follows a perturbation"
        try:
            for scratch, some in still.items():
                loan = scratch.lend(some)
                frame.loans.append((scratch, loan, some))
                call = loan.copies.filled_by(self._direction, self._scale, self._distribution)
                run(call, self._backend)
                for weight, copy in zip(some, loan.copies.tensors, strict=True):
                    frame.weights.append(weight)
                    weight.point_to(copy)
        finally:
            self._at_work = False

    def _release(self, frame: _Frame) -> None:
        self._at_work = True
        try:
            for weight in frame.weights:
                weight.point_to(None)
            for scratch, loan, weights in frame.loans:
                self._readers.take_back(scratch, loan, weights)
        finally:
            self._at_work = False

    def _watch_or_not(self) -> None:
        """Operations are watched outside of all modules, and in modules that no step has seen
        running, at every step; in all others at the steps that are due. Watching costs
        microseconds an operation, and few operations are outside of modules."""
        wanted = self._frames[-1].watched if self._frames else True
        if wanted == self._watching:
            return
        if wanted:
            self._watching = True
            self._watch.__enter__()
        elif _get_current_dispatch_mode() is self._watch:
            self._stop_watching()  # not if the closure has entered a mode of its own since

    def _stop_watching(self) -> None:
        while _get_current_dispatch_mode() is self._watch:
            self._watch.__exit__(None, None, None)
        self._watching = False

    def _look(self, operation: Any, arguments: object) -> None:
        """Looks at an operation before it runs. A weight that it would read unperturbed is
        perturbed now, and from then on whenever the module runs that is running."""
        if self._at_work:
            return
        for tensor in tree_leaves(arguments):
            if not isinstance(tensor, Tensor):
                continue
            weight = self._readers.weight_under(tensor)
            if weight is not None and not weight.perturbed:
                self._found(weight, tensor)
            elif weight is not None:
                self._refuse(_alias(weight.name))
            elif (kept := self._readers.outdated(tensor)) is not None:
                self._refuse(
                    f"a tensor is read that shares memory with {kept} as an earlier evaluation "
                    "perturbed it: a module or the closure has kept a view of it, such as its "
                    "transpose. Make the view anew at every forward, or take "
                    "perturbation='inplace'"
                )
        for tensor in written_by(operation, arguments):
            for frame in self._frames:
                for weight in frame.weights:
                    if overlap(tensor, weight.parameters[0]):
                        self._refuse(
                            f"{weight.name} is written in a forward, by {operation}: with "
                            "perturbation='out_of_place' that would be lost. Do it outside of the "
                            "step"
                        )

    def _found(self, weight: Weight, tensor: Tensor) -> None:
        """An operation is about to read an unperturbed weight."""
        if all(tensor is not p for p in weight.parameters):
            self._refuse(_alias(weight.name))
        frame = self._frames[-1] if self._frames else None
        if frame is None or not self._readers.knows(frame.module):
            where = "outside of all modules" if frame is None else type(frame.module).__name__
            self._refuse(
                f"{weight.name} is read {'' if frame is None else 'in the forward of a '}{where}"
                f"{'' if frame is None else ', which is no module of the model'}: "
                "perturbation='out_of_place' perturbs weights while a module of the model runs. "
                f"Read it in the forward of one, or {_OTHERWISE[0].lower()}{_OTHERWISE[1:]}"
            )
        self._show(frame, [weight])
        self._readers.learn(frame.module, weight)

    def _refuse(self, message: str) -> NoReturn:
        self._refusal = RuntimeError(message)
        raise self._refusal


def _alias(name: str) -> str:
    return (
        f"{name} is read through another tensor over its memory, such as a view, a detach() or a "
        "copy of the parameters for functional_call that was made outside of the forward: "
        "perturbation='out_of_place' perturbs the parameter itself. Use the parameter, or "
        "take perturbation='inplace'"
    )


class _Frame:
    """A module that is running, and the weights that it is shown perturbed."""

    __slots__ = ("loans", "module", "watched", "weights")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.watched = False
        self.weights: list[Weight] = []
        self.loans: list[tuple[Scratch, Loan, list[Weight]]] = []
