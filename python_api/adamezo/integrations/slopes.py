"""Slopes between the evaluations of a step, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..engine.arithmetic import Number
from ..engine.base import Probe


def references(probes: Sequence[Probe]) -> list[int | None]:
    """For each evaluation the earlier one that its slope is taken from: that on the other side of
    its direction, or else the one at the unperturbed weights. None where there is neither.

    Where a step evaluates a second loss at the same places, each loss has slopes of its own.
    """
    found: list[int | None] = []
    which = losses_of(probes)
    for i, (z, scale) in enumerate(probes):
        others = [k for k in range(i) if which[k] == which[i]] if scale else []
        same = [k for k in others if probes[k][0] == z and probes[k][1]]
        base = [k for k in others if not probes[k][1]]
        both = [*base, *same]
        found.append(both[-1] if both else None)
    return found


def losses_of(probes: Sequence[Probe]) -> list[int]:
    """For each evaluation, the how manieth it is at its place: 0 for the loss of the step."""
    return [list(probes[:i]).count(probe) for i, probe in enumerate(probes)]


def slopes(probes: Sequence[Probe], losses: Sequence[Number]) -> list[float]:
    """The slope of the loss along each direction of a step: its projected gradient.

    Two-sided where a step evaluates both sides, otherwise one-sided.
    """
    by_direction = {}
    which = losses_of(probes)
    for i, k in enumerate(references(probes)):
        if k is not None and which[i] == 0:
            distance = probes[i][1] - probes[k][1]
            by_direction[probes[i][0]] = (float(losses[i]) - float(losses[k])) / distance
    return list(by_direction.values())


def bounded(most: float) -> Callable[[Sequence[Number], Sequence[Probe]], Sequence[Number]]:
    """A ``shaping`` for an optimizer that lets no slope be steeper than ``most``.

    Each loss is brought to within ``most`` times the distance between two evaluations of the loss
    that it is compared with (:func:`references`), which clips a projected gradient to
    [-most, most].
    """

    def shaped(losses: Sequence[Number], probes: Sequence[Probe]) -> Sequence[Number]:
        used: list[Number] = []
        for i, k in enumerate(references(probes)):
            loss = losses[i]
            if k is not None:
                reach = most * abs(probes[i][1] - probes[k][1])
                low, high = used[k] - reach, used[k] + reach
                if isinstance(loss, Tensor):  # with capturable, on a device
                    loss = torch.clamp(loss, torch.as_tensor(low), torch.as_tensor(high))
                else:
                    loss = min(max(loss, low), high)
            used.append(loss)
        return used

    return shaped
