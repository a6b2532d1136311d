"""The Triton kernel in Triton's interpreter: the bits of the CPU's kernels and of the reference.

Not collected by itself: the interpreter is chosen for a whole process, and test_triton.py starts
one. By hand: TRITON_INTERPRET=1 python -m pytest tests/gpu/triton_interpreted.py
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from adamezo_kernels import (
    RULES,
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
from adamezo_kernels.backends import triton
from helpers.backends import INSTRUCTION_SETS
from helpers.operations import (
    KEY,
    OFFSET,
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

HALVES = TYPES[1:]
NATIVE = "native" if INSTRUCTION_SETS else "reference"
KINDS = [
    ("exact", "nearest"),
    ("exact", "stochastic"),
    ("rademacher", "nearest"),
    ("rademacher", "stochastic"),
]


def zoo(dtype: torch.dtype, guarded) -> tuple[list[torch.Tensor], dict]:
    """The kinds of tensors of test_operations.zoo, with few rows: every row is a program, and an
    interpreted one takes milliseconds."""
    members = [
        (guarded(0, dtype), None),
        (guarded(1, dtype, 1), None),
        (guarded(2600, dtype, 4), None),
        (guarded(1100, dtype, 2), Shard(offset=2**34 - 501)),
        (guarded(1, dtype, 7)[0], None),
        (guarded(105, dtype).view(3, 5, 7), Shard(offset=2**62 + 1)),
        (guarded(2 * 53, dtype, 9), Shard(offset=5, rows=2, stride=2**33 + 1)),
    ]
    wide = guarded(2 * 64, dtype, 1).view(2, 64)
    members += [
        (wide[:, 5:22], None),
        (wide[:, 22:63], Shard(offset=2**33 + 2, rows=2, stride=4099)),
        (guarded(0, dtype), None),
    ]
    tensors = [tensor for tensor, _ in members]
    for seed, tensor in enumerate(tensors):
        tensor.copy_(weights(tensor.numel(), dtype, seed).view(tensor.shape))
    parameters = [2**24 - 1 - 5 * i for i in range(len(members))]
    return tensors, {"parameters": parameters, "shards": [shard for _, shard in members]}


def on_both(operation, dtype, guarded, kind=("exact", "nearest")) -> None:
    """``operation(plan, tensors, backend)`` by Triton and by the CPU, bit by bit."""
    tensors, arguments = zoo(dtype, guarded)
    operation(Plan(tensors, **arguments), tensors, "triton")
    expected, arguments = zoo(dtype, unguarded)
    by = NATIVE if kind == ("exact", "nearest") else "reference"
    operation(Plan(expected, **arguments), expected, by)
    for i in range(len(tensors)):
        assert_same_bits(tensors[i], expected[i], i)


@pytest.mark.parametrize("distribution", ["exact", "rademacher"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sample(guarded, dtype, distribution):
    edge = {"exact": 2**34, "rademacher": 2**39}[distribution]

    def sample(plan, tensors, backend):
        for i, tensor in enumerate(tensors):
            state = PhiloxState(KEY, 9, edge - 50 + i)
            sample_(tensor, state, parameter=i, distribution=distribution, backend=backend)

    on_both(sample, dtype, guarded, (distribution, "nearest"))


def perturb(plan: Plan, kind: tuple[str, str], backend: str) -> None:
    distribution, rounding = kind
    state = PhiloxState(KEY, 9, OFFSET)
    perturb_(plan, state, -1.7e-3, distribution=distribution, rounding=rounding, backend=backend)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_perturb(guarded, dtype, kind):
    on_both(lambda plan, _, backend: perturb(plan, kind, backend), dtype, guarded, kind)


@pytest.mark.parametrize(("dtype", "kind"), [(t, KINDS[i]) for i, t in enumerate(TYPES)], ids=str)
def test_perturb_out_of_place(guarded, dtype, kind):
    tensors, arguments = zoo(dtype, guarded)
    before = [tensor.clone() for tensor in tensors]
    outputs = [guarded(t.numel(), dtype, i % 8).view(t.shape) for i, t in enumerate(tensors)]
    perturb(Plan(tensors, **arguments).into(outputs), kind, "triton")
    expected = [tensor.clone() for tensor in before]
    perturb(Plan(expected, **arguments), kind, "reference")
    for i in range(len(tensors)):
        assert_same_bits(outputs[i], expected[i], i)
        assert_same_bits(tensors[i], before[i], "a source changed")


# (directions, second given, restore, weight decay)
UPDATES = [
    (1, True, 1e-3, 0.1),
    (1, False, 0.0, 0.0),
    (2, True, 1e-3, 0.1),
    (2, False, 1e-3, 0.1),
    (2, True, 0.0, 0.1),
]


def update(plan: Plan, case: tuple, backend: str, kind=("exact", "nearest"), **changes) -> None:
    count, with_second, restore, weight_decay = case
    first, second = coefficients(count, with_second)
    options = {"lr": 3e-3, "eps": 1e-8, "weight_decay": weight_decay, "restore": restore}
    options |= {"distribution": kind[0], "rounding": kind[1]} | changes
    update_(plan, states(count), first, second, backend=backend, **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", UPDATES, ids=str)
def test_update(guarded, case, dtype):
    on_both(lambda plan, _, backend: update(plan, case, backend), dtype, guarded)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(t, kind) for t in HALVES for kind in KINDS[1:]], ids=str
)
def test_update_of_the_other_kinds(guarded, dtype, kind):
    case = (2, True, 1e-3, 0.1)
    on_both(lambda plan, _, backend: update(plan, case, backend, kind), dtype, guarded, kind)


def test_a_restore_of_0_adds_nothing():
    """Not even 0 to -0."""
    results = []
    for backend in ("triton", "reference"):
        w = torch.full((64,), -0.0)
        update_(Plan([w]), states(1), [0.0], None, lr=1.0, backend=backend)
        results.append(w)
    assert_same_bits(*results)
    assert results[0].signbit().all()


@pytest.mark.parametrize("count", [10, 33])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_many_directions(dtype, count):
    results = []
    for backend in ("triton", NATIVE):
        w = weights(1500, dtype, 0)
        update(Plan([w]), (count, True, 1e-3, 0.1), backend)
        results.append(w)
    assert_same_bits(*results)


@pytest.mark.parametrize(
    ("count", "with_second", "distribution"),
    [(1, True, "exact"), (3, False, "exact"), (3, True, "exact"), (1, True, "rademacher"),
     (5, True, "rademacher")],
)  # fmt: skip
def test_moments(guarded, count, with_second, distribution):
    tensors, arguments = zoo(torch.bfloat16, guarded)
    before = [tensor.clone() for tensor in tensors]
    plan = Plan(tensors, **arguments)
    sums = coefficients(count, with_second)
    kind = {"distribution": distribution}
    got = moments(plan, states(count), *sums, backend="triton", **kind)
    expected = moments(plan, states(count), *sums, backend="reference", **kind)
    for i in range(len(tensors)):
        assert_same_bits(got[0][i], expected[0][i], i)
        assert_same_bits(got[1][i], expected[1][i], i)
        assert_same_bits(tensors[i], before[i], i)


def test_sums_and_quotients_among_subnormals():
    """S2, its root's argument, and quotients below 2^-126: nothing is flushed."""
    for scale in (1e-38, 1e-42):
        results = []
        for backend in ("triton", NATIVE):
            w = torch.zeros(1200)
            sums = [scale, -scale], [scale, scale]
            update_(Plan([w]), states(2), *sums, lr=1.0, eps=1e3, backend=backend)
            m, v = moments(Plan([w]), states(2), *sums, backend=backend)
            results.append((w, m[0], v[0]))
        for got, expected in zip(*results, strict=True):
            assert_same_bits(got, expected, scale)
        assert ((results[0][2] > 0) & (results[0][2] < 2.0**-126)).any()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_every_number_and_the_half_way_to_the_next(dtype, ulp, rounding):
    """theta (1 + ulp) of all 65536 bit patterns: half-way between two numbers wherever the last
    bit of theta's significand is set, and beside it elsewhere."""
    results = []
    for backend in ("triton", "reference"):
        w = torch.arange(2**16).to(torch.int16).view(dtype)
        options = {"lr": 1.0, "weight_decay": -ulp, "rounding": rounding, "backend": backend}
        update_(Plan([w]), states(1), [0.0], None, **options)
        results.append(w)
    assert_same_bits(*results)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stores_of_all_sizes(dtype, rounding):
    """Numbers of every binade of float32, from its smallest to those that overflow."""
    for exponent in range(-149, 128, 11):
        results = []
        for backend in ("triton", "reference"):
            w = torch.zeros(300, dtype=dtype)
            update_(
                Plan([w]),
                states(1),
                [2.0**exponent],
                None,
                lr=1.0,
                rounding=rounding,
                backend=backend,
            )
            results.append(w)
        assert_same_bits(*results, exponent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2**34 - 2048, 2**34 - 2049])
@pytest.mark.parametrize("numel", [2047, 2048, 2049])
def test_sizes_about_a_window(guarded, numel, offset, dtype):
    state = PhiloxState(KEY, 5, offset)
    for shift in (0, 1):
        w = guarded(numel, dtype, shift)
        sample_(w, state, backend="triton")
        assert_same_bits(w, sample_(torch.empty_like(w), state, backend=NATIVE), shift)


# --- rules that keep numbers for each weight ------------------------------------------------------

# Each kind with each pair of types and with each rule.
UPDATING = [rule for rule in NUMBERS if RULES[rule].updates]
RULE_CASES = [
    (rule, dtype, kept, KINDS[(r + 3 * i + j) % 4])
    for r, rule in enumerate(NUMBERS)
    for i, dtype in enumerate(TYPES)
    for j, kept in enumerate(TYPES)
]


def both_steps(plan: Plan, rule: str, kind: tuple[str, str], backend: str) -> None:
    """A perturbation, and an update that takes another one back."""
    options = {"distribution": kind[0], "rounding": kind[1], "backend": backend}
    perturb_(plan, terms_of(rule), -RESTORE, **options)
    if RULES[rule].updates:
        update_terms_(plan, terms_of(rule), eps=EPS, restore=RESTORE, **options)


@pytest.mark.parametrize("case", RULE_CASES, ids=str)
def test_rules(guarded, case):
    rule, dtype, kept_type, kind = case
    ends = []
    for backend, make in (("triton", guarded), ("reference", unguarded)):
        tensors, arguments = zoo(dtype, make)
        plan, buffers = with_buffers(rule, tensors, arguments, kept_type, make)
        both_steps(plan, rule, kind, backend)
        ends.append([*tensors, *(buffer for kept in buffers for buffer in kept)])
    for i, (got, expected) in enumerate(zip(*ends, strict=True)):
        assert_same_bits(got, expected, i)


@pytest.mark.parametrize("rule", UPDATING)
@pytest.mark.parametrize(("dtype", "kept_type"), [*zip(TYPES, reversed(TYPES), strict=True)])
def test_four_at_once_where_weights_and_buffers_are_aligned(
    guarded, monkeypatch, rule, dtype, kept_type
):
    """Window 1 of elements 3 to 3002 is whole. Which way it takes is seen by how pointers are
    made, once for each load and store of a window; the bits are the same on both."""
    made: Counter[bool] = Counter()
    pointers = triton.kernels()._pointers

    def counted(address, ALIGNED, *rest):
        made[bool(ALIGNED)] += 1
        return pointers(address, ALIGNED, *rest)

    monkeypatch.setattr(triton.kernels(), "_pointers", counted)
    assert terms_of(rule).offset == OFFSET == 3
    count = RULES[rule].buffers
    # From an aligned address, in elements: the window begins 1021 behind the first.
    shifts = [(3, *[3] * count), (4, *[3] * count)]
    shifts += [tuple(4 if i == j else 3 for j in range(-1, count)) for i in range(count)]
    for n, (of_weights, *of_buffers) in enumerate(shifts):
        ends = []
        for backend, make in (("triton", guarded), ("reference", unguarded)):
            w = make(3000, dtype, of_weights).copy_(weights(3000, dtype, 0))
            kept = [make(3000, kept_type, shift) for shift in of_buffers]
            for i, buffer in enumerate(kept):
                buffer.copy_(weights(3000, kept_type, i + 1).abs() + 0.5)
            made.clear()
            plan = Plan([w]).with_buffers([kept])
            options = {"eps": EPS, "restore": RESTORE, "backend": backend}
            update_terms_(plan, terms_of(rule), **options)
            if backend == "triton":
                accesses = 2 * (1 + count)
                aligned = accesses if n == 0 else 0
                assert made[True] == aligned, (of_weights, of_buffers)
                assert made[False] == 3 * accesses - aligned
            ends.append([w, *kept])
        for i, (got, expected) in enumerate(zip(*ends, strict=True)):
            assert_same_bits(got, expected, (n, i))


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].has_direction])
def test_a_rule_out_of_place(guarded, rule):
    tensors, arguments = zoo(torch.bfloat16, guarded)
    plan, buffers = with_buffers(rule, tensors, arguments, torch.float32, guarded)
    before = [t.clone() for t in (*tensors, *(b for kept in buffers for b in kept))]
    outs = [guarded(t.numel(), t.dtype, i % 8).view(t.shape) for i, t in enumerate(tensors)]
    perturb_(plan.into(outs), terms_of(rule), RESTORE, backend="triton")
    after = [*tensors, *(b for kept in buffers for b in kept)]
    for i, (a, b) in enumerate(zip(after, before, strict=True)):
        assert_same_bits(a, b, i)
    perturb_(plan, terms_of(rule), RESTORE, backend="reference")
    for i, (out, tensor) in enumerate(zip(outs, tensors, strict=True)):
        assert_same_bits(out, tensor.contiguous(), i)


@pytest.mark.parametrize("restore", [0.0, RESTORE])
@pytest.mark.parametrize("rule", UPDATING)
def test_buffers_with_what_they_should_not_hold(rule, restore):
    """Zeros of both signs, subnormals, negative numbers, infinities and NaN; and where nothing is
    restored, what would be infinite along them changes nothing."""
    ends = []
    for backend in ("triton", "reference"):
        w = torch.zeros(1200)
        kept = [weights(1200, torch.float32, i) for i in range(RULES[rule].buffers)]
        plan = Plan([w]).with_buffers([kept])
        update_terms_(plan, terms_of(rule), eps=EPS, restore=restore, backend=backend)
        ends.append([w, *kept])
    for i, (got, expected) in enumerate(zip(*ends, strict=True)):
        assert_same_bits(got, expected, i)
    # HiZOO's curvature is within bounds again before the step is made with it.
    mended = rule == "hizoo" and restore == 0
    assert bool(ends[0][0].isfinite().all()) == mended
    assert ends[0][0].isfinite().any()


# The places of the numbers that what is kept or stepped is proportional to.
@pytest.mark.parametrize(
    ("rule", "places"), [("adam", (1, 3)), ("hizoo", (2,)), ("helene", (1, 3)), ("adamu", (0, 1))]
)
def test_rules_among_subnormals(rule, places):
    seen = 0
    for scale in (1e-38, 1e-42):
        numbers = [n * scale if i in places else n for i, n in enumerate(NUMBERS[rule])]
        terms = Terms.of(terms_of(rule).states(), minus_lr=-1.0, rule=rule, numbers=numbers)
        ends = []
        for backend in ("triton", "reference"):
            w = torch.zeros(1200)
            size = 1.0 if rule == "hizoo" else scale
            kept = [torch.full((1200,), size) for _ in range(RULES[rule].buffers)]
            update_terms_(Plan([w]).with_buffers([kept]), terms, eps=1.0, backend=backend)
            ends.append([w, *kept])
        for i, (got, expected) in enumerate(zip(*ends, strict=True)):
            assert_same_bits(got, expected, (scale, i))
        w = ends[0][0]
        seen += int(((w != 0) & (w.abs() < 2.0**-126)).sum())
    assert seen > 1000


@pytest.mark.parametrize(
    ("rule", "kept_type"), [(rule, HALVES[r % 2]) for r, rule in enumerate(NUMBERS)], ids=str
)
def test_rules_of_rows_and_types_that_mix(rule, kept_type):
    """Rows that buffers follow without gaps, in memory, in the parameter or in both."""
    ends = []
    for backend in ("triton", "reference"):
        tensors = [
            torch.zeros(1, dtype=torch.float16),
            weights(7 * 131, torch.bfloat16, 1).view(7, 131)[:, 2:129],
            weights(1026, torch.float16, 2),
            weights(3 * 9, torch.bfloat16, 3).view(3, 9)[:, 1:5],
            weights(3 * 4, torch.float16, 4).view(3, 4),
        ]
        shards = [None, None, Shard(2**34 - 600), Shard(7, 3, 2**35), Shard(0, 3, 1024)]
        plan, buffers = with_buffers(rule, tensors, {"shards": shards}, kept_type, unguarded)
        both_steps(plan, rule, ("exact", "stochastic"), backend)
        ends.append([*tensors, *(buffer for kept in buffers for buffer in kept)])
    for i, (got, expected) in enumerate(zip(*ends, strict=True)):
        assert_same_bits(got, expected, i)


# --- staged tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_staged_tensors(monkeypatch, dtype):
    """Copies of their blocks, some of which begin inside of a row of their shard."""
    monkeypatch.setattr(staging, "BLOCK", 200)
    shards = [Shard(2**34 - 99), Shard(7, 3, 2**35), None]
    ends = []
    for turned in (True, False):
        tensors = [weights(n * m, dtype, n).view(n, m).t() for n, m in ((20, 9), (31, 15))]
        tensors.append(weights(2 * 3 * 4 * 5, dtype, 2).view(2, 4, 5, 3).permute(0, 3, 1, 2))
        tensors = tensors if turned else [tensor.contiguous() for tensor in tensors]
        plan, buffers = with_buffers("adam", tensors, {"shards": shards}, dtype, unguarded)
        out = [torch.full_like(tensor, float("nan")) for tensor in tensors]
        backend = "triton" if turned else NATIVE
        perturb(plan.into(out), KINDS[0], backend)
        update_terms_(
            plan, terms_of("adam"), eps=EPS, restore=RESTORE, rounding="stochastic",
            backend=backend,
        )  # fmt: skip
        ends.append([*tensors, *out, *(buffer for kept in buffers for buffer in kept)])
    for i, (got, expected) in enumerate(zip(*ends, strict=True)):
        assert_same_bits(got, expected, i)


# --- launches -------------------------------------------------------------------------------------


def test_many_small_tensors_in_one_launch(guarded, monkeypatch):
    sizes = [0, 0, *range(1, 60, 3), 0, 3000, 0, 2, 0]
    tensors = [guarded(n, torch.float16, i % 9) for i, n in enumerate(sizes)]
    expected = [weights(n, torch.float16, i) for i, n in enumerate(sizes)]
    for a, b in zip(tensors, expected, strict=True):
        a.copy_(b)
    launches = []
    start = triton.start

    def counted(grid, *arguments, **constants):
        launches.append(grid)
        start(grid, *arguments, **constants)

    monkeypatch.setattr(triton, "start", counted)
    perturb(Plan(tensors), KINDS[0], "triton")
    assert len(launches) == 1
    perturb(Plan(expected), KINDS[0], NATIVE)
    for i in range(len(sizes)):
        assert_same_bits(tensors[i], expected[i], i)


def test_more_programs_than_a_launch_takes(guarded, monkeypatch):
    monkeypatch.setattr(triton, "MOST_PROGRAMS", 3)
    on_both(lambda plan, _, backend: perturb(plan, KINDS[0], backend), torch.float32, guarded)


@pytest.mark.parametrize("rule", ["moments", "hizoo"])
def test_programs_and_rows_beyond_32_bits(rule):
    """Row 2^40 + 1 of a segment whose rows all lie at the same place, but for those of its buffer:
    of 700 elements, each may reach into two windows."""
    w, row, stride = torch.zeros(700), 2**40 + 1, 2**22
    kept = weights(700, torch.float32, 1).exp()
    terms = Terms.of([PhiloxState(KEY, 9)], rule=rule)
    address, buffer = w.data_ptr(), kept.data_ptr() - row * 700 * 4
    segment = [address, address, row + 5, 700, 0, 0, 0, stride, 3, buffer, 0, 0]
    triton.start(
        (1,),
        torch.tensor([segment]),
        terms.words,
        1,
        1,
        0,
        2 * row,
        *triton.key_words(KEY),
        *triton.float_bits(1.0, 0.0),
        **triton.constants(
            *("perturb", "exact", "float32", "float32"),
            second=False,
            stochastic=False,
            rule=rule,
            on="interpreter",
        )
        | {"WINDOW": 2048},
    )
    expected = torch.zeros(700)
    plan = Plan([expected], parameters=[3], shards=[Shard(row * stride)]).with_buffers([[kept]])
    perturb_(plan, terms, 1.0, backend="reference")
    assert_same_bits(w, expected)


def test_types_mix_in_one_plan():
    together = [weights(500, dtype, 1) for dtype in (*TYPES, *TYPES)]
    expected = [t.clone() for t in together]
    update(Plan(together), (2, True, 1e-3, 0.1), "triton")
    update(Plan(expected), (2, True, 1e-3, 0.1), NATIVE)
    for i in range(len(together)):
        assert_same_bits(together[i], expected[i], i)


def test_fast_normals_are_near_the_exact_ones():
    """The bound of test_cuda_bodies.py: the functions of a host are within 2^-23 here too."""
    z, exact = (
        sample_(
            torch.empty(1 << 16), PhiloxState(KEY, 3), distribution=distribution, backend="triton"
        )
        for distribution in ("fast", "exact")
    )
    assert z.isfinite().all()
    pairs = exact.double().view(-1, 2)
    radius = pairs.square().sum(1, keepdim=True).sqrt()
    difference = (z.double().view(-1, 2) - pairs).abs()
    assert (difference <= 3 * radius * 2.0**-22 + 2e-6).all()
    assert not torch.equal(z, exact)


def test_autograd_sees_what_was_written():
    w = torch.zeros(5, requires_grad=True)
    before = w._version
    perturb_(Plan([w]), PhiloxState(KEY, 1), 1.0, backend="triton")
    assert w._version > before
    kept = torch.ones(5)
    before = kept._version
    plan = Plan([w]).with_buffers([[kept]])
    update_terms_(plan, terms_of("hizoo"), eps=EPS, backend="triton")
    assert kept._version > before


def test_a_failed_launch_names_everything(monkeypatch):
    def fail(*arguments, **constants):
        raise ValueError("out of resource: shared memory")

    monkeypatch.setattr(triton, "start", fail)
    with pytest.raises(
        RuntimeError,
        match=r"(?s)update of torch.float32 tensors \(2, 3\) on cpu along 2 exact direction.*"
        r"out of resource.*Triton",
    ):
        update(Plan([torch.zeros(2, 3)]), (2, True, 0.0, 0.0), "triton")
