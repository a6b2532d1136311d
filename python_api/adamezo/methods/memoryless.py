"""Base of methods that keep nothing for each weight and step along the step's own directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adamezo_kernels import PhiloxState, Terms

from ..engine.arithmetic import Number, quotient
from ..engine.device import DeviceCoefficients, DeviceGroup
from .common import Method


class Memoryless(Method):
    """Base of methods whose update is coefficients in front of directions of the step itself.

    A method computes these (:meth:`_coefficients`), in one text for floats and for tensors on
    a device (arithmetic.py). Its history is plain numbers.

    Args:
        params: as for :class:`AdaMeZO`.
        own: the method's own options and their values, ``lr`` and ``zo_eps`` among them.
        common: those of COMMON that are to have another value.
    """

    @staticmethod
    def _coefficients(
        measured: Sequence[Number], history: dict[str, Number], schedule: dict[str, Number],
        group: dict[str, Any],
    ) -> Sequence[Number]:  # fmt: skip
        """The coefficients of the step's directions, in the order of the probes: unless a method
        has others, equal shares of the measured numbers.

        Args:
            measured: as many numbers as the step has directions.
            history: the numbers of :attr:`history`, which are replaced here.
            schedule: the numbers of :meth:`_scheduled` at this step.
            group: its options.
        """
        return [quotient(value, len(measured)) for value in measured]

    def _terms(
        self, group: dict[str, Any], first: PhiloxState, measured: tuple[float, ...]
    ) -> tuple[Terms, dict[str, Any]]:
        """``theta <- theta (1 - lr weight_decay) - lr sum_q coefficients[q] z_q``, in one pass."""
        counters = range(first.counter, group["next_direction"])
        history = {name: group[name] for name in self.history}
        schedule: dict[str, Number] = {**self._scheduled(group["steps"] + 1, group)}
        coefficients = self._coefficients(measured[: len(counters)], history, schedule, group)
        sign = -1 if group["maximize"] else 1
        lr = float(group["lr"])
        terms = Terms.of_counters(
            first.key,
            counters[::-1],  # the direction that is restored along is the last
            [sign * value for value in coefficients[::-1]],
            minus_lr=-lr,
            decay=1 - lr * group["weight_decay"],
        )
        return terms, history

    def _device_group(
        self, group: dict[str, Any], directions: int, device: torch.device
    ) -> DeviceGroup:
        return DeviceCoefficients(
            group,
            Terms(group["seed"], horizon=directions, device=device),
            self._coefficients,
            self.history,
            self._schedule(group),
        )
