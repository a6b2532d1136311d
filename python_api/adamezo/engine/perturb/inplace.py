"""Perturbation in place: the weights themselves are written, and need no further memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from adamezo_kernels import Call, Direction, Plan, Terms, run
from adamezo_kernels.backends import Backend

from .interface import forget_cached_weights
from .overflow import OverflowCheck


class InPlace:
    """Writes perturbed values into the weights. In 16 bits, roundings remain after they are
    restored.

    Whoever uses it holds signals meanwhile (signals.py), so that it is always known how the weights
    are perturbed. A perturbation that might overflow is a ValueError before anything is written
    (overflow.py).

    Args:
        plans: the weights of each parameter group.
        roundings: how the weights of each group are rounded when they are restored. Perturbed ones
            are rounded to nearest.
        distribution, backend: see :func:`adamezo_kernels.perturb_`.
        forget: called when weights have changed, to forget what was computed from them.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        roundings: Sequence[str],
        distribution: str,
        backend: Backend,
        forget: Callable[[], None] = forget_cached_weights,
    ) -> None:
        self.perturbations = 0
        self.broken = False
        self._plans = plans
        self._roundings = roundings
        self._distribution = distribution
        self._backend = backend
        self._forget = forget
        # The direction and the scale of the perturbation that each group has.
        self._now: list[tuple[Direction | None, float]] = [(None, 0.0)] * len(plans)
        self._checks = [OverflowCheck(plan, distribution) for plan in plans]
        self._terms: tuple[Direction, Terms] | None = None
        self._calls: list[Call | None] = [None] * len(plans)

    def perturb(self, direction: Direction, scale: float) -> None:
        for check, (was, at) in zip(self._checks, self._now, strict=True):
            check.check(direction, scale, was, at)
        self._move(direction, scale)
        self.perturbations += 1

    def evaluation(self) -> AbstractContextManager[None]:
        return nullcontext()

    def restoring(self, group: int) -> float:
        return -self._now[group][1]

    def restored(self, group: int) -> None:
        self._now[group] = None, 0.0

    def restore(self) -> None:
        broken = self.broken
        self._move(None, 0.0)
        self.broken = broken

    def _move(self, direction: Direction | None, scale: float) -> None:
        self.broken = True
        for i in range(len(self._plans)):
            self._move_group(i, direction, scale)
        self.broken = False
        self._forget()

    def _move_group(self, i: int, direction: Direction | None, scale: float) -> None:
        was, at = self._now[i]
        if at and scale and was != direction:
            assert was is not None
            assert direction is not None
            difference = Terms.blend(direction, scale, was, -at)
            if difference is not None:  # from one to the next in one pass
                self._add(i, difference, 1.0, "nearest")
                self._now[i] = direction, scale
                return
        if at and (was != direction or not scale):
            self._add(i, was, -at, self._roundings[i])
            self._now[i] = was, at = was, 0.0
        if scale != at:
            self._add(i, direction, scale - at, "nearest")
        self._now[i] = direction, scale

    def _add(self, i: int, direction: Direction | None, scale: float, rounding: str) -> None:
        assert direction is not None, "perturbed weights have a direction"
        terms, call = self._as_terms(direction), self._calls[i]
        if call is None or call.rounding != rounding:
            call = Call("perturb", self._plans[i], terms, self._distribution, rounding, scale)
        else:  # like the last one, but for these
            call = call.vary(terms=terms, scale=scale)
        self._calls[i] = call
        run(call, self._backend)
        self._checks[i].rounded(2 if rounding == "stochastic" else 1)

    def _as_terms(self, direction: Direction) -> Terms:
        """The direction in the form of the kernels, made once: most steps have one direction."""
        if isinstance(direction, Terms):
            return direction
        if self._terms is None or self._terms[0] is not direction:
            self._terms = direction, Terms.of([direction])
        return self._terms[1]
