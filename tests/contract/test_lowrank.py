"""Low-rank directions: their definition, their bits for any shape, shard and split, and what is
refused."""

from __future__ import annotations

import math

import pytest
import torch

from adamezo_kernels import Call, PhiloxState, Plan, Shard, Terms, kind_of, perturb_, run, sample_
from adamezo_kernels.backends import choose, native, reference
from adamezo_kernels.stream import LARGEST_FACTOR, LARGEST_RANK
from helpers.backends import BACKENDS, INSTRUCTION_SETS
from helpers.low_rank import KEY, RANKS, SHAPES, STATE, of_reference, operations, pieces
from helpers.operations import assert_same_bits, run_perturb, run_update, unguarded, weights
from helpers.rules import NUMBERS, terms_of, with_buffers


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    with native.use_isa(request.param):
        yield request.param


def factor(parameter: int, purpose: int, q: int, count: int) -> torch.Tensor:
    """The exact normals of one factor, by the definition of the stream."""
    return reference.exact_direction(
        q << 34, 0, 1, count, key=KEY, direction=STATE.counter, parameter=parameter | purpose << 24
    )[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2, 3, 64])
def test_a_direction_is_the_sum_of_outer_products(backend, rank):
    rows, columns, parameter = 37, 83, 2**24 - 1
    name = "lowrank" if rank == 1 else f"lowrank:{rank}"
    z = sample_(
        torch.full((rows, columns), math.nan),
        STATE,
        parameter=parameter,
        distribution=name,
        backend=backend,
    )
    expected = torch.zeros(rows, columns, dtype=torch.float64)
    for q in range(rank):
        u, v = factor(parameter, 4, q, rows), factor(parameter, 5, q, columns)
        if rank > 1:
            u = u * torch.tensor(1 / math.sqrt(rank), dtype=torch.float64).float()
        # float64 holds the product exactly. The sum is rounded twice, which differs from once only
        # where the first lands on the middle of two float32: not in these numbers.
        expected = (expected + u.double()[:, None] * v.double()).float().double()
    assert_same_bits(z, expected.float())


@pytest.mark.parametrize("shape", [(), (5,), (1000,), (0,)], ids=str)
def test_a_vector_has_exact_normals(shape):
    both = [sample_(torch.empty(shape), STATE, distribution=d) for d in ("lowrank", "exact")]
    assert_same_bits(*both)


def test_moments_of_the_distribution():
    """Mean 0 and covariance 1, over directions: the bounds are five standard errors."""
    n = 8000
    for name in RANKS:
        z = torch.stack(
            [
                sample_(torch.empty(3, 4), PhiloxState(1, i), distribution=name).flatten()
                for i in range(n)
            ]
        ).double()
        # Var z = 1; Var z_a z_b is at most E z^4 - 1 = 8 for one product of two normals.
        assert z.mean(0).abs().max() < 5 / math.sqrt(n)
        assert (z.T @ z / n - torch.eye(12)).abs().max() < 5 * math.sqrt(8 / n)
        # Distinct elements of a row share u, so their squares go together.
        assert ((z[:, 0] ** 2 - 1) * (z[:, 1] ** 2 - 1)).mean() > 0.3


@pytest.mark.parametrize("distribution", RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_the_reference(isa, shape, distribution, dtype):
    got = operations(shape, distribution, dtype, "native")
    for mine, expected in zip(got, of_reference(shape, distribution, dtype), strict=True):
        assert_same_bits(mine, expected)


@pytest.mark.parametrize("rule", NUMBERS)
@pytest.mark.parametrize("shape", [(30, 8), (9, 130), (40,)], ids=str)
def test_rules(isa, rule, shape):
    results = []
    for backend in ("native", "reference"):
        w = weights(math.prod(shape), torch.float32, 3).view(shape)
        terms = terms_of(rule)
        plan, own = with_buffers(rule, [w], {}, torch.float32, unguarded)
        run(Call("perturb", plan, terms, "lowrank:3", scale=1e-2), backend)
        if rule != "blend":
            run(Call("update", plan, terms, "lowrank:3", scale=-1e-2, eps=1e-4), backend)
        results.append([w, *(b for each in own for b in each)])
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_many_shares(isa, threads):
    """On tensors that are cut within rows, whose windows of columns a share sees in part."""
    results = []
    for count in (threads, 1):
        torch.set_num_threads(count)
        members = [weights(n * m, torch.float32, n).view(n, m) for n, m in
                   ((3, 40_000), (900, 129), (70_000, 2), (257, 640))]  # fmt: skip
        plan = Plan([*members, weights(5000, torch.float32, 1)])
        run_perturb(plan, ("lowrank:2", "nearest"), "native")
        run_update(plan, (3, True, 1e-3, 0.1), "native", ("lowrank", "nearest"))
        results.append([segment.tensor for segment in plan])
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [7, 40, 200])
def test_pieces_of_a_parameter(backend, columns):
    """By rows, by columns, from the middle of a row, and as rows shorter than the matrix's."""
    whole = sample_(torch.empty(24, columns), STATE, distribution="lowrank:2", backend=backend)
    for piece, shard in pieces(whole):
        got = torch.full(piece.shape, math.nan)
        plan = Plan([got], shards=[shard])
        run(Call("sample", plan, Terms.of([STATE]), "lowrank:2"), backend)
        assert_same_bits(got, piece.contiguous(), shard)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_of_whole_rows_moves_the_rows(backend):
    whole = sample_(torch.empty(9, 50), STATE, distribution="lowrank", backend=backend)
    state = PhiloxState(STATE.key, STATE.counter, 4 * 50)
    got = sample_(torch.empty(5, 50), state, distribution="lowrank", backend=backend)
    assert_same_bits(got, whole[4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_rows_and_columns(backend):
    """Up to row and column 2**34 - 1; the high word of a factor's block is its place in the sum."""
    last = LARGEST_FACTOR - 1
    tall = Shard(offset=3 * LARGEST_FACTOR - 300, columns=3)
    wide = Shard(offset=last - 600, columns=LARGEST_FACTOR)
    results = []
    for by in (backend, "reference"):
        tensors = [torch.full((300,), math.nan), torch.full((601,), math.nan)]
        plan = Plan(tensors, shards=[tall, wide])
        run(Call("sample", plan, Terms.of([STATE]), "lowrank:2"), by)
        results.append(tensors)
        assert all(t.isfinite().all() for t in tensors)
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)
    # Row 2**34 would have the block of row 0 of the next term.
    with pytest.raises(ValueError, match=r"leads to rows beyond 17,179,869,184.*at most 0"):
        perturb_(Plan([tensors[0]], shards=[tall]), PhiloxState(1, 2, 1), 1.0,
                 distribution="lowrank", backend=backend)  # fmt: skip


def test_a_large_parameter_does_not_need_memory():
    """The factors are made for a tile: a call on 64 MB takes less than one more."""
    import resource

    w = torch.zeros(4096, 4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run_update(Plan([w]), (10, True, 1e-3, 0.1), "native" if INSTRUCTION_SETS else "reference",
               ("lowrank", "nearest"))  # fmt: skip
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB


# --- names and refusals -------------------------------------------------------------------------


def test_names():
    assert kind_of("exact") == ("exact", 1)
    assert kind_of("lowrank") == ("lowrank", 1)
    assert kind_of("lowrank:2") == ("lowrank", 2)
    assert kind_of(f"lowrank:{LARGEST_RANK}") == ("lowrank", 64)
    for name in ("lowrank:1", "lowrank:0", "lowrank:65", "lowrank:02", "lowrank:", "lowrank: 2",
                 "lowrank:-2", "exact:2", "low", "", None, 3, b"exact"):  # fmt: skip
        with pytest.raises(
            ValueError, match="must be one of .* 'lowrank:2' to 'lowrank:64' or .*, got"
        ):
            kind_of(name)


def test_a_piece_of_unknown_shape_is_refused():
    w = torch.zeros(4, 6)
    plan = Plan([w], shards=[Shard(offset=12)], names=["layer.weight"])
    perturb_(plan, STATE, 1.0)
    with pytest.raises(ValueError, match="layer.weight is a piece .* expected a Shard with `colu"):
        perturb_(plan, STATE, 1.0, distribution="lowrank")
    with pytest.raises(ValueError, match="layer.weight is a piece"):
        perturb_(plan.like([w]), STATE, 1.0, distribution="lowrank")
    long = Plan([w], shards=[Shard(columns=LARGEST_FACTOR + 1)])
    with pytest.raises(ValueError, match="rows of 17,179,869,185 elements"):
        perturb_(long, STATE, 1.0, distribution="lowrank")


def test_a_backend_without_a_distribution():
    with pytest.raises(
        RuntimeError, match="'reference' has no distribution 'fast', expected one of"
    ):
        choose([torch.device("cpu")], "reference", "fast")
