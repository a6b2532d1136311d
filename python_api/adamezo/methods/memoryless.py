"""What methods share that step along the directions of one step: their options, and that step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from adamezo_kernels import PhiloxState, Plan, Terms, update_

from ..arithmetic import Number, quotient
from ..optimizer import ZerothOrder
from ..resident import ResidentGroup, ResidentNumbers

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


class Memoryless(ZerothOrder):
    """Base of methods whose update is coefficients in front of directions of the step itself.

    A method says what these are (:meth:`_coefficients`), in one text for floats and for tensors on
    a device (arithmetic.py). Its history is plain numbers.

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
    def _coefficients(
        measured: Sequence[Number], kept: dict[str, Number], group: dict[str, Any]
    ) -> Sequence[Number]:
        """In front of the step's directions, in the order of the probes: a share of each number
        measured, unless a method has something else.

        Args:
            measured: as many numbers as the step has directions.
            kept: the history, whose numbers are to be replaced here, and what is scheduled.
            group: its options.
        """
        return [quotient(value, len(measured)) for value in measured]

    @staticmethod
    def _scheduled(step: int, group: dict[str, Any]) -> dict[str, float]:
        """Numbers that depend on nothing but how often the group has moved: 1 at the first step."""
        return {}

    @staticmethod
    def _settled(group: dict[str, Any]) -> int:
        """A step from which on they are what they are there."""
        return 1

    def _update(
        self,
        group: dict[str, Any],
        plan: Plan,
        first: PhiloxState,
        measured: tuple[float, ...],
        restore: float,
        backend: str,
    ) -> None:
        """``theta <- theta (1 - lr weight_decay) - lr sum_q coefficients[q] z_q``, in one pass."""
        directions = directions_from(first, group["next_direction"] - first.counter)
        kept = {name: group[name] for name in self.history}
        kept |= self._scheduled(group["steps"] + 1, group)
        coefficients = self._coefficients(measured[: len(directions)], kept, group)
        sign = -1 if group["maximize"] else 1
        update_(
            plan,
            directions[::-1],  # what is to be restored is of the last one
            [sign * value for value in coefficients[::-1]],
            None,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            restore=restore,
            distribution=group["distribution"],
            rounding=group["rounding"],
            backend=backend,
        )
        group.update({name: kept[name] for name in self.history})
        group["steps"] += 1

    def _resident_group(
        self, group: dict[str, Any], directions: int, device: torch.device
    ) -> ResidentGroup:
        rows = [self._scheduled(step, group) for step in range(1, self._settled(group) + 1)]
        return ResidentNumbers(
            group,
            Terms(group["seed"], horizon=directions, device=device),
            self._coefficients,
            self.history,
            {name: [row[name] for row in rows] for name in rows[0]},
        )


def directions_from(first: PhiloxState, count: int) -> list[PhiloxState]:
    """``count`` directions, of which ``first`` is the first."""
    return [first._replace(counter=first.counter + q) for q in range(count)]


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises ValueError unless it is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Invalid {name}: {value!r}, expected an integer of at least {least}")
