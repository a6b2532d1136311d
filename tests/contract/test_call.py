"""The record of one operation, and how it gets to a backend."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from adamezo_kernels import (
    Call,
    PhiloxState,
    Plan,
    Terms,
    moments,
    ops,
    perturb_,
    sample_,
    update_,
)
from adamezo_kernels.backends import BACKENDS, native, reference
from helpers.backends import needs_native

STATE = PhiloxState(3, 7)
ADAM = Terms.of([STATE], rule="adam", numbers=[0.5])


def plan_of(*sizes: int) -> Plan:
    return Plan([torch.ones(size) for size in sizes])


def buffered(*sizes: int) -> Plan:
    return plan_of(*sizes).with_buffers([[torch.ones(n), torch.ones(n)] for n in sizes])


SOUND = Call("update", buffered(4), ADAM)
WRONG = {
    "plan": ({"plan": [torch.ones(4)]}, TypeError, r"plan must be an .*\.Plan, got list"),
    "operation": ({"operation": "add"}, ValueError, "operation must be one of .*, got 'add'"),
    "distribution": ({"distribution": "x"}, ValueError, "distribution must be one of .*, got 'x'"),
    "rounding": ({"rounding": "up"}, ValueError, "rounding must be one of .*, got 'up'"),
    "restore": ({"scale": math.nan}, ValueError, "restore must be finite .* got nan"),
    "scale": (
        {"operation": "perturb", "scale": -1e39},
        ValueError,
        r"scale must be finite .* got -1e\+39",
    ),
    "eps": ({"eps": math.inf}, ValueError, "eps must be finite and within float32, got inf"),
    "eps of 0": (
        {"terms": Terms.of([STATE], [1.0], [1.0])},
        ValueError,
        r"eps must be positive in float32 where `second` is given, got 0\.0",
    ),
    "offset": (
        {"terms": Terms.of([PhiloxState(3, 7, 2**63 - 4)])} | {"plan": plan_of(2, 5)},
        ValueError,
        "beyond 2\\*\\*63, as the plan's element indices reach 4",
    ),
    "buffers": ({"plan": plan_of(4)}, ValueError, "needs 2 buffer.* the plan has 0"),
    "rule": (
        {"terms": Terms.of([STATE, STATE], rule="blend")},
        ValueError,
        "the rule 'blend' only perturbs",
    ),
    "place": (
        {"plan": plan_of(4).into([torch.ones(4)])},
        ValueError,
        r"writes another \(Plan.into\), which only perturb_ can do",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_call_checks_itself(case):
    fields, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        replace(SOUND, **fields)


def test_a_call_does_not_change():
    with pytest.raises(FrozenInstanceError):
        SOUND.scale = 1.0


def test_a_perturbation_along_z_takes_the_newest_direction_alone():
    """So backends see a rule only where it is at work."""
    call = Call("perturb", plan_of(4), ADAM, scale=2)
    assert (call.terms.rule, call.terms.horizon) == ("moments", 1)
    assert call.terms.words is ADAM.words
    assert isinstance(call.scale, float)
    hizoo = Terms.of([STATE], rule="hizoo")
    assert Call("perturb", buffered(4), hizoo, scale=2).terms is hizoo


# --- varied calls -------------------------------------------------------------------------------


def test_a_varied_call_differs_in_what_is_given():
    call = Call("perturb", buffered(4), ADAM, "rademacher", "stochastic", 2.0, 0.5)
    other = Terms.of([PhiloxState(5, 6)], rule="adam", numbers=[0.25])
    assert call.vary() == call
    assert call.vary(scale=-3) == replace(call, scale=-3.0)
    assert isinstance(call.vary(scale=-3).scale, float)
    varied = call.vary(terms=other, scale=0.0)
    assert varied == replace(call, terms=other, scale=0.0)
    assert varied.terms is other.newest
    assert (call.scale, call.terms) == (2.0, ADAM.newest)


VARIED = {
    name: (fields, error, message)
    for name, (fields, error, message) in WRONG.items()
    if fields.keys() <= {"terms", "scale"}
}


@pytest.mark.parametrize("case", VARIED)
def test_what_is_varied_is_checked(case):
    fields, error, message = VARIED[case]
    with pytest.raises(error, match=message):
        SOUND.vary(**fields)


def test_terms_are_checked_against_the_plan_of_the_call_that_is_varied():
    call = Call("perturb", plan_of(2, 5), Terms.of([STATE]), scale=1.0)
    with pytest.raises(ValueError, match="beyond 2\\*\\*63, as the plan's element indices reach 4"):
        call.vary(terms=Terms.of([PhiloxState(3, 7, 2**63 - 4)]))
    with pytest.raises(ValueError, match=r"needs 1 buffer.* the plan has 0"):
        call.vary(terms=Terms.of([STATE], rule="hizoo"))
    with pytest.raises(ValueError, match="scale must be finite .* got inf"):
        call.vary(scale=math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e39])
@pytest.mark.parametrize("name", ["first", "second"])
def test_every_coefficient_is_a_float32(name, bad):
    """Also behind others that are, and where only the sum of all is too large for one."""
    states = [PhiloxState(3, k) for k in range(3)]
    given = {"first": [1.0, 3e38, 3e38], "second": [1.0, 3e38, 3e38]}
    update_(plan_of(2), states, given["first"], given["second"], lr=0.0)
    given[name] = [1.0, 2.0, bad]
    message = re.escape(f"{name} must be finite and within float32, got {bad}")
    with pytest.raises(ValueError, match=message):
        update_(plan_of(2), states, given["first"], given["second"], lr=0.0)


def test_terms_of_one_call_are_of_one_stream():
    for other in (PhiloxState(4, 7), PhiloxState(3, 7, 1)):
        with pytest.raises(ValueError, match="share key and offset"):
            Terms.of([STATE, other], rule="blend")
    with pytest.raises(ValueError, match="got no states, expected at least one direction"):
        Terms.of([])


@pytest.fixture
def seen(monkeypatch):
    """The calls that backend "reference" is given."""
    calls = []
    run = reference.run
    monkeypatch.setattr(reference, "run", lambda call: calls.append(call) or run(call))
    return calls


def test_every_operation_is_one_call(seen):
    plan, options = plan_of(4, 3), {"backend": "reference", "distribution": "rademacher"}
    perturb_(plan, STATE, 0.5, rounding="stochastic", **options)
    update_(plan, [STATE], [1.0], [2.0], lr=0.1, eps=0.25, restore=-0.5, **options)
    sample_(torch.ones(2), STATE, **options)
    moments(plan, [STATE], [1.0], [2.0], **options)
    found = [(c.operation, c.distribution, c.rounding, c.scale, c.eps) for c in seen]
    assert found == [
        ("perturb", "rademacher", "stochastic", 0.5, 0.0),
        ("update", "rademacher", "nearest", -0.5, 0.25),
        ("sample", "rademacher", "nearest", 0.0, 0.0),
        *[("moment", "rademacher", "nearest", 0.0, 0.0)] * 2,
    ]
    assert seen[0].plan is seen[1].plan is plan
    assert seen[1].terms.step.tolist() == pytest.approx([-0.1, 1.0])


# --- choosing once ------------------------------------------------------------------------------


def test_a_backend_that_was_chosen_is_not_asked_again(seen, monkeypatch):
    monkeypatch.setattr(reference, "availability", lambda: (False, "asked"))
    plan = plan_of(4)
    with pytest.raises(RuntimeError, match="backend 'reference' is not available: asked"):
        perturb_(plan, STATE, 0.5, backend="reference")
    perturb_(plan, STATE, 0.5, backend=reference)
    ops.run(Call("perturb", plan, Terms.of([STATE]), scale=0.5), reference)
    assert len(seen) == 2


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_a_backend_that_was_chosen_for_others_is_refused(backend):
    """As its kernels would read addresses of another device."""
    with pytest.raises(RuntimeError, match=f"backend '{backend.NAME}' does not support tensors on"):
        perturb_(Plan([Elsewhere(torch.ones(4))]), STATE, 0.5, backend=backend)
    if backend.supports(torch.device("cpu")) and "fast" not in backend.DISTRIBUTIONS:
        with pytest.raises(RuntimeError, match="has no distribution 'fast', expected one of exact"):
            perturb_(plan_of(4), STATE, 0.5, distribution="fast", backend=backend)


class Elsewhere(torch.Tensor):
    """On a device of which no backend knows."""

    device = torch.device("mps")


# --- what is constant for a plan ----------------------------------------------------------------


class Unwalked(tuple):
    def __iter__(self):
        raise AssertionError("a list of tensors was walked again")


@needs_native
@pytest.mark.parametrize("backend", [native, "native"], ids=["chosen", "named"])
def test_a_second_call_walks_no_tensors(backend):
    """With hundreds of small tensors that was most of a step."""
    weights = [torch.nn.Parameter(torch.ones(8)) for _ in range(3)]
    plan = Plan(weights)

    def both() -> None:
        perturb_(plan, STATE, 0.5, backend=backend)
        update_(plan, [STATE], [1.0], None, lr=0.1, restore=-0.5, backend=backend)

    both()
    plan.segments = Unwalked(plan.segments)
    (launch,) = plan.launches
    object.__setattr__(launch, "segments", Unwalked(launch.segments))
    before = [w._version for w in weights]
    both()
    assert [w._version for w in weights] == [version + 2 for version in before]
    again = [torch.ones(8) for _ in range(3)]
    plan = Plan(again)
    both()
    both()
    for one, other in zip(weights, again, strict=True):
        assert torch.equal(one, other)
