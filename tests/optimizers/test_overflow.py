"""In-place perturbations that would leave infinities in weights are refused, and no others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adamezo import (
    FZOO,
    HELENE,
    AdaMeZO,
    HiZOO,
    MeZO,
    ZOAdam,
    ZOAdaMU,
)
from adamezo.engine.perturb import InPlace
from adamezo.engine.perturb import overflow as overflow_of
from adamezo.runlog import StepLog, optimizer_for, read, replay
from adamezo_kernels import PhiloxState, Plan, Terms, perturb_, sample_
from helpers.backends import BACKENDS
from helpers.operations import TYPES, assert_same_bits

MOST = {dtype: torch.finfo(dtype).max for dtype in TYPES}
# Half a unit of the last place there.
HALF = {torch.float32: 2.0**103, torch.bfloat16: 2.0**119, torch.float16: 16.0}
METHODS = {
    "AdaMeZO": (AdaMeZO, {}),
    "MeZO": (MeZO, {}),
    "MeZO, from one direction to the next": (MeZO, {"queries": 2}),
    "MeZO, signs": (MeZO, {"distribution": "rademacher"}),
    "FZOO": (FZOO, {"queries": 3}),
    "HiZOO": (HiZOO, {}),
    "HELENE": (HELENE, {}),
    "ZOAdaMU": (ZOAdaMU, {}),
    "ZOAdaMU, annealed": (ZOAdaMU, {"warmup": 0, "anneal": 1}),
    "ZOAdam": (ZOAdam, {}),
}
all_methods = pytest.mark.parametrize("method", METHODS)
all_types = pytest.mark.parametrize("dtype", TYPES, ids=str)


def weights(dtype: torch.dtype, value: float, count: int = 1000) -> nn.Parameter:
    """So large on both sides, among usual ones."""
    w = 0.02 * torch.randn(count, generator=torch.Generator().manual_seed(1))
    w[::5], w[3::5] = value, -value
    return nn.Parameter(w.to(dtype))


def make(method: str, params, zo_eps: float, **options):
    kind, own = METHODS[method]
    named = [(f"layers.{i}.weight", p) for i, p in enumerate(params)]
    return kind(named, **{"lr": 0.0, "seed": 7, "zo_eps": zo_eps, **own, **options})


@pytest.fixture
def unseen(monkeypatch):
    """Nobody may look at weights, or at what is kept for them."""

    def looked(tensor):
        raise AssertionError("a usual step looked at weights")

    monkeypatch.setattr(overflow_of, "largest", looked)
    monkeypatch.setattr(overflow_of, "least_of", looked)


# --- what is refused ----------------------------------------------------------------------------


@all_types
@all_methods
def test_what_would_overflow_is_refused_by_name(method, dtype):
    fine, bad = weights(dtype, 1.0), weights(dtype, MOST[dtype])
    before = [p.detach().clone() for p in (fine, bad)]
    optimizer = make(method, [fine, bad], 2 * HALF[dtype])
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"layers\.1\.weight has numbers.*perturbation='out_of_place'"
        ):
            optimizer.step(lambda: 1.0)
        for p, b in zip((fine, bad), before, strict=True):
            assert_same_bits(p.detach(), b)
    assert optimizer.param_groups[0]["next_direction"] == 0


@all_types
def test_without_a_look_there_would_be_infinities(monkeypatch, dtype):
    """That the steps of the test before are such that something is to be refused."""
    monkeypatch.setattr(overflow_of, "LARGEST_Z", dict.fromkeys(overflow_of.LARGEST_Z, 0.0))
    for method in METHODS:
        p = weights(dtype, MOST[dtype])
        make(method, [p], 2 * HALF[dtype]).step(lambda: 1.0)
        assert not p.isfinite().all(), method


@all_types
@all_methods
def test_exact_perturbation_takes_any(method, dtype):
    """Up to float32's own end, where it is the update that has no room."""
    zo_eps = 2 * HALF[dtype] if dtype == torch.float16 else 3.0
    model = nn.Module()
    model.weight = weights(dtype, MOST[dtype])
    before = model.weight.detach().clone()
    kind, own = METHODS[method]
    options = {"lr": 0.0, "seed": 7, "zo_eps": zo_eps, "perturbation": "out_of_place", **own}
    optimizer = kind(model.named_parameters(), model=model, **options)
    model.forward = lambda: model.weight.isfinite().sum().float()
    counts = []

    def closure() -> torch.Tensor:
        counts.append(int(model()))
        return torch.tensor(1.0)

    optimizer.step(closure)
    if dtype == torch.float16:
        assert min(counts) < model.weight.numel()  # what was evaluated has overflowed
    assert_same_bits(model.weight.detach(), before)


def test_no_group_is_written_where_one_is_refused():
    fine, bad = weights(torch.float16, 1.0), weights(torch.float16, 65504.0)
    before = fine.detach().clone()
    groups = [{"params": [("fine", fine)]}, {"params": [("bad", bad)]}]
    optimizer = MeZO(groups, lr=0.0, zo_eps=20.0, seed=7)
    version = fine._version
    with pytest.raises(ValueError, match="^bad has"):
        optimizer.step(lambda: 1.0)
    assert fine._version == version
    assert_same_bits(fine.detach(), before)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_step_that_is_refused_when_it_has_begun_is_restored(rounding, tmp_path):
    """After many perturbations their roundings have used up the room, and a log knows."""
    p = weights(torch.float16, 65504.0 - 10 - 16 * 16 - 22)
    start = {"layers.0.weight": p.detach().clone()}
    optimizer = make("MeZO", [p], 10.0, queries=40, rounding=rounding, distribution="rademacher")
    calls = []
    with StepLog.create(tmp_path / "log", optimizer):
        with pytest.raises(ValueError, match=r"layers\.0\.weight has numbers"):
            optimizer.step(lambda: calls.append(1) or 1.0)
    assert 12 < len(calls) < 80
    assert p.isfinite().all()
    # Each rounding was at most half a unit, 32 at the largest; the last one may be a whole one.
    change = (p.detach().float() - start["layers.0.weight"].float()).abs().max()
    assert change <= 16 * len(calls) + 32
    log = read(tmp_path / "log")
    replay(log, optimizer_for(log.header, start))
    assert_same_bits(start["layers.0.weight"], p.detach())


# --- what is not --------------------------------------------------------------------------------


@all_types
@all_methods
@pytest.mark.parametrize("zo_eps", [1e-6, 1e-3, 1e-2])
def test_a_usual_step_looks_at_nothing(unseen, method, dtype, zo_eps):
    p = weights(dtype, 1.0)
    optimizer = make(method, [p], zo_eps)
    for _ in range(3):
        optimizer.step(lambda: 1.0)


@all_types
@all_methods
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("zo_eps", [1e-3, 0.01])
def test_a_usual_step_brings_the_largest_numbers_back(unseen, method, dtype, zo_eps, rounding):
    p = weights(dtype, MOST[dtype], 50_000)
    large = p.detach().abs() == MOST[dtype]
    optimizer = make(method, [p], zo_eps, rounding=rounding)
    for _ in range(3):
        optimizer.step(lambda: 1.0)
    assert p.isfinite().all()
    # At random a float16 may come down by a unit of its last place, and up again to where it was.
    down = 64.0 if rounding == "stochastic" and dtype == torch.float16 else 0.0
    assert (MOST[dtype] - p.detach()[large].double().abs() <= down).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_store_at_random_leaves_the_largest_float16(backend):
    """0.25 more than it, which goes up in one of 128 stores: there is nothing above."""
    p = torch.full((10_000,), 65504.0).half()
    state = PhiloxState(1, 2)
    options = {"distribution": "rademacher", "rounding": "stochastic", "backend": backend}
    perturb_(Plan([p]), state, 0.25, **options)
    assert (p == 65504).sum() > 9800
    assert 20 < (p == 65472).sum() < 80  # of the half that came down
    p.fill_(65504.0)
    perturb_(Plan([p]), state, 32.0, **options)  # as far as 65536, which is too large
    z = sample_(torch.empty(10_000), state, distribution="rademacher")
    assert torch.equal(p.isinf(), z > 0)


@all_types
@all_methods
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_large_step_on_usual_weights(method, dtype, rounding):
    p = weights(dtype, 1.0)
    looked = []
    largest = overflow_of.largest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overflow_of, "largest", lambda t: looked.append(t) or largest(t))
        optimizer = make(method, [p], HALF[dtype], rounding=rounding)
        for _ in range(2):
            optimizer.step(lambda: 1.0)
    assert any(tensor is p for tensor in looked)
    assert p.isfinite().all()


@all_types
def test_infinite_and_nan_weights_stay_what_they_are(dtype):
    p = weights(dtype, 1.0)
    with torch.no_grad():
        p[:4] = torch.tensor([math.inf, -math.inf, math.nan, 1.0]).to(dtype)
    for zo_eps in (1e-3, HALF[dtype]):
        make("MeZO", [p], zo_eps).step(lambda: 1.0)
    assert torch.equal(p[:2].isinf(), torch.tensor([True, True]))
    assert p[2].isnan()
    assert p[3:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@all_types
def test_whatever_is_not_refused_comes_back(dtype, rounding, backend):
    """Weights up to their type's end, perturbations around those that overflow."""
    generator = torch.Generator().manual_seed(3)
    outcomes = []
    for trial in range(100):
        method = list(METHODS)[trial % len(METHODS)]
        reach = HALF[dtype] * 2 ** float(8 * torch.rand((), generator=generator) - 3)
        below = HALF[dtype] * 2 ** float(10 * torch.rand((), generator=generator) - 1)
        p = weights(dtype, MOST[dtype] - below, 400)
        before = p.detach().clone()
        zo_eps = reach / overflow_of.LARGEST_Z["exact"]
        fused = backend != "reference"
        optimizer = make(method, [p], zo_eps, rounding=rounding, seed=trial, fused=fused)
        try:
            optimizer.step(lambda: 1.0)
            outcomes.append("done")
        except ValueError:
            outcomes.append("refused")
            assert_same_bits(p.detach(), before, method)
        assert p.isfinite().all(), (method, outcomes[-1], reach, below)
    assert min(outcomes.count("done"), outcomes.count("refused")) >= 20, outcomes


# --- the bounds ---------------------------------------------------------------------------------


def test_the_largest_z():
    """Of the largest radius, from the least u, along the axis that the frame is turned to."""
    assert math.sqrt(62 * math.log(2)) + 2e-6 < overflow_of.LARGEST_Z["exact"] < 6.561
    z = sample_(torch.empty(1 << 20), PhiloxState(1, 2), distribution="rademacher")
    assert z.abs().max() == overflow_of.LARGEST_Z["rademacher"]


@all_types
def test_below_half_a_unit_nothing_overflows(dtype):
    half = HALF[dtype]
    assert overflow_of._half_a_unit(dtype) == half
    most = torch.tensor(MOST[dtype], dtype=dtype)
    for d in (half, half * (1 - 2.0**-7)):
        there = (most.double() + d).float() if dtype != torch.float32 else most.double() + d
        assert bool(there.to(dtype).isfinite()) == (d < half)
    assert 2 * overflow_of._negligible(dtype) < half
    assert overflow_of._negligible(torch.float16) / overflow_of.LARGEST_Z["exact"] > 1.2


def perturb(plan: Plan, direction, to: float) -> None:
    InPlace([plan], ["nearest"], "exact", "reference").perturb(direction, to)


def test_hizoo_reaches_as_far_as_its_least_curvature():
    z = PhiloxState(1, 2)
    along = Terms.of([z], rule="hizoo")
    for least, refused in ((1e-4, True), (1.0, False)):
        weight, curvature = torch.full((50,), 65400.0).half(), torch.ones(50)
        curvature[7] = least
        plan = Plan([weight], names=["w"]).with_buffers([[curvature]])
        if refused:
            with pytest.raises(ValueError, match="^w has numbers"):
                perturb(plan, along, 0.3)
        else:
            perturb(plan, along, 0.3)  # 0.3 * 6.56 * 100 might overflow: it is looked up
            assert weight.isfinite().all()
    for wrong in (0.0, math.nan):
        curvature[7] = wrong
        with pytest.raises(ValueError, match="^w has numbers"):
            perturb(plan, along, 0.3)


def test_adamu_reaches_as_far_as_its_moment(monkeypatch):
    """Whose bound is that of the schedule; and where that has none, the moment's own."""
    z = PhiloxState(1, 2), PhiloxState(1, 3)
    looked = []
    largest = overflow_of.largest
    monkeypatch.setattr(overflow_of, "largest", lambda t: looked.append(t) or largest(t))
    for beta, kept, seen, refused in (
        (0.9, 1.0, 0, False),
        (0.0, 1.0, 1, False),
        (0.0, 1e4, 2, True),
    ):
        weight, m = torch.full((50,), 65000.0).half(), torch.full((50,), kept)
        plan = Plan([weight], names=["w"]).with_buffers([[m]])
        root = math.sqrt(0.5)
        along = Terms.of(z, rule="adamu", numbers=(root, root, beta, 1 - beta))
        looked.clear()
        if refused:
            with pytest.raises(ValueError, match="^w has numbers"):
                perturb(plan, along, 0.1)
        else:
            perturb(plan, along, 0.1)
        assert [t is m for t in looked] == [True, False][:seen]


def test_the_moment_of_a_run_is_within_its_bound():
    """At the smallest beta1 whose bound is finite, nearly, and in bfloat16."""
    options = {"ends": (0.5, 0.05, 0.01), "buffer_dtype": "bfloat16"}
    p = weights(torch.float32, 1.0)
    optimizer = make("ZOAdaMU, annealed", [p], 1e-3, **options)
    for _ in range(200):
        optimizer.step(lambda: 1.0)
    m = optimizer.state[p]["m"].float().abs().max()
    along = Terms.of(
        [PhiloxState(1, 2), PhiloxState(1, 3)], rule="adamu",
        numbers=(math.sqrt(0.5), math.sqrt(0.5), 0.05, 0.95),
    )  # fmt: skip
    bound = overflow_of.OverflowCheck(Plan([p]), "exact")._bound(along)
    assert 5 < m < bound < math.inf


def test_in_a_capture_nobody_looks(monkeypatch, unseen):
    monkeypatch.setattr(overflow_of, "capturing", lambda device: True)
    weight = weights(torch.float16, 1.0)
    plan = Plan([weight.detach()], names=["w"])
    perturb(plan, PhiloxState(1, 2), 1.2)
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="^w would be perturbed.*in a capture.*smaller zo_eps"):
        perturb(plan, PhiloxState(1, 2), 1.3)
    assert_same_bits(weight.detach(), before)


# --- types that have no perturbation ------------------------------------------------------------


@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool], ids=str
)
def test_frozen_weights_of_other_types_are_left_alone(dtype, perturbation):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            packed = torch.tensor([0, 1, 1, 0]).to(dtype)
            self.packed = nn.Parameter(packed, requires_grad=False)
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self) -> torch.Tensor:
            return (self.packed.float() * self.weight).sum()

    model, alone = Model(), Model()
    before = model.packed.detach().view(torch.uint8).clone()
    optimizer = AdaMeZO.for_model(model, lr=1e-2, seed=3, perturbation=perturbation)
    for _ in range(3):
        optimizer.step(model)
    assert torch.equal(model.packed.detach().view(torch.uint8), before)
    assert model.packed._version == 0
    assert (model.weight != 1).any()
    # It counts as a parameter: others keep their directions when it is one that is trained.
    alone.packed = nn.Parameter(alone.packed.float(), requires_grad=False)
    other = AdaMeZO.for_model(alone, lr=1e-2, seed=3, perturbation=perturbation)
    for _ in range(3):
        other.step(alone)
    assert_same_bits(alone.weight.detach(), model.weight.detach())
