"""Base class: a forward-only step that always restores the weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor

from adamezo_kernels import RULES, Call, Direction, PhiloxState, Plan, Terms, run
from adamezo_kernels.backends import Backend

from . import notices
from .arithmetic import Number, two_sided, usable
from .base import OptimizerBase, Probe
from .closure import Closure, mean_loss
from .device import DeviceNumbers, is_capturing
from .evaluation import evaluate_with
from .guard import Guard
from .known_model import known_model
from .module_buffers import KeptBuffers
from .options import set_lr
from .perturb import (
    Corrected,
    InPlace,
    OutOfPlace,
    Perturbation,
    Point,
    Readers,
    Regenerated,
    Saved,
)
from .ranks import DISCONNECTED
from .records import StepRecord, check_record
from .signals import HeldSignals
from .weights import Weights


class _Step(NamedTuple):
    """What a step works with, looked up once at its beginning."""

    options: dict[str, Any]
    first: PhiloxState
    probes: list[Probe]
    device: DeviceNumbers | None
    weights: Weights
    backend: Backend


class ZerothOrder(OptimizerBase):
    """Base of the optimizers: evaluates a closure at perturbed weights, and restores or updates.

    A method says where it evaluates (:meth:`_probes`), which numbers it computes from the losses
    (:meth:`_measure`) and what these make of the history and of an update (:meth:`_terms`).

    Attributes:
        losses (tuple[float, ...]): of the last step, in the order of its evaluations. With
            ``capturable`` these and the next two are tensors on the device.
        measured (tuple[float, ...]): the numbers that its update took from them; empty if it
            failed.
        skipped (int): steps left out because of a non-finite loss, since this object was made or
            a state was loaded into it.
        recorder (Callable[[StepRecord], None] | None): called at the end of every step, and of
            failed ones that have touched the weights.
        shaping (Callable | None): given the losses of a step and its probes, returns those that the
            update is computed from. Not saved; a log holds what it made, and replays without it.
    """

    _stacklevel: ClassVar[int] = 6  # of a warning to the caller of step, above torch's wrappers

    @property
    def measured_per_step(self) -> int:
        """How many numbers a step computes from its losses, which is the same for every step."""
        options, _, probes = self._next_probes()
        return len(self._measure([0.0] * len(probes), options))

    def _probes(self, first: PhiloxState, options: dict[str, Any]) -> list[Probe]:
        """Where a step evaluates the loss: on both sides along one direction, unless a method has
        others. Directions count up from ``first.counter``."""
        return [(first, options["zo_eps"]), (first, -options["zo_eps"])]

    def _measure(self, losses: Sequence[Number], options: dict[str, Any]) -> tuple[Number, ...]:
        """The numbers that an update takes from the losses of all probes: the projected gradient,
        unless a method has others."""
        loss_plus, loss_minus = losses
        return (two_sided(loss_plus, loss_minus, options["zo_eps"]),)

    @abstractmethod
    def _terms(
        self, group: dict[str, Any], first: PhiloxState, measured: tuple[float, ...]
    ) -> tuple[Terms, dict[str, Any]]:
        """The terms of a group's update, whose first direction is that of the last probe, and the
        history that the group has after it."""

    def _direction(self, z: PhiloxState, options: dict[str, Any]) -> Direction:
        """The direction of a probe's perturbation: z, unless the method's rule has its own."""
        return z

    def unit_length(self, group: dict[str, Any]) -> float | None:
        """How far a step with lr = 1 moves a weight of a group for good, about, as a root mean
        square; None where that depends on the scale of the loss (:func:`adamezo.find_lr`)."""
        return None

    def _closures(self, closure: Closure, probes: Sequence[Probe]) -> list[Closure]:
        """The closure that is evaluated at each probe."""
        return [closure] * len(probes)

    @overload  # type: ignore[override]  # torch's closures return floats, ours tensors too
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> Tensor: ...

    @torch.inference_mode(False)  # what a step makes and keeps is of the ordinary kind
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:
        """One step.

        Args:
            closure: evaluates the model without gradients and returns the loss as a scalar tensor
                or a number, or an output of a model or a dict that has such a ``loss``; or a
                :class:`adamezo.LossSum` of samples' losses. It must be a function of the weights
                alone: whatever else changes between the evaluations of a step goes into the
                projected gradient, unseen. So it is on the same batch each time, which is drawn
                before the step. The global generators of torch, Python
                (``random``) and numpy (``numpy.random``) give all evaluations the same numbers;
                generators that were made (``torch.Generator``, ``random.Random``,
                ``numpy.random.default_rng``) do not. :func:`adamezo.check_closure` looks. Without
                a closure nothing happens and None is returned: frameworks call ``step()`` to
                initialize state. Buffers of the weights are made then.

        Returns:
            The mean of the losses, a scalar tensor.
        """
        if closure is None:
            self._make_buffers()
            if self._has_gradients():
                self._warn_once("gradients", notices.warn_of_gradients)
            return None
        if not callable(closure):
            raise TypeError(
                f"step takes a closure that evaluates the loss, got {type(closure).__name__}: pass "
                "a function without arguments, as a step evaluates the loss more than once"
            )
        options, first, probes, device, trained, _ = step = self._begin(*self._next_probes())
        if self.ranks is not None:
            self.ranks.begin(self)
        elif not trained.sharded:
            self._warn_once("alone", notices.warn_of_ranks)
        else:
            raise RuntimeError(DISCONNECTED.format(trained.names[0]))
        if not trained.trains:
            self._warn_once("nothing to train", notices.warn_of_nothing_to_train, self.param_groups)
        weights = self._perturbation(step)
        points = self._points(probes, options) if device is None else device.points(probes)
        guard = Guard(trained)
        self.measured = ()
        outcome = "failed"
        with HeldSignals() as signals, self._kept_buffers(trained.plans) as buffers:
            try:
                closures = self._closures(closure, probes)
                around = weights, guard, signals, buffers
                losses, results = evaluate_with(self.ranks, device, closures, points, *around)
                self.losses = tuple(losses)
                shaped = losses if self.shaping is None else self.shaping(self.losses, probes)
                self.measured = self._measure(shaped, options)
                buffers.let_go()
                if device is not None:
                    outcome = "broken"
                    device.advance(self.losses, self.measured)
                    self._update(step, weights)
                    outcome = "updated"
                    if is_capturing(device.setup.device):
                        # The graph reads and writes their memory for as long as it is replayed,
                        # whatever becomes of them here.
                        self._captured.append((device, trained, self._readers))
                else:
                    self._use_up(probes)
                    outcome = "skipped"
                    if usable((*self.losses, *self.measured)):
                        self._count_skipped(0)
                        outcome = "broken"
                        self._update(step, weights)
                        outcome = "updated"
            except BaseException:
                if self.ranks is not None and self.ranks.lost:
                    outcome = "lost"  # without a record: the job goes on from the step before
                raise
            finally:
                try:
                    guard.put_back()
                    weights.restore()
                finally:
                    if weights.broken or guard.written:
                        outcome = "broken"
                    written = weights.perturbations
                    happened = outcome != "lost" and (outcome != "failed" or written)
                    if self.recorder is not None and happened:
                        lrs = tuple([float(group["lr"]) for group in self.param_groups])
                        record = StepRecord(outcome, first.counter, written, self.measured, lrs)
                        self.recorder(record)
        if outcome == "skipped":
            self._skip(options["nonfinite"], options["max_skipped"])
        return mean_loss(losses, results)

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self, record: StepRecord) -> None:
        """Does to weights and history what a recorded step did, bit for bit and without a closure.

        Weights, history and options have to be those before that step. Afterwards each group's
        ``lr`` is the recorded one.

        Raises:
            ValueError: a record that cannot be of the next step; nothing has happened then.
        """
        groups = self.param_groups
        self._leave_device()
        options, first, probes = self._next_probes()
        measured = len(self._measure([0.0] * len(probes), options))
        check_record(record, first.counter, len(probes), len(groups), measured)
        step = self._begin({**options, "capturable": False}, first, probes)
        weights = self._in_place(step)
        with HeldSignals():
            try:
                for direction, scale in self._points(probes, options)[: record.perturbations]:
                    weights.perturb(direction, scale)
                if record.outcome != "failed":
                    self.losses, self.measured = (), record.measured
                    self._use_up(probes)
                if record.outcome == "updated":
                    for group, lr in zip(groups, record.lrs, strict=True):
                        set_lr(group, lr)
                    self._count_skipped(0)
                    self._update(step, weights)
                elif record.outcome == "skipped":
                    self.skipped += 1
                    self._count_skipped(groups[0]["skipped_in_a_row"] + 1)
            finally:
                weights.restore()

    def _next_probes(self) -> tuple[dict[str, Any], PhiloxState, list[Probe]]:
        """The options that the next step shares, its first direction and its probes."""
        self._check_groups()  # as users and schedulers have set them
        options = self._shared_options()
        if not options["capturable"]:
            self._leave_device()
        first = PhiloxState(options["seed"], self.param_groups[0]["next_direction"])
        return options, first, self._probes(first, options)

    def _begin(self, options: dict[str, Any], first: PhiloxState, probes: list[Probe]) -> _Step:
        # Before the plans: in a capture nothing may be made, buffers neither.
        device = self._on_device(first, probes) if options["capturable"] else None
        weights = self._current_weights()
        backend = self._backend(options, weights.devices)
        return _Step(options, first, probes, device, weights, backend)

    def _points(self, probes: Sequence[Probe], options: dict[str, Any]) -> list[Point]:
        # One object for each direction, by which a perturbation sees that it is the same.
        directions = {z: self._direction(z, options) for z, _ in probes}
        return [(directions[z], scale) for z, scale in probes]

    def _perturbation(self, step: _Step) -> Perturbation:
        kind, distribution = step.options["perturbation"], step.options["distribution"]
        if kind == "inplace":
            return self._in_place(step)
        forget, plans = self._forgetting(step.weights), step.weights.plans
        model = self._checked_model(f"perturbation={kind!r}")
        if kind == "regenerated":
            made = self._corrected
            if made is None or not made.are_of(model, plans, distribution):
                made = self._corrected = Corrected(model, plans, distribution, step.backend)
            return Regenerated(made, model)
        if step.weights.sharded:
            if self._saved is None or not self._saved.are_of(plans, distribution, step.backend):
                self._saved = Saved(plans, distribution, step.backend, forget)
            self._saved.save()
            return self._saved
        if self._readers is None or not self._readers.are_of(model, plans):
            self._readers = Readers(model, plans)
        return OutOfPlace(self._readers, distribution, step.backend)

    def _in_place(self, step: _Step) -> InPlace:
        roundings = [group["rounding"] for group in self.param_groups]
        distribution, forget = step.options["distribution"], self._forgetting(step.weights)
        return InPlace(step.weights.plans, roundings, distribution, step.backend, forget)

    def _update(self, step: _Step, weights: Perturbation) -> None:
        """Restores and updates the weights of all groups, and brings their history up to date."""
        for i, (group, plan) in enumerate(zip(self.param_groups, step.weights.plans, strict=True)):
            history = None
            if step.device is not None:
                terms = step.device.groups[i].terms
            else:
                terms, history = self._terms(group, step.first, self.measured)
            of = group["distribution"], group["rounding"], weights.restoring(i)
            run(Call("update", plan, terms, *of, eps=group.get("eps", 0.0)), step.backend)
            if history is not None:
                group.update(history)
                group["steps"] += 1
            weights.restored(i)

    def _kept_buffers(self, plans: list[Plan]) -> KeptBuffers:
        """The buffers of the modules, where they are to be put back."""
        if self.module_buffers == "every":
            return KeptBuffers()
        return KeptBuffers(known_model(self.model, type(self), "module_buffers='last'"), plans)

    def _use_up(self, probes: Sequence[Probe]) -> None:
        """The next step has directions of its own."""
        last = max([direction.counter for direction, _ in probes])
        for group in self.param_groups:
            group["next_direction"] = last + max(RULES[self.rule].directions, 1)

    def _count_skipped(self, in_a_row: int) -> None:
        for group in self.param_groups:
            group["skipped_in_a_row"] = in_a_row

    def _skip(self, nonfinite: str, limit: int) -> None:
        in_a_row = self.param_groups[0]["skipped_in_a_row"] + 1
        self._count_skipped(in_a_row)
        self.skipped += 1
        first = self.skipped == 1
        notices.tell_of_skipped_step(
            self.losses, in_a_row, nonfinite, limit, first, self._stacklevel
        )

    def _make_buffers(self) -> None:
        """Makes the state that a checkpoint can be loaded into, as torch's distributed checkpoints
        expect of a ``step()``. They set lr to 0 and gradients to zeros for that."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self._buffers_of(p, group)

    def _has_gradients(self) -> bool:
        """Whether somebody has backpropagated, and expects a step to use that."""
        return any(
            p.grad is not None and float(group["lr"]) != 0
            for group in self.param_groups
            for p in group["params"]
        )

    def _warn_once(self, of: str, warn: Callable[..., None], *arguments: object) -> None:
        if of not in self._warned:
            self._warned.add(of)
            warn(type(self).__name__, *arguments, self._stacklevel)
