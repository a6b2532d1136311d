"""What all zeroth-order optimizers here have in common: a step of forward passes that ends well."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, NamedTuple, TypeVar, overload
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from adamezo_kernels import (
    DISTRIBUTIONS,
    ROUNDINGS,
    RULES,
    STREAM_VERSION,
    Direction,
    PhiloxState,
    Plan,
)
from adamezo_kernels.backends import BACKENDS, choose

from .arithmetic import Number, usable
from .evaluation import Closure, checked_loss, forked_generators, mean_loss, numbers
from .exact import Exact, Readers
from .guard import Guard
from .layout import Layout
from .module_buffers import MODULE_BUFFERS, KeptBuffers
from .perturbation import PERTURBATIONS, Displacement, InPlace
from .plain import make_plain
from .resident import Made, Resident, ResidentGroup, is_capturing
from .signals import HeldSignals

_Optimizer = TypeVar("_Optimizer", bound="ZerothOrder")

Probe = tuple[PhiloxState, float]
"""(z, scale): the loss is evaluated at ``theta + scale z``."""

NONFINITE = ("skip", "raise")

_COUNTED = ("next_direction", "skipped_in_a_row")
"""What all groups know alike: index of the next step's first direction; how many steps have been
skipped since the last that was not."""

# Put into a group by torch, its schedulers and whoever wraps the optimizer.
_NOT_SAVED = ("params", "param_names", "initial_lr")

OUTCOMES = ("updated", "skipped", "failed", "broken")


class StepRecord(NamedTuple):
    """What a step did to the weights: with the options of its groups, all that there is to know."""

    outcome: str
    """One of OUTCOMES. ``skipped``: a loss was not finite. ``failed``: the closure raised. Either
    way the weights were displaced and put back. ``broken``: an operation on them failed half-way,
    and what they are is not known."""
    direction: int
    """The 32-bit index of the step's first direction."""
    displacements: int
    """How many displacements the weights went through before they were put back or updated."""
    measured: tuple[float, ...]
    """What an update takes from the losses; empty where there was none. For AdaMeZO
    ``(projected_grad,)``."""
    lrs: tuple[float, ...]
    """The learning rate of each group."""


class ZerothOrder(torch.optim.Optimizer):
    """Base of the optimizers: evaluates a closure at displaced weights, and restores or updates.

    A method says where it evaluates (:meth:`_probes`), what it takes from the losses
    (:meth:`_measure`) and what it does with that (:meth:`_update`).

    Attributes:
        losses (tuple[float, ...]): of the last step, in the order of its evaluations. With
            ``capturable`` these and the next two are tensors on the device.
        measured (tuple[float, ...]): what its update took from them; empty if it failed.
        skipped (int): steps left out because of a non-finite loss, since this object was made or
            a state was loaded into it.
        recorder (Callable[[StepRecord], None] | None): called at the end of every step, and of
            failed ones that have touched the weights.
    """

    shared_options: ClassVar[tuple[str, ...]] = (
        "zo_eps",
        "distribution",
        "perturbation",
        "fused",
        "capturable",
        "seed",
        "nonfinite",
        "max_skipped",
    )
    """Options that the whole step shares: one direction, one set of losses."""

    fixed_options: ClassVar[tuple[str, ...]] = ("method", "stream_version", "distribution")
    """Options that a state must share with the optimizer that loads it. All others come with it."""

    history: ClassVar[dict[str, Any]] = {}
    """What a group keeps from step to step, besides its number of steps, and how it begins. Plain
    numbers, or lists of them that are replaced and never changed, as a state_dict shares them: that
    survives every way of saving and loading."""

    rule: ClassVar[str] = "moments"
    """What an update is, and what it keeps for each weight: one of adamezo_kernels.RULES."""

    recorder: Callable[[StepRecord], None] | None = None

    _frames_above_skip: ClassVar[int] = 6  # the caller of step, above torch's three wrappers
    _resident: Resident | None = None
    _module_buffers: str = "every"
    _model: ref[nn.Module] | None = None  # weak: the optimizer of a model may be kept with it

    def __init__(
        self,
        params: ParamsT,
        options: dict[str, Any],
        differentiable: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        if differentiable:
            raise ValueError("differentiable=True is not possible: a step uses no gradients")
        if isinstance(params, nn.Module):
            name = type(self).__name__
            raise TypeError(
                f"params is a {type(params).__name__}, expected its parameters: pass "
                f"`model.parameters()`, or take {name}.for_model(model, ...), which has their names"
            )
        if options["seed"] is None:
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
            options = {**options, "seed": seed}
        make_plain(options)
        self._told: set[str] = set()
        self._captured: list[object] = []
        super().__init__(params, options)
        self._forget_last_step()
        self.model = model
        if options["perturbation"] == "exact":
            self._check_model()

    @classmethod
    def for_model(cls: type[_Optimizer], model: nn.Module, **options: Any) -> _Optimizer:
        """An optimizer of all parameters of a model, with their names, that knows the model."""
        return cls(model.named_parameters(), model=model, **options)

    @property
    def model(self) -> nn.Module | None:
        """The model that the closure evaluates, which ``perturbation="exact"`` needs to know. It is
        not saved, and not kept alive: set it again after unpickling or copying."""
        return None if self._model is None else self._model()

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        self._model = None if model is None else ref(model)

    @property
    def module_buffers(self) -> str:
        """Which evaluations of a step move the buffers of the model's modules, such as BatchNorm's
        running statistics: ``"every"`` one, or the ``"last"`` alone, which needs :attr:`model`
        (docs/adamezo.md). It is not saved: set it again after unpickling or copying."""
        return self._module_buffers

    @module_buffers.setter
    def module_buffers(self, which: str) -> None:
        if which not in MODULE_BUFFERS:
            raise ValueError(f"Invalid module_buffers: {which!r}, expected one of {MODULE_BUFFERS}")
        self._module_buffers = which

    @property
    def scratch_bytes(self) -> int:
        """Bytes of memory for displaced copies of weights, the most that steps have had at a time:
        with ``perturbation="exact"`` those of the module with the largest weights of its own, or of
        several that call each other. It is kept from step to step."""
        return 0 if self._readers is None else self._readers.scratch_bytes

    def _forget_last_step(self) -> None:
        self.losses: tuple[Number, ...] = ()
        self.measured: tuple[Number, ...] = ()
        self.skipped: Number = 0
        self._resident = None
        self._layout = Layout()
        self._readers: Readers | None = None

    # --- what a method defines --------------------------------------------------------------------

    @abstractmethod
    def _probes(self, first: PhiloxState, options: dict[str, Any]) -> list[Probe]:
        """Where a step evaluates the loss. Its directions count up from ``first.counter``."""

    @abstractmethod
    def _measure(self, losses: Sequence[Number], options: dict[str, Any]) -> tuple[Number, ...]:
        """What an update takes from the losses of all probes."""

    @abstractmethod
    def _update(
        self,
        group: dict[str, Any],
        plan: Plan,
        first: PhiloxState,
        measured: tuple[float, ...],
        restore: float,
        backend: str,
    ) -> None:
        """Steps a group and advances its history.

        ``restore`` times the direction of the last probe is to be added to the weights.
        """

    def _along(self, z: PhiloxState, options: dict[str, Any]) -> Direction:
        """What a probe displaces the weights along: z, unless the method's rule bends it."""
        return z

    def _closures(self, closure: Closure, probes: Sequence[Probe]) -> list[Closure]:
        """What is evaluated at each probe."""
        return [closure] * len(probes)

    def _buffers_of(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """What the method's rule keeps for each element of a weight, made here if need be."""
        return ()

    def _resident_group(
        self, group: dict[str, Any], directions: int, device: torch.device
    ) -> ResidentGroup:
        """The same on a device, for ``capturable``, of steps that draw this many directions."""
        raise ValueError(f"{type(self).__name__} cannot do capturable=True")

    # --- the step ---------------------------------------------------------------------------------

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
                or a number, or an output of a model or a dict that has such a ``loss``. It must be
                a function of the weights alone: whatever else changes between the evaluations of a
                step goes into the projected gradient, unseen. So it is on the same batch each
                time, which is drawn before the step. The global generators of torch, Python
                (``random``) and numpy (``numpy.random``) give all evaluations the same numbers;
                generators that were made (``torch.Generator``, ``random.Random``,
                ``numpy.random.default_rng``) do not. :func:`adamezo.check_closure` looks. Without
                a closure nothing happens and None is returned: frameworks call ``step()`` to
                initialize state. Buffers of the weights are made then.

        Returns:
            The mean of the losses, a scalar tensor.
        """
        if closure is None:
            self._step_without_closure()
            return None
        groups = self.param_groups
        for group in groups:
            make_plain(group)  # as users and schedulers have set them
        options = self._shared_options()
        if not options["capturable"]:
            self._leave_device()
        first = PhiloxState(options["seed"], groups[0]["next_direction"])
        probes = self._probes(first, options)
        # Before the plans: in a capture nothing may be made, buffers neither.
        resident = self._on_device(first, probes) if options["capturable"] else None
        plans = self._plans()
        if not self._layout.trains:
            self._tell_of_nothing_to_train()
        backend = self._backend(options, [p for group in groups for p in group["params"]])
        weights = self._displacement(options, plans, backend)
        evaluated: Sequence[tuple[Direction, float]] = (
            self._displaced_along(probes, options) if resident is None else resident.probes(probes)
        )
        closures = self._closures(closure, probes)
        guard = Guard(plans)
        results: list[Tensor | float] = []
        self.measured = ()
        outcome = "failed"
        with HeldSignals() as signals, self._kept_buffers(plans) as buffers:
            try:
                for i, (direction, to) in enumerate(evaluated):
                    weights.displace(direction, to)
                    guard.look()
                    with ExitStack() as stack:
                        if i < len(probes) - 1:  # all see the random numbers that the last leaves
                            stack.enter_context(forked_generators())
                        stack.enter_context(weights.evaluation())
                        with signals.through():
                            result = closures[i]()
                    results.append(checked_loss(result))
                    guard.check()
                    if i < len(probes) - 1:
                        buffers.put_back()
                losses = numbers(results) if resident is None else resident.losses(results)
                self.losses = tuple(losses)
                self.measured = self._measure(losses, options)
                buffers.let_go()
                if resident is not None:
                    outcome = "broken"
                    resident.update(self.losses, self.measured, weights, plans, backend)
                    outcome = "updated"
                    if is_capturing(resident.made.device):
                        # The graph reads and writes their memory for as long as it is replayed,
                        # whatever becomes of them here.
                        self._captured.append((resident, plans, self._readers))
                else:
                    self._use_up(probes)
                    outcome = "skipped"
                    if usable((*self.losses, *self.measured)):
                        self._count_skipped(0)
                        outcome = "broken"
                        self._update_groups(weights, plans, first, backend)
                        outcome = "updated"
            finally:
                try:
                    guard.put_back()
                    weights.restore()
                finally:
                    if weights.broken or guard.written:
                        outcome = "broken"
                    if self.recorder is not None and (outcome != "failed" or weights.displacements):
                        lrs = tuple(float(group["lr"]) for group in groups)
                        made = weights.displacements
                        self.recorder(StepRecord(outcome, first.counter, made, self.measured, lrs))
        if outcome == "skipped":
            self._skip(options["nonfinite"], options["max_skipped"])
        return mean_loss(losses, results)

    def _update_groups(
        self, weights: Displacement, plans: Sequence[Plan], first: PhiloxState, backend: str
    ) -> None:
        for i, (group, plan) in enumerate(zip(self.param_groups, plans, strict=True)):
            self._update(group, plan, first, self.measured, -weights.in_weights(i), backend)
            weights.updated(i)

    def _step_without_closure(self) -> None:
        """What torch's distributed checkpoints expect of it: state that can be loaded into. They
        set lr to 0 and gradients to zeros for that. Others are about to train nothing."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self._buffers_of(p, group)
        if "gradients" not in self._told and any(
            p.grad is not None and float(group["lr"]) != 0
            for group in self.param_groups
            for p in group["params"]
        ):
            self._told.add("gradients")
            name = type(self).__name__
            warnings.warn(
                f"{name}.step() was called without a closure and did nothing, and parameters hold "
                f"gradients: somebody calls backward(), which {name} does not need, and expects "
                "step() to use them. The weights are not trained. Call step(closure), where the "
                "closure runs the model forward and returns the loss; a training loop that calls "
                "step() by itself, such as transformers.Trainer, cannot be used as it is",
                UserWarning,
                stacklevel=self._frames_above_skip,
            )

    def _tell_of_nothing_to_train(self) -> None:
        if "nothing to train" not in self._told:
            self._told.add("nothing to train")
            names = [
                names[i] if names else f"parameter {i} of group {k}"
                for k, group in enumerate(self.param_groups)
                for names in (group.get("param_names"),)
                for i in range(len(group["params"]))
            ]
            what = (
                f"all parameters are frozen or empty ({', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}): set requires_grad "
                "of those that are to be trained"
                if names
                else "there are no parameters: pass those that are to be trained"
            )
            warnings.warn(
                f"{type(self).__name__} evaluates the loss and moves nothing, as {what}",
                UserWarning,
                stacklevel=self._frames_above_skip,
            )

    def _use_up(self, probes: Sequence[Probe]) -> None:
        for group in self.param_groups:
            last = max(direction.counter for direction, _ in probes)
            group["next_direction"] = last + max(RULES[self.rule].directions, 1)

    def _skip(self, nonfinite: str, limit: int) -> None:
        in_a_row = self.param_groups[0]["skipped_in_a_row"] + 1
        self._count_skipped(in_a_row)
        self.skipped += 1
        what = f"the losses of a step were {self.losses}: the weights are restored and the step"
        if nonfinite == "raise":
            raise FloatingPointError(f"{what} left out. nonfinite='skip' would go on")
        if in_a_row >= limit:
            raise FloatingPointError(
                f"{what} skipped, as were the {in_a_row - 1} before it: the run is lost. Go back "
                "to an earlier state with a smaller lr or zo_eps, or set max_skipped"
            )
        if self.skipped == 1:
            warnings.warn(
                f"{what} is skipped. Later ones are only counted, in `skipped`",
                RuntimeWarning,
                stacklevel=self._frames_above_skip,
            )

    def _count_skipped(self, in_a_row: int) -> None:
        for group in self.param_groups:
            group["skipped_in_a_row"] = in_a_row

    # --- the same step again ----------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self, record: StepRecord) -> None:
        """Does to weights and history what a recorded step did, bit for bit and without a closure.

        Weights, history and options have to be those before that step. Afterwards each group's
        ``lr`` is the recorded one.

        Raises:
            ValueError: a record that cannot be of the next step; nothing has happened then.
        """
        self._leave_device()
        groups = self.param_groups
        for group in groups:
            make_plain(group)
        options = self._shared_options()
        first = PhiloxState(options["seed"], groups[0]["next_direction"])
        probes = self._probes(first, options)
        self._check_record(record, len(probes))
        plans = self._plans()
        backend = self._backend(options, [p for group in groups for p in group["params"]])
        weights = InPlace(
            plans, [group["rounding"] for group in groups], options["distribution"], backend
        )
        with HeldSignals():
            try:
                for direction, to in self._displaced_along(probes, options)[: record.displacements]:
                    weights.displace(direction, to)
                if record.outcome != "failed":
                    self.losses, self.measured = (), record.measured
                    self._use_up(probes)
                if record.outcome == "updated":
                    for group, lr in zip(groups, record.lrs, strict=True):
                        set_lr(group, lr)
                    self._count_skipped(0)
                    self._update_groups(weights, plans, first, backend)
                elif record.outcome == "skipped":
                    self.skipped += 1
                    self._count_skipped(groups[0]["skipped_in_a_row"] + 1)
            finally:
                weights.restore()

    def _check_record(self, record: StepRecord, probes: int) -> None:
        next_direction = self.param_groups[0]["next_direction"]
        problem = None
        if record.outcome not in ("updated", "skipped", "failed"):
            problem = f"its outcome is {record.outcome!r}: the weights after it are not known"
        elif record.direction != next_direction:
            problem = f"its direction is {record.direction}, the next one is {next_direction}"
        elif not 0 <= record.displacements <= probes:
            problem = f"it has {record.displacements} displacements, a step has {probes} at most"
        elif len(record.lrs) != len(self.param_groups):
            problem = f"it has {len(record.lrs)} learning rates for {len(self.param_groups)} groups"
        elif not all(0 <= lr < math.inf for lr in record.lrs):
            problem = f"its learning rates are {record.lrs}"
        elif record.outcome == "updated":
            expected = len(self._measure([0.0] * probes, self.param_groups[0]))
            if len(record.measured) != expected:
                problem = f"it has {len(record.measured)} measured values, expected {expected}"
            elif not usable(record.measured):
                problem = f"what it measured is {record.measured}"
        if problem is not None:
            raise ValueError(f"a record cannot be replayed: {problem}")

    # --- what a step works with -------------------------------------------------------------------

    def _shared_options(self) -> dict[str, Any]:
        """The options of the whole step, read anew as a user may have set them in the groups."""
        first = self.param_groups[0]
        for name in (*self.shared_options, *_COUNTED):
            values = [group[name] for group in self.param_groups]
            if any(value != values[0] for value in values):
                raise ValueError(f"{name} must be the same in all parameter groups, got {values}")
        return {name: first[name] for name in self.shared_options}

    def _plans(self) -> list[Plan]:
        return self._layout.plans(self.param_groups, self._buffers_of)

    def _displaced_along(
        self, probes: Sequence[Probe], options: dict[str, Any]
    ) -> list[tuple[Direction, float]]:
        # One object for each direction: a displacement is to see that it is the same.
        along = {z: self._along(z, options) for z, _ in probes}
        return [(along[z], to) for z, to in probes]

    def _backend(self, options: dict[str, Any], params: Sequence[Tensor]) -> str:
        fused, distribution = options["fused"], options["distribution"]
        if fused is False:
            return "reference"
        devices = {p.device for p in params if p.requires_grad}
        name: str = choose(devices, distribution=distribution).NAME
        if fused and name == "reference":
            reasons = "; ".join(f"{b}: {m.availability()[1]}" for b, m in BACKENDS.items())
            raise RuntimeError(
                f"fused=True, but no compiled kernels for {distribution!r} directions run on "
                f"{', '.join(map(str, devices))} here, or ADAMEZO_BACKEND forbids them "
                f"({reasons}). Pass fused=None to take the best there is"
            )
        return name

    def _displacement(
        self, options: dict[str, Any], plans: list[Plan], backend: str
    ) -> Displacement:
        if options["perturbation"] == "exact":
            return Exact(self._current_readers(plans), options["distribution"], backend)
        roundings = [group["rounding"] for group in self.param_groups]
        return InPlace(plans, roundings, options["distribution"], backend)

    def _kept_buffers(self, plans: list[Plan]) -> KeptBuffers:
        """Those of the modules, where they are to be put back."""
        if self._module_buffers == "every":
            return KeptBuffers()
        model = self.model
        if model is None:
            raise ValueError(
                "module_buffers='last' needs the model, whose buffers it puts back: "
                f"{type(self).__name__}.for_model(model, ...) or model=model, and after unpickling "
                "or copying the optimizer `optimizer.model = model`"
            )
        return KeptBuffers(model, plans)

    def _current_readers(self, plans: list[Plan]) -> Readers:
        """Made again when parameters or modules have changed."""
        model = self._check_model()
        if self._readers is None or not self._readers.are_of(model, plans):
            self._readers = Readers(model, plans)
        return self._readers

    def _check_model(self) -> nn.Module:
        """The model. Raises ValueError if there is none, or if it lacks parameters."""
        model = self.model
        if model is None:
            raise ValueError(
                "perturbation='exact' needs the model, as it shows modules other weights than they "
                f"have: {type(self).__name__}.for_model(model, ...) or model=model, and after "
                "unpickling or copying the optimizer `optimizer.model = model`"
            )
        known = {id(p) for p in model.parameters()}
        missing = []
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"parameter {k} of group {i}" for k in range(len(group["params"]))
            ]
            for name, p in zip(names, group["params"], strict=True):
                missing += [] if id(p) in known else [name]
        if missing:
            raise ValueError(
                f"the model has no {', '.join(missing)}: with perturbation='exact' all parameters "
                "of the optimizer must be the model's. Was another model given?"
            )
        return model

    # --- numbers on the device --------------------------------------------------------------------

    def _on_device(self, first: PhiloxState, probes: Sequence[Probe]) -> Resident:
        """The numbers of all steps so far; brought there anew where an option has changed."""
        if self.recorder is not None:
            raise RuntimeError(
                "capturable=True keeps the numbers of a step on the device, where no recorder can "
                "see them: set `recorder` to None, or take capturable=False"
            )
        groups = self.param_groups
        made = Made.of(groups, self.defaults, probes)
        if self._resident is None or not self._resident.fits(made):
            made.check_not_capturing()
            self._read_back()
            first = first._replace(counter=groups[0]["next_direction"])
            in_a_row = groups[0]["skipped_in_a_row"]
            there = [self._resident_group(group, made.directions, made.device) for group in groups]
            self._resident = Resident(made, first, there, self.skipped, in_a_row, self.rule)
            self.skipped = self._resident.skipped
        return self._resident

    def _read_back(self) -> None:
        """Brings the groups up to date, where steps on the device have left them behind."""
        if self._resident is not None:
            self._resident.read_back()

    def _leave_device(self) -> None:
        """The next step begins from what is in the groups."""
        if self._resident is not None:
            self._read_back()
            self.skipped = int(self.skipped)
            self._resident = None

    # --- groups and their options -----------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters. Their history begins now: earlier directions never moved them."""
        self._leave_device()
        if isinstance(param_group, dict):  # torch refuses all else below
            make_plain(param_group)
        shared = self.param_groups[0] if self.param_groups else self.defaults
        options = {
            **self.defaults,
            **{name: shared[name] for name in self.shared_options},
            **param_group,
        }
        self.check_options(options)
        for name in self.shared_options:
            if options[name] != shared[name]:
                raise ValueError(
                    f"{name} is {shared[name]!r} for the whole step, a group cannot set it to "
                    f"{options[name]!r}"
                )
            param_group[name] = shared[name]  # not the default: a loaded state has its own
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.update(self.history)
        group["method"], group["stream_version"] = type(self).__name__, STREAM_VERSION
        group["steps"] = 0
        for name in _COUNTED:
            group[name] = self.param_groups[0].get(name, 0)
        if group["fused"]:
            self._backend(group, group["params"])

    def check_options(self, options: dict[str, Any]) -> None:
        """Raises ValueError for an option of a group, in torch's own words where torch has some."""
        lr = options["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not 0.0 <= float(lr) < math.inf:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0.0 <= options["weight_decay"] < math.inf:
            raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}")
        if not 0.0 < options["zo_eps"] < math.inf:
            raise ValueError(f"Invalid zo_eps value: {options['zo_eps']}")
        for name, choices in (
            ("distribution", DISTRIBUTIONS),
            ("perturbation", PERTURBATIONS),
            ("rounding", ROUNDINGS),
            ("nonfinite", NONFINITE),
        ):
            if options[name] not in choices:
                raise ValueError(f"Invalid {name}: {options[name]!r}, expected one of {choices}")
        limit = options["max_skipped"]
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"Invalid max_skipped: {limit!r}, expected an integer of at least 1")
        seed = options["seed"]
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
            raise ValueError(f"Invalid seed: {seed!r}, expected an integer in [0, 2**64)")
        can_capture = type(self)._resident_group is not ZerothOrder._resident_group
        if options["capturable"] and not can_capture:
            raise ValueError(f"{type(self).__name__} cannot do capturable=True")
        if options["capturable"] and options["nonfinite"] == "raise":
            raise ValueError(
                "nonfinite='raise' with capturable=True: nothing looks at the losses on the "
                "device. Take 'skip' and look at `skipped`, or leave out capturable"
            )

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._read_back()
        for group in self.param_groups:
            make_plain(group)  # weights_only loading and JSON take no others
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._read_back()
        return super().__getstate__()

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's: options come with the state, and parameters keep theirs.

        Raises:
            ValueError: the state is of another method, stream of directions, distribution or
                normalization, which this run cannot go on with; or it is damaged. Nothing has
                changed then.
            RuntimeError: a step of this optimizer was captured in a CUDA graph, which would go on
                from the state that it had.
        """
        if self._captured:
            raise RuntimeError(
                "a CUDA graph has captured a step of this optimizer, and its replays go on from "
                "the numbers on the device, not from a state that is loaded. Make a new optimizer, "
                "load the state into that one, take a step and capture again"
            )
        try:
            super().load_state_dict(state_dict)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"this is not the state of an optimizer: {error!r}") from error

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "param_groups" in self.__dict__:  # loading, and not unpickling
            for i, (saved, group) in enumerate(
                zip(state["param_groups"], self.param_groups, strict=True)
            ):
                self._check_state(saved, group, f"group {i} of the state")
        else:
            self._told, self._captured = set(), []
        super().__setstate__(state)
        self._forget_last_step()

    def _check_state(self, saved: dict[str, Any], group: dict[str, Any], where: str) -> None:
        """Raises ValueError unless the saved group can go on as ``group``."""
        missing = [name for name in group if name not in saved and name not in _NOT_SAVED]
        if missing:
            raise ValueError(
                f"{where} lacks {', '.join(missing)}: it is of another optimizer, or of an earlier "
                "version of this one"
            )
        for name in self.fixed_options:
            if saved[name] != group[name]:
                raise ValueError(
                    f"{where} has {name} {saved[name]!r}, this optimizer has {group[name]!r}: a "
                    f"run keeps its {name} from its first step to its last"
                )
        for name, value in saved.items():
            if isinstance(value, int) and abs(value) >= 2**64:
                raise ValueError(f"{where} is damaged: {name} is beyond 64 bits")
        try:
            self.check_options(saved)
        except TypeError as error:
            raise ValueError(f"{where} is damaged: {error}") from error
        for name, limit in (
            ("steps", 2**63),
            ("next_direction", 2**32),
            ("skipped_in_a_row", 2**63),
        ):
            if type(saved[name]) is not int or not 0 <= saved[name] <= limit:
                raise ValueError(f"{where} is damaged: {name} is {saved[name]!r}")


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Also where the learning rate is a tensor, on a device perhaps, which keeps its place."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
