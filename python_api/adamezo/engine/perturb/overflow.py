"""Refusal of perturbations in place that would leave infinities in the weights.

Nothing can be subtracted from an infinity to get a weight back. So a perturbation that might make
one is refused before anything is written. With M the largest number of a type and h half a unit of
its last place there:

- A weight to which less than h is added rounds to a finite number; h is 16 in float16, 2^119 in
  bfloat16 and 2^103 in float32. A step goes from one side to the other, so it adds at most twice
  the perturbation. If that is below h, even weights near M do not move, and the weights are not
  looked at: this is the case of every usual step.
- Else the largest weight is looked up. The stored value is ``theta + scale z`` and the errors of
  the roundings so far, each at most h; the restored one is theta and those errors. Where all that
  stays within M, neither rounding gives an infinity.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from adamezo_kernels import RULES, Direction, Plan, Segment, Terms, kind_of
from adamezo_kernels.staging import blocks_of, capturing

LARGEST_Z = {"exact": 6.56, "fast": 6.56, "rademacher": 1.0, "flipout": 6.56}
"""The largest number that a direction of a distribution can have (docs/directions.md)."""


def largest_z(distribution: str) -> float:
    """The same for a distribution with its rank r: of r products over sqrt(r), each at most the
    square of a normal. The rounding of at most 64 float32 operations is within the last factor."""
    name, rank = kind_of(distribution)
    if name != "lowrank":
        return LARGEST_Z[name]
    return LARGEST_Z["exact"] ** 2 * math.sqrt(rank) * (1 + 2.0**-16)


_FEWEST_ROUNDINGS = 16
"""How many roundings are always allowed for, so that a step with a dozen perturbations is refused
at the first, if at all, and not when it has begun."""

_FLOAT32_ERROR = 2.0**-22  # relative error of a perturbation: its scalars are rounded


class OverflowCheck:
    """The check for the weights of one plan, in one step.

    Args:
        plan: the weights.
        distribution: of the directions.
    """

    def __init__(self, plan: Plan, distribution: str) -> None:
        self._plan = plan
        self._largest_z = largest_z(distribution)
        self._negligible = min(map(_negligible, plan.dtypes), default=math.inf)
        self._roundings = 0
        # The largest weight of each segment before the step, where it was looked up.
        self._largest: dict[int, float] = {}

    def rounded(self, times: int) -> None:
        """Weights have been stored, each with an error of so many half units of the last place."""
        self._roundings += times

    def check(self, direction: Direction, scale: float, was: Direction | None, at: float) -> None:
        """Raises ValueError unless weights that are at ``theta + at was`` can be written at
        ``theta + scale direction`` and be restored."""
        reach = abs(scale) * self._bound(direction)
        if reach < self._negligible:
            return
        for i, segment in enumerate(self._plan):
            if segment.elements and reach >= _negligible(segment.tensor.dtype):
                self._check(i, segment, direction, scale, was, at)

    def _check(
        self, i: int, segment: Segment, direction: Direction, scale: float,
        was: Direction | None, at: float,
    ) -> None:  # fmt: skip
        name, dtype = self._plan.names[i], segment.tensor.dtype
        if capturing(segment.tensor.device):
            raise ValueError(
                f"{name} would be perturbed by up to {abs(scale) * self._bound(direction):.3g}, "
                f"which may overflow {dtype}, and the weights cannot be read in a capture: "
                f"{_OTHERWISE}"
            )
        reach = abs(scale) * self._bound(direction, segment)
        if reach < _negligible(dtype):
            return
        if i not in self._largest:
            now = 0.0 if was is None else abs(at) * self._bound(was, segment)
            self._largest[i] = largest(segment.tensor) + now
        error = _half_a_unit(dtype) + reach * _FLOAT32_ERROR
        # Three more: back to where the weights were, and here.
        roundings = max(self._roundings + 3, _FEWEST_ROUNDINGS)
        most = torch.finfo(dtype).max
        if not self._largest[i] + reach + roundings * error <= most:  # also where one is NaN
            raise ValueError(
                f"{name} has numbers of up to {self._largest[i]:.6g} and would be perturbed by up "
                f"to {reach:.3g}, too near to the end of {dtype} at {most:.6g}: what overflows "
                f"cannot be restored. {_OTHERWISE}"
            )

    def _bound(self, direction: Direction, segment: Segment | None = None) -> float:
        """A bound on the elements of a direction; a better one with a segment, whose buffers are
        read then."""
        bound = RULES[direction.rule].bound if isinstance(direction, Terms) else None
        if not isinstance(direction, Terms) or bound is None:
            return self._largest_z
        buffers = None if segment is None else [_Extremes(buffer) for buffer in segment.buffers]
        return bound(self._largest_z, buffers, direction.numbers)


_OTHERWISE = "Take a smaller zo_eps, or perturbation='out_of_place', which never writes weights"


def _half_a_unit(dtype: torch.dtype) -> float:
    """Half a unit of the last place at the largest number of a type."""
    info = torch.finfo(dtype)
    return math.ldexp(info.eps, math.frexp(info.max)[1] - 2)


@functools.cache
def _negligible(dtype: torch.dtype) -> float:
    """A bound below which a perturbation overflows nothing. What float32 loses beside a number of
    bfloat16's size is far less than bfloat16 would lose, and is not rounded up at random either."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    # Less, for the error of a float32 that is rounded again.
    return _half_a_unit(wide) / 2 * (1 - 2.0**-10)


def largest(tensor: Tensor) -> float:
    """The largest magnitude of the finite elements. An infinite one stays so and is not at risk."""
    found = []
    for block in blocks_of(tensor.detach()):
        magnitudes = block.float().abs()
        found.append(magnitudes.masked_fill_(~magnitudes.isfinite(), 0).amax())
    return float(torch.stack(found).amax())


def least_of(tensor: Tensor) -> float:
    """The least element; NaN if there is one."""
    return float(torch.stack([b.float().amin() for b in blocks_of(tensor.detach())]).amin())


class _Extremes:
    """The extremes of a buffer, for the bound of a rule."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer

    def least(self) -> float:
        return least_of(self._buffer)

    def largest(self) -> float:
        return largest(self._buffer)
