"""The evaluations of a step: a closure at perturbed weights, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from adamezo_kernels import Direction

from .closure import Closure, checked_loss
from .generators import ForkedGenerators
from .guard import Guard
from .module_buffers import KeptBuffers
from .perturb import Perturbation
from .signals import HeldSignals

Point = tuple[Direction, float]
"""(z, scale): the loss is evaluated at ``theta + scale z``."""


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
    losses: list[Tensor | float] = []
    last = len(points) - 1
    for i, (direction, scale) in enumerate(points):
        weights.perturb(direction, scale)
        guard.expect_unchanged()
        generators = ForkedGenerators() if i < last else nullcontext()
        with generators, weights.evaluation(), signals.through():
            result = closures[i]()
        losses.append(checked_loss(result))
        guard.check()
        if i < last:
            module_buffers.put_back()
    return losses
