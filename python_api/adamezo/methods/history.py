"""The coefficients of the directions of a history, on the host and on a device.

With p_k the projected gradient and z_k the direction of age k (0 = newest), K of them::

    S1 = sum_k beta1^k p_k z_k        S2 = sum_k beta2^k p_k^2 z_k^2
    theta <- theta - lr m / (sqrt(v) + eps)

and the three normalizations differ in what m and v are (AdaMeZO, arXiv 2605.00650)::

    "paper"             m = (1 - beta1) S1         v = (1 - beta2) S2
    "bias_corrected"    m = S1 / sum_k beta1^k     v = S2 / sum_k beta2^k
    "official"          m = 100 S1                 v = S2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adamezo_kernels import Terms

from ..engine.device import DeviceSums

NORMALIZATIONS = ("paper", "bias_corrected", "official")


def coefficients(
    projected_grads: Sequence[float], betas: tuple[float, float], normalization: str
) -> tuple[list[float], list[float] | None]:
    """(first, second) with ``m = sum_k first[k] z_k`` and ``v = sum_k second[k] z_k^2``.

    Args:
        projected_grads: p_k, the newest first; at least one.
        betas: (beta1, beta2), each in [0, 1). ``beta2 = 0`` stands for v = 1: ``second`` is None.
        normalization: one of NORMALIZATIONS.

    Returns:
        As many coefficients as directions have any weight: with beta1 = beta2 = 0 just one.
    """
    beta1, beta2 = betas
    count = len(projected_grads) if beta1 or beta2 else 1
    scale1, scale2 = _scales(count, betas, normalization)
    first = [scale1 * beta1**age * p for age, p in enumerate(projected_grads[:count])]
    if beta2 == 0:
        return first, None
    return first, [scale2 * beta2**age * p * p for age, p in enumerate(projected_grads)]


def _scales(count: int, betas: tuple[float, float], normalization: str) -> tuple[float, float]:
    """The factors of the sums S1 and S2 of ``count`` directions."""
    beta1, beta2 = betas
    if normalization == "paper":
        return 1 - beta1, 1 - beta2
    if normalization == "official":
        return 100.0, 1.0
    return 1 / sum(beta1**age for age in range(count)), 1 / sum(beta2**age for age in range(count))


class DeviceHistory(DeviceSums):
    """A group's history and its coefficients on a device, in the arithmetic of `coefficients`.

    There are always ``horizon`` terms. Those for which there is no direction yet have a projected
    gradient of 0, and so add nothing.

    Args:
        group: a parameter group, with the history so far.
        device: of its weights.
        with_second: whether the update has a sum S2.
    """

    def __init__(self, group: dict[str, Any], device: torch.device, with_second: bool) -> None:
        horizon, betas = group["horizon"], group["betas"]
        terms = horizon if any(betas) else 1
        on_device = Terms(group["seed"], horizon=terms, with_second=with_second, device=device)
        super().__init__(group, on_device)

        def filled(values: Sequence[float]) -> list[float]:
            return [*values, *[0] * horizon][:horizon]

        self._projected_grads = self.tensor(filled(group["projected_grads"]))
        self._counters = self.tensor(filled(group["directions"]), torch.int64)
        self._count = self.tensor(min(len(group["directions"]), horizon), torch.int64)
        # By the number of directions there are, and by age.
        scales = [_scales(count, betas, group["normalization"]) for count in range(1, terms + 1)]
        self._scales = [self.tensor(column) for column in zip(*scales, strict=True)]
        self._weights = [self.tensor([beta**age for age in range(terms)]) for beta in betas]

    def sums(
        self, measured: Sequence[Tensor], counter: Tensor, finite: Tensor
    ) -> tuple[Tensor, Sequence[Tensor] | Tensor, Tensor | None]:
        (p,) = measured
        horizon, terms = self._counters.numel(), self.terms.horizon
        projected_grads = torch.cat([p[None], self._projected_grads[:-1]])
        counters = torch.cat([counter[None], self._counters[:-1]])
        torch.where(finite, projected_grads, self._projected_grads, out=self._projected_grads)
        torch.where(finite, counters, self._counters, out=self._counters)
        self._count.add_(finite).clamp_(max=horizon)

        at = (self._count.clamp(1, terms) - 1)[None]
        kept = projected_grads[:terms]
        scale1, scale2 = (scales.gather(0, at) for scales in self._scales)
        first = scale1 * self._weights[0] * kept
        if self.group["betas"][1] == 0:
            return counters[:terms], first, None
        return counters[:terms], first, scale2 * self._weights[1] * kept * kept

    def read_back(self) -> None:
        super().read_back()
        count = int(self._count)
        self.group["projected_grads"] = self._projected_grads[:count].tolist()
        self.group["directions"] = self._counters[:count].tolist()
