"""Displacements that nothing could take back: they would leave infinities in the weights.

An infinity takes no part in any further arithmetic. So what might make one is refused before
anything is written. With M the largest number of a type and h half a unit of its last place there:

- A weight, to which less than h is added, rounds to a finite number; h is 16 in float16, 2^119 in
  bfloat16 and 2^103 in float32. Displacements of a step are from one side to the other, so each is
  at most two reaches. With a reach below h / 2 weights near M do not even move, and nobody looks at
  any: the case of every usual step.
- Else the largest weight is looked up. What is stored is ``theta + to z`` and the errors of the
  roundings so far, each at most h; what is restored is theta and those errors. Where all that stays
  within M, neither rounding makes an infinity of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamezo_kernels import Direction, Plan, Segment, Terms
from adamezo_kernels.staging import blocks_of, capturing

LARGEST_Z = {"exact": 6.56, "fast": 6.56, "rademacher": 1.0}
"""Of all numbers that a direction of a distribution can have (docs/directions.md)."""

LEAST_CURVATURE = 1e-4 * (1 - 2.0**-7)
"""That HiZOO's rule keeps (csrc/adamezo/buffered.h), as bfloat16 may round it."""

_FEWEST_ROUNDINGS = 16
"""For which there has to be room: so a step with a dozen displacements is refused at its first, if
at all, and not when it has begun."""

_FLOAT32_ERROR = 2.0**-22  # of a displacement: the roundings of its scalars, and of a blend


class Room:
    """Of the weights of one plan, in one step.

    Args:
        plan: the weights.
        distribution: of the directions.
    """

    def __init__(self, plan: Plan, distribution: str) -> None:
        self._plan = plan
        self._largest_z = LARGEST_Z[distribution]
        self._dtypes = [(dtype, _negligible(dtype)) for dtype in plan.dtypes]
        self._roundings = 0
        # The largest weight of each segment before the step, where it was looked up.
        self._largest: dict[int, float] = {}

    def rounded(self, times: int) -> None:
        """Weights have been stored, with errors of so many half units of the last place."""
        self._roundings += times

    def check(self, direction: Direction, to: float, was: Direction | None, at: float) -> None:
        """Raises ValueError unless weights, now at ``at was``, can be at ``to direction`` and come
        back."""
        reach = abs(to) * self._bound(direction)
        dtypes = {dtype for dtype, negligible in self._dtypes if reach >= negligible}
        if not dtypes:
            return
        for i, segment in enumerate(self._plan):
            if segment.elements and segment.tensor.dtype in dtypes:
                self._check(i, segment, direction, to, was, at)

    def _check(
        self, i: int, segment: Segment, direction: Direction, to: float,
        was: Direction | None, at: float,
    ) -> None:  # fmt: skip
        name, dtype = self._plan.names[i], segment.tensor.dtype
        if capturing(segment.tensor.device):
            raise ValueError(
                f"{name} would be displaced by up to {abs(to) * self._bound(direction):.3g}, which "
                f"may overflow {dtype}, and in a capture nobody can look at the weights: "
                f"{_OTHERWISE}"
            )
        reach = abs(to) * self._bound(direction, segment)
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
                f"{name} has numbers of up to {self._largest[i]:.6g} and would be displaced by up "
                f"to {reach:.3g}, too near to the end of {dtype} at {most:.6g}: what overflows "
                f"cannot be put back. {_OTHERWISE}"
            )

    def _bound(self, direction: Direction, segment: Segment | None = None) -> float:
        """On what weights are displaced along; better with a segment, whose buffers are looked up
        then."""
        z = self._largest_z
        if not isinstance(direction, Terms):
            return z
        rule = direction.rule
        if rule == "hizoo":
            least = LEAST_CURVATURE if segment is None else least_of(segment.buffers[0])
            return z / math.sqrt(least) if least > 0 else math.inf if least <= 0 else math.nan
        if rule == "adamu":
            fresh, moving, beta, rest = direction.numbers[:4].tolist()
            if segment is not None:
                kept = largest(segment.buffers[0])
            else:
                # m <- beta1 z' + (1 - beta1) z'', and beta1 has never been less than it is: |m| is
                # at most |z| + (1 - beta1) |m|, rounded to bfloat16.
                grows = 1 + 2.0**-7
                kept = grows * z / (1 - grows * rest) if grows * rest < 1 else math.inf
            return beta * fresh * z + rest * (kept + moving * z)
        if rule == "blend":
            return z * sum(map(abs, direction.numbers[:2].tolist()))
        return z


_OTHERWISE = "Take a smaller zo_eps, or perturbation='exact', which never writes what it displaces"


def _half_a_unit(dtype: torch.dtype) -> float:
    """Of the last place, at the largest number of a type."""
    info = torch.finfo(dtype)
    return math.ldexp(info.eps, math.frexp(info.max)[1] - 2)


def _negligible(dtype: torch.dtype) -> float:
    """A reach below this overflows nothing. What float32 does not see beside a number of bfloat16's
    size is far less than bfloat16 would round away, and is not rounded up at random either."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    # Less, for the error of a float32 that is rounded again.
    return _half_a_unit(wide) / 2 * (1 - 2.0**-10)


def largest(tensor: Tensor) -> float:
    """Of the finite elements, in magnitude. What is infinite stays so, and is not at risk."""
    found = []
    for block in blocks_of(tensor.detach()):
        magnitudes = block.float().abs()
        found.append(magnitudes.masked_fill_(~magnitudes.isfinite(), 0).amax())
    return float(torch.stack(found).amax())


def least_of(tensor: Tensor) -> float:
    """The least element; NaN if there is one."""
    return float(torch.stack([b.float().amin() for b in blocks_of(tensor.detach())]).amin())
