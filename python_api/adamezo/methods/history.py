"""From the projected gradients kept to the coefficients in front of the directions.

With p_k the projected gradient and z_k the direction of age k (0 = newest), K of them kept::

    S1 = sum_k beta1^k p_k z_k        S2 = sum_k beta2^k p_k^2 z_k^2
    theta <- theta - lr m / (sqrt(v) + eps)

and the three normalizations differ in what m and v are (AdaMeZO, arXiv 2605.00650)::

    "paper"             m = (1 - beta1) S1         v = (1 - beta2) S2
    "bias_corrected"    m = S1 / sum_k beta1^k     v = S2 / sum_k beta2^k
    "official"          m = 100 S1                 v = S2
"""

from __future__ import annotations

from collections.abc import Sequence

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
    weights1 = [beta1**age for age in range(count)]
    weights2 = [beta2**age for age in range(count)]
    scale1, scale2 = {
        "paper": (1 - beta1, 1 - beta2),
        "bias_corrected": (1 / sum(weights1), 1 / sum(weights2)),
        "official": (100.0, 1.0),
    }[normalization]
    first = [scale1 * w * p for w, p in zip(weights1, projected_grads, strict=False)]
    if beta2 == 0:
        return first, None
    return first, [scale2 * w * p * p for w, p in zip(weights2, projected_grads, strict=False)]
