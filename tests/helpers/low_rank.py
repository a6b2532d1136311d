"""Matrices of every kind, and what all operations make of them along low-rank directions."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from adamezo_kernels import PhiloxState, Plan, Shard
from helpers.operations import run_moments, run_perturb, run_update, weights

KEY = 0x9E3779B97F4A7C15
STATE = PhiloxState(KEY, 2**32 - 2)
RANKS = ("lowrank", "lowrank:2", "lowrank:5")

# Narrow and wide matrices, of fewer and more rows than a block of factors has, with rows of whole
# groups of lanes and others, one longer than a window of columns; and those that are vectors.
SHAPES = [
    (1, 1), (3, 5), (2, 64), (70, 1), (1, 70), (65, 127), (130, 129), (300, 8), (7, 576),
    (33, 1000), (3, 9000), (2, 3, 4, 5), (5,), (),
]  # fmt: skip


def operations(shape, distribution, dtype, backend) -> list[torch.Tensor]:
    """The weights after a perturbation and updates, and the moments."""
    kind = (distribution, "stochastic")
    w = weights(math.prod(shape), dtype, 3).view(shape)
    plan = Plan([w], parameters=[77])
    run_perturb(plan, kind, backend)
    for case in ((3, True, 1e-3, 0.1), (1, False, 0.0, 0.0), (2, False, 1e-3, 0.0)):
        run_update(plan, case, backend, kind)
    return [w, *(m[0] for m in run_moments(plan, 4, True, distribution, backend))]


@functools.cache
def of_reference(shape, distribution, dtype) -> list[torch.Tensor]:
    return operations(shape, distribution, dtype, "reference")


def pieces(whole: torch.Tensor) -> Iterator[tuple[torch.Tensor, Shard]]:
    """Parts of a matrix of 24 rows with their places in it: by rows, by columns, from the middle of
    a row, and as rows shorter than the matrix's."""
    columns, flat, half = whole.shape[1], whole.flatten(), whole.shape[1] // 2
    yield whole[5:], Shard(5 * columns, columns=columns)
    yield whole[:, half:].contiguous(), Shard(half, 24, columns, columns)
    yield whole[:, half:], Shard(half, 24, columns, columns)
    yield whole[::2], Shard(0, 12, 2 * columns, columns)
    yield flat[3:-2], Shard(3, columns=columns)
    if columns % 2 == 0:
        yield flat[columns - 1 :][: 2 * columns], Shard(columns - 1, 4, half, columns)
