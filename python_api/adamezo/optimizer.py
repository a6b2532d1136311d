"""What all zeroth-order optimizers here have in common: a step of forward passes that ends well."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adamezo_kernels import DISTRIBUTIONS, ROUNDINGS, PhiloxState, Plan
from adamezo_kernels.backends import BACKENDS, choose
from adamezo_kernels.plan import memory_of

from .perturbation import Displacement, InPlace, interrupts_later

Closure = Callable[[], Tensor | float]

Probe = tuple[PhiloxState, float]
"""(z, scale): the loss is evaluated at ``theta + scale z``."""

# A number whose square float32 cannot hold is as useless as an infinite one.
_HUGE = 1e19

NONFINITE = ("skip", "raise")

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
        losses (tuple[float, ...]): of the last step, in the order of its evaluations.
        measured (tuple[float, ...]): what its update took from them; empty if it failed.
        skipped (int): steps left out because of a non-finite loss, since this object was made or
            a state was loaded into it.
        recorder (Callable[[StepRecord], None] | None): called at the end of every step, and of
            failed ones that have touched the weights.
    """

    shared_options: ClassVar[tuple[str, ...]] = (
        "zo_eps",
        "distribution",
        "fused",
        "seed",
        "nonfinite",
        "max_skipped",
    )
    """Options that the whole step shares: one direction, one set of losses."""

    history: ClassVar[dict[str, Any]] = {}
    """What a group keeps from step to step, besides its number of steps, and how it begins. Plain
    numbers, or lists of them that are replaced and never changed, as a state_dict shares them: that
    survives every way of saving and loading."""

    recorder: Callable[[StepRecord], None] | None = None

    def __init__(
        self, params: ParamsT, options: dict[str, Any], differentiable: bool = False
    ) -> None:
        if differentiable:
            raise ValueError("differentiable=True is not possible: a step uses no gradients")
        if options["seed"] is None:
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
            options = {**options, "seed": seed}
        super().__init__(params, options)
        self._forget_last_step()

    def _forget_last_step(self) -> None:
        self.losses: tuple[float, ...] = ()
        self.measured: tuple[float, ...] = ()
        self.skipped = self._skipped_in_a_row = 0
        self._layout: tuple[Any, list[Plan]] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_last_step()

    # --- what a method defines ------------------------------------------------------------------

    @abstractmethod
    def _probes(self, first: PhiloxState, options: dict[str, Any]) -> list[Probe]:
        """Where a step evaluates the loss. Its directions count up from ``first.counter``."""

    @abstractmethod
    def _measure(self, losses: Sequence[float], options: dict[str, Any]) -> tuple[float, ...]:
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

    def _check_options(self, options: dict[str, Any]) -> None:
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
            ("rounding", ROUNDINGS),
            ("nonfinite", NONFINITE),
        ):
            if options[name] not in choices:
                raise ValueError(f"Invalid {name}: {options[name]!r}, expected one of {choices}")
        limit = options["max_skipped"]
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"Invalid max_skipped: {limit!r}, expected an integer of at least 1")
        seed = options["seed"]
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"Invalid seed: {seed!r}, expected an integer in [0, 2**64)")

    # --- groups -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters. Their history begins now: earlier directions never moved them."""
        shared = self.param_groups[0] if self.param_groups else self.defaults
        options = {
            **self.defaults,
            **{name: shared[name] for name in self.shared_options},
            **param_group,
        }
        self._check_options(options)
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
        group["steps"] = 0
        group["next_direction"] = self.param_groups[0].get("next_direction", 0)
        if group["fused"]:
            self._backend(group, group["params"])

    # --- the step ---------------------------------------------------------------------------------

    @overload  # type: ignore[override]  # torch's closures return floats, ours tensors too
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> Tensor: ...

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:
        """One step.

        Args:
            closure: evaluates the model without gradients on the same batch each time and returns
                the loss as a scalar tensor or a number. Without a closure nothing happens and
                None is returned (frameworks call ``step()`` to initialize state).

        Returns:
            The mean of the losses, a scalar tensor.
        """
        if closure is None:
            return None
        groups = self.param_groups
        options = self._shared_options()
        first = PhiloxState(options["seed"], groups[0]["next_direction"])
        probes = self._probes(first, options)
        plans = self._plans()
        backend = self._backend(options, [p for group in groups for p in group["params"]])
        weights: Displacement = InPlace(
            plans, [group["rounding"] for group in groups], options["distribution"], backend
        )
        results: list[Tensor | float] = []
        self.measured = ()
        outcome = "failed"
        try:
            for i, (direction, to) in enumerate(probes):
                weights.displace(direction, to)
                with ExitStack() as stack:
                    if i < len(probes) - 1:  # all see the random numbers that the last one leaves
                        stack.enter_context(_forked_generators())
                    results.append(_checked_loss(closure()))
            losses = _numbers(results)
            self.losses = tuple(losses)
            self.measured = self._measure(losses, options)
            for group in groups:
                group["next_direction"] = 1 + max(direction.counter for direction, _ in probes)
            outcome = "skipped"
            if all(abs(value) < _HUGE for value in (*losses, *self.measured)):
                self._skipped_in_a_row = 0
                with interrupts_later():
                    outcome = "broken"
                    for i, (group, plan) in enumerate(zip(groups, plans, strict=True)):
                        restore = -weights.in_weights(i)
                        self._update(group, plan, first, self.measured, restore, backend)
                        weights.updated(i)
                    outcome = "updated"
        finally:
            try:
                weights.restore()
            finally:
                if weights.broken:
                    outcome = "broken"
                if self.recorder is not None and (outcome != "failed" or weights.displacements):
                    lrs = tuple(float(group["lr"]) for group in groups)
                    made = weights.displacements
                    self.recorder(StepRecord(outcome, first.counter, made, self.measured, lrs))
        if outcome == "skipped":
            self._skip(options["nonfinite"], options["max_skipped"])
        last = results[-1]
        like = last if isinstance(last, Tensor) and last.is_floating_point() else None
        return torch.tensor(
            sum(losses) / len(losses),
            dtype=None if like is None else like.dtype,
            device=None if like is None else like.device,
        )

    def _skip(self, nonfinite: str, limit: int) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        what = f"the losses of a step were {self.losses}: the weights are restored and the step"
        if nonfinite == "raise":
            raise FloatingPointError(f"{what} left out. nonfinite='skip' would go on")
        if self._skipped_in_a_row >= limit:
            raise FloatingPointError(
                f"{what} skipped, as were the {limit - 1} before it: the run is lost. Go back to "
                "an earlier state with a smaller lr or zo_eps, or set max_skipped"
            )
        if self.skipped == 1:
            warnings.warn(
                f"{what} is skipped. Later ones are only counted, in `skipped`",
                RuntimeWarning,
                stacklevel=5,  # the caller of step, above torch's two wrappers around it
            )

    def _shared_options(self) -> dict[str, Any]:
        """The options of the whole step, read anew as a user may have set them in the groups."""
        first = self.param_groups[0]
        for name in (*self.shared_options, "next_direction"):
            values = [group[name] for group in self.param_groups]
            if any(value != values[0] for value in values):
                raise ValueError(f"{name} must be the same in all parameter groups, got {values}")
        return {name: first[name] for name in self.shared_options}

    def _plans(self) -> list[Plan]:
        """A plan for each group, made again when a parameter has been replaced, moved or frozen."""
        layout = [
            # Frozen ones may be of a kind that has no address, such as sparse.
            [(id(p), p.requires_grad and memory_of(p)) for p in params]
            for params in (group["params"] for group in self.param_groups)
        ]
        if self._layout is None or self._layout[0] != layout:
            self._layout = layout, _make_plans(self.param_groups)
        return self._layout[1]

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


def _make_plans(groups: Iterable[dict[str, Any]]) -> list[Plan]:
    """Trainable parameters of each group. A parameter's index counts all of them, frozen ones too,
    so that freezing one does not change the others' directions."""
    members: list[tuple[list[Tensor], list[int], list[str]]] = []
    seen = set()
    index = 0
    for group in groups:
        tensors, parameters, names = [], [], []
        given = group.get("param_names")
        for i, p in enumerate(group["params"]):
            # Two Parameters over the same memory are one weight, and must move once.
            if p.requires_grad and (p.numel() == 0 or memory_of(p) not in seen):
                seen.add(memory_of(p))
                tensors.append(p)
                parameters.append(index)
                names.append(given[i] if given else f"parameter {index}")
            index += 1
        members.append((tensors, parameters, names))
    plans = [
        Plan(tensors, parameters=parameters, names=names) for tensors, parameters, names in members
    ]
    if len(plans) > 1:  # also across groups no two may share memory
        tensors, parameters, names = (sum(lists, []) for lists in zip(*members, strict=True))
        Plan(tensors, parameters=parameters, names=names)
    return plans


@contextmanager
def _forked_generators() -> Iterator[None]:
    """Inside, torch's generators advance as usual; on leaving they are back where they were."""
    # All devices in use: a trained CPU tensor may feed a frozen model on a GPU, with dropout there.
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
        for kind in ("cuda", "xpu"):
            module = torch.get_device_module(kind)
            if module.is_initialized():
                devices = range(module.device_count())
                stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        yield


def _checked_loss(loss: Any) -> Tensor | float:
    """What a closure returned, if it is one real number."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(
                f"the closure must return one real number, got a tensor of shape "
                f"{tuple(loss.shape)} and dtype {loss.dtype}: reduce it, for example by `mean()`"
            )
        # Of its own memory: a closure may return the same tensor again, with another value.
        return loss.detach().clone()
    if isinstance(loss, (int, float)):
        return float(loss)
    raise TypeError(
        f"the closure must return the loss as a scalar tensor or a number, got "
        f"{type(loss).__name__}" + (": does it lack a `return`?" if loss is None else "")
    )


def _numbers(losses: Sequence[Tensor | float]) -> list[float]:
    """All losses as numbers. Those on a GPU are waited for and copied once, and not one by one."""
    tensors = [loss.double().reshape(()) for loss in losses if isinstance(loss, Tensor)]
    if len(tensors) == len(losses) and len({t.device for t in tensors}) == 1:
        return torch.stack(tensors).tolist()
    return [float(loss) for loss in losses]
