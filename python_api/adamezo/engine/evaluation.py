"""The evaluations of a step: a closure at perturbed weights, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from .batched import BatchedClosure, check_equal
from .closure import Closure, checked_loss
from .generators import ForkedGenerators
from .guard import Guard
from .module_buffers import KeptBuffers
from .perturb import Perturbation, Point, Regenerated
from .signals import HeldSignals


def evaluate(
    closures: Sequence[Closure],
    points: Sequence[Point],
    weights: Perturbation,
    guard: Guard,
    signals: HeldSignals,
    module_buffers: KeptBuffers,
) -> list[Tensor | float]:
    """Evaluates each closure at its point and returns the losses.

    All evaluations see the same random numbers, and leave the generators where the last one does.
    Whoever calls this restores the weights, whatever happens here.

    Raises:
        RuntimeError: a closure has written or replaced weights.
        TypeError, ValueError: a closure has not returned one real number.
    """
    forwards = [([closures[i]], [point]) for i, point in enumerate(points)]
    if isinstance(weights, Regenerated) and isinstance(closures[0], BatchedClosure):
        batches = _batches(closures, points, closures[0].chunks)
        if weights.due and len(batches) < len(points):
            batches = forwards + batches
        forwards = batches
    losses: list[Tensor | float] = []
    for i, (these, some) in enumerate(forwards):
        last = i + 1 == len(forwards)
        which = [each.part for each in these if isinstance(each, BatchedClosure)]
        if isinstance(weights, Regenerated) and len(some) > 1:
            weights.perturb_batch(some, which)
        else:
            weights.perturb(*some[0])
        guard.expect_unchanged()
        generators = nullcontext() if last else ForkedGenerators()
        with generators, weights.evaluation(), signals.through():
            closure = these[0]
            if isinstance(weights, Regenerated) and isinstance(closure, BatchedClosure):
                results = list(closure.losses(which, weights.rows))
            else:
                results = [closure()]
        losses += map(checked_loss, results)
        guard.check()
        if not last:
            module_buffers.put_back()
    if isinstance(weights, Regenerated) and len(losses) > len(points):
        alone, losses = losses[: len(points)], losses[len(points) :]
        check_equal(losses, alone, weights.types)
    return losses


def _batches(
    closures: Sequence[Closure], points: Sequence[Point], chunks: int
) -> list[tuple[list[Closure], list[Point]]]:
    """The points in as many forwards as the closure wants."""
    size = -(-len(points) // chunks)
    starts = range(0, len(points), size)
    return [(list(closures[i : i + size]), list(points[i : i + size])) for i in starts]
