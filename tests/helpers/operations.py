"""Tensors of every kind, calls of the operations on them, and the comparison of bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from adamezo_kernels import PhiloxState, Plan, Shard, moments, perturb_, sample_, update_
from adamezo_kernels.backends import native
from adamezo_kernels.stream import ROUNDINGS

TYPES = (torch.float32, torch.bfloat16, torch.float16)
DISTRIBUTIONS = native.DISTRIBUTIONS
# Of an operation that stores: distribution and rounding.
KINDS = [
    pytest.param(kind, id="-".join(kind)) for kind in itertools.product(DISTRIBUTIONS, ROUNDINGS)
]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor, where: object = "") -> None:
    """Bitwise, so that -0 is not 0; any NaN equals any, as their payload is nobody's promise."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    integers = INTEGERS[got.dtype]
    same = got.contiguous().view(integers) == expected.contiguous().view(integers)
    same |= got.isnan() & expected.isnan()
    assert same.all(), (where, (~same).nonzero()[:4].tolist(), (~same).sum().item())


KEY, OFFSET = 0x243F6A8885A308D3, 3


def weights(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Weights of usual size, and among them what float arithmetic has in its corners."""
    w = 0.02 * torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    corners = (0.0, -0.0, 1e-40, -1e-6, 6e-8, 65504.0, 3e38, math.inf, -math.inf, math.nan)
    if numel >= 100:
        w[3 : 3 + 7 * len(corners) : 7] = torch.tensor(corners)
    return w.to(dtype)


def zoo(dtype: torch.dtype, guarded) -> tuple[list[torch.Tensor], dict]:
    """Tensors of one type and the rest of the arguments of their Plan.

    Sizes 0, 1, 3, 127 to 129 and 4097, odd addresses, row-strided views (two of them interleaved
    in one buffer), 0 and 3 dimensions, and shards of parameters with more than 2**32 elements, two
    of which cross the elements where the low word of the block index wraps, of four elements a
    block and of 128. As matrices, the shards have from 1 to 2**33 columns; none
    goes on in the next row of so many, as tiles would cover all of both rows.
    """
    members = [
        (guarded(0, dtype), None),
        (guarded(1, dtype, 1), None),
        (guarded(3, dtype, 3), None),
        (guarded(4097, dtype, 5), None),
        (guarded(4097, dtype, 2), Shard(offset=2**34 - 2001, columns=700)),
        (guarded(3000, dtype, 6), Shard(offset=2**39 - 1001, columns=3 * 2**31)),
        *(
            (guarded(size, dtype, size % 7), Shard(size - 61, columns=size - 127))
            for size in (127, 128, 129)
        ),
        (guarded(1, dtype, 7)[0], None),
        (guarded(105, dtype).view(3, 5, 7), Shard(offset=2**62 + 1, columns=2**29 + 3)),
        (guarded(10 * 33, dtype, 9), Shard(5, rows=10, stride=2**33 + 1, columns=2**33 + 1)),
    ]
    wide = guarded(37 * 64, dtype, 1).view(37, 64)
    members += [
        (wide[:, 5:22], None),
        (wide[:, 22:63], Shard(offset=2**33 + 2, rows=37, stride=4099, columns=4099)),
        (guarded(8 * 6 * 10, dtype).view(8, 6, 10)[:, 1:3], None),
    ]
    tensors = [tensor for tensor, _ in members]
    for seed, tensor in enumerate(tensors):
        tensor.copy_(weights(tensor.numel(), dtype, seed).view(tensor.shape))
    parameters = [2**24 - 1 - 5 * i for i in range(len(members))]
    return tensors, {"parameters": parameters, "shards": [shard for _, shard in members]}


def unguarded(numel: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    return torch.full((numel,), math.nan, dtype=dtype)


def states(count: int) -> list[PhiloxState]:
    return [PhiloxState(KEY, 2**32 - 1 - 3 * k, OFFSET) for k in range(count)]


def coefficients(count: int, with_second: bool) -> tuple[list[float], list[float] | None]:
    """Those of betas (0.7, 0.9) with projected gradients of both signs and of many sizes."""
    projected = [(-1) ** (k // 2) * 0.3 * 1.7 ** (k % 7) for k in range(count)]
    first = [0.3 * 0.7**k * p for k, p in enumerate(projected)]
    second = [0.1 * 0.9**k * p * p for k, p in enumerate(projected)]
    return first, second if with_second else None


def run_perturb(plan: Plan, kind: tuple[str, str], backend: str) -> None:
    distribution, rounding = kind
    state = PhiloxState(KEY, 9, OFFSET)
    perturb_(plan, state, -1.7e-3, distribution=distribution, rounding=rounding, backend=backend)


def samples(tensors: list[torch.Tensor], distribution: str, backend: str) -> list[torch.Tensor]:
    edge = {"exact": 2**34, "rademacher": 2**39, "lowrank": 2**34, "flipout": 2**34}[distribution]
    return [
        sample_(
            tensor,
            PhiloxState(KEY, 9, edge - 50 + i),
            parameter=i,
            distribution=distribution,
            backend=backend,
        )
        for i, tensor in enumerate(tensors)
    ]


# (directions, second given, restore, weight decay)
UPDATES = [
    *((k, second, 1e-3, 0.1) for k in (1, 2, 10, 33) for second in (True, False)),
    (2, True, 0.0, 0.0),
    (2, True, 0.0, 0.1),
    (2, True, 1e-3, 0.0),
    (1, False, 0.0, 0.0),
    (10, True, 0.0, 0.0),
]


def run_update(
    plan: Plan, case: tuple, backend: str, kind: tuple[str, str] = ("exact", "nearest")
) -> None:
    count, with_second, restore, weight_decay = case
    distribution, rounding = kind
    update_(
        plan,
        states(count),
        *coefficients(count, with_second),
        lr=3e-3,
        eps=1e-8,
        weight_decay=weight_decay,
        restore=restore,
        distribution=distribution,
        rounding=rounding,
        backend=backend,
    )


def run_moments(plan: Plan, count: int, with_second: bool, distribution: str, backend: str):
    return moments(
        plan,
        states(count),
        *coefficients(count, with_second),
        distribution=distribution,
        backend=backend,
    )
