"""The Triton kernel of low-rank directions in Triton's interpreter: the bits of the reference.

Not collected by itself, like triton_interpreted.py.
By hand: TRITON_INTERPRET=1 python -m pytest tests/gpu/triton_tiles_interpreted.py
"""

from __future__ import annotations

import pytest
import torch

from adamezo_kernels import (
    RULES,
    PhiloxState,
    Plan,
    Shard,
    moments,
    perturb_,
    sample_,
    update_,
    update_terms_,
)
from adamezo_kernels.backends import triton
from adamezo_kernels.stream import LARGEST_FACTOR
from helpers.operations import (
    KEY,
    TYPES,
    assert_same_bits,
    coefficients,
    states,
    unguarded,
    weights,
)
from helpers.rules import EPS, NUMBERS, RESTORE, terms_of, with_buffers

pytestmark = pytest.mark.skipif(
    not triton.availability()[0], reason=f"no interpreter: {triton.availability()[1]}"
)


def zoo(dtype: torch.dtype, guarded, few: bool = False) -> tuple[list[torch.Tensor], dict]:
    """Matrices and vectors, whole and in pieces, of every layout that a plan has.

    Whole tiles, four elements at once; rows that are no multiples of four; matrices narrower and
    lower than a tile; from the middle of one row to that of another; pieces of columns from a
    multiple of four, of a tile and others; rows with others between them; experts, whose rows are
    parts of one of the matrix; and those that have no tiles: within a row and over its end, and
    rows that are not below each other. ``few`` leaves six of them, as an interpreted program takes
    tens of milliseconds.
    """
    members = [
        (guarded(0, dtype).view(0, 5), None),
        (guarded(64 * 64, dtype).view(64, 64), None),
        (guarded(66 * 67, dtype, 3).view(66, 67), None),
        (guarded(9 * 5, dtype, 1).view(9, 5), None),
        (guarded(41, dtype, 2), None),
        (guarded(1, dtype, 7)[0], None),
        (guarded(2 * 3 * 5, dtype, 4).view(2, 3, 5), None),
        (guarded(200, dtype, 1), Shard(50, columns=52)),
        (guarded(6 * 32, dtype).view(6, 32), Shard(64, 6, 128, 128)),
        (guarded(5 * 62, dtype).view(5, 62), Shard(70, 5, 134, 134)),
        (guarded(6 * 70, dtype, 4).view(6, 70)[:, 2:66], Shard(0, 6, 256, 128)),
        (guarded(4 * 128, dtype).view(4, 128), Shard(64, 4, 320, 64)),
        (guarded(90, dtype, 1), Shard(2 * LARGEST_FACTOR - 150, columns=LARGEST_FACTOR)),
        (guarded(60, dtype, 1), Shard(2 * LARGEST_FACTOR - 40, columns=LARGEST_FACTOR)),
        (guarded(7 * 10, dtype).view(7, 10), Shard(5, 7, 2**33 + 1, 2**33 + 1)),
        (guarded(3 * 5 * 7, dtype).view(3, 5, 7)[:, :, 2:5], None),
        (guarded(4 * 9, dtype).view(4, 9), Shard(3, 4, 11, 7)),
        (guarded(100, dtype), Shard(3 * LARGEST_FACTOR - 100, columns=3)),
    ]
    if few:
        members = [members[i] for i in (1, 3, 4, 9, 10, 16)]
    tensors = [tensor for tensor, _ in members]
    for seed, tensor in enumerate(tensors):
        tensor.copy_(weights(tensor.numel(), dtype, seed).view(tensor.shape))
    parameters = [2**24 - 1 - 5 * i for i in range(len(members))]
    return tensors, {"parameters": parameters, "shards": [shard for _, shard in members]}


def test_the_zoo_has_every_kind(guarded):
    tensors, arguments = zoo(torch.float32, guarded)
    (launch,) = Plan(tensors, **arguments).launches
    kinds = {kind: len(part.segments) for kind, part in triton.parts(launch, 0).items()}
    assert kinds == {"windows": 2, "tiles": 12, "scattered": 3}
    # Whole rows further it is the same, and tables are kept; within a row less fits into tiles.
    assert triton.parts(launch, 0) is triton.parts(launch, 0)
    assert len(triton.parts(launch, 3)["scattered"].segments) > 3


def both(operation, dtype, guarded, few: bool) -> None:
    """``operation(plan, backend)`` by Triton and by the reference, bit by bit."""
    tensors, arguments = zoo(dtype, guarded, few)
    operation(Plan(tensors, **arguments), "triton")
    expected, arguments = zoo(dtype, unguarded, few)
    operation(Plan(expected, **arguments), "reference")
    for i, (got, other) in enumerate(zip(tensors, expected, strict=True)):
        assert_same_bits(got, other, i)


def here(count: int) -> list[PhiloxState]:
    return [state._replace(offset=0) for state in states(count)]


# Offset 0, as the zoo has the last rows and columns that there are.
@pytest.mark.parametrize(
    ("dtype", "distribution", "rounding"),
    [
        (torch.float32, "lowrank", "nearest"),
        (torch.bfloat16, "lowrank:3", "stochastic"),
        (torch.float16, "lowrank", "stochastic"),
    ],
    ids=str,
)
def test_operations(guarded, dtype, distribution, rounding):
    def operation(plan, backend):
        kind = {"distribution": distribution, "backend": backend}
        perturb_(plan, here(1)[0], -1.7e-3, rounding=rounding, **kind)
        for count, second, restore in ((2, True, 1e-3), (1, False, 0.0)):
            update_(
                plan,
                here(count),
                *coefficients(count, second),
                lr=3e-3,
                eps=1e-8,
                weight_decay=0.1,
                restore=restore,
                rounding=rounding,
                **kind,
            )

    both(operation, dtype, guarded, few=dtype == torch.float16)


def test_moments():
    plan = Plan([torch.full((n, m), float("nan")) for n, m in ((65, 7), (3, 66))])
    got, expected = (
        sum(
            moments(plan, here(3), *coefficients(3, True), distribution="lowrank:2", backend=by), []
        )
        for by in ("triton", "reference")
    )
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a, b, i)


RULE_CASES = [
    (rule, TYPES[i % 3], TYPES[(i + 1 + i // 3) % 3], ("stochastic", "nearest")[i % 4 == 3])
    for i, rule in enumerate(NUMBERS)
]


@pytest.mark.parametrize("case", RULE_CASES, ids=str)
def test_rules(guarded, case):
    rule, dtype, kept_type, rounding = case
    ends = []
    for backend, make in (("triton", guarded), ("reference", unguarded)):
        tensors, arguments = zoo(dtype, make, few=True)
        plan, buffers = with_buffers(rule, tensors, arguments, kept_type, make)
        options = {"distribution": "lowrank:2", "rounding": rounding, "backend": backend}
        terms = terms_of(rule)
        terms.offset = 0
        perturb_(plan, terms, -RESTORE, **options)
        if RULES[rule].updates:
            update_terms_(plan, terms, eps=EPS, restore=RESTORE, **options)
        ends.append([*tensors, *(buffer for kept in buffers for buffer in kept)])
    for i, (got, expected) in enumerate(zip(*ends, strict=True)):
        assert_same_bits(got, expected, i)


@pytest.mark.parametrize("offset", [3, 130 * 7, 2**34 - 50])
def test_offsets(guarded, offset):
    """Of whole rows and within one; beyond the words that one high word of a block has."""
    ends = []
    for backend, make in (("triton", guarded), ("reference", unguarded)):
        tensors = [make(71 * 130, torch.bfloat16, 1).view(71, 130), make(9, torch.bfloat16),
                   make(70 * 32, torch.bfloat16).view(70, 32)]  # fmt: skip
        for i, tensor in enumerate(tensors):
            tensor.copy_(weights(tensor.numel(), torch.bfloat16, i).view(tensor.shape))
        plan = Plan(tensors, shards=[None, None, Shard(96, 70, 128, 128)])
        kind = {"distribution": "lowrank", "rounding": "stochastic", "backend": backend}
        perturb_(plan, PhiloxState(KEY, 5, offset), 1e-2, **kind)
        ends.append(tensors)
    for i, (got, expected) in enumerate(zip(*ends, strict=True)):
        assert_same_bits(got, expected, i)


def test_into_other_tensors(guarded):
    tensors, arguments = zoo(torch.bfloat16, guarded, few=True)
    before = [tensor.clone() for tensor in tensors]
    outs = [guarded(t.numel(), t.dtype, i % 8).view(t.shape) for i, t in enumerate(tensors)]
    plan = Plan(tensors, **arguments)
    perturb_(plan.into(outs), here(1)[0], 1e-2, distribution="lowrank", backend="triton")
    for i, (a, b) in enumerate(zip(tensors, before, strict=True)):
        assert_same_bits(a, b, i)
    perturb_(plan, here(1)[0], 1e-2, distribution="lowrank", backend="reference")
    for i, (out, tensor) in enumerate(zip(outs, tensors, strict=True)):
        assert_same_bits(out, tensor.contiguous(), i)


def test_four_at_once_in_whole_tiles(monkeypatch):
    """Which way a tile takes is seen by how its pointers are made; the bits are the same."""
    seen: list[bool] = []
    module = triton.tiles()
    for name, whole in (("_aligned", True), ("_single", False)):
        made = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, made=made, whole=whole: (seen.append(whole), made(*a))[1]
        )
    for shape, offset, expected in (
        ((64, 192), 0, [True] * 6),
        ((64, 132), 0, [True] * 4 + [False] * 2),  # the third tile has four columns
        ((65, 64), 0, [True] * 2 + [False] * 2),
        ((64, 130), 0, [False] * 6),  # rows that are not aligned
        ((64, 64), 1, [False] * 2),
    ):
        n = shape[0] * shape[1]
        w = torch.zeros(n + 8)[8 - 4 + offset :][:n].view(shape)
        assert w.data_ptr() % 16 == 4 * offset % 16
        seen.clear()
        perturb_(Plan([w]), here(1)[0], 1.0, distribution="lowrank", backend="triton")
        assert seen == expected, shape
        expected_bits = sample_(torch.empty(shape), here(1)[0], distribution="lowrank",
                                backend="reference")  # fmt: skip
        assert_same_bits(w, expected_bits)


def test_more_programs_than_a_launch_takes(guarded, monkeypatch):
    monkeypatch.setattr(triton, "MOST_PROGRAMS", 3)

    ends = []
    for backend, make in (("triton", guarded), ("reference", unguarded)):
        tensors = [make(n * m, torch.float32).view(n, m) for n, m in ((65, 130), (3, 4))]
        for i, tensor in enumerate(tensors):
            tensor.copy_(weights(tensor.numel(), torch.float32, i).view(tensor.shape))
        perturb_(Plan(tensors), here(1)[0], 1e-2, distribution="lowrank", backend=backend)
        ends.append(tensors)
    for i, (got, expected) in enumerate(zip(*ends, strict=True)):
        assert_same_bits(got, expected, i)


def test_a_failed_launch_names_everything(monkeypatch):
    def fail(*arguments, **constants):
        raise ValueError("out of resource: shared memory")

    monkeypatch.setattr(triton, "start_tiles", fail)
    w = torch.zeros(2, 3)
    version = w._version
    with pytest.raises(RuntimeError, match=r"perturb .*along 1 lowrank:2 direction.*out of resou"):
        perturb_(Plan([w]), here(1)[0], 1.0, distribution="lowrank:2", backend="triton")
    assert w._version == version
