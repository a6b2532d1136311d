"""The operations: their rule against float64, native against the reference bit for bit, and every
argument that is refused."""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time

import pytest
import torch

from adamezo_kernels import PhiloxState, Plan, Shard, moments, perturb_, sample_, update_
from adamezo_kernels.backends import choose, native, reference
from helpers.backends import BACKENDS, INSTRUCTION_SETS, needs_native
from helpers.operations import (
    DISTRIBUTIONS,
    INTEGERS,
    KEY,
    KINDS,
    TYPES,
    UPDATES,
    assert_same_bits,
    coefficients,
    run_moments,
    run_perturb,
    run_update,
    samples,
    states,
    unguarded,
    weights,
    zoo,
)

# --- a plan with one tensor of every kind -------------------------------------------------------


@functools.cache
def reference_samples(dtype: torch.dtype, distribution: str) -> list[torch.Tensor]:
    tensors, _ = zoo(dtype, unguarded)
    return samples(tensors, distribution, "reference")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sample_has_the_bits_of_the_reference(isa, guarded, distribution, dtype, threads):
    tensors, _ = zoo(dtype, guarded)
    torch.set_num_threads(threads)
    samples(tensors, distribution, "native")
    expected = reference_samples(dtype, distribution)
    for i in range(len(tensors)):
        assert_same_bits(tensors[i], expected[i], i)


@functools.cache
def reference_perturb(dtype: torch.dtype, kind: tuple[str, str]) -> list[torch.Tensor]:
    tensors, arguments = zoo(dtype, unguarded)
    run_perturb(Plan(tensors, **arguments), kind, "reference")
    return tensors


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_perturb_has_the_bits_of_the_reference(isa, guarded, dtype, kind, threads):
    tensors, arguments = zoo(dtype, guarded)
    torch.set_num_threads(threads)
    run_perturb(Plan(tensors, **arguments), kind, "native")
    for i, (got, expected) in enumerate(zip(tensors, reference_perturb(dtype, kind), strict=True)):
        assert_same_bits(got, expected, i)


def check_out_of_place(dtype: torch.dtype, kind: tuple[str, str], guarded, backend: str) -> None:
    tensors, arguments = zoo(dtype, guarded)
    before = [tensor.clone() for tensor in tensors]
    outputs = [guarded(t.numel(), dtype, i % 8).view(t.shape) for i, t in enumerate(tensors)]
    run_perturb(Plan(tensors, **arguments).into(outputs), kind, backend)
    for i, expected in enumerate(reference_perturb(dtype, kind)):
        assert_same_bits(outputs[i], expected, i)
        integers = INTEGERS[dtype]
        assert torch.equal(tensors[i].view(integers), before[i].view(integers)), "source changed"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_perturb_out_of_place_is_in_place_on_a_copy(isa, guarded, dtype, kind, threads):
    """The sources at odd addresses and in rows, the outputs at other addresses."""
    torch.set_num_threads(threads)
    check_out_of_place(dtype, kind, guarded, "native")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_reference_out_of_place_is_in_place_on_a_copy(guarded, dtype, kind):
    check_out_of_place(dtype, kind, guarded, "reference")


@functools.cache
def reference_update(dtype: torch.dtype, case: tuple, kind: tuple) -> list[torch.Tensor]:
    tensors, arguments = zoo(dtype, unguarded)
    run_update(Plan(tensors, **arguments), case, "reference", kind)
    return tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", UPDATES, ids=str)
def test_update_has_the_bits_of_the_reference(isa, guarded, case, dtype, kind):
    tensors, arguments = zoo(dtype, guarded)
    run_update(Plan(tensors, **arguments), case, "native", kind)
    for i, (got, expected) in enumerate(
        zip(tensors, reference_update(dtype, case, kind), strict=True)
    ):
        assert_same_bits(got, expected, i)


@functools.cache
def reference_moments(count: int, with_second: bool, distribution: str) -> tuple[list, list]:
    tensors, arguments = zoo(torch.bfloat16, unguarded)
    return run_moments(Plan(tensors, **arguments), count, with_second, distribution, "reference")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("with_second", [True, False])
@pytest.mark.parametrize("count", [1, 2, 10, 33])
def test_moments_have_the_bits_of_the_reference(isa, guarded, count, with_second, distribution):
    tensors, arguments = zoo(torch.bfloat16, guarded)
    before = [tensor.clone() for tensor in tensors]
    plan = Plan(tensors, **arguments)
    got = run_moments(plan, count, with_second, distribution, "native")
    expected = reference_moments(count, with_second, distribution)
    for i in range(len(tensors)):
        assert got[0][i].shape == tensors[i].shape
        assert_same_bits(got[0][i], expected[0][i], i)
        assert_same_bits(got[1][i], expected[1][i], i)
        assert_same_bits(tensors[i], before[i], i)  # neither written ...
    if not with_second:
        assert all(v.eq(1).all() for v in got[1])


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_number_of_threads_does_not_matter(dtype, kind):
    """On sizes that are split over threads: many small tensors, long ones, and long rows-strided
    ones, whose rows a split cuts."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tensors = [weights(n, dtype, n) for n in (70001, *range(1, 400, 7), 50000)]
        tensors.append(weights(300 * 517, dtype, 0).view(300, 517)[:, 5:505])
        tensors.append(tensors[-1].clone())
        parameters = [*range(len(tensors) - 1), len(tensors) - 2]
        plan = Plan(tensors, parameters=parameters)
        for case in ((3, True, 1e-3, 0.1), (1, False, 0.0, 0.0)):
            run_update(plan, case, "native", kind)
        run_perturb(plan, kind, "native")
        assert_same_bits(tensors[-1], tensors[-2], "strided and contiguous")
        results.append(tensors)
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize(("distribution", "count"), [("exact", 400), ("rademacher", 1500)])
def test_a_long_horizon(isa, guarded, distribution, count):
    got, expected = guarded(65, torch.float32, 1), weights(65, torch.float32, 2)
    got.copy_(expected)
    for tensor, backend in ((got, "native"), (expected, "reference")):
        run_update(Plan([tensor]), (count, True, 1e-3, 0.1), backend, (distribution, "nearest"))
    assert_same_bits(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_types_mix_in_one_plan(backend):
    together = [weights(500, dtype, 1) for dtype in (*TYPES, *TYPES)]
    alone = [t.clone() for t in together]
    run_update(Plan(together), (2, True, 1e-3, 0.1), backend)
    for i, tensor in enumerate(alone):
        run_update(Plan([tensor], parameters=[i]), (2, True, 1e-3, 0.1), backend)
        assert_same_bits(together[i], tensor, i)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shard_gets_its_part_of_the_whole(backend, kind):
    """A parameter split along either dimension is updated as it is when whole."""
    dtype = torch.bfloat16 if kind[1] == "stochastic" else torch.float32
    whole = weights(48 * 40, dtype, 6).view(48, 40)
    top, bottom = whole[:17].clone(), whole[17:].clone()
    left, right = whole[:, :13].clone(), whole[:, 13:].clone()
    case = (3, True, 1e-3, 0.1)
    run_update(Plan([whole], parameters=[4]), case, backend, kind)
    for piece, shard, expected in (
        (top, Shard(columns=40), whole[:17]),
        (bottom, Shard(offset=17 * 40, columns=40), whole[17:]),
        (left, Shard(rows=48, stride=40, columns=40), whole[:, :13]),
        (right, Shard(offset=13, rows=48, stride=40, columns=40), whole[:, 13:]),
    ):
        run_update(Plan([piece], parameters=[4], shards=[shard]), case, backend, kind)
        assert_same_bits(piece, expected, shard)


# --- the rule, against float64 ------------------------------------------------------------------

UNIT = 2.0**-24  # the largest relative error of one rounding to float32
STORE = {torch.float32: UNIT, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Half the spacing of the smallest numbers of a type, where the relative bound ends.
TINY = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}


def rule_in_float64(theta, z, first, second, lr, eps, weight_decay, restore):
    """The three formulas of the optimizer, and a bound on what float32 may add to them.

    Every fma, product, root, quotient and scalar is off by at most UNIT of its own value. S1 is K
    of them with K rounded coefficients: K + 1 units of the sum of magnitudes. S2, whose terms are
    positive and squared first: K + 2 units. The root halves that and adds its own; eps, the sum
    and the quotient are one each. Products of two errors are under 1 % of the bound.
    """
    count = len(first)
    a = torch.tensor(first, dtype=torch.float64)[:, None]
    t = theta + restore * z[0]
    t_error = UNIT * (2 * (restore * z[0]).abs() + theta.abs())
    s1, s1_error = (a * z).sum(0), (count + 1) * UNIT * (a * z).abs().sum(0)
    if second is None:
        step, step_error = s1, s1_error
    else:
        b = torch.tensor(second, dtype=torch.float64)[:, None]
        root = (b * z * z).sum(0).sqrt() + eps
        step = s1 / root
        step_error = s1_error / root + step.abs() * ((count + 2) / 2 + 4) * UNIT
    decayed = t * (1 - lr * weight_decay)
    result = decayed - lr * step
    error = t_error + 2 * UNIT * decayed.abs() + lr * (step_error + UNIT * step.abs())
    return result, 1.01 * (error + UNIT * result.abs())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", UPDATES, ids=str)
def test_update_is_the_rule_in_float64(case, backend, dtype, distribution):
    count, with_second, restore, weight_decay = case
    lr, eps, n = 0.5, 1e-3, 1000  # large, so that a wrong term is far outside the bound
    theta = torch.randn(n, generator=torch.Generator().manual_seed(8)).to(dtype)
    before = theta.clone().double()
    first, second = coefficients(count, with_second)
    z = torch.stack(
        [
            sample_(
                torch.empty(n),
                state,
                parameter=7,
                distribution=distribution,
                backend="reference",
            )
            for state in states(count)
        ]
    ).double()
    update_(
        Plan([theta], parameters=[7]),
        states(count),
        first,
        second,
        lr=lr,
        eps=eps,
        weight_decay=weight_decay,
        restore=restore,
        distribution=distribution,
        backend=backend,
    )
    expected, bound = rule_in_float64(before, z, first, second, lr, eps, weight_decay, restore)
    # A float32 step off by 0.02 % of the typical one fails.
    assert bound.median() < 2e-4 * (expected - before).abs().median()
    if dtype != torch.float32:
        bound += STORE[dtype] * expected.abs() * 1.01 + TINY[dtype]
    assert ((theta.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_perturb_is_one_rounded_sum(backend, dtype):
    """theta + scale z in float64, exact but for 2**-53, rounded by torch: off by a unit of the
    float32 result at most (scale is taken here as float32 has it), then by the type's store."""
    n, scale = 1000, reference.to_float32(-0.37)
    theta = torch.randn(n, generator=torch.Generator().manual_seed(9)).to(dtype)
    z = sample_(torch.empty(n), PhiloxState(1, 2, 3), parameter=5, backend="reference")
    expected = theta.double() + scale * z.double()
    perturb_(Plan([theta], parameters=[5]), PhiloxState(1, 2, 3), scale, backend=backend)
    bound = (STORE[dtype] + UNIT) * expected.abs() * 1.01 + TINY[dtype]
    assert ((theta.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_are_what_update_divides(backend):
    n, count = 1000, 10
    first, second = coefficients(count, True)
    theta = torch.zeros(n)
    m, v = moments(Plan([theta]), states(count), first, second, backend=backend)
    run_update(Plan([theta]), (count, True, 0.0, 0.0), backend)
    # With theta = 0 and correctly rounded roots and quotients, the same operations in torch.
    eps, lr = reference.to_float32(1e-8), reference.to_float32(3e-3)
    step = (m[0].double() / (v[0].double().sqrt().float() + eps).double()).float()
    assert_same_bits(theta, -lr * step)


def test_apply_update_takes_published_directions():
    """The reference's rule on directions that are given, such as those of a paper's figure, is
    what it does to those that it regenerates."""
    n, count = 257, 4
    theta = torch.randn(n, generator=torch.Generator().manual_seed(10))
    first, second = coefficients(count, True)
    z = [
        sample_(torch.empty(n), state, parameter=0, backend="reference") for state in states(count)
    ]
    expected = reference.apply_update(
        theta, z, first, second, lr=3e-3, eps=1e-8, decay=1 - 3e-3 * 0.1, restore=1e-3
    )
    run_update(Plan([theta]), (count, True, 1e-3, 0.1), "reference")
    assert_same_bits(theta, expected)


# --- stochastic stores --------------------------------------------------------------------------

HALVES = (torch.bfloat16, torch.float16)


def cut(value: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(whole, fraction, unit) in float64, all exact: abs(value) = (whole + fraction) unit, where
    ``unit`` is the last place that ``dtype`` keeps of a number of that size; of ``fraction`` the
    digits beyond 31 count as 0."""
    kept, lowest = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}[dtype]
    exponent = torch.frexp(value.double().abs()).exponent - 1
    one = torch.ones(value.shape, dtype=torch.float64)
    unit = torch.ldexp(one, exponent.clamp(min=lowest) - kept)
    steps = value.double().abs() / unit
    return steps.floor(), ((steps - steps.floor()) * 2**31).floor() / 2**31, unit


def stored(value: torch.Tensor, words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The definition: up where fraction + words / 2**32 >= 1, in float64; in float16 from below
    2**16 not to it."""
    whole, fraction, unit = cut(value, dtype)
    up = fraction + words.double() / 2**32 >= 1
    magnitude = (whole + up) * unit
    if dtype == torch.float16:
        magnitude = torch.where(value.abs() < 2**16, magnitude.clamp(max=65504.0), magnitude)
    result = torch.copysign(magnitude, value.double())
    return torch.where(value.isfinite(), result, value.double()).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_reference_rounds_stochastically_as_defined(dtype):
    """Random bit patterns, with random words and with those just on either side of a step up."""
    generator = torch.Generator().manual_seed(12)
    bits = torch.randint(-(2**31), 2**31, (2**19,), generator=generator)
    # Half of them where float16 ends, at either end.
    bits[::4] = torch.randint(0x2F800000, 0x39000000, (2**17,), generator=generator)
    bits[1::4] = -(2**31) + torch.randint(0x47700000, 0x47900000, (2**17,), generator=generator)
    value = bits.to(torch.int32).view(torch.float32)
    top = torch.finfo(dtype).max
    corners = (0.0, -0.0, 1e-45, 2.0**-126, 2.0**-24, 2.0**-14, math.inf, -math.inf, math.nan)
    value[: len(corners)] = torch.tensor(corners)
    value[20:30] = top * torch.linspace(1, 1 + 2.0**-8, 10)
    _, fraction, _ = cut(value, dtype)
    step = ((1 - fraction) * 2**32).nan_to_num().long()
    for words in (
        torch.randint(2**32, value.shape, generator=generator),
        step.clamp(max=2**32 - 1),
        (step - 1).clamp(min=0),
        torch.zeros_like(step),
        torch.full_like(step, 2**32 - 1),
    ):
        got = reference.round_stochastically(value, words, dtype)
        assert_same_bits(got, stored(value, words, dtype))
    assert (step < 2**32).sum() > 2**17, "few values lie between two of the type"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-9, 3e-8, 3e-6, 1e-3, 30.0, 1e38])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sums_with_every_weight_are_stored_as_by_the_reference(isa, dtype, scale, distribution):
    """All 2**16 bit patterns of the type, NaN and infinities among them."""
    theta = torch.arange(2**16).to(torch.int16).view(dtype)
    results = []
    for backend in ("native", "reference"):
        results.append(theta.clone())
        perturb_(
            Plan(results[-1:]),
            PhiloxState(KEY, 4),
            scale,
            distribution=distribution,
            rounding="stochastic",
            backend=backend,
        )
    assert_same_bits(*results)


def place_of(words: list[int]) -> tuple[PhiloxState, int]:
    """A state and a parameter whose first four elements are stored with these random words: Philox
    run backwards, with one key after the other until the counter it gives is one that can be."""
    inverses = [pow(multiplier, -1, 2**32) for multiplier in reference.PHILOX_MULTIPLIERS]
    for key in itertools.count():
        x = words
        for number in reversed(range(10)):
            round_key = [
                ((key >> shift) + number * step) % 2**32
                for shift, step in zip((0, 32), reference.PHILOX_KEY_STEPS, strict=True)
            ]
            c0, c2 = x[3] * inverses[0] % 2**32, x[1] * inverses[1] % 2**32
            high0 = c0 * reference.PHILOX_MULTIPLIERS[0] >> 32
            high1 = c2 * reference.PHILOX_MULTIPLIERS[1] >> 32
            x = [c0, x[0] ^ high1 ^ round_key[0], c2, x[2] ^ high0 ^ round_key[1]]
        if x[3] >> 24 == reference.PURPOSE_ROUNDING and x[1] < 2**29:
            return PhiloxState(key, x[2], 4 * (x[0] | x[1] << 32)), x[3] % 2**24


@pytest.mark.parametrize("words", [[2**32 - 1, 0, 2**31, 2**31 - 1], [1, 2**32 - 2, 2**16, 2**19]])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rare_words_round_as_defined(isa, dtype, words):
    """Words that no test would meet by chance, with numbers of every size: +v and -v are the sums
    of 0 and v times a sign."""
    state, parameter = place_of(words)
    z = sample_(torch.empty(4), state, parameter=parameter, distribution="rademacher")
    ups = 0
    for exponent in range(-149, 128):
        for significand in (1.0, 1.5, 1 + 2.0**-10, 2 - 2.0**-23):
            scale = reference.to_float32(math.ldexp(significand, exponent))
            theta = torch.zeros(4, dtype=dtype)
            perturb_(
                Plan([theta], parameters=[parameter]),
                state,
                scale,
                distribution="rademacher",
                rounding="stochastic",
                backend="native",
            )
            expected = stored(scale * z, torch.tensor(words), dtype)
            assert_same_bits(theta, expected, (exponent, significand))
            ups += (theta.double().abs() > scale).sum().item()
    assert ups > 100


# A weight and what is added to it or taken from it: (theta, step). The sums lie between two
# numbers of the type, some of them subnormal, and not half-way.
BETWEEN = {
    torch.bfloat16: [
        (0.0, 1e-41),
        (1e-40, 4e-41),
        (2.0**-126, 2e-41),
        (-0.02, 1e-5),
        (1.0, 1e-3),
        (-100.0, 0.06),
        (3e38, 3e35),
    ],
    torch.float16: [
        (0.0, 1.5e-9),
        (0.0, 4e-8),
        (2e-6, 1.7e-8),
        (-(2.0**-14), 1e-8),
        (-0.02, 1e-6),
        (1.0, 1e-4),
        (65408.0, 3.0),
    ],
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_stores_have_the_right_mean(backend, dtype):
    """100,000 draws of each sum, in 100 directions.

    A store is off by some e in [-fraction, 1 - fraction] units, and of mean 0 if it goes up with
    probability `fraction`. Times the sign of the step, so that a rule that always does the same
    with a number does not cancel, it stays so. By Hoeffding's inequality the mean of n independent
    ones exceeds t units with probability at most 2 exp(-2 n t^2): 1e-9 for the t used here, 0.0104.
    To nearest, e has a mean of min(fraction, 1 - fraction), twice as much at least.
    """
    directions, copies = 100, 1000
    limit = math.sqrt(math.log(2 / 1e-9) / (2 * directions * copies))
    count = len(BETWEEN[dtype])
    theta = [torch.full((copies,), start, dtype=dtype) for start, _ in BETWEEN[dtype]]
    outs = [torch.empty_like(t) for t in theta]
    plans = [
        Plan([t], parameters=[i]).into([out])
        for i, (t, out) in enumerate(zip(theta, outs, strict=True))
    ]
    errors, least, seen = [0.0] * count, [1.0] * count, [set() for _ in range(count)]
    for direction in range(directions):
        state = PhiloxState(KEY, direction)
        for i, (_, step) in enumerate(BETWEEN[dtype]):
            z = sample_(
                torch.empty(copies),
                state,
                parameter=i,
                distribution="rademacher",
                backend=backend,
            )
            perturb_(
                plans[i],
                state,
                step,
                distribution="rademacher",
                rounding="stochastic",
                backend=backend,
            )
            value = reference.apply_perturbation(theta[i], z, step)
            _, fraction, unit = cut(value, dtype)
            error = (outs[i].double() - value.double()) / unit
            assert ((error > -1) & (error < 1)).all()
            errors[i] += (error * z).sum().item() / (directions * copies)
            least[i] = min(least[i], fraction.min().item(), (1 - fraction).min().item())
            seen[i] |= set(outs[i].tolist())
    for i, case in enumerate(BETWEEN[dtype]):
        assert least[i] > 2 * limit, (case, "too near to a number of the type to tell")
        assert len(seen[i]) >= 3, case
        assert abs(errors[i]) < limit, case


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_stores_can_be_repeated_and_float32_has_none(backend):
    for dtype in TYPES:
        results = []
        for rounding in ("stochastic", "stochastic", "nearest"):
            results.append(weights(1000, dtype, 13))
            run_update(Plan(results[-1:]), (2, True, 1e-3, 0.1), backend, ("exact", rounding))
        again, nearest = results[1:]
        assert_same_bits(results[0], again)
        different = (results[0] != nearest) & ~nearest.isnan()
        assert different.any() == (dtype != torch.float32)


# --- the process around a call ------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("operation", ["sample", "perturb", "update", "moments"])
def test_kernels_release_the_interpreter_lock(operation):
    """Another Python thread wakes every millisecond or so during a call of 0.1 s or more; were the
    lock held, it could not wake once."""
    theta = torch.zeros(2**24)
    plan = Plan([theta])
    first, second = coefficients(1, True)
    state = PhiloxState(1, 2)
    call = {
        "sample": lambda: sample_(theta, state, backend="native"),
        "perturb": lambda: perturb_(plan, state, 0.1, backend="native"),
        "update": lambda: update_(plan, [state], first, second, lr=1.0, backend="native"),
        "moments": lambda: moments(plan, [state], first, None, backend="native"),
    }[operation]
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    with native.use_isa("portable"):  # the slowest: the call lasts long enough to see
        thread.start()
        begin = time.perf_counter()
        call()
        end = time.perf_counter()
        done.set()
        thread.join()
    assert sum(begin < t < end for t in ticks) >= 10, end - begin


@pytest.fixture
def flush_to_zero():
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals to zero")
    torch.set_flush_denormal(False)
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


def subnormal_results(dtype: torch.dtype, scale: float, first: list, eps: float) -> list:
    """Weights after operations whose inputs, sums and results are mostly subnormal numbers."""
    size = 40000  # enough for two threads
    tiny = {torch.float32: 1e-39, torch.bfloat16: 1e-39, torch.float16: 2e-6}[dtype]
    integers = torch.randint(0, 2**9, (size,), generator=torch.Generator().manual_seed(11))
    # From bit patterns: torch itself may be flushing.
    results = [integers.to(INTEGERS[dtype]).view(dtype) for _ in range(2)]
    perturb_(Plan(results[:1]), PhiloxState(1, 2), scale, backend="native")
    update_(
        Plan(results[1:]),
        states(2),
        first,
        [2e-38, 4e-38],
        lr=20 * tiny,
        eps=eps,
        restore=scale,
        backend="native",
    )
    return results


def check_flushing_changes_nothing(flush_to_zero, *arguments) -> None:
    expected = subnormal_results(*arguments)
    for t in expected:
        smallest = torch.finfo(t.dtype).smallest_normal
        assert ((t != 0) & (t.abs() < smallest)).sum() > t.numel() // 10, "nothing to flush here"
    flush_to_zero(True)
    got = subnormal_results(*arguments)
    still_flushing = (torch.full((1,), 2e-38) * 1e-3).view(torch.int32).item() == 0
    flush_to_zero(False)
    assert still_flushing, "a kernel left the caller's floating-point mode changed"
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_flushing_subnormals_in_the_process_changes_no_bit(isa, flush_to_zero, dtype, threads):
    """torch.set_flush_denormal, which `-ffast-math` in any library of the process also does."""
    torch.set_num_threads(threads)
    scale = 2e-6 if dtype == torch.float16 else 2e-38
    check_flushing_changes_nothing(flush_to_zero, dtype, scale, [1e-20, 2e-20], 1e-30)


@needs_native
def test_flushing_subnormals_changes_no_scalar(flush_to_zero):
    """Scalars that are subnormal in float32 are rounded to it, not flushed."""
    check_flushing_changes_nothing(flush_to_zero, torch.float32, 1e-39, [1e-40, 2e-41], 1e-42)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_is_told_of_the_write(backend):
    weight = torch.ones(10, requires_grad=True)
    loss = (weight * weight).sum()
    perturb_(Plan([weight]), PhiloxState(1, 2), 0.1, backend=backend)
    assert weight.requires_grad
    assert weight.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_leave_no_trace_in_autograd(backend):
    weight = torch.ones(10, requires_grad=True)
    loss = (weight * weight).sum()
    moments(Plan([weight]), [PhiloxState(1, 2)], [1.0], [1.0], backend=backend)
    loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend):
    with torch.inference_mode():
        theta = torch.zeros(9)
        perturb_(Plan([theta]), PhiloxState(1, 2), 1.0, backend=backend)
    assert_same_bits(theta.clone(), sample_(torch.empty(9), PhiloxState(1, 2), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_plan_is_no_work(backend):
    plan = Plan([])
    perturb_(plan, PhiloxState(1, 2), 1.0, backend=backend)
    run_update(plan, (2, True, 0.0, 0.0), backend)
    assert moments(plan, states(1), [1.0], [1.0], backend=backend) == ([], [])


# --- what is refused ----------------------------------------------------------------------------


def quantized():
    return torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)


BAD_TENSORS = {
    "a list": (lambda: [1.0, 2.0], TypeError, "expected a torch.Tensor, got list"),
    "int64": (lambda: torch.zeros(4, dtype=torch.int64), TypeError, "dtype torch.int64"),
    "bool": (lambda: torch.zeros(4, dtype=torch.bool), TypeError, "dtype torch.bool"),
    "float64": (lambda: torch.zeros(4, dtype=torch.float64), TypeError, "dtype torch.float64"),
    "complex": (lambda: torch.zeros(4, dtype=torch.complex64), TypeError, "dtype torch.complex64"),
    "float8": (lambda: torch.zeros(4).to(torch.float8_e4m3fn), TypeError, "dtype torch.float8"),
    "meta": (lambda: torch.zeros(4, device="meta"), TypeError, "meta device"),
    "sparse": (lambda: torch.eye(4).to_sparse(), TypeError, "layout torch.sparse_coo"),
    "csr": (lambda: torch.eye(4).to_sparse_csr(), TypeError, "layout torch.sparse_csr"),
    "quantized": (quantized, TypeError, "qint8"),
    "negated": (lambda: torch._neg_view(torch.zeros(4)), TypeError, "resolve_neg"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        TypeError,
        "nested",
    ),
    "expanded": (lambda: torch.zeros(1, 4).expand(3, 4), ValueError, "overlap"),
    "overlapping": (lambda: torch.zeros(9).as_strided((3, 4), (2, 1)), ValueError, "overlap"),
    "overlapping by one": (
        lambda: torch.zeros(9).as_strided((4, 3), (2, 1)),
        ValueError,
        "overlap",
    ),
    "overlapping in columns": (
        lambda: torch.zeros(9).as_strided((4, 3), (1, 2)),
        ValueError,
        "overlap",
    ),
    "overlapping somewhere": (
        lambda: torch.zeros(99).as_strided((4, 5, 2), (4, 3, 50)),
        ValueError,
        "overlap",
    ),
    "view of a parameter": (
        lambda: torch.zeros(4, requires_grad=True)[1:],
        ValueError,
        "requires grad",
    ),
    "freed": (
        lambda: (t := torch.zeros(4), t.untyped_storage().resize_(0))[0],
        ValueError,
        "memory",
    ),
}


# Quantized, nested and CSR tensors say when made that they are prototypes or on their way out.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_tensors_that_are_refused(kind):
    make, error, message = BAD_TENSORS[kind]
    with pytest.raises(error, match=message) as raised:
        Plan([torch.zeros(2), make()], names=["fine", "layers.3.weight"])
    assert "layers.3.weight" in str(raised.value)


def test_tensors_that_share_memory_are_refused():
    buffer = torch.zeros(100)
    wide = torch.zeros(10, 20)
    parameter = torch.nn.Parameter(torch.zeros(5))
    pairs = [
        (buffer, buffer),
        (buffer[:10], buffer[9:20]),
        (buffer[10:90], buffer[40:50]),
        (buffer.view(torch.bfloat16)[:4], buffer[1:5]),
        (wide[:, :6], wide[:, 5:10]),
        (wide[:, :6], wide[3]),
        (parameter, parameter.detach()),
    ]
    for a, b in pairs:
        for first, second in ((a, b), (b, a)):
            with pytest.raises(ValueError, match=r"share memory.*tied") as raised:
                Plan([first, torch.zeros(3), second], names=["up", "other", "down"])
            assert "up" in str(raised.value)
            assert "down" in str(raised.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_in_one_buffer_are_not_overlap(backend):
    """Slices of one flat buffer (as FSDP keeps them), and columns of one matrix."""
    buffer, wide = torch.zeros(100), torch.zeros(10, 20)
    tensors = [buffer[:10], buffer[10:40], buffer[40:], wide[:, :6], wide[:, 6:7], wide[:, 7:]]
    perturb_(Plan(tensors), PhiloxState(1, 2), 1.0, backend=backend)
    assert buffer.ne(0).all()
    assert wide.ne(0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameters": [0]}, "1 parameters for 2 tensors"),
        ({"shards": [None]}, "1 shards for 2 tensors"),
        ({"names": ["a", "b", "c"]}, "3 names for 2 tensors"),
        ({"parameters": [0, 2**24]}, r"tensor 1.*2\*\*24"),
        ({"parameters": [-1, 0]}, r"tensor 0.*2\*\*24"),
        ({"parameters": [0.5, 0]}, r"tensor 0.*2\*\*24"),
        ({"shards": [Shard(rows=3, stride=9), None]}, "tensor 0.*8 elements"),
        ({"shards": [Shard(rows=0), None]}, "tensor 0.*8 elements"),
        ({"shards": [Shard(offset=-1), None]}, "tensor 0.*offset=-1"),
        ({"shards": [Shard(rows=2, stride=3), None]}, "tensor 0.*overlap"),
        ({"shards": [Shard(offset=2**63 - 7), None]}, r"tensor 0.*2\*\*63"),
        ({"shards": [Shard(rows=2, stride=2**63 - 2), None]}, r"tensor 0.*2\*\*63"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_plans_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plan([torch.zeros(8), torch.zeros(2)], **arguments)


GOOD = {"states": [PhiloxState(1, 3), PhiloxState(1, 2)], "first": [1.0, 0.5], "second": [1.0, 0.5]}
TOO_LARGE = (math.nan, math.inf, -math.inf, 3.5e38)
BAD_UPDATES = [
    *(({name: x}, f"{name} must be finite") for name in ("lr", "restore") for x in TOO_LARGE),
    *(({name: math.nan}, f"{name} must be finite") for name in ("eps", "weight_decay")),
    *(({name: [1.0, x]}, f"{name}.*finite") for name in ("first", "second") for x in TOO_LARGE),
    ({"second": [1.0, -0.5]}, "second must not be negative"),
    ({"eps": 0.0}, "eps must be positive"),
    ({"eps": -1e-8}, "eps must be positive"),
    ({"eps": 1e-50}, "eps must be positive in float32"),
    ({"lr": 1e30, "weight_decay": 1e30}, "weight_decay"),
    ({"first": [1.0]}, "first has 1 coefficients for 2 states"),
    ({"second": [1.0] * 3}, "second has 3 coefficients for 2 states"),
    ({"states": [], "first": [], "second": []}, "at least one"),
    ({"states": [PhiloxState(1, 3), PhiloxState(2, 2)]}, "share key"),
    ({"states": [PhiloxState(1, 3), PhiloxState(1, 2, 1)]}, "share key and offset"),
    ({"distribution": "gaussian"}, "distribution must be one of"),
    ({"rounding": "up"}, "rounding must be one of"),
    ({"backend": "fortran"}, "unknown backend 'fortran'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_UPDATES, ids=lambda value: str(value)[:60])
def test_updates_that_are_refused(arguments, message):
    theta = torch.arange(5.0)
    arguments = {**GOOD, "lr": 0.1, "backend": "reference", **arguments}
    with pytest.raises(ValueError, match=message):
        update_(Plan([theta]), **arguments)
    assert torch.equal(theta, torch.arange(5.0)), "a refused call changed the weights"


@pytest.mark.parametrize("scale", TOO_LARGE)
def test_perturbations_that_are_refused(scale):
    with pytest.raises(ValueError, match="scale must be finite"):
        perturb_(Plan([torch.zeros(3)]), PhiloxState(1, 2), scale)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (PhiloxState(-1, 0), r"key must be an integer in \[0, 2\*\*64\), got -1"),
        (PhiloxState(2**64, 0), "key must be"),
        (PhiloxState(0.5, 0), "key must be"),
        (PhiloxState(0, 2**32), r"counter must be an integer in \[0, 2\*\*32\)"),
        (PhiloxState(0, -1), "counter must be"),
        (PhiloxState(0, 0, -1), "offset must be"),
        (PhiloxState(0, 0, 2**63), "offset must be"),
        # Each fits, their sum does not: element 2**63 has no place in the reference's int64.
        (PhiloxState(0, 0, 2**63 - 2), r"2\*\*63"),
    ],
    ids=str,
)
def test_states_that_are_refused(state, message):
    plan, out = Plan([torch.zeros(3)]), torch.zeros(3)
    for call in (
        lambda: sample_(out, state),
        lambda: perturb_(plan, state, 0.1),
        lambda: update_(plan, [state], [1.0], [1.0], lr=0.1),
        lambda: moments(plan, [state], [1.0], [1.0]),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_elements_of_the_index_space(backend):
    out = sample_(torch.empty(3), PhiloxState(0, 0, 2**63 - 3), backend=backend)
    expected = reference.exact_direction(2**63 - 3, 0, 1, 3, key=0, direction=0, parameter=0)[0]
    assert_same_bits(out, expected)


def test_a_plan_is_asked_for():
    with pytest.raises(TypeError, match=r"plan must be an adamezo_kernels\.Plan, got list"):
        perturb_([torch.zeros(3)], PhiloxState(1, 2), 0.1)


@needs_native
def test_the_environment_forces_an_instruction_set(monkeypatch):
    for name in INSTRUCTION_SETS:
        monkeypatch.setenv("ADAMEZO_ISA", name)
        assert native.instruction_set() == name
    monkeypatch.setenv("ADAMEZO_ISA", "mmx")
    with pytest.raises(RuntimeError, match=r"'mmx'.*this machine can run .*portable"):
        perturb_(Plan([torch.zeros(3)]), PhiloxState(1, 2), 0.1, backend="native")


def test_a_backend_that_is_named_never_falls_back(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    plan, state = Plan([torch.zeros(3)]), PhiloxState(1, 2)
    with pytest.raises(RuntimeError, match="backend 'native' is not available.*cannot be imported"):
        perturb_(plan, state, 0.1, backend="native")
    monkeypatch.setenv("ADAMEZO_BACKEND", "native")
    with pytest.raises(RuntimeError, match="backend 'native' is not available"):
        perturb_(plan, state, 0.1)
    monkeypatch.delenv("ADAMEZO_BACKEND")
    perturb_(plan, state, 0.1)  # one that is not named does
    assert plan.segments[0].tensor.ne(0).all()


def test_a_device_that_no_backend_supports_is_named():
    with pytest.raises(RuntimeError, match="no backend supports tensors on meta: move them"):
        choose([torch.device("meta")])
