"""The bodies of the CUDA kernels, run on the host thread by thread: the same bits as the CPU
kernels, whatever the shape of the launch. What is left for a GPU is in test_cuda_gpu.py."""

from __future__ import annotations

import functools
import itertools
import math
from contextlib import nullcontext

import pytest
import torch

from adamezo_kernels import (
    RULES,
    Call,
    PhiloxState,
    Plan,
    Shard,
    Terms,
    moments,
    perturb_,
    sample_,
    staging,
    update_,
    update_terms_,
)
from adamezo_kernels import run as run_call
from adamezo_kernels.backends import BACKENDS, choose, cuda, native, reference
from adamezo_kernels.stream import ROUNDINGS
from helpers import low_rank
from helpers.backends import needs_native
from helpers.operations import (
    KEY,
    OFFSET,
    TYPES,
    UPDATES,
    assert_same_bits,
    coefficients,
    run_update,
    states,
    unguarded,
    weights,
    zoo,
)
from helpers.operations import (
    KINDS as ALL_KINDS,
)
from helpers.rules import EPS, LR, NUMBERS, RESTORE, by_reference, run, terms_of, with_buffers

pytestmark = needs_native

# (blocks, threads): one warp for everything, a few, more warps than windows.
SAME_BITS = [kind for kind in cuda.DISTRIBUTIONS if kind in reference.DISTRIBUTIONS]
KINDS = [kind for kind in ALL_KINDS if kind.values[0][0] in SAME_BITS]
SHAPES = [(1, 32), (2, 96), (5, 64), (40, 256)]


class OnHost:
    """Stands in for a device: host memory, and a launch that runs thread after thread."""

    shape = SHAPES[0]
    guard = nullcontext()
    stream = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def capturing(self) -> bool:
        return False

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    keep = copy

    def run(self, call, highs) -> None:
        native.compiled.cuda_on_host(call, highs, *self.shape)


@pytest.fixture
def on_host(monkeypatch):
    """``on_host(shape)``: backend "cuda" takes CPU tensors from now on."""
    monkeypatch.setattr(cuda, "Place", OnHost)
    monkeypatch.setattr(cuda, "availability", lambda: (True, "on the host"))
    monkeypatch.setattr(cuda, "supports", lambda device: True)

    def use(shape) -> None:
        monkeypatch.setattr(OnHost, "shape", shape)

    use(SHAPES[0])
    return use


def on_both(operation, dtype, guarded):
    """``operation(plan, tensors, backend)`` by the bodies and by the CPU, bit by bit."""
    tensors, arguments = zoo(dtype, guarded)
    operation(Plan(tensors, **arguments), tensors, "cuda")
    expected, arguments = zoo(dtype, unguarded)
    operation(Plan(expected, **arguments), expected, "native")
    for i in range(len(tensors)):
        assert_same_bits(tensors[i], expected[i], i)


# --- everything that a kernel is compiled for, against the reference -----------------------------


def perturb(plan, tensors, make, **options):
    perturb_(plan, PhiloxState(KEY, 9, OFFSET), -1.7e-3, **options)
    return tensors


def perturb_into(plan, tensors, make, **options):
    """To addresses aligned in other ways than those that are read."""
    before = [tensor.clone() for tensor in tensors]
    out = [make(t.numel(), t.dtype, i % 9).view(t.shape) for i, t in enumerate(tensors)]
    perturb_(plan.into(out), PhiloxState(KEY, 9, OFFSET), -1.7e-3, **options)
    for i, tensor in enumerate(tensors):
        assert_same_bits(tensor, before[i], f"source {i}")
    return out


def update(plan, tensors, make, with_second=True, **options):
    update_(
        plan,
        states(3),
        *coefficients(3, with_second),
        lr=3e-3,
        weight_decay=0.1,
        restore=1e-3,
        **options,
    )
    return tensors


def momentum(plan, tensors, make, **options):
    return update(plan, tensors, make, with_second=False, **options)


def sample(plan, tensors, make, rounding, **options):
    for i, tensor in enumerate(tensors):
        sample_(tensor, PhiloxState(KEY, 9, 2**34 - 50 + i), parameter=i, **options)
    return tensors


def both_moments(plan, tensors, make, rounding, **options):
    m, v = moments(plan, states(3), *coefficients(3, True), **options)
    return m + v


def fast_direction(index_offset, index_stride, rows, row_length, *, key, direction, parameter, **_):
    """For the reference, which has no `fast` normals: the bodies' own, which are held to be near
    the exact ones below."""
    return torch.stack(
        [
            sample_(
                torch.empty(row_length),
                PhiloxState(key, direction, index_offset + row * index_stride),
                parameter=parameter,
                distribution="fast",
                backend="cuda",
            )
            for row in range(rows)
        ]
    )


@pytest.fixture
def with_fast(monkeypatch):
    """The reference takes ``fast`` directions too."""
    monkeypatch.setitem(reference._DIRECTIONS, "fast", fast_direction)
    monkeypatch.setattr(reference, "DISTRIBUTIONS", cuda.DISTRIBUTIONS)


@functools.cache
def expected_of(operation, dtype, distribution, rounding):
    tensors, arguments = zoo(dtype, unguarded)
    return operation(
        Plan(tensors, **arguments),
        tensors,
        unguarded,
        distribution=distribution,
        rounding=rounding,
        backend="reference",
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("distribution", cuda.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("operation", [perturb, perturb_into, update, momentum])
def test_the_bits_of_the_reference(
    on_host, with_fast, guarded, operation, dtype, distribution, rounding, shape
):
    expected = expected_of(operation, dtype, distribution, rounding)
    on_host(shape)
    tensors, arguments = zoo(dtype, guarded)
    got = operation(
        Plan(tensors, **arguments),
        tensors,
        guarded,
        distribution=distribution,
        rounding=rounding,
        backend="cuda",
    )
    for i in range(len(got)):
        assert_same_bits(got[i], expected[i], i)
    if rounding == "stochastic":
        nearest = expected_of(operation, dtype, distribution, "nearest")
        differs = any(
            not torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(got, nearest, strict=True)
        )
        assert differs == (dtype != torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("distribution", cuda.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("operation", [sample, both_moments])
def test_the_bits_of_the_reference_where_nothing_is_chosen_to_round(
    on_host, with_fast, guarded, operation, dtype, distribution, shape
):
    expected = expected_of(operation, dtype, distribution, "nearest")
    on_host(shape)
    tensors, arguments = zoo(dtype, guarded)
    got = operation(
        Plan(tensors, **arguments),
        tensors,
        guarded,
        distribution=distribution,
        rounding="nearest",
        backend="cuda",
    )
    for i in range(len(got)):
        assert_same_bits(got[i], expected[i], i)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_stochastic_stores_of_numbers_of_every_size(on_host, guarded, dtype):
    """From far below the type's least number to beyond its largest."""
    on_host((2, 64))
    for exponent in range(-149, 128, 3):
        results = []
        for backend in ("cuda", "reference"):
            w = guarded(1030, dtype).zero_()
            state = PhiloxState(KEY, exponent % 2**32)
            perturb_(Plan([w]), state, 2.0**exponent, rounding="stochastic", backend=backend)
            results.append(w)
        assert_same_bits(*results, exponent)


@pytest.mark.parametrize("distribution", SAME_BITS)
@pytest.mark.parametrize("offset", [2**34 - 700, 2**34, 2**39 - 700, 2**41 + 129])
def test_random_words_beyond_one_high_word(on_host, guarded, distribution, offset):
    """A call of stochastic stores is shared by four elements, also where one of signs by 128."""
    on_host((2, 64))
    results = []
    for backend in ("cuda", "reference"):
        w = guarded(1500, torch.bfloat16, 3)
        w.copy_(weights(1500, torch.bfloat16, 0))
        update_(
            Plan([w]),
            [PhiloxState(KEY, k, offset) for k in (7, 5)],
            *coefficients(2, True),
            lr=3e-3,
            distribution=distribution,
            rounding="stochastic",
            backend=backend,
        )
        results.append(w)
    assert_same_bits(*results)


FIRST = (0.0, -0.0, 1e-45, -1e-39, 1e-25, -1e-12, 1.0, 1e12, -1e25, 3e38)
SECOND = (0.0, 1e-45, 1e-38, 2.0**-101, 3e-31, 1e-12, 1.0, 1e20, 3e38)


@pytest.mark.parametrize("eps", [1e-45, 1e-38, 1e-8, 1.0, 1e18, 2e18, 3e38])
def test_updates_with_sums_of_every_size(on_host, eps):
    """Roots and quotients where the steps of csrc/cuda/quotients.cuh hold, where they do not, and
    where both are in one thread."""
    for first, second in itertools.product(FIRST, SECOND):
        results = []
        for backend in ("cuda", "native"):
            w = torch.zeros(600)
            sums = [first, first / 3], [second, second / 7]
            update_(Plan([w]), states(2), *sums, lr=1.0, eps=eps, backend=backend)
            results.append(w)
        assert_same_bits(*results, (first, second))


# --- low-rank directions of matrices --------------------------------------------------------------


@pytest.mark.parametrize("distribution", low_rank.RANKS)
@pytest.mark.parametrize("shape", low_rank.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_low_rank_of_every_shape(on_host, shape, distribution, dtype):
    places = low_rank.SHAPES.index(shape), low_rank.RANKS.index(distribution), TYPES.index(dtype)
    on_host(SHAPES[sum(places) % len(SHAPES)])
    got = low_rank.operations(shape, distribution, dtype, "cuda")
    expected = low_rank.of_reference(shape, distribution, dtype)
    for mine, right in zip(got, expected, strict=True):
        assert_same_bits(mine, right)


@pytest.mark.parametrize("columns", [7, 40, 200])
def test_low_rank_pieces_of_a_parameter(on_host, guarded, columns):
    on_host((3, 64))
    options = {"distribution": "lowrank:2", "backend": "native"}
    whole = sample_(torch.empty(24, columns), low_rank.STATE, **options)
    for dtype in TYPES:
        for shift, (piece, shard) in enumerate(low_rank.pieces(whole)):
            got = guarded(piece.numel(), dtype, shift).view(piece.shape)
            plan = Plan([got], shards=[shard])
            run_call(Call("sample", plan, Terms.of([low_rank.STATE]), "lowrank:2"), "cuda")
            assert_same_bits(got, piece.to(dtype).contiguous(), shard)


@pytest.mark.parametrize(("count", "rank"), [(2, 64), (40, 3)])
def test_more_terms_than_shared_memory_holds(on_host, count, rank):
    """The factors are then made in parts, also within a direction."""
    on_host((2, 64))
    kind = (f"lowrank:{rank}", "nearest")
    results = []
    for backend in ("cuda", "native"):
        shapes = [(70, 140), (300,), (300, 8)]
        tensors = [weights(math.prod(s), torch.bfloat16, i).view(s) for i, s in enumerate(shapes)]
        run_update(Plan(tensors), (count, True, 1e-3, 0.1), backend, kind)
        results.append(tensors)
    for got, right in zip(*results, strict=True):
        assert_same_bits(got, right)


@pytest.mark.parametrize("rule", NUMBERS)
@pytest.mark.parametrize("shape", [(300, 8), (9, 130), (64, 64), (40,)], ids=str)
def test_rules_along_low_rank_directions(on_host, rule, shape):
    on_host((2, 96))
    results = []
    for backend in ("cuda", "native"):
        w = weights(math.prod(shape), torch.bfloat16, 3).view(shape)
        plan, own = with_buffers(rule, [w], {}, torch.float16, unguarded)
        terms, options = terms_of(rule), {"rounding": "stochastic"}
        run_call(Call("perturb", plan, terms, "lowrank:20", scale=1e-2, **options), backend)
        if RULES[rule].updates:
            call = Call("update", plan, terms, "lowrank:20", scale=-1e-2, eps=EPS, **options)
            run_call(call, backend)
        results.append([w, *(b for each in own for b in each)])
    for got, right in zip(*results, strict=True):
        assert_same_bits(got, right)


def test_tables_of_tiles_belong_to_an_offset(on_host):
    """Where a matrix has other rows at another offset, it has other tiles."""
    results = []
    for backend in ("cuda", "native"):
        w = weights(700 * 9, torch.float32, 3).view(700, 9)
        plan = Plan([w])
        for offset in (0, 9 * 130, 2**33 + 5, 0):
            state = PhiloxState(KEY, 3, offset)
            perturb_(plan, state, 1e-2, distribution="lowrank", backend=backend)
        results.append(w)
    assert_same_bits(*results)


# --- rules that keep numbers for each weight -----------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("buffer_dtype", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", NUMBERS)
def test_rules_have_the_bits_of_the_reference(
    on_host, guarded, rule, dtype, buffer_dtype, kind, shape
):
    on_host(shape)
    got = run(rule, dtype, buffer_dtype, kind, "cuda", guarded)
    expected = by_reference(rule, dtype, buffer_dtype, kind)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a, b, i)
    if kind[1] == "stochastic":
        nearest = by_reference(rule, dtype, buffer_dtype, (kind[0], "nearest"))
        count = len(zoo(dtype, unguarded)[0])  # weights, then buffers
        for part, of in ((slice(count), dtype), (slice(count, None), buffer_dtype)):
            pairs = zip(got[part], nearest[part], strict=True)
            differs = any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
            assert differs == (of != torch.float32 and bool(got[part]))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", NUMBERS)
def test_rules_along_fast_directions(on_host, with_fast, guarded, rule, rounding):
    on_host((5, 64))
    kind = ("fast", rounding)
    got = run(rule, torch.bfloat16, torch.bfloat16, kind, "cuda", guarded)
    expected = run(rule, torch.bfloat16, torch.bfloat16, kind, "reference", unguarded)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a, b, i)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].has_direction])
def test_bent_directions_out_of_place(on_host, guarded, rule, dtype):
    """To addresses aligned in other ways than those that are read; nothing else is written."""
    results = []
    for backend in ("cuda", "reference"):
        on_host((3, 64))
        tensors, layout = zoo(dtype, guarded)
        plan, buffers = with_buffers(rule, tensors, layout, torch.bfloat16, guarded)
        read = [*tensors, *(buffer for kept in buffers for buffer in kept)]
        before = [tensor.clone() for tensor in read]
        out = [guarded(t.numel(), dtype, i % 9).view(t.shape) for i, t in enumerate(tensors)]
        perturb_(plan.into(out), terms_of(rule), RESTORE, rounding="stochastic", backend=backend)
        for i, tensor in enumerate(read):
            assert_same_bits(tensor, before[i], f"source {i}")
        results.append(out)
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_same_bits(a, b, i)


@pytest.mark.parametrize("distribution", SAME_BITS)
@pytest.mark.parametrize("offset", [2**34 - 702, 2**34, 2**39 - 700, 2**41 + 129])
@pytest.mark.parametrize("rule", NUMBERS)
def test_rules_beyond_one_high_word(on_host, guarded, rule, distribution, offset):
    on_host((2, 64))
    results = []
    for backend in ("cuda", "reference"):
        w = guarded(1500, torch.bfloat16, 3)
        w.copy_(weights(1500, torch.bfloat16, 0))
        plan, buffers = with_buffers(rule, [w], {}, torch.float16, guarded)
        found = [PhiloxState(KEY, 7 - k, offset) for k in range(RULES[rule].directions)]
        terms = Terms.of(found, minus_lr=-LR, rule=rule, numbers=NUMBERS[rule])
        options = {"distribution": distribution, "rounding": "stochastic", "backend": backend}
        perturb_(plan, terms, -RESTORE, **options)
        if RULES[rule].updates:
            update_terms_(plan, terms, eps=EPS, restore=RESTORE, **options)
        results.append([w, *buffers[0]])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_same_bits(a, b, i)


@pytest.mark.parametrize("rule", ["adam", "helene"])
def test_a_rule_without_a_direction_perturbs_along_z(on_host, rule):
    a, b = torch.ones(1000), torch.ones(1000)
    plan, _ = with_buffers(rule, [a], {}, torch.float32, unguarded)
    perturb_(plan, terms_of(rule), 0.5, backend="cuda")
    perturb_(Plan([b]), terms_of(rule).states()[0], 0.5, backend="reference")
    assert_same_bits(a, b)


# --- against the kernels of the CPU --------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", UPDATES, ids=str)
def test_update(on_host, guarded, case, dtype):
    on_host(SHAPES[UPDATES.index(case) % len(SHAPES)])
    count, with_second, restore, weight_decay = case
    on_both(
        lambda plan, _, backend: update_(
            plan,
            states(count),
            *coefficients(count, with_second),
            lr=3e-3,
            eps=1e-8,
            weight_decay=weight_decay,
            restore=restore,
            backend=backend,
        ),
        dtype,
        guarded,
    )


@pytest.mark.parametrize("with_second", [True, False])
@pytest.mark.parametrize("count", [1, 10])
def test_moments(on_host, guarded, count, with_second):
    tensors, arguments = zoo(torch.bfloat16, guarded)
    plan = Plan(tensors, **arguments)
    sums = coefficients(count, with_second)
    got = moments(plan, states(count), *sums, backend="cuda")
    expected = moments(plan, states(count), *sums, backend="native")
    for i in range(len(tensors)):
        assert_same_bits(got[0][i], expected[0][i], i)
        assert_same_bits(got[1][i], expected[1][i], i)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_directions(on_host, shape):
    on_host(shape)
    results = []
    for backend in ("cuda", "native"):
        w = weights(1200, torch.bfloat16, 0)
        update_(
            Plan([w]),
            states(1024),
            *coefficients(1024, True),
            lr=1e-3,
            restore=1e-3,
            backend=backend,
        )
        results.append(w)
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("numel", [511, 512, 513, 1024, 70001])
@pytest.mark.parametrize("offset", [0, 1, 8, 2**34 - 512, 2**34 - 513])
def test_sizes_about_a_window(on_host, guarded, numel, offset, dtype):
    on_host((3, 64))
    state = PhiloxState(KEY, 5, offset)
    for shift in (0, 1, 4, 8):
        w = guarded(numel, dtype, shift)
        sample_(w, state, backend="cuda")
        assert_same_bits(w, sample_(torch.empty_like(w), state, backend="native"), shift)


def test_rademacher_signs_are_the_bits_of_a_call():
    key, direction, parameter, block = KEY, 77, 5, 3
    words = reference.philox4x32(block, 0, direction, parameter, key)
    expected = [1.0 - 2.0 * (words[i // 32] >> i % 32 & 1) for i in range(128)]
    z = torch.empty(128)
    sample_(
        z,
        PhiloxState(key, direction, 128 * block),
        parameter=parameter,
        distribution="rademacher",
        backend="reference",
    )
    assert z.tolist() == expected
    assert set(expected) == {-1.0, 1.0}


def test_rademacher_beyond_one_high_word(on_host):
    """2**39 elements share the high word of their blocks."""
    for offset in (2**39 - 700, 2**39, 2**41 + 129):
        state = PhiloxState(KEY, 9, offset)
        z, expected = (
            sample_(torch.empty(1500), state, distribution="rademacher", backend=backend)
            for backend in ("cuda", "reference")
        )
        assert_same_bits(z, expected, offset)


def test_fast_normals_are_near_the_exact_ones(on_host):
    """On the host the four functions are libm's, within 2^-23 of their value, and u is the same.
    z = R sin(angle): R collects half of the error of the logarithm and of one product, and a
    root's, 2^-22 together; the angle, at most pi, is a product away from exact, 2^-22; the sine and
    the last product add 2^-22. So z is within R 3 2^-22, and `exact` within 2e-6 of the truth."""
    z, exact = (
        sample_(
            torch.empty(1 << 18), PhiloxState(KEY, 3), distribution=distribution, backend="cuda"
        )
        for distribution in ("fast", "exact")
    )
    assert z.isfinite().all()
    pairs = exact.double().view(-1, 2)
    radius = pairs.square().sum(1, keepdim=True).sqrt()
    difference = (z.double().view(-1, 2) - pairs).abs()
    assert (difference <= 3 * radius * 2.0**-22 + 2e-6).all()
    assert not torch.equal(z, exact)  # a stream of its own


def test_high_words():
    def highs(shard, rows_length, offset=0):
        plan = Plan([torch.empty(rows_length)], shards=[shard])
        return cuda.high_words(plan.launches[0], offset)

    assert highs(None, 100) == [0]
    assert highs(Shard(offset=2**34 - 50), 100) == [0, 1]
    assert highs(Shard(offset=2**34 - 50), 50) == [0]
    assert highs(None, 100, offset=5 * 2**34) == [5]
    assert highs(Shard(offset=0, rows=4, stride=2**34), 100) == [0, 1, 2, 3]
    assert highs(Shard(offset=2**34 - 10, rows=2, stride=2**62), 40) == [0, 1, 2**28, 2**28 + 1]


def test_tensors_without_elements_have_no_high_words(on_host):
    """Where their first element would be a multiple of 2**34, the call's offset included."""
    nothing = [None, Shard(2**34), Shard(7, rows=4, stride=2**35), Shard(2**70, rows=2**40)]
    for shard in nothing:
        (launch,) = Plan([torch.empty(0)], shards=[shard]).launches
        assert launch.last_index == -1
        for offset in (0, 2**34, 5 * 2**34 - 1):
            assert cuda.high_words(launch, offset) in ([], [0])
    for offset in (0, 2**34, 3 * 2**34 - 9):
        ends = []
        for backend in ("cuda", "native", "reference"):
            some = [torch.ones(n) for n in (20, 0, 0, 0, 0, 5, 0)]
            plan = Plan(some, shards=[Shard(2**34), *nothing, None, Shard(2**34)])
            perturb_(plan, PhiloxState(KEY, 9, offset), 1.0, backend=backend)
            ends.append(some)
        for other in ends[1:]:
            for a, b in zip(ends[0], other, strict=True):
                assert_same_bits(a, b, offset)


# --- words: carried by launches, or in memory ----------------------------------------------------


@pytest.mark.parametrize("count", [1, 84, 85, 300])
def test_few_words_of_the_host_are_carried(on_host, monkeypatch, count):
    """By every launch of a call: nothing is allocated for them, nor copied."""
    copied = []
    copy = OnHost.copy
    monkeypatch.setattr(OnHost, "copy", lambda at, w: copied.append(len(w)) or copy(at, w))
    results = []
    for backend in ("cuda", "native"):
        # Of two high words and with a vector among matrices: of four launches.
        w = [torch.zeros(shape, dtype=torch.bfloat16) for shape in ((40, 16), (700,))]
        plan = Plan(w, shards=[None, Shard(2**34 - 300, columns=0)])
        for kind in KINDS:
            run_update(plan, (count, True, 1e-3, 0.1), backend, kind.values[0])
        results.append(w)
    for got, right in zip(*results, strict=True):
        assert_same_bits(got, right)
    assert copied == ([] if count < 85 else [3 * count + 2] * len(KINDS))


@pytest.mark.parametrize("distribution", SAME_BITS)
@pytest.mark.parametrize("rule", ["moments", *NUMBERS])
def test_few_words_in_memory(on_host, monkeypatch, rule, distribution):
    """As those of a captured step are on the device."""
    monkeypatch.setattr(cuda, "MOST_CARRIED", 0)
    kind = (distribution, "stochastic")
    if rule == "moments":
        tensors, arguments = zoo(torch.bfloat16, unguarded)
        run_update(Plan(tensors, **arguments), (3, True, 1e-3, 0.1), "cuda", kind)
        expected, arguments = zoo(torch.bfloat16, unguarded)
        run_update(Plan(expected, **arguments), (3, True, 1e-3, 0.1), "native", kind)
    else:
        tensors = run(rule, torch.bfloat16, torch.float32, kind, "cuda", unguarded)
        expected = by_reference(rule, torch.bfloat16, torch.float32, kind)
    for i, (got, right) in enumerate(zip(tensors, expected, strict=True)):
        assert_same_bits(got, right, i)


@pytest.mark.parametrize("count", [1, 300])
def test_a_capture_refuses_words_of_the_host(on_host, monkeypatch, count):
    monkeypatch.setattr(OnHost, "capturing", lambda self: True)
    w = torch.ones(9)
    with pytest.raises(RuntimeError, match=r"terms on the host would keep .* capturable=True"):
        run_update(Plan([w]), (count, True, 1e-3, 0.1), "cuda")
    assert (w == 1).all()


def test_a_launch_has_room_for_the_words_that_it_carries(on_host, monkeypatch):
    monkeypatch.setattr(cuda, "MOST_CARRIED", 10**6)
    options = {"backend": "cuda", "lr": 1.0}
    update_(Plan([torch.ones(9)]), states(84), *coefficients(84, True), **options)
    with pytest.raises(ValueError, match="carries up to 256 words, got 257"):
        update_(Plan([torch.ones(9)]), states(85), *coefficients(85, True), **options)


def test_staged_tensors(on_host, monkeypatch):
    """Their copies are launches of their own, with tables that are copied once."""
    monkeypatch.setattr(staging, "BLOCK", 500)
    tensors = [weights(40 * 31, torch.float16, 1).view(40, 31).t(), weights(90, torch.float16, 2)]
    expected = [tensor.contiguous().clone() for tensor in tensors]
    plan = Plan(tensors, shards=[Shard(2**34 - 99), None])
    for kind in (plan, Plan(expected, shards=[Shard(2**34 - 99), None])):
        backend = "cuda" if kind is plan else "reference"
        for _ in range(2):
            update(kind, None, None, backend=backend, rounding="stochastic")
    for got, right in zip(tensors, expected, strict=True):
        assert_same_bits(got, right)
    (batches,) = plan.batches.values()
    assert [len(batch.plan.launches[0].copies) for batch in batches] == [1, 1, 1]


def test_the_table_of_a_plan_is_copied_once(on_host):
    plan = Plan([torch.zeros(10)])
    perturb_(plan, PhiloxState(KEY, 1), 1.0, backend="cuda")
    (table,) = plan.launches[0].copies.values()
    perturb_(plan, PhiloxState(KEY, 2), 1.0, backend="cuda")
    assert next(iter(plan.launches[0].copies.values())) is table


def test_a_failed_launch_names_everything(on_host, monkeypatch):
    def fail(self, call, highs):
        raise RuntimeError("launching: cudaErrorNoKernelImageForDevice, no kernel image")

    monkeypatch.setattr(OnHost, "run", fail)
    with pytest.raises(
        RuntimeError,
        match=r"(?s)update of torch.float32 tensors \(2, 3\) on cpu along 2 exact direction.*"
        r"cudaErrorNoKernelImageForDevice.*built by",
    ):
        update_(Plan([torch.zeros(2, 3)]), states(2), [1, 1], None, lr=1.0, backend="cuda")


# --- which backend, and what is said where there is none ----------------------------------------


def test_mixed_devices_are_refused():
    devices = [torch.device("cpu"), torch.device("cuda:1")]
    with pytest.raises(RuntimeError, match=r"on cpu, cuda:1, expected devices of one type"):
        choose(devices)


def test_the_automatic_choice(monkeypatch):
    cpu, gpu = [torch.device("cpu")], [torch.device("cuda:0"), torch.device("cuda:1")]
    assert choose(cpu) is native
    monkeypatch.setattr(cuda, "availability", lambda: (False, "no driver"))
    assert choose(gpu) is reference
    with pytest.raises(RuntimeError, match="cuda has .*, lowrank, and cannot run: no"):
        choose(gpu, distribution="fast")
    with pytest.raises(RuntimeError, match=r"'fast' for tensors on cpu: native has exact"):
        choose(cpu, distribution="fast")
    monkeypatch.setattr(cuda, "availability", lambda: (True, ""))
    assert choose(gpu) is cuda
    assert choose(gpu, distribution="fast") is cuda
    assert choose(cpu) is native


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_named_backend_never_falls_back():
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available"):
        perturb_(Plan([torch.zeros(3)]), PhiloxState(0, 0), 1.0, backend="cuda")


@pytest.mark.parametrize(
    ("found", "torch_cuda", "expected"),
    [
        ({"driver_version": 0}, "13.0", "no NVIDIA driver: install one"),
        ({"driver_version": 12040}, "13.0", "for CUDA up to 12.4: install a driver for CUDA 13.0"),
        ({"devices": 0, "error": "no CUDA-capable device"}, "13.0", "finds no device (no CUDA-cap"),
        ({}, None, "is without CUDA: install a CUDA build of torch"),
        ({}, "13.0", ""),
    ],
)
def test_what_is_missing_is_said(found, torch_cuda, expected):
    status = {"driver_version": 13000, "runtime_version": 13000, "devices": 2, "error": ""} | found
    usable, reason = cuda._usable("nvcc 13.0 for 90", torch_cuda, status)
    assert usable == (not expected)
    assert expected in reason


def test_a_module_without_cuda_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(native, "build_report", lambda: {"cuda": "off: no nvcc", "compiler": "x"})
    usable, reason = cuda.availability.__wrapped__()
    assert not usable
    assert "without CUDA (off: no nvcc)" in reason
    assert "ADAMEZO_CUDA=ON" in reason


def test_every_backend_is_registered_under_its_name():
    assert {name: backend.NAME for name, backend in BACKENDS.items()} == {n: n for n in BACKENDS}
