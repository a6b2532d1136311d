"""What an update makes of the rewards of a step: a ``shaping`` of an optimizer.

All evaluations of a step are shaped together, on both sides of all its directions, so that the
scale of the reward does not matter to the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor


def z_scores(rewards: Sequence[Any], probes: object = None) -> list[float]:
    """(r - mean) / standard deviation, as in arXiv 2509.24372; zeros where all are equal."""
    values = _plain(rewards)
    spread = pstdev(values) if _finite(values) else 0.0
    mean = fmean(values)
    return [(value - mean) / spread if spread else 0.0 for value in values]


def ranks(rewards: Sequence[Any], probes: object = None) -> list[float]:
    """Ranks from -1/2 (the lowest) to 1/2, as in arXiv 1703.03864; equal rewards share theirs."""
    values = _plain(rewards)
    if len(values) < 2:
        return [0.0] * len(values)
    ordered = sorted(values)
    first = {value: i for i, value in reversed(list(enumerate(ordered)))}
    place = [first[value] + (ordered.count(value) - 1) / 2 for value in values]
    return [x / (len(values) - 1) - 0.5 for x in place]


SHAPINGS: dict[str, Callable[..., list[float]] | None] = {
    "none": None,
    "z-score": z_scores,
    "rank": ranks,
}


def _plain(rewards: Sequence[Any]) -> list[float]:
    if any(isinstance(reward, Tensor) for reward in rewards):
        raise TypeError(
            "with capturable=True rewards stay on the device, where they cannot be shaped: leave "
            "out capturable"
        )
    return [float(reward) for reward in rewards]


def _finite(values: Sequence[float]) -> bool:
    return all(abs(value) < float("inf") for value in values)
