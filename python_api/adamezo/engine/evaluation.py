"""The evaluations of a step: a closure at perturbed weights, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from .arithmetic import Number
from .batched import BatchedClosure, check_equal
from .closure import Closure, Result, checked_loss, numbers
from .device import DeviceNumbers
from .generators import ForkedGenerators
from .guard import Guard
from .module_buffers import KeptBuffers
from .perturb import InPlace, Perturbation, Point, Regenerated
from .ranks import Ranks
from .signals import HeldSignals


def evaluate(
    closures: Sequence[Closure],
    points: Sequence[Point],
    weights: Perturbation,
    guard: Guard,
    signals: HeldSignals,
    module_buffers: KeptBuffers,
    own: range | None = None,
) -> list[Result]:
    """Evaluates each closure at its point and returns the losses.

    All evaluations see the same random numbers, and leave the generators where the last one does.
    Whoever calls this restores the weights, whatever happens here.

    Args:
        own: which of them are evaluated here; None means all. In place weights are perturbed for
            the others too, so that they have the same roundings wherever these are evaluated.

    Raises:
        RuntimeError: a closure has written or replaced weights.
        TypeError, ValueError: a closure has not returned one real number.
    """
    own = range(len(points)) if own is None else own
    forwards: list[_Forward] = [([closures[i]], [points[i]]) for i in own]
    if isinstance(weights, Regenerated) and own and isinstance(closures[0], BatchedClosure):
        batches = _batches([closures[i] for i in own], [points[i] for i in own], closures[0].chunks)
        if weights.due and len(batches) < len(own):
            batches = forwards + batches
        forwards = batches
    elif isinstance(weights, InPlace):
        forwards = [([closures[i]] if i in own else [], [points[i]]) for i in range(len(points))]
    last_one = max((i for i, (these, _) in enumerate(forwards) if these), default=0)
    losses: list[Result] = []
    for i, (these, some) in enumerate(forwards):
        last = i == last_one
        which = [each.part for each in these if isinstance(each, BatchedClosure)]
        if isinstance(weights, Regenerated) and len(some) > 1:
            weights.perturb_batch(some, which)
        else:
            weights.perturb(*some[0])
        if not these:
            continue
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
    if isinstance(weights, Regenerated) and len(losses) > len(own):
        alone, losses = losses[: len(own)], losses[len(own) :]
        check_equal(numbers(losses), numbers(alone), weights.types)
    return losses


def evaluate_with(
    ranks: Ranks | None,
    device: DeviceNumbers | None,
    closures: Sequence[Closure],
    points: Sequence[Point],
    weights: Perturbation,
    guard: Guard,
    signals: HeldSignals,
    module_buffers: KeptBuffers,
) -> tuple[Sequence[Number], list[Result]]:
    """The losses of a step's evaluations, and the results of those that were this process's.

    Args:
        ranks: the processes that take the step together, if there are others.
        device: where the losses stay, if they do.
        closures, points, weights, guard, signals, module_buffers: see :func:`evaluate`.
    """
    around = weights, guard, signals, module_buffers
    if ranks is None:
        results = evaluate(closures, points, *around)
        return numbers(results) if device is None else device.losses(results), results
    try:
        results = evaluate(closures, points, *around, ranks.own(len(points)))
        numbers(results)  # an error on a device is seen here, before the others are told
    except BaseException as error:
        if isinstance(weights, InPlace) and weights.perturbations and not weights.broken:
            guard.put_back()
            for point in points[weights.perturbations :]:  # the roundings that the others have
                weights.perturb(*point)
        ranks.failed(error, len(points))
        raise
    return ranks.losses(results, len(points)), results


_Forward = tuple[list[Closure], list[Point]]
"""The closures of one forward, none where another process makes it, and their points."""


def _batches(closures: Sequence[Closure], points: Sequence[Point], chunks: int) -> list[_Forward]:
    """The points in as many forwards as the closure wants."""
    size = -(-len(points) // chunks)
    starts = range(0, len(points), size)
    return [(list(closures[i : i + size]), list(points[i : i + size])) for i in starts]
