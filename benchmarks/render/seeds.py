"""What a few seeds say about a mean, a difference, and the forward passes to a loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy
import pandas

STUDENT = 2.776
"""The 97.5 % point of Student's t with four degrees of freedom, which five seeds have."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean of five numbers, by Student's t.

    A bootstrap's percentiles are too narrow for five: of numbers from a normal distribution they
    hold the mean in 84 % of cases.
    """
    some = numpy.asarray(values, float)
    half = STUDENT * some.std(ddof=1) / math.sqrt(len(some))
    return float(some.mean() - half), float(some.mean() + half)


def reached(curve: pandas.Series, target: float) -> float:
    """The forward passes at which a loss comes down to the target, on straight lines between the
    places where it was measured; infinity if it never does."""
    places, losses = curve.index.to_numpy(float), curve.to_numpy(float)
    below = numpy.flatnonzero(losses <= target)
    if not len(below):
        return math.inf
    i = int(below[0])
    if i == 0 or not math.isfinite(losses[i - 1]):
        return float(places[i])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(places[i - 1] + share * (places[i] - places[i - 1]))


def when_reached(curves: pandas.DataFrame, ends: pandas.Series) -> tuple[float, float, float]:
    """After how many forward passes a method's mean loss is where another's mean ends; and 95 % of
    the same over all resamples of the seeds (bootstrap).

    Args:
        curves: of the method, by forward passes and seed.
        ends: of the other, by seed: the same seeds, which have the same rows in the same order.
    """
    seeds = list(ends.index)
    drawn = itertools.combinations_with_replacement(seeds, len(seeds))
    found, weights = [], []
    for some in map(list, drawn):
        found.append(reached(curves[some].mean(axis=1), ends[some].mean()))
        orders = math.factorial(len(some))
        weights.append(orders / math.prod(math.factorial(some.count(s)) for s in seeds))
    order = numpy.argsort(found, kind="stable")
    share = numpy.cumsum(numpy.asarray(weights)[order]) / sum(weights)
    low, high = (found[order[numpy.searchsorted(share, part)]] for part in (0.025, 0.975))
    return reached(curves[seeds].mean(axis=1), ends.mean()), low, high
