"""What methods share that keep nothing for each weight and step along the step's own directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adamezo_kernels import PhiloxState, Plan, Terms, update_

from ..arithmetic import Number, quotient
from ..resident import ResidentGroup, ResidentNumbers
from .common import Method, directions_from


class Memoryless(Method):
    """Base of methods whose update is coefficients in front of directions of the step itself.

    A method says what these are (:meth:`_coefficients`), in one text for floats and for tensors on
    a device (arithmetic.py). Its history is plain numbers.

    Args:
        params: as for :class:`AdaMeZO`.
        own: the method's own options and their values, ``lr`` and ``zo_eps`` among them.
        common: those of COMMON that are to have another value.
    """

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
        return ResidentNumbers(
            group,
            Terms(group["seed"], horizon=directions, device=device),
            self._coefficients,
            self.history,
            self._schedule(group),
        )
