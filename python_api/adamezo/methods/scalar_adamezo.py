"""A control for AdaMeZO: the same truncated momentum, over one number in the place of v."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.arithmetic import Number, square_root, total
from .adamezo import AdaMeZO
from .history import DeviceHistory


class ScalarAdaMeZO(AdaMeZO):
    """AdaMeZO with the mean of v over all weights in the place of v: of no paper, a control.

    As z^2 is 1 on average, that mean is the same sum without the directions. With c1 and c2 of the
    ``normalization`` (:mod:`adamezo.methods.history`)::

        m = c1 sum_k beta1^k p_k z_k        rms^2 = c2 sum_k beta2^k p_k^2
        theta <- theta (1 - lr weight_decay) - lr m / (rms + eps)

    What AdaMeZO does better than this, it owes to a v of each weight's own. Arguments are those of
    :class:`AdaMeZO`.
    """

    def _coefficients(
        self, grads: Sequence[float], group: dict[str, Any]
    ) -> tuple[Sequence[float], Sequence[float] | None]:
        m, v = super()._coefficients(grads, group)
        return _over_rms(m, v, group["eps"]), None

    def _device_group(
        self, group: dict[str, Any], directions: int, device: torch.device
    ) -> DeviceHistory:
        return _OnDevice(group, device, with_second=False)


class _OnDevice(DeviceHistory):
    def sums(
        self, measured: Sequence[Tensor], counter: Tensor, finite: Tensor
    ) -> tuple[Tensor, Sequence[Tensor], None]:
        counters, m, v = super().sums(measured, counter, finite)
        return counters, _over_rms(m, v, self.group["eps"]), None


def _over_rms(m: Iterable[Number], v: Iterable[Number] | None, eps: float) -> list[Number]:
    """``m / (sqrt(sum v) + eps)``, or m where v stands for 1."""
    if v is None:
        return [*m]
    root = square_root(total(v)) + eps
    return [value / root for value in m]
