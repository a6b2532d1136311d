"""Base class of the optimizers without the step: options, saved state, model and backend."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from adamezo_kernels import RULES, STREAM_VERSION, PhiloxState, Plan
from adamezo_kernels.backends import BACKENDS, Backend, choose

from .arithmetic import Number
from .device import DeviceGroup, DeviceNumbers, Setup
from .known_model import check_has_all, known_model
from .module_buffers import MODULE_BUFFERS
from .options import check, check_kinds, make_plain, rename_values, shared, usual_lr
from .perturb import Corrected, Readers, Saved
from .perturb.interface import forget_cached_weights
from .ranks import Ranks
from .records import StepRecord
from .sharded import forgetting, reshard
from .state import COUNTERS, check_saved_group
from .weights import Weights

_Base = TypeVar("_Base", bound="OptimizerBase")

Probe = tuple[PhiloxState, float]
"""(z, scale): the loss is evaluated at ``theta + scale z``."""


class OptimizerBase(torch.optim.Optimizer):
    """What an optimizer has besides its step: see :class:`ZerothOrder`."""

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
    """What a group keeps from step to step besides its number of steps, with its first value. Plain
    numbers, or lists of them that are replaced and never changed, as a state_dict shares them: that
    survives every way of saving and loading."""

    rule: ClassVar[str] = "moments"
    """The rule of an update, which also says what is kept for each weight: one of RULES."""

    recorder: Callable[[StepRecord], None] | None = None
    ranks: Ranks | None = None

    shaping: Callable[[Sequence[Number], Sequence[Probe]], Sequence[Number]] | None = None

    _device: DeviceNumbers | None = None
    _weights: Weights | None = None
    _readers: Readers | None = None
    _corrected: Corrected | None = None
    _saved: Saved | None = None
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
        self._warned: set[str] = set()
        self._captured: list[object] = []
        super().__init__(params, options)
        self._forget_last_step()
        self.model = model
        if options["perturbation"] != "inplace":
            self._checked_model(f"perturbation={options['perturbation']!r}")
        if options["perturbation"] == "regenerated" and RULES[self.rule].has_direction:
            raise ValueError(
                f"perturbation='regenerated' with {type(self).__name__}, whose perturbation "
                "depends on its buffers: take 'out_of_place'"
            )

    @classmethod
    def for_model(cls: type[_Base], model: nn.Module, **options: Any) -> _Base:
        """An optimizer of all parameters of a model, with their names, that knows the model."""
        reshard(model)  # fully_shard may be showing parameters that are gathered, and will go
        return cls(model.named_parameters(), model=model, **options)

    @property
    def model(self) -> nn.Module | None:
        """The model that the closure evaluates, which all perturbations but ``"inplace"`` need
        to know. It is not saved, and not kept alive: set it again after unpickling or copying."""
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
        """Bytes of memory for perturbed copies of weights, the most that steps have had at a time:
        with ``perturbation="out_of_place"`` those of the module with the largest weights of its
        own, or of several that call each other; with ``"regenerated"`` the factors of the
        directions or pieces of weights, and the copies of vectors; of DTensors a copy of this
        rank's pieces. It is kept from step to step."""
        kept = (self._readers, self._corrected, self._saved)
        return sum(each.scratch_bytes for each in kept if each is not None)

    def plans(self) -> list[Plan]:
        """The tensors that a step trains, as checked tables: one for each parameter group."""
        return self._current_weights().plans

    def owners(self) -> list[list[Tensor]]:
        """For each plan the parameters whose elements, or whose pieces here, its tensors are."""
        return self._current_weights().owners

    def _buffers_of(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """What the method's rule keeps for each element of a weight, made here if need be."""
        return ()

    def _device_group(
        self, group: dict[str, Any], directions: int, device: torch.device
    ) -> DeviceGroup:
        """The same on a device, for ``capturable``, of steps that draw this many directions."""
        raise ValueError(f"{type(self).__name__} cannot do capturable=True")

    def _current_weights(self) -> Weights:
        """Made again when a parameter or a buffer has been replaced, moved or frozen."""
        groups, buffers_of = self.param_groups, self._buffers_of
        if self._weights is None or not self._weights.are_of(groups, buffers_of):
            if self._weights is not None:
                self._weights.check_shapes(groups)
            self._weights = Weights(groups, buffers_of)
        return self._weights

    def _forget_last_step(self) -> None:
        self.losses: tuple[Number, ...] = ()
        self.measured: tuple[Number, ...] = ()
        self.skipped: Number = 0
        self._device = self._weights = self._readers = self._corrected = self._saved = None
        self._checked: dict[int, list[Any]] = {}

    def _check_groups(self) -> None:
        """Checks the options that somebody has set in a group since they were checked: before a
        step, as one that fails in it could fail again when weights are restored."""
        names = [name for name in self.defaults if name != "lr"]
        for i, group in enumerate(self.param_groups):
            make_plain(group)
            now = [group.get(name) for name in names]
            if now != self._checked.get(i) or not usual_lr(group["lr"]):
                self.check_options(group)
                self._checked[i] = now

    def _shared_options(self) -> dict[str, Any]:
        """The options that the whole step shares, as they are now in the groups."""
        return shared(self.param_groups, self.shared_options, COUNTERS)

    def _backend(self, options: dict[str, Any], devices: Collection[torch.device]) -> Backend:
        """The backend for a step on weights on these devices."""
        fused, distribution = options["fused"], options["distribution"]
        if fused is False:
            return BACKENDS["reference"]
        backend = choose(devices, distribution=distribution)
        if fused and backend.NAME == "reference":
            reasons = "; ".join(f"{b}: {m.availability()[1]}" for b, m in BACKENDS.items())
            raise RuntimeError(
                f"fused=True, but no compiled kernels for {distribution!r} directions run on "
                f"{', '.join(map(str, devices))} here, or ADAMEZO_BACKEND forbids them "
                f"({reasons}). Pass fused=None to take the best there is"
            )
        return backend

    def _checked_model(self, needed_by: str) -> nn.Module:
        """The model. Raises ValueError if there is none, or if it lacks parameters."""
        model = known_model(self.model, type(self), needed_by)
        check_has_all(model, self.param_groups, needed_by)
        return model

    def _forgetting(self, weights: Weights) -> Callable[[], None]:
        """What forgets all that was computed or gathered from weights, once they have changed."""
        if not weights.sharded:
            return forget_cached_weights
        needed_by = "a model in pieces (DTensors)"
        forget = forgetting(known_model(self.model, type(self), needed_by))
        forget()
        self._checked_model(needed_by)
        return forget

    def _on_device(self, first: PhiloxState, probes: Sequence[Probe]) -> DeviceNumbers:
        """The numbers of all steps so far; brought to the device anew where an option has
        changed."""
        if self.recorder is not None:
            raise RuntimeError(
                "capturable=True keeps the numbers of a step on the device, where no recorder can "
                "see them: set `recorder` to None, or take capturable=False"
            )
        groups = self.param_groups
        setup = Setup.of(groups, self.defaults, probes)
        if self._device is None or not self._device.fit(setup):
            setup.check_not_capturing()
            self._read_back()
            first = first._replace(counter=groups[0]["next_direction"])
            in_a_row = groups[0]["skipped_in_a_row"]
            there = [self._device_group(group, setup.directions, setup.device) for group in groups]
            self._device = DeviceNumbers(setup, first, there, self.skipped, in_a_row, self.rule)
            self.skipped = self._device.skipped
        return self._device

    def _read_back(self) -> None:
        """Brings the groups up to date, where steps on the device have left them behind."""
        if self._device is not None:
            self._device.read_back()

    def _leave_device(self) -> None:
        """The next step begins from the numbers in the groups."""
        if self._device is not None:
            self._read_back()
            self.skipped = int(self.skipped)
            self._device = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters. Their history begins now: earlier directions never moved them."""
        self._leave_device()
        if isinstance(param_group, dict):  # torch refuses all else below
            make_plain(param_group)
        first = self.param_groups[0] if self.param_groups else self.defaults
        options = {
            **self.defaults,
            **{name: first[name] for name in self.shared_options},
            **param_group,
        }
        self.check_options(options)
        for name in self.shared_options:
            if options[name] != first[name]:
                raise ValueError(
                    f"{name} is {first[name]!r} for the whole step, a group cannot set it to "
                    f"{options[name]!r}"
                )
            param_group[name] = first[name]  # not the default: a loaded state has its own
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.update(self.history)
        group["method"], group["stream_version"] = type(self).__name__, STREAM_VERSION
        group["steps"] = 0
        for name in COUNTERS:
            group[name] = self.param_groups[0].get(name, 0)
        if group["fused"]:
            self._backend(group, {p.device for p in group["params"] if p.requires_grad})

    def check_options(self, options: dict[str, Any]) -> None:
        """Raises ValueError for an option of a group, in torch's own words where torch has some."""
        check_kinds(options, type(self))
        check(options)
        can_capture = type(self)._device_group is not OptimizerBase._device_group
        if options["capturable"] and not can_capture:
            raise ValueError(f"{type(self).__name__} cannot do capturable=True")

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
            pairs = zip(state["param_groups"], self.param_groups, strict=True)
            for i, (saved, group) in enumerate(pairs):
                self._check_state(saved, group, f"group {i} of the state")
        else:
            self._warned, self._captured = set(), []
        super().__setstate__(state)
        for group in self.param_groups:
            rename_values(group)
        self._forget_last_step()

    def _check_state(self, saved: dict[str, Any], group: dict[str, Any], where: str) -> None:
        """Raises ValueError unless the saved group can go on as ``group``."""
        check_saved_group(saved, group, where, self.fixed_options, self.check_options)
