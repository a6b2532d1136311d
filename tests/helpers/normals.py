"""What independent standard normals satisfy: checks of a long draw, for every stream of them.

Bounds are in standard errors of each statistic under independent normals. The seeds of the tests
are fixed, so a test passes or fails once and for all; with about 60 statistics for a stream, one
beyond 4.5 sigma would come up by chance with probability 60 * 6.8e-6 = 4e-4.
"""

from __future__ import annotations

import math

import torch

SIGMAS = 4.5
LAGS = (1, 2, 3, 4, 5, 8, 16, 64, 4096)


def mean(x: torch.Tensor) -> float:
    return x.mean(dtype=torch.float64).item()


def check_moments(many: torch.Tensor) -> None:
    """The first to the sixth."""
    double_factorial = {0: 1, 2: 1, 4: 3, 6: 15, 8: 105, 10: 945, 12: 10395}
    z = many.double()
    for k in range(1, 7):
        expected = double_factorial.get(k, 0)
        variance = double_factorial[2 * k] - expected**2
        error = mean(z**k) - expected
        assert abs(error) < SIGMAS * math.sqrt(variance / z.numel()), k


def check_kolmogorov_smirnov(many: torch.Tensor) -> None:
    """sqrt(n) sup |F_n - F| exceeds 2.0 with probability 2 exp(-2 * 2.0**2) = 6.7e-4."""
    n = many.numel()
    cdf = torch.special.ndtr(many.sort().values.double())
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - cdf).max(), (cdf - steps[:-1]).max()).item()
    assert math.sqrt(n) * distance < 2.0


def check_tails(many: torch.Tensor) -> None:
    """Elements beyond each limit, either side, against the binomial they follow."""
    n = many.numel()
    for limit in (0.5, 1.0, 2.0, 3.0, 4.0, 4.5):
        p = 0.5 * math.erfc(limit / math.sqrt(2))
        for count in ((many > limit).sum().item(), (many < -limit).sum().item()):
            # + 1: a count is an integer, and the last limits expect few.
            assert abs(count - n * p) < SIGMAS * math.sqrt(n * p * (1 - p)) + 1, limit


def check_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    """Of z, and of z**2 - 1, which Box-Muller pairs would show were their radius shared badly."""
    bound = SIGMAS / math.sqrt(a.numel())
    assert abs(mean(a * b)) < bound
    assert abs(mean((a * a - 1) * (b * b - 1))) < 2 * bound  # the variance of z**2 is 2
