"""The numbers of a step as tensors on the weights' device: ``capturable=True``.

Losses, measured numbers, the history, its coefficients and the counters are tensors, which kernels
read when they run. So nothing waits for the device, and a step that was captured in a CUDA graph
goes on from where the last one ended when it is replayed. All arithmetic is that of the steps on
the host, in float64 and in the same order (arithmetic.py), and so are the bits.

Steps on the host keep Python's floats all the same: the same tensors on the CPU were measured to
cost 23 to 102 us a step, up to 12 % of one (docs/performance_steps.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamezo_kernels import RULES, PhiloxState, Terms

from .arithmetic import Number, usable
from .closure import LossSum, Result

Groups = Sequence[dict[str, Any]]

LONGEST_SCHEDULE = 2**20
"""The most steps of a schedule, of 8 bytes each on the device."""

Schedule = Mapping[str, Sequence[float]]
"""Numbers that depend on the step alone: their values at a group's steps 1, 2, ...; after the last
they stay."""


class DeviceGroup(ABC):
    """A parameter group on the device: its history, and the terms of its next update.

    Args:
        group: with the history so far. Its lr becomes a tensor, which schedulers write into.
        terms: of its update, on the device.
        schedule: the numbers that depend on the step.
    """

    def __init__(self, group: dict[str, Any], terms: Terms, schedule: Schedule | None = None):
        self.group = group
        self.terms = terms
        self.steps = self.tensor(group["steps"], torch.int64)
        self._schedule = {name: self.tensor(row) for name, row in (schedule or {}).items()}
        lr = group["lr"]
        kind = lr.dtype if isinstance(lr, Tensor) else torch.float64
        group["lr"] = torch.as_tensor(lr, dtype=kind, device=self.steps.device)

    def tensor(self, values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.terms.words.device)

    def scheduled(self) -> dict[str, Number]:
        """The numbers of the schedule at this step."""
        return {
            name: row.gather(0, self.steps.clamp(max=row.numel() - 1)[None])[0]
            for name, row in self._schedule.items()
        }

    @abstractmethod
    def advance(self, measured: Sequence[Tensor], counter: Tensor, finite: Tensor) -> None:
        """Takes the measured numbers of a step into the history and sets the terms of its update.
        Where they are not ``finite`` the history stays, and the update only restores the weights.

        Args:
            measured: float64 scalars.
            counter: int64 scalar, the index of the step's first direction.
            finite: bool scalar.
        """

    def end_of_step(self, finite: Tensor) -> None:
        """The last part of :meth:`advance`: the step size, and the number of steps."""
        lr = self.group["lr"].double().reshape(()).masked_fill(finite.logical_not(), 0)
        self.terms.step[0].copy_(-lr)
        self.terms.step[1].copy_(1 - lr * self.group["weight_decay"])
        self.steps.add_(finite)

    def read_back(self) -> None:
        """Writes the history into the group, as plain numbers and lists. Waits for the device."""
        self.group["steps"] = int(self.steps)


class DeviceSums(DeviceGroup):
    """A group whose update is sums of directions, of which a method gives the coefficients."""

    @abstractmethod
    def sums(
        self, measured: Sequence[Tensor], counter: Tensor, finite: Tensor
    ) -> tuple[Tensor, Sequence[Tensor] | Tensor, Sequence[Tensor] | Tensor | None]:
        """Takes in the measured numbers of a step, with the arguments of :meth:`advance`.

        Returns:
            (counters, first, second): as many of each as ``terms`` has directions, and with the
            meaning that :func:`adamezo_kernels.update_` gives them. The newest direction comes
            first, also where the step is left out: the weights are restored along it.
        """

    def advance(self, measured: Sequence[Tensor], counter: Tensor, finite: Tensor) -> None:
        counters, first, second = self.sums(measured, counter, finite)
        left_out = finite.logical_not()
        sign = -1 if self.group["maximize"] else 1
        self.terms.counters.copy_(counters)
        self.terms.first.copy_((sign * _stacked(first)).masked_fill(left_out, 0))
        if second is not None:
            self.terms.second.copy_(_stacked(second).masked_fill(left_out, 0))
        self.end_of_step(finite)


class DeviceCoefficients(DeviceSums):
    """A group whose history is a few numbers. Its method computes from them as it does on the host.

    Args:
        group, terms, schedule: as above.
        compute: gives the coefficients of the step's directions, in the order of the probes, from
            the measured numbers, the history, whose numbers it replaces, the schedule and the
            group.
        history: names of the numbers in the group.
    """

    def __init__(
        self,
        group: dict[str, Any],
        terms: Terms,
        compute: Callable[
            [Sequence[Number], dict[str, Number], dict[str, Number], dict[str, Any]],
            Sequence[Number],
        ],
        history: Iterable[str],
        schedule: Schedule,
    ) -> None:
        super().__init__(group, terms, schedule)
        self._compute = compute
        self._history = {name: self.tensor(group[name]) for name in history}
        self._newest_first = self.tensor(range(terms.horizon)[::-1], torch.int64)

    def computed(self, measured: Sequence[Tensor], finite: Tensor) -> Sequence[Tensor]:
        """The coefficients. The history is replaced, unless the step is not ``finite``."""
        history = {**self._history}
        coefficients = self._compute(measured, history, self.scheduled(), self.group)
        for name, value in self._history.items():
            torch.where(finite, history[name], value, out=value)
        return coefficients

    def sums(
        self, measured: Sequence[Tensor], counter: Tensor, finite: Tensor
    ) -> tuple[Tensor, Sequence[Tensor], None]:
        return counter + self._newest_first, self.computed(measured, finite)[::-1], None

    def read_back(self) -> None:
        super().read_back()
        for name, value in self._history.items():
            self.group[name] = float(value)


class DeviceRule(DeviceGroup):
    """A group whose update is a rule with buffers. Its method computes the rule's numbers.

    Args:
        group, terms, schedule: as above.
        compute: gives the rule's numbers from p (negated where the group maximizes), the other
            measured numbers, the index of the step's first direction, the schedule and the group.
    """

    def __init__(
        self,
        group: dict[str, Any],
        terms: Terms,
        compute: Callable[
            [Number, Sequence[Number], Number, dict[str, Number], dict[str, Any]], Sequence[Number]
        ],
        schedule: Schedule,
    ) -> None:
        super().__init__(group, terms, schedule)
        self._compute = compute
        self._newer = self.tensor(range(terms.horizon), torch.int64)
        noop = RULES[terms.rule].noop
        if noop is None:
            raise ValueError(f"the rule {terms.rule!r} cannot leave a step out on a device")
        self._noop = noop

    def advance(self, measured: Sequence[Tensor], counter: Tensor, finite: Tensor) -> None:
        sign = -1 if self.group["maximize"] else 1
        p, others = sign * measured[0], measured[1:]
        numbers = self._compute(p, others, counter, self.scheduled(), self.group)
        for i, number in enumerate(numbers):
            if not isinstance(number, Tensor):
                number = torch.full_like(p, number)
            if i in self._noop:
                number = number.masked_fill(finite.logical_not(), self._noop[i])
            self.terms.numbers[i].copy_(number)
        self.terms.counters.copy_(counter + self._newer)
        self.end_of_step(finite)


def _stacked(values: Sequence[Tensor] | Tensor) -> Tensor:
    return values if isinstance(values, Tensor) else torch.stack([*values])


class Setup(NamedTuple):
    """What numbers on a device depend on. When it changes they are brought there anew."""

    device: torch.device
    directions: int
    """How many directions a step draws."""
    options: list[dict[str, Any]]

    @classmethod
    def of(
        cls, groups: Groups, options: Collection[str], probes: Sequence[tuple[PhiloxState, float]]
    ) -> Setup:
        """Raises ValueError unless all weights are on one device."""
        devices = {p.device for group in groups for p in group["params"] if p.requires_grad}
        if len(devices) != 1:
            raise ValueError(
                "capturable=True needs all weights on one device, where the numbers of a step are; "
                f"got {', '.join(sorted(map(str, devices))) or 'none'}"
            )
        counters = {direction.counter for direction, _ in probes}
        return cls(
            devices.pop(),
            len(counters),
            [{k: v for k, v in group.items() if k in options and k != "lr"} for group in groups],
        )

    def check_not_capturing(self) -> None:
        """Host values cannot be copied during graph capture."""
        if is_capturing(self.device):
            raise RuntimeError(
                "the numbers of a step are not on the device yet, or an option was changed: "
                "take one step before capturing"
            )


class DeviceNumbers:
    """The numbers of an optimizer's steps on one device.

    Args:
        setup: what they depend on.
        first: the next step's first direction.
        groups: one for each parameter group.
        skipped: how many steps were left out.
        skipped_in_a_row: how many of them since the last that was not.
        rule: of the updates; its own direction may differ from z.

    Attributes:
        skipped: an int64 tensor.
    """

    def __init__(
        self,
        setup: Setup,
        first: PhiloxState,
        groups: Sequence[DeviceGroup],
        skipped: Any,
        skipped_in_a_row: int,
        rule: str,
    ) -> None:
        def count(value: Any) -> Tensor:
            return torch.tensor(int(value), dtype=torch.int64, device=setup.device)

        self.setup = setup
        self.groups = groups
        self.skipped = count(skipped)
        self._skipped_in_a_row = count(skipped_in_a_row)
        self._next = count(first.counter)
        rule = rule if RULES[rule].has_direction else "moments"
        self._directions = [
            Terms(first.key, rule=rule, device=setup.device) for _ in range(setup.directions)
        ]

    def fit(self, setup: Setup) -> bool:
        """Whether steps may go on with these numbers."""
        lrs = [group.group["lr"] for group in self.groups]
        on_device = all(isinstance(lr, Tensor) and lr.device == setup.device for lr in lrs)
        return self.setup == setup and on_device

    def points(self, probes: Sequence[tuple[PhiloxState, float]]) -> list[tuple[Terms, float]]:
        """The probes, along directions whose indices are read from the device."""
        first = probes[0][0].counter
        for i, terms in enumerate(self._directions):
            terms.counters.copy_(self._next + i)
        return [(self._directions[z.counter - first], scale) for z, scale in probes]

    def losses(self, results: Sequence[Result]) -> list[Tensor]:
        """The losses in float64. Raises TypeError unless they are on the device."""
        device = self.setup.device
        losses = []
        for result in results:
            loss = result.loss if isinstance(result, LossSum) else result
            if not isinstance(loss, Tensor) or loss.device != device:
                got = loss.device if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(
                    f"capturable=True needs the loss as a tensor on {device}, got {got}"
                )
            losses.append(loss.double().reshape(()))
        return losses

    def advance(self, losses: Sequence[Tensor], measured: Sequence[Tensor]) -> None:
        """Brings history, terms and counters up to date, without a look at any number."""
        finite = usable([*losses, *measured])
        for group in self.groups:
            group.advance(measured, self._next, finite)
        left_out = finite.logical_not()
        self.skipped.add_(left_out)
        self._skipped_in_a_row.add_(1).mul_(left_out)
        self._next.add_(self.setup.directions)

    def read_back(self) -> None:
        """Writes everything into the parameter groups. Waits for the device."""
        for group in self.groups:
            group.read_back()
            group.group["next_direction"] = int(self._next)
            group.group["skipped_in_a_row"] = int(self._skipped_in_a_row)


def is_capturing(device: torch.device) -> bool:
    """Whether work on the device's current stream goes into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
