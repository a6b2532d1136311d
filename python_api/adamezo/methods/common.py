"""The options of every method, and checks and formulas that several methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim.optimizer import ParamsT

from adamezo_kernels import PhiloxState

from ..engine.device import LONGEST_SCHEDULE, Schedule
from ..engine.optimizer import ZerothOrder

COMMON: dict[str, Any] = dict(
    weight_decay=0.0,
    distribution="exact",
    perturbation="inplace",
    rounding="stochastic",
    nonfinite="skip",
    max_skipped=20,
    maximize=False,
    fused=None,
    capturable=False,
    seed=None,
    differentiable=False,
    model=None,
)
"""Options of every method, with the meaning and the defaults that :class:`AdaMeZO` has."""


class Method(ZerothOrder):
    """Base of methods that take the options of COMMON by their names.

    Args:
        params: as for :class:`AdaMeZO`.
        own: the method's own options and their values, ``lr`` and ``zo_eps`` among them.
        common: those of COMMON that are to have another value.
    """

    def __init__(self, params: ParamsT, own: dict[str, Any], common: dict[str, Any]) -> None:
        unknown = sorted(common.keys() - COMMON.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(unknown)}, expected some of "
                f"{', '.join([*own, *COMMON])}"
            )
        options: dict[str, Any] = {**own, **COMMON, **common}
        differentiable, model = options.pop("differentiable"), options.pop("model")
        super().__init__(params, options, differentiable, model)

    @staticmethod
    def _scheduled(step: int, group: dict[str, Any]) -> dict[str, float]:
        """The numbers that depend on the group's step alone, which is 1 at the first."""
        return {}

    @staticmethod
    def _settled(group: dict[str, Any]) -> int:
        """A step from which on the schedule is constant."""
        return 1

    def _schedule(self, group: dict[str, Any]) -> Schedule:
        """The schedule as a table, which ``capturable`` needs."""
        rows = [self._scheduled(step, group) for step in range(1, self._settled(group) + 1)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _check_schedule(self, options: dict[str, Any], *names: str) -> None:
        """Raises ValueError if these options make the table too long."""
        if options["capturable"] and (steps := self._settled(options)) > LONGEST_SCHEDULE:
            values = ", ".join(f"{name}={options[name]}" for name in names)
            raise ValueError(
                f"{values} with capturable=True: what depends on the step is read from a table, "
                f"which would have {steps} steps, more than {LONGEST_SCHEDULE}. Take smaller "
                "values, or leave out capturable"
            )


def directions_from(first: PhiloxState, count: int) -> list[PhiloxState]:
    """``count`` directions, of which ``first`` is the first."""
    return [first._replace(counter=first.counter + q) for q in range(count)]


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raises ValueError unless it is at least ``least``."""
    if value < least:
        raise ValueError(f"Invalid {name}: {value!r}, expected an integer of at least {least}")


def check_betas(betas: Sequence[float]) -> None:
    """Raises ValueError, in torch's words, unless they are two in [0, 1)."""
    for i, beta in enumerate(betas):
        check_fraction(f"beta parameter at index {i}", beta)


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless it is finite and float32 does not take it for 0."""
    if not 2.0**-126 <= value < math.inf:
        raise ValueError(f"Invalid {name}: {value}, expected a positive number within float32")


def check_fraction(name: str, value: float, *, closed: bool = False) -> None:
    """Raises ValueError unless it is in [0, 1), or with ``closed`` in [0, 1]."""
    if not 0.0 <= value <= 1.0 or (value == 1.0 and not closed):
        raise ValueError(f"Invalid {name}: {value}")
