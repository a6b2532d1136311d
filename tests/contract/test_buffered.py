"""Rules that keep numbers for each weight: their formulas in float64, the compiled kernels against
the reference bit for bit, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from adamezo_kernels import RULES, PhiloxState, Plan, Terms, perturb_, sample_, update_terms_
from helpers.backends import BACKENDS, needs_native
from helpers.operations import KEY, KINDS, OFFSET, TYPES, assert_same_bits, unguarded, zoo
from helpers.rules import (
    DECAY,
    EPS,
    LR,
    NUMBERS,
    RESTORE,
    by_reference,
    by_the_formula,
    run,
    terms_of,
    with_buffers,
)

all_rules = pytest.mark.parametrize("rule", NUMBERS)
all_updates = pytest.mark.parametrize("rule", [rule for rule in NUMBERS if RULES[rule].updates])
both_backends = pytest.mark.parametrize("backend", BACKENDS)


# --- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer_dtype", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@all_rules
def test_bits_of_the_reference(isa, guarded, rule, dtype, buffer_dtype, kind):
    got = run(rule, dtype, buffer_dtype, kind, "native", guarded)
    expected = by_reference(rule, dtype, buffer_dtype, kind)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a, b, i)


@needs_native
@all_updates
def test_bits_do_not_depend_on_threads(rule):
    ends = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        big = torch.randn(300_007, generator=generator).bfloat16()
        plan, buffers = with_buffers(rule, [big], {}, torch.bfloat16, unguarded)
        update_terms_(plan, terms_of(rule), eps=EPS, restore=RESTORE, rounding="stochastic")
        ends.append([big, *buffers[0]])
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            assert_same_bits(a, b)


@both_backends
@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].has_direction])
def test_into_reads_one_place_and_writes_another(rule, backend):
    tensors, layout = zoo(torch.float32, unguarded)
    plan, buffers = with_buffers(rule, tensors, layout, torch.float32, unguarded)
    copies = [torch.full(t.shape, math.nan) for t in tensors]
    before = [t.clone() for t in (*tensors, *(b for kept in buffers for b in kept))]
    perturb_(plan.into(copies), terms_of(rule), RESTORE, backend=backend)
    after = [*tensors, *(b for kept in buffers for b in kept)]
    for a, b in zip(after, before, strict=True):
        assert_same_bits(a, b)
    perturb_(plan, terms_of(rule), RESTORE, backend=backend)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert_same_bits(tensor.contiguous(), copy)


@both_backends
@pytest.mark.parametrize("rule", ["adam", "helene"])
def test_a_rule_without_a_direction_perturbs_along_z(rule, backend):
    a, b = torch.ones(1000), torch.ones(1000)
    plan, _ = with_buffers(rule, [a], {}, torch.float32, unguarded)
    perturb_(plan, terms_of(rule), 0.5, backend=backend)
    perturb_(Plan([b]), PhiloxState(KEY, 2**32 - 1, OFFSET), 0.5, backend=backend)
    assert_same_bits(a, b)


# --- formulas -------------------------------------------------------------------------------------


@both_backends
@all_rules
def test_the_formula(rule, backend):
    theta = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    plan, buffers = with_buffers(rule, [theta], {}, torch.float32, unguarded)
    terms = terms_of(rule)
    u = [sample_(torch.empty(20_000), state).double() for state in terms.states()]
    start, kept = theta.double(), [buffer.double() for buffer in buffers[0]]
    along, step, after = by_the_formula(rule, start, kept, u)

    perturb_(plan, terms, -RESTORE, backend=backend)
    torch.testing.assert_close(
        theta.double(), start - RESTORE * along, rtol=1e-6, atol=1e-6, check_dtype=False
    )
    if rule == "blend":
        with pytest.raises(ValueError, match="'blend' only perturbs"):
            update_terms_(plan, terms, eps=EPS, restore=RESTORE, backend=backend)
        return
    update_terms_(plan, terms, eps=EPS, restore=RESTORE, backend=backend)
    # A dozen roundings to 2^-24 of numbers up to 100; steps themselves are far above that.
    torch.testing.assert_close(
        theta.double(), DECAY * start - LR * step, rtol=1e-5, atol=1e-5, check_dtype=False
    )
    assert (LR * step).abs().median() > 1e-3
    for buffer, expected in zip(buffers[0], after, strict=True):
        torch.testing.assert_close(buffer.double(), expected, rtol=1e-6, atol=1e-6)
        assert (buffer.double() - expected).abs().max() < (expected - kept[0]).abs().max()


@both_backends
def test_a_curvature_moves_at_the_published_alpha(backend):
    """1e-8, at which a curvature of 16 bits would stay what it is."""
    theta, curvature = torch.zeros(4096), torch.ones(4096)
    plan = Plan([theta]).with_buffers([[curvature]])
    numbers = (-1e-8, 1e-8 * 300.0, 0.0)  # of a curvature of 300 along d
    for step in range(20):
        terms = Terms.of([PhiloxState(1, step)], rule="hizoo", numbers=numbers)
        update_terms_(plan, terms, backend=backend)
    # 20 steps of 3e-6 z^2 each, whose mean over 4096 weights is 1 within 2 %
    assert math.isclose((curvature - 1).mean().item(), 20 * 3e-6, rel_tol=0.05)


@both_backends
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_curvature_stays_where_perturbations_are_finite(dtype, backend):
    values = [0.0, 1e-6, 1e-4, 1.0, 1e4, 6e4, math.inf, math.nan]
    theta, curvature = torch.zeros(8), torch.tensor(values).to(dtype)
    plan = Plan([theta]).with_buffers([[curvature]])
    for numbers in ((-0.9, 0.0, 1.0), (-0.1, 1e30, 1.0)):
        terms = Terms.of([PhiloxState(1, 0)], minus_lr=-1.0, rule="hizoo", numbers=numbers)
        update_terms_(plan, terms, backend=backend)
        assert theta.isfinite().all()
        assert (curvature.float() >= torch.tensor(1e-4).to(dtype).float()).all()
        assert (curvature.float() <= torch.tensor(1e4).to(dtype).float()).all()
    assert (curvature.float() > 9e3).all()


@both_backends
@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_stochastic_buffers_keep_what_is_below_their_last_place(dtype, backend):
    """beta2 = 0.999 takes away less of a bfloat16 than it can show; on average it is all there."""
    n = 2**16
    theta, m, v = torch.zeros(n), torch.zeros(n, dtype=dtype), torch.ones(n, dtype=dtype)
    numbers = (0.9, 0.0, 0.999, 0.0, 1.0, 1.0)
    ends = {}
    for rounding in ("nearest", "stochastic"):
        v.fill_(1.0)
        plan = Plan([theta]).with_buffers([[m, v]])
        for step in range(3):
            terms = Terms.of([PhiloxState(2, step)], rule="adam", numbers=numbers)
            update_terms_(plan, terms, eps=EPS, rounding=rounding, backend=backend)
        ends[rounding] = v.double().mean().item()
    # Three steps of a chance of 0.001 / 2^-8 (bfloat16) or 2^-11 below 1: five standard errors.
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert abs(ends["stochastic"] - 0.999**3) < 5 * unit * math.sqrt(3 / 4 / n)
    if dtype == torch.bfloat16:
        assert ends["nearest"] == 1.0


# --- what is refused ------------------------------------------------------------------------------


def test_buffers_that_do_not_fit():
    a, b = torch.zeros(3, 4), torch.zeros(5)
    plan = Plan([a, b], names=["a", "b"])
    good = [[torch.zeros(3, 4)], [torch.zeros(5)]]
    assert plan.with_buffers(good).buffers == 1
    for buffers, message in (
        (good[:1], "buffers for 1 of 2"),
        ([good[0], []], "same number of buffers"),
        ([good[0], [torch.zeros(5).bfloat16()]], "of one type"),
        ([good[0], [torch.zeros(4)]], "buffer 0 of b has shape"),
        ([[torch.zeros(4, 3).t()], good[1]], "not contiguous"),
        ([good[0], [b]], "share memory"),
        ([[a.view(3, 4)], good[1]], "share memory"),
        ([good[0], [torch.zeros(5, dtype=torch.float64)]], "float64"),
        ([[torch.zeros(3, 4)] * 3, [torch.zeros(5)] * 3], "2 at most"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            plan.with_buffers(buffers)


def test_terms_that_do_not_fit():
    states = [PhiloxState(1, 0), PhiloxState(1, 1)]
    with pytest.raises(ValueError, match="rule must be one of"):
        Terms.of(states, rule="sgd")
    with pytest.raises(ValueError, match=r"2 direction\(s\)"):
        Terms.of(states[:1], rule="adamu")
    with pytest.raises(ValueError, match="4 numbers for the rule 'hizoo', which has 3"):
        Terms.of(states[:1], rule="hizoo", numbers=[1.0] * 4)
    plan = Plan([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"needs 2 buffer\(s\) for each weight, the plan has 0"):
        update_terms_(plan, Terms.of(states[:1], rule="adam"))
    with pytest.raises(ValueError, match="needs 1"):
        perturb_(plan, Terms.of(states[:1], rule="hizoo"), 1.0)


def test_every_rule_is_tested():
    assert {*NUMBERS, "moments"} == RULES.keys()
