"""How a step's two evaluations come to see displaced weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch.nn.utils import parametrize

from adamezo_kernels import Direction, Plan, perturb_

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

    Whoever uses it holds signals meanwhile (signals.py): what is displaced is then always known.

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
        self._direction: Direction | None = None
        self._displaced = [0.0] * len(plans)

    def displace(self, direction: Direction, to: float) -> None:
        if direction != self._direction:
            self.restore()
            self._direction = direction
        self._move(to)
        self.displacements += 1

    def evaluation(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _move(self, to: float) -> None:
        self.broken = True
        for i, plan in enumerate(self._plans):
            if self._displaced[i] != to and self._direction is not None:
                perturb_(
                    plan,
                    self._direction,
                    to - self._displaced[i],
                    distribution=self._distribution,
                    rounding="nearest" if to else self._roundings[i],
                    backend=self._backend,
                )
                self._displaced[i] = to
        self.broken = False
        forget_casts()

    def in_weights(self, group: int) -> float:
        return self._displaced[group]

    def updated(self, group: int) -> None:
        self._displaced[group] = 0.0

    def restore(self) -> None:
        half_way = self.broken
        self._move(0.0)
        self.broken = half_way


def forget_casts() -> None:
    """What torch keeps of weights as they were would else be read in place of the weights: inside
    torch.autocast their casts, inside parametrize.cached() what is made from them."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()
