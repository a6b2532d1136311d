"""How a step's evaluations come to see displaced weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch.nn.utils import parametrize

from adamezo_kernels import Direction, Plan, Terms, perturb_

from .overflow import Room

PERTURBATIONS = ("inplace", "exact")


class Displacement(Protocol):
    """Of all weights along a direction z, for the length of one step."""

    displacements: int
    """How many the weights went through. None where they themselves are never written."""
    broken: bool
    """Whether one of them failed half-way."""

    def displace(self, direction: Direction, to: float) -> None:
        """Evaluations from now on see ``theta + to z``."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Around each evaluation of the closure."""

    def in_weights(self, group: int) -> float:
        """What is to be taken back from the weights of a group, in units of the last z."""

    def updated(self, group: int) -> None:
        """An update has taken it back."""

    def restore(self) -> None:
        """Takes back what is left, whatever has happened. Evaluations then see theta."""


class InPlace:
    """The weights themselves are displaced: no memory, and in 16 bits not without a trace.

    Whoever uses it holds signals meanwhile (signals.py): what is displaced is then always known. A
    displacement that might overflow is a ValueError, before anything is written (overflow.py).

    Args:
        plans: the weights of each parameter group.
        roundings: for each group, how weights that are put back are rounded. Displaced ones are
            rounded to nearest.
        distribution, backend: see :func:`adamezo_kernels.perturb_`.
    """

    def __init__(
        self, plans: Sequence[Plan], roundings: Sequence[str], distribution: str, backend: str
    ) -> None:
        self.displacements = 0
        self.broken = False
        self._plans = plans
        self._roundings = roundings
        self._distribution = distribution
        self._backend = backend
        # Along what and how far, for each group.
        self._at: list[tuple[Direction | None, float]] = [(None, 0.0)] * len(plans)
        self._rooms = [Room(plan, distribution) for plan in plans]

    def displace(self, direction: Direction, to: float) -> None:
        for room, (was, at) in zip(self._rooms, self._at, strict=True):
            room.check(direction, to, was, at)
        self._move(direction, to)
        self.displacements += 1

    def evaluation(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _move(self, direction: Direction | None, to: float) -> None:
        self.broken = True
        for i in range(len(self._plans)):
            self._move_group(i, direction, to)
        self.broken = False
        forget_casts()

    def _move_group(self, i: int, direction: Direction | None, to: float) -> None:
        was, at = self._at[i]
        if at and to and was != direction:
            assert was is not None
            assert direction is not None
            over = Terms.blend(direction, to, was, -at)
            if over is not None:  # from one to the next in one pass
                self._perturb(i, over, 1.0, "nearest")
                self._at[i] = direction, to
                return
        if at and (was != direction or not to):
            self._perturb(i, was, -at, self._roundings[i])
            self._at[i] = was, at = was, 0.0
        if to != at:
            self._perturb(i, direction, to - at, "nearest")
        self._at[i] = direction, to

    def _perturb(self, i: int, along: Direction | None, scale: float, rounding: str) -> None:
        assert along is not None, "there is a direction where weights are displaced"
        perturb_(
            self._plans[i],
            along,
            scale,
            distribution=self._distribution,
            rounding=rounding,
            backend=self._backend,
        )
        self._rooms[i].rounded(2 if rounding == "stochastic" else 1)

    def in_weights(self, group: int) -> float:
        return self._at[group][1]

    def updated(self, group: int) -> None:
        self._at[group] = None, 0.0

    def restore(self) -> None:
        half_way = self.broken
        self._move(None, 0.0)
        self.broken = half_way


def forget_casts() -> None:
    """What torch keeps of weights as they were would else be read in place of the weights: inside
    torch.autocast their casts, inside parametrize.cached() what is made from them."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()
