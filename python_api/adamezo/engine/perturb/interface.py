"""The interface between a step and a way to perturb weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.nn.utils import parametrize

from adamezo_kernels import Direction

PERTURBATIONS = ("inplace", "out_of_place", "regenerated")

_FORMER_NAMES = {"exact": "out_of_place"}  # in options, states and logs of before 0.2


Point = tuple[Direction, float]
"""(z, scale): the loss is evaluated at ``theta + scale z``."""


def perturbation_named(name: Any) -> Any:
    """Today's name of a perturbation; whatever is none of a perturbation stays as it is."""
    return _FORMER_NAMES.get(name, name) if isinstance(name, str) else name


class Perturbation(Protocol):
    """A perturbation of all weights along a direction z, for the length of one step."""

    perturbations: int
    """How many have been written into the weights."""
    broken: bool
    """Whether a write failed half-way, so that the values of the weights are not known."""

    def perturb(self, direction: Direction, scale: float) -> None:
        """Evaluations from now on see ``theta + scale z``."""

    def evaluation(self) -> AbstractContextManager[None]:
        """A context around each evaluation of the closure."""

    def restoring(self, group: int) -> float:
        """The scale, for a group, with which the last direction must be added to the weights to
        restore them. An update does this in the same pass."""

    def restored(self, group: int) -> None:
        """An update has restored the weights of a group."""

    def restore(self) -> None:
        """Restores all weights that no update has restored, whatever has happened."""


def forget_cached_weights() -> None:
    """Clears torch's caches of what was computed from weights, which would be read in their place:
    the casts of torch.autocast, and the parametrizations of parametrize.cached()."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()
