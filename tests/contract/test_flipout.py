"""Flipout directions: their definition, what they share, and their bits for shards and backends."""

from __future__ import annotations

import math

import pytest
import torch

from adamezo_kernels import (
    Call,
    PhiloxState,
    Plan,
    Shard,
    Terms,
    kind_of,
    perturb_,
    run,
    sample_,
    update_,
)
from adamezo_kernels.backends import choose, native, reference
from adamezo_kernels.factors import Factors
from adamezo_kernels.stream import LARGEST_FACTOR, LARGEST_GROUP
from helpers.backends import BACKENDS, INSTRUCTION_SETS
from helpers.operations import assert_same_bits

KEY, PARAMETER = 0x9E3779B97F4A7C15, 2**24 - 1
SHAPES = [(1, 1), (3, 5), (70, 1), (65, 127), (7, 576), (3, 9000), (2, 3, 4, 5)]


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    with native.use_isa(request.param):
        yield request.param


def normals(counter: int, purpose: int, count: int) -> torch.Tensor:
    """The exact normals of one purpose, by the definition of the stream."""
    return reference.exact_direction(
        0, 0, 1, count, key=KEY, direction=counter, parameter=PARAMETER | purpose << 24
    )[0]


def sampled(shape, counter: int, distribution: str, backend: str) -> torch.Tensor:
    out = torch.full(shape, math.nan)
    state = PhiloxState(KEY, counter)
    return sample_(out, state, parameter=PARAMETER, distribution=distribution, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group", [1, 4, LARGEST_GROUP])
def test_a_direction_is_shared_normals_with_signs_of_its_own(backend, shape, group):
    name = "flipout" if group == 1 else f"flipout:{group}"
    rows, columns = shape[0], math.prod(shape[1:])
    for counter in (0, 3, 4, 2**32 - 1):
        z = sampled(shape, counter, name, backend).view(rows, columns)
        u = normals(counter // group, 0, rows * columns).view(rows, columns)
        r, s = (
            torch.where(normals(counter, p, n).signbit(), -1.0, 1.0)
            for p, n in ((6, rows), (7, columns))
        )
        assert_same_bits(z, u * r[:, None] * s)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vector_has_exact_normals_of_each_direction(backend):
    for shape in ((), (5,), (1000,), (0,)):
        for counter in (5, 6):
            both = [sampled(shape, counter, kind, backend) for kind in ("flipout:4", "exact")]
            assert_same_bits(*both)


@pytest.mark.parametrize("backend", BACKENDS)
def test_directions_of_a_group_are_uncorrelated(backend):
    """E z z' = 0 by the signs: a mean of 10,000 products, of variance E u^4 = 3, within six
    standard deviations; and no two are alike or opposite."""
    group = [sampled((100, 100), 8 + i, "flipout:8", backend) for i in range(8)]
    for i, z in enumerate(group):
        assert torch.equal(z.abs(), group[0].abs())
        for other in group[:i]:
            assert abs((z * other).mean()) < 6 * math.sqrt(3) / 100
            assert 0.3 < (z == other).float().mean() < 0.7
    assert not torch.equal(sampled((100, 100), 16, "flipout:8", backend).abs(), group[0].abs())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_have_the_bits_of_the_reference(isa, shape, dtype):
    """Along directions of two groups, whose normals the kernels make once each."""
    states = [PhiloxState(KEY, counter) for counter in (9, 8, 7, 6, 5)]
    first, second = [0.3, -0.2, 0.1, 0.05, 1.0], [0.1, 0.2, 0.3, 0.4, 0.5]
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator).to(dtype)
    for squares in (second, None):
        ends = []
        for backend in ("native", "reference"):
            w = start.clone()
            update_(
                Plan([w]), states, first, squares, lr=0.1, restore=0.01, rounding="stochastic",
                distribution="flipout:4", backend=backend,
            )  # fmt: skip
            ends.append(w)
        assert_same_bits(*ends)
        assert not torch.equal(ends[0], start)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [5, 48, 131])
def test_a_piece_has_its_part_of_the_whole(backend, columns):
    whole = sampled((24, columns), 5, "flipout:4", "reference")
    half = columns // 2
    for piece, shard in (
        (whole[5:], Shard(5 * columns, columns=columns)),
        (whole[:, half:], Shard(half, 24, columns, columns)),
        (whole.flatten()[3:-2], Shard(3, columns=columns)),
    ):
        got = torch.full(piece.shape, math.nan)
        plan = Plan([got], parameters=[PARAMETER], shards=[shard])
        run(Call("sample", plan, Terms.of([PhiloxState(KEY, 5)]), "flipout:4"), backend)
        assert_same_bits(got, piece.contiguous())


def test_the_signs_as_tensors():
    state, w = PhiloxState(KEY, 7), torch.zeros(9, 30)
    factors = Factors([Plan([w, torch.zeros(4)], parameters=[PARAMETER, 1])], "flipout:4")
    factors.fill(state)
    u = sampled((9, 30), 1, "exact", "reference")
    assert_same_bits(u * (factors.of[0].u.t() @ factors.of[0].v),
                     sampled((9, 30), 7, "flipout:4", "reference"))  # fmt: skip
    assert factors.of[1].v is None


def test_names_and_refusals():
    assert kind_of("flipout") == ("flipout", 1)
    assert kind_of("flipout:2") == ("flipout", 2)
    assert kind_of(f"flipout:{LARGEST_GROUP}") == ("flipout", 65536)
    for name in ("flipout:1", "flipout:0", "flipout:65537", "flipout:02", "flipout:", "flipout:x"):
        with pytest.raises(ValueError, match="'flipout:2' to 'flipout:65536', got"):
            kind_of(name)
    plan = Plan([torch.zeros(4, 6)], shards=[Shard(offset=12)], names=["layer.weight"])
    with pytest.raises(ValueError, match="layer.weight is a piece .* expected a Shard with `colu"):
        perturb_(plan, PhiloxState(1, 2), 1.0, distribution="flipout:2")
    tall = Plan([torch.zeros(6)], shards=[Shard(offset=3 * LARGEST_FACTOR - 6, columns=3)])
    with pytest.raises(ValueError, match=r"leads to rows beyond 17,179,869,184"):
        perturb_(tall, PhiloxState(1, 2, 1), 1.0, distribution="flipout:2")
    assert choose([torch.device("cuda")], distribution="flipout:2") is reference
