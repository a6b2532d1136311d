"""A step whose numbers never leave the device: ``capturable=True``.

Losses, what is measured from them, the history, its coefficients and the counters are tensors, and
kernels read them when they run. So nothing waits for the device, and a step that was captured in a
CUDA graph goes on from where the last one ended when it is replayed. All arithmetic is that of the
steps on the host, in float64 and in the same order, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from adamezo_kernels import PhiloxState, Terms


class ResidentHistory(Protocol):
    """A group's history on the device, as a method defines it."""

    terms: Terms
    """Of the group's update."""

    def advance(self, measured: Sequence[Tensor], counter: Tensor, finite: Tensor) -> None:
        """Takes in what a step measured, unless that is not ``finite``; sets ``terms``.

        Without it the terms are such that an update restores the weights and moves them nowhere.

        Args:
            measured: float64 scalars.
            counter: int64 scalar, the step's first direction.
            finite: bool scalar.
        """

    def read_back(self, group: dict[str, Any]) -> None:
        """Writes the history into the group, as plain numbers and lists. Waits for the device."""


class Resident:
    """The numbers of an optimizer's steps on one device.

    Args:
        key: the run's seed.
        next_direction: index of the next step's first direction.
        directions: how many a step draws.
        histories: one for each parameter group.
    """

    def __init__(
        self,
        key: int,
        next_direction: int,
        directions: int,
        histories: Sequence[ResidentHistory],
        device: torch.device,
    ) -> None:
        self.histories = histories
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._next = torch.tensor(next_direction, dtype=torch.int64, device=device)
        self._directions = [Terms(key, device=device) for _ in range(directions)]

    def probes(self, probes: Sequence[tuple[PhiloxState, float]]) -> list[tuple[Terms, float]]:
        """The same, along directions whose indices are read from the device."""
        first = probes[0][0].counter
        for i, terms in enumerate(self._directions):
            terms.counters.copy_(self._next + i)
        return [(self._directions[direction.counter - first], to) for direction, to in probes]

    def advance(self, measured: Sequence[Tensor], finite: Tensor) -> None:
        for history in self.histories:
            history.advance(measured, self._next, finite)
        self.skipped.add_(finite.logical_not())
        self._next.add_(len(self._directions))

    def read_back(self, groups: Sequence[dict[str, Any]]) -> None:
        """Writes everything into the groups. Waits for the device."""
        for group, history in zip(groups, self.histories, strict=True):
            history.read_back(group)
            group["next_direction"] = int(self._next)
