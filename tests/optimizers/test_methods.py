"""The methods: each by its formula in float64, and with all that AdaMeZO promises. One row each."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import adamezo.engine.optimizer
import adamezo.engine.perturb.inplace
import adamezo.methods.memoryless
from adamezo import (
    FZOO,
    GRZO,
    HELENE,
    MEAZO,
    AdaMeZO,
    AdaZeta,
    HiZOO,
    MeZO,
    ScalarAdaMeZO,
    ZOAdam,
    ZOAdaMU,
    runlog,
)
from adamezo.engine.options import is_of, kinds_of
from adamezo_kernels import RULES, PhiloxState, sample_
from examples import toy_functions, train_on_accuracy
from helpers.backends import needs_native

SEED = 0x243F6A8885A308D3
UNIT = 2.0**-24
ZO_EPS = 1e-2


@pytest.fixture(autouse=True)
def automatic_backend(monkeypatch):
    """`fused` is about the automatic choice, which the environment may override."""
    monkeypatch.delenv("ADAMEZO_BACKEND", raising=False)


# --- the table ------------------------------------------------------------------------------------

Z = Callable[[int], torch.Tensor]
"""A direction by its number, in float64."""


class Step(NamedTuple):
    """Of one weight, by a rule in float64."""

    step: torch.Tensor
    """theta <- theta (1 - lr weight_decay) - lr step"""
    size: torch.Tensor
    """The same with the absolute values of all that is added up."""
    roundings: float
    """So many units of ``size`` is what float32 may make of it, to first order."""
    reach: torch.Tensor
    """How far the weights were perturbed, in units of zo_eps."""


Rule = Callable[[int, list[float], list[Any], Z], Step]
"""From the number of its first direction, its losses, and what it keeps: a step."""

Coefficients = dict[int, float]
"""By the number of a direction, what stands in front of it in the update, but for -lr."""


def linear(rule: Callable[[int, list[float], list[Any]], Coefficients]) -> Rule:
    """Each of the K coefficients is a rounded scalar, as is lr, and K sums are rounded."""

    def step(first: int, losses: list[float], past: list[Any], z: Z) -> Step:
        update = rule(first, losses, past)
        terms = [c * z(k) for k, c in update.items()]
        reach = torch.stack([z(k).abs() for k in update if k >= first]).amax(dim=0)
        return Step(sum(terms), sum(term.abs() for term in terms), len(update) + 2, reach)

    return step


def two_sided(losses: list[float]) -> list[float]:
    return [(a - b) / (2 * ZO_EPS) for a, b in zip(losses[::2], losses[1::2], strict=True)]


@linear
def mean_of_estimates(first: int, losses: list[float], past: list[Any]) -> Coefficients:
    p = two_sided(losses)
    return {first + q: p[q] / len(p) for q in range(len(p))}


@linear
def meazo(first: int, losses: list[float], past: list[float]) -> Coefficients:
    past += two_sided(losses)
    t = len(past)
    s = sum(0.1 * 0.9 ** (t - i) * past[i - 1] ** 2 for i in range(1, t + 1))
    return {first: past[-1] / (math.sqrt(s / (1 - 0.9**t)) + 0.01)}


@linear
def fzoo(first: int, losses: list[float], past: list[Any]) -> Coefficients:
    n = len(losses) - 1
    one_sided = torch.tensor(losses[1:], dtype=torch.float64)
    sigma = one_sided.std(correction=1).item()
    return {first + i: (losses[1 + i] - losses[0]) / (n * ZO_EPS * sigma) for i in range(n)}


@linear
def grzo(first: int, losses: list[float], past: list[Any]) -> Coefficients:
    n = len(losses) // 2
    sides = torch.tensor(losses, dtype=torch.float64)
    delta = (sides[:n] - sides[n:]) / 2
    a = delta / (delta.std(correction=1) + 1e-8)
    return {first + i: a[i].item() / (2 * ZO_EPS * n) for i in range(n)}


@linear
def scalar_adamezo(first: int, losses: list[float], past: list[float]) -> Coefficients:
    past += two_sided(losses)
    kept = past[: -5 - 1 : -1]
    rms = math.sqrt(0.1 * sum(0.9**k * p**2 for k, p in enumerate(kept)))
    return {first - k: 0.3 * 0.7**k * p / (rms + 1e-8) for k, p in enumerate(kept)}


# A buffer has been rounded a few times in each of t steps. A mean of squares has no cancellation;
# one of gradients has, so `size` has their absolute values.


def zo_adam(first: int, losses: list[float], past: list[torch.Tensor], z: Z) -> Step:
    (p,) = two_sided(losses)
    t, g = first + 1, p * z(first)
    m, size, v = past or [torch.zeros_like(g)] * 3
    m, size, v = 0.9 * m + 0.1 * g, 0.9 * size + 0.1 * g.abs(), 0.99 * v + 0.01 * g**2
    past[:] = m, size, v
    below = (1 - 0.9**t) * ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    return Step(m / below, size / below, 4 * t + 2 * t + 8, z(first).abs())


def hizoo(first: int, losses: list[float], past: list[torch.Tensor], z: Z) -> Step:
    start, plus, minus = losses
    p, c = (plus - minus) / (2 * ZO_EPS), abs(plus + minus - 2 * start) / (2 * ZO_EPS**2)
    (before,) = past or [torch.ones_like(z(first))]
    after = (1 - 1e-3) * before + 1e-3 * c * before * z(first) ** 2
    past[:] = [after]
    step = p * z(first) / after.sqrt()
    # D is a product of t factors, each rounded four times, and half of its error is in the root.
    return Step(step, step.abs(), 2 * (first + 1) + 6, z(first).abs() / before.sqrt())


HELENE_OPTIONS = {
    "betas": (0.8, 0.9), "gamma": 0.5, "clip": 0.05, "anneal": 5.0, "curvature_every": 3,
    "batch_size": 2,
}  # fmt: skip


def helene(first: int, losses: list[float], past: list[torch.Tensor], z: Z) -> Step:
    if len(losses) == 4:
        losses, sampled = losses[::2], losses[1::2]
    else:
        sampled = losses
    (p,), (p_hat,) = two_sided(losses), two_sided(sampled)
    alpha = 0.8 + 0.2 * math.exp(-first / 5)
    g = p * z(first)
    m, size, h = past or [torch.zeros_like(g)] * 3
    m, size = 0.8 * m + alpha * g, 0.8 * size + alpha * g.abs()
    if first % 3 == 0:
        h = 0.9 * h + 0.1 * 2 * (p_hat * z(first)) ** 2
    past[:] = m, size, h
    below = 0.5 * h.clamp(min=0.05) + 1e-8
    return Step(m / below, size / below, 4 * (first + 1) + 4 * (first + 1) + 6, z(first).abs())


ANNEALED = {"warmup": 4, "anneal": 14}


def zo_adamu(first: int, losses: list[float], past: list[torch.Tensor], z: Z) -> Step:
    (p,) = two_sided(losses)
    t = first // 2
    cosine = math.cos(math.pi * min(max((t - 4) / 10, 0), 1))
    alpha, beta1, beta2 = ((1 + end + (1 - end) * cosine) / 2 for end in (0.5, 0.9, 0.01))
    m, m_size = past or [torch.zeros_like(z(first))] * 2
    fresh = alpha**0.5 * z(first)
    other = (1 - alpha) ** 0.5 * z(first + 1)
    moving, moving_size = m + other, m_size + other.abs()
    d = beta1 * fresh + (1 - beta1) * moving
    size = beta1 * fresh.abs() + (1 - beta1) * moving_size
    past[:] = d, size
    v = beta2 * fresh**2 + (1 - beta2) * moving**2 + 1e-8
    # z'' is a sum with cancellation in v as well, whose root has half of its relative error.
    size = size + d.abs() * (1 + (1 - beta2) * moving.abs() * moving_size / v)
    return Step(p * d / v.sqrt(), abs(p) * size / v.sqrt(), 5 * (t + 1) + 8, d.abs())


class Row(NamedTuple):
    method: type
    lr: float
    options: dict[str, Any]
    rule: Rule
    directions: Callable[[int], int] = lambda step: 1
    """How many a step has."""
    evaluations: int | None = None
    """How many, where it is not two for each direction."""


LINEAR = {"queries": 4, "linear_over": 16}
EPOCHS = {"queries": 6, "steps_per_epoch": 4, "exponent": 1.5, "alpha": 0.85}

METHODS = {
    "MeZO": Row(MeZO, 0.02, {}, mean_of_estimates),
    "MeZO, 3 directions": Row(MeZO, 0.02, {"queries": 3}, mean_of_estimates, lambda step: 3),
    "MeZO, linear": Row(
        MeZO, 0.02, LINEAR, mean_of_estimates, lambda step: min(max(step // 4, 1), 4)
    ),
    "AdaZeta": Row(
        AdaZeta,
        0.02,
        EPOCHS,
        mean_of_estimates,
        lambda step: (1, 1, 2, 4, 6)[step // 4],  # 0.85 (0, 1, 2.8, 5.2, 8)
    ),
    "MEAZO": Row(MEAZO, 0.02, {"beta": 0.9, "eps": 0.01}, meazo),
    "FZOO": Row(FZOO, 1e-3, {"queries": 4}, fzoo, lambda step: 4, evaluations=5),
    "GRZO": Row(GRZO, 1e-3, {"examples": 4}, grzo, lambda step: 4),
    "ScalarAdaMeZO": Row(ScalarAdaMeZO, 0.02, {"horizon": 5}, scalar_adamezo),
    "ZOAdam": Row(ZOAdam, 0.02, {"betas": (0.9, 0.99)}, zo_adam),
    "HiZOO": Row(HiZOO, 0.02, {"alpha": 1e-3}, hizoo, evaluations=3),
    "HELENE": Row(HELENE, 0.005, HELENE_OPTIONS, helene),
    "ZOAdaMU": Row(ZOAdaMU, 0.02, ANNEALED, zo_adamu, lambda step: 2, evaluations=2),
}

all_methods = pytest.mark.parametrize("name", METHODS)
both_16_bit_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


# --- a model --------------------------------------------------------------------------------------


class Model(nn.Module):
    """A head tied to an embedding, and once more as another Parameter over the same memory."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(30, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 30)
        self.head.weight = self.embed.weight
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator).to(dtype)
        self.alias = nn.Parameter(self.embed.weight.detach())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids)))) + self.alias.mean()


def groups(model: Model, lr: float) -> list[dict[str, Any]]:
    names = dict(model.named_parameters(remove_duplicate=False))

    def named(*chosen: str) -> list[tuple[str, nn.Parameter]]:
        return [(name, names[name]) for name in chosen]

    return [
        {"params": named("embed.weight", "body.weight"), "weight_decay": 0.2},
        {"params": named("body.bias", "head.bias", "alias"), "lr": 3 * lr, "maximize": True},
    ]


def make(name: str, model: Model, **options: Any) -> Any:
    row = METHODS[name]
    options = {"seed": SEED, "zo_eps": ZO_EPS, "model": model, **row.options, **options}
    return row.method(groups(model, row.lr), lr=row.lr, **options)


def loss_of(model: Model) -> Callable[[], torch.Tensor]:
    ids = torch.arange(12) % 30
    return lambda: nn.functional.cross_entropy(model(ids).float(), (ids * 7 + 3) % 30)


def tensors(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def plain(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state, with tensors as lists."""
    state = optimizer.state_dict()
    kept = {p: {n: b.tolist() for n, b in bs.items()} for p, bs in state["state"].items()}
    return {**copy.deepcopy(state), "state": kept}


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Of weights that are no NaN."""
    return all(
        torch.equal(x, y) and torch.equal(x.signbit(), y.signbit())
        for x, y in zip(a, b, strict=True)
    )


# --- options --------------------------------------------------------------------------------------

OF_ANOTHER_KIND = ("no", "1e-3", None, True, 1.5, (0.5, "x"), [0.5], 3)


@all_methods
def test_options_of_another_kind_are_refused(name):
    """By name, when they are given and when somebody sets them between two steps: then before
    anything is perturbed."""
    model, row = Model(), METHODS[name]
    optimizer = make(name, model)
    optimizer.step(loss_of(model))
    (group, _), before, refused = optimizer.param_groups, tensors(model), 0
    kinds = kinds_of(type(optimizer))
    for option in optimizer.defaults.keys() & kinds.keys():
        for value in OF_ANOTHER_KIND:
            if is_of(value, kinds[option]):
                continue
            refused += 1
            with pytest.raises(ValueError, match=f"Invalid {option}: .*, expected "):
                row.method(model.parameters(), **{"lr": row.lr, **row.options, option: value})
            usual = group[option]
            if value == usual:  # as True is 1
                continue
            group[option] = value
            with pytest.raises(ValueError, match=rf"Invalid {option}: |must be the same in all"):
                optimizer.step(loss_of(model))
            group[option] = usual
    assert refused > 60
    assert same_bits(tensors(model), before)
    optimizer.step(loss_of(model))
    assert not same_bits(tensors(model), before)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("rounding", "stochastc", "Invalid rounding: 'stochastc'"),
        ("perturbation", "out-of-place", "Invalid perturbation: 'out-of-place'"),
        ("nonfinite", "ignore", "Invalid nonfinite: 'ignore'"),
        ("max_skipped", 0, "Invalid max_skipped: 0"),
        ("weight_decay", -1.0, "Invalid weight_decay value: -1"),
        ("lr", -1.0, "Invalid learning rate: -1"),
        ("lr", float("nan"), "Invalid learning rate: nan"),
    ],
)
@all_methods
def test_options_that_are_set_between_steps_are_checked(name, option, value, message):
    model = Model()
    optimizer = make(name, model)
    optimizer.step(loss_of(model))
    before = tensors(model)
    for group in optimizer.param_groups:
        group[option] = value
    with pytest.raises(ValueError, match=message):
        optimizer.step(loss_of(model))
    assert same_bits(tensors(model), before)


# --- the rules ------------------------------------------------------------------------------------

STEPS = 20


def given_losses(name: str) -> list[list[float]]:
    """For each step. As they do not depend on the weights, neither do the updates."""
    row = METHODS[name]
    generator = torch.Generator().manual_seed(1)
    losses = []
    for t in range(STEPS):
        count = row.evaluations or 2 * row.directions(t)
        losses.append((2 + 0.02 * torch.randn(count, generator=generator).double()).tolist())
    return losses


def by_the_rule(name, start, parameter, lr, weight_decay, maximize, distribution):
    """A weight in float64 after STEPS steps, and a bound on what float32 may add.

    As losses are given, errors of steps add up. One step: of each direction the weights are rounded
    at +mu, at -mu and when put back, three units of a number of at most |theta| + mu |z|; the decay
    is a rounded scalar and a rounded product, and the result is rounded: three more. The rest is in
    `Step`. The last 1 % is for the products of errors.
    """
    row = METHODS[name]
    theta, bound = start.double(), torch.zeros(start.shape, dtype=torch.float64)
    cache: dict[int, torch.Tensor] = {}

    def z(counter: int) -> torch.Tensor:
        if counter not in cache:
            out = torch.empty(start.shape)
            state = PhiloxState(SEED, counter)
            sample_(out, state, parameter=parameter, distribution=distribution)
            cache[counter] = out.double()
        return cache[counter]

    first, past = 0, []
    for t, losses in enumerate(given_losses(name)):
        count = row.directions(t)
        step = row.rule(first, losses, past, z)
        bound = bound + UNIT * (3 * count + 3) * (theta.abs() + ZO_EPS * step.reach)
        bound = bound + lr * UNIT * step.roundings * step.size
        theta = theta * (1 - lr * weight_decay) - (-1 if maximize else 1) * lr * step.step
        first += count
    return theta, 1.01 * bound


WEIGHTS = {  # its index, lr in units of the method's, weight decay, maximize
    "embed.weight": (0, 1, 0.2, False),
    "body.weight": (1, 1, 0.2, False),
    "body.bias": (2, 3, 0.0, True),
    "head.bias": (3, 3, 0.0, True),
}


def expected_weight(name: str, weight: str, model: Model):
    index, times, decay, maximize = WEIGHTS[weight]
    distribution = {"FZOO": "rademacher", "GRZO": "flipout:4"}.get(name, "exact")
    start = model.get_parameter(weight).detach()
    lr = times * METHODS[name].lr
    return by_the_rule(name, start, index, lr, decay, maximize, distribution)


@all_methods
@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
def test_the_rule(name, perturbation):
    model = Model()
    expected = {weight: expected_weight(name, weight, model) for weight in WEIGHTS}
    start = {weight: model.get_parameter(weight).detach().clone() for weight in WEIGHTS}
    optimizer = make(name, model, perturbation=perturbation)
    for losses in given_losses(name):
        values = iter(losses)
        optimizer.step(lambda values=values: next(values))
        assert next(values, None) is None, "a step evaluates as often as it has losses"
        assert optimizer.losses == tuple(losses)
    for weight, (end, bound) in expected.items():
        error = (model.get_parameter(weight).detach().double() - end).abs()
        assert (error <= bound).all(), weight
        # The bound is sharp: a thousandth of the way that the typical weight went is a failure.
        assert bound.median() < 1e-3 * (end - start[weight]).abs().median(), weight
    assert model.head.weight is model.embed.weight
    assert model.alias.data_ptr() == model.embed.weight.data_ptr()


def test_no_two_of_these_rules_are_alike():
    """Otherwise a test above could pass with an option that is ignored."""
    ends = [expected_weight(name, "embed.weight", Model()) for name in METHODS]
    for i, (end, bound) in enumerate(ends):
        for other, _ in ends[:i]:
            assert ((end - other).abs() > 10 * bound).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mezo_of_one_direction_has_the_bits_of_adamezo_without_betas(dtype):
    ends = []
    for method, options in ((MeZO, {}), (AdaMeZO, {"betas": (0.0, 0.0)})):
        model = Model(dtype)
        optimizer = method(groups(model, 0.02), lr=0.02, seed=SEED, **options)
        for _ in range(8):
            optimizer.step(loss_of(model))
        ends.append((tensors(model), optimizer.losses, optimizer.measured))
    assert same_bits(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_adamezo_with_signs_is_the_scalar_control():
    """z^2 is 1 everywhere, so v is one number. Each of 8 steps and its three writes round weights
    of up to 4, and the sums of up to 5 directions, whose step is lr (3 lr in a group) at most."""
    ends = []
    for method in (AdaMeZO, ScalarAdaMeZO):
        model, values = Model(), iter(torch.linspace(1.0, 2.0, 16).sin().tolist())
        optimizer = method(
            groups(model, 0.02), lr=0.02, seed=SEED, horizon=5, distribution="rademacher"
        )
        before = tensors(model)
        for _ in range(8):
            optimizer.step(lambda values=values: next(values))
        ends.append(tensors(model))
    for a, b, start in zip(*ends, before, strict=True):
        assert (a - b).abs().max() <= 8 * (4 * 4 + 10 * 0.06) * UNIT
        assert (a - start).abs().max() > 0.01


def test_a_step_of_many_directions_is_one_update_of_each_group(monkeypatch):
    """So no estimate is ever kept in a tensor."""
    calls = []

    def counted(call, backend):
        calls.append((call.terms.horizon, call.terms.with_second))

    monkeypatch.setattr(adamezo.engine.optimizer, "run", counted)
    model = Model()
    make("MeZO, 3 directions", model).step(loss_of(model))
    make("FZOO", model).step(loss_of(model))
    assert calls == [(3, False), (3, False), (4, False), (4, False)]


@all_methods
def test_passes_over_the_weights(name, monkeypatch):
    """A perturbation, or the way from one to the next, is one; and the update, which restores."""
    scales = []
    run = adamezo.engine.perturb.inplace.run

    def counted(call, backend):
        scales.append(call.scale)
        run(call, backend)

    monkeypatch.setattr(adamezo.engine.perturb.inplace, "run", counted)
    model = Model()
    optimizer = make(name, model)
    for t in range(6):
        scales.clear()
        optimizer.step(loss_of(model))
        at_theta = name in ("HiZOO", "FZOO")  # the first evaluation is there
        evaluations = METHODS[name].evaluations or 2 * METHODS[name].directions(t)
        assert len(scales) == 2 * (evaluations - at_theta)  # in each of two groups


@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
@pytest.mark.parametrize("name", ["MeZO, 3 directions", "FZOO"])
def test_where_a_step_of_several_directions_evaluates(name, perturbation):
    model = Model()
    optimizer = make(name, model, perturbation=perturbation)
    start, seen = model.body.weight.detach().double(), []
    hook = model.body.register_forward_pre_hook(
        lambda module, _: seen.append(module.weight.detach().double())
    )
    optimizer.step(loss_of(model))
    hook.remove()
    scales = [0.0] + [ZO_EPS] * 4 if name == "FZOO" else [ZO_EPS, -ZO_EPS] * 3
    distribution = optimizer.param_groups[0]["distribution"]
    for i, (weight, scale) in enumerate(zip(seen, scales, strict=True)):
        number = max(i - 1, 0) if name == "FZOO" else i // 2
        z = torch.empty(8, 8)
        sample_(z, PhiloxState(SEED, number), parameter=1, distribution=distribution)
        # Weights of up to 4 were rounded to 2.4e-7 once for each evaluation so far.
        torch.testing.assert_close(weight, start + scale * z.double(), rtol=0, atol=2e-6)


# --- schedules ------------------------------------------------------------------------------------


def queries(optimizer: MeZO, steps: range) -> list[int]:
    return [optimizer.queries_at(step, optimizer.param_groups[0]) for step in steps]


def test_linear_schedule():
    p = [nn.Parameter(torch.zeros(3))]
    assert queries(MeZO(p, queries=5), range(3)) == [5, 5, 5]
    linear = MeZO(p, queries=5, linear_over=10)
    assert queries(linear, range(14)) == [1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5]
    assert queries(MeZO(p, queries=5, linear_over=1), range(3)) == [1, 5, 5]


def test_adazetas_schedule():
    p = [nn.Parameter(torch.zeros(3))]
    exponent = math.log(20 / 0.85) / math.log(10)  # 20 directions in epoch 10, were it not for 15
    optimizer = AdaZeta(p, steps_per_epoch=3, exponent=exponent)
    by_hand = [1]  # epoch 0
    for epoch in range(1, 12):
        by_hand.append(min(max(math.floor(0.85 * epoch**exponent), 1), 15))
    assert (by_hand[1], by_hand[4], by_hand[10]) == (1, 5, 15)
    assert queries(optimizer, range(36)) == [count for count in by_hand for _ in range(3)]
    huge = AdaZeta(p, queries=7, steps_per_epoch=1, exponent=500.0, alpha=1e-300)
    assert queries(huge, range(0, 30, 2))[-1] == 7


def test_steps_that_are_skipped_do_not_move_a_schedule():
    model = Model()
    optimizer = make("MeZO, linear", model)
    evaluations = []

    def nan() -> float:
        evaluations.append(1)
        return math.nan

    for _ in range(7):
        optimizer.step(loss_of(model))
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step(nan)
    optimizer.step(nan)
    assert len(evaluations) == 2 * 2
    optimizer.step(loss_of(model))
    assert len(optimizer.losses) == 2
    optimizer.step(loss_of(model))
    assert len(optimizer.losses) == 4
    assert optimizer.measured[2:] == (0.0, 0.0)


# --- FZOO without a scale -------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.7, 0.3])
def test_fzoo_without_a_spread_only_decays(start):
    """Thirds do not sum exactly, so that sigma by its formula would be a rounding error."""
    model = Model()
    before = tensors(model)
    optimizer = make("FZOO", model, queries=3, perturbation="out_of_place")
    values = iter([start, 0.7, 0.7, 0.7])
    optimizer.step(lambda: next(values))
    assert optimizer.measured == (0.0, 0.0, 0.0)
    assert optimizer.skipped == 0
    assert [group["steps"] for group in optimizer.param_groups] == [1, 1]
    for p, was, decay in zip(model.parameters(), before, (0.2, 0.2, 0.2, 0, 0), strict=True):
        assert torch.equal(p, was * torch.tensor(1 - 1e-3 * decay, dtype=torch.float32))


@pytest.mark.parametrize("values", [[1e-200, 0, 1e-200, 0], [1e200, -1e200, 1e200, 0]])
def test_fzoo_of_losses_whose_squares_leave_the_range_of_floats(values):
    model = Model()
    before = tensors(model)
    optimizer = make("FZOO", model, queries=3, perturbation="out_of_place", weight_decay=0.0)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    given = iter(map(float, values))
    if values[0] > 1:
        with pytest.warns(RuntimeWarning, match="skipped"):
            optimizer.step(lambda: next(given))
    else:
        optimizer.step(lambda: next(given))
        assert optimizer.measured == (0.0, 0.0, 0.0)
    assert same_bits(tensors(model), before)


# --- methods with buffers -------------------------------------------------------------------------

BUFFERED = [name for name, row in METHODS.items() if RULES[row.method.rule].buffers]
with_buffers = pytest.mark.parametrize("name", BUFFERED)


def test_adamezo_is_zo_adam_while_its_horizon_holds_all_steps():
    """To rounding: one sums up what the other multiplies by beta."""
    ends = []
    for method, options in (
        (ZOAdam, {}),
        (AdaMeZO, {"horizon": STEPS, "normalization": "bias_corrected"}),
    ):
        model = Model()
        optimizer = method(groups(model, 0.02), 0.02, (0.9, 0.99), seed=SEED, **options)
        for losses in given_losses("ZOAdam"):
            values = iter(losses)
            optimizer.step(lambda values=values: next(values))
        ends.append(tensors(model))
    start = tensors(Model())
    for a, b, was in zip(*ends, start, strict=True):
        moved = (a - was).abs().mean()
        assert moved > 0.05
        # A few hundred roundings of 2^-24 each.
        assert (a - b).abs().max() < 1e-4 * moved


@both_16_bit_types
def test_hizoos_curvature_moves_in_16_bits(dtype):
    """With the published alpha, which leaves a curvature in 16 bits at 1."""
    model = Model(dtype)
    optimizer = HiZOO(
        groups(model, 1e-6), seed=SEED, zo_eps=1e-2, perturbation="out_of_place", model=model
    )
    expected = 0.0
    for _ in range(50):
        optimizer.step(loss_of(model))
        expected += 1e-8 * (optimizer.measured[1] - 1)
    curvature = torch.cat([s["curvature"].flatten() for s in optimizer.state.values()])
    assert curvature.dtype == torch.float32
    assert expected > 1e-6
    assert (curvature != 1).float().mean() > 0.5
    # z^2 has mean 1 and variance 2 over 350 weights and 50 steps; a place of D is 1.2e-7.
    assert math.isclose((curvature - 1).mean().item(), expected, rel_tol=0.5)


@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
def test_zo_adamu_updates_along_what_it_has_evaluated(perturbation):
    """Its code draws another direction for the update."""
    model = Model()
    optimizer = make("ZOAdaMU", model, perturbation=perturbation, weight_decay=0.0)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for _ in range(STEPS - 4):
        optimizer.step(loss_of(model))
    start, seen = model.body.weight.detach().clone(), []
    loss = loss_of(model)
    hook = model.body.register_forward_pre_hook(
        lambda module, _: seen.append(module.weight.detach().clone())
    )
    optimizer.step(loss)
    hook.remove()
    d = (seen[0] - seen[1]) / (2 * ZO_EPS)
    kept = optimizer.state[model.body.weight]["m"]
    # Weights of up to 4 are rounded to 2.4e-7 on either side of 2e-2 d.
    torch.testing.assert_close(kept, d, rtol=0, atol=3e-5)
    step = (start - model.body.weight.detach()) / optimizer.measured[0]
    aligned = (step * d > 0) | (d.abs() < 1e-3)
    assert aligned.all()
    assert kept.std() > 0.3


def test_helenes_labels_from_the_model():
    """In the steps that update h, and only there, on the same perturbed weights."""
    model = Model()
    optimizer = make("HELENE", model, curvature="sampled")
    with pytest.raises(ValueError, match=r"expected step\(closure, sampled\)"):
        optimizer.step(loss_of(model))
    calls: list[str] = []
    past: dict[str, list[Any]] = {weight: [] for weight in WEIGHTS}
    expected = {w: model.get_parameter(w).detach().double() for w in WEIGHTS}
    seen: list[torch.Tensor] = []

    def closure(kind: str, values: list[float]):
        def loss() -> float:
            calls.append(kind)
            seen.append(model.body.weight.detach().clone())
            return values.pop(0)

        return loss

    for t, losses in enumerate(given_losses("HELENE")[:8]):
        calls.clear(), seen.clear()
        due = t % 3 == 0
        other = [losses[0] * 1.5, losses[1]] if due else []
        mean = optimizer.step(closure("loss", losses[:]), closure("sampled", other[:]))
        assert calls == (["loss", "sampled"] * 2 if due else ["loss"] * 2)
        assert math.isclose(mean.item(), sum(losses) / 2, rel_tol=1e-6)
        assert len(optimizer.measured) == 2
        if due:
            assert torch.equal(seen[0], seen[1])
            assert torch.equal(seen[2], seen[3])
            losses = [losses[0], other[0], losses[1], other[1]]
        assert not torch.equal(seen[0], seen[-1])
        for weight, (index, times, decay, maximize) in WEIGHTS.items():

            def z(counter: int, index=index, weight=weight) -> torch.Tensor:
                out = torch.empty_like(model.get_parameter(weight))
                return sample_(out, PhiloxState(SEED, counter), parameter=index).double()

            lr = times * METHODS["HELENE"].lr
            step = helene(t, losses, past[weight], z).step
            sign = -1 if maximize else 1
            expected[weight] = expected[weight] * (1 - lr * decay) - sign * lr * step
    for weight, end in expected.items():
        got = model.get_parameter(weight).detach().double()
        torch.testing.assert_close(got, end, rtol=1e-5, atol=1e-5)


def test_helenes_sampled_labels_replay(tmp_path):
    model = Model()
    optimizer = make("HELENE", model, curvature="sampled")
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    with runlog.StepLog.create(tmp_path / "log", optimizer):
        for _ in range(7):
            optimizer.step(loss_of(model), lambda: 2 * loss_of(model)())
    log = runlog.read(tmp_path / "log")
    twin = runlog.optimizer_for(log.header, base)
    assert runlog.replay(log, twin) == 7
    for n, p in zip(
        twin.param_groups[0]["param_names"], twin.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(p, model.get_parameter(n))


@with_buffers
def test_buffers_of_16_bits(name):
    """They are saved and loaded as they are, whatever the type of the weights."""
    model = Model()
    optimizer = make(name, model, buffer_dtype="bfloat16")
    for _ in range(5):
        optimizer.step(loss_of(model))
    assert all(
        b.dtype == torch.bfloat16 for kept in optimizer.state.values() for b in kept.values()
    )
    other = Model()
    other.load_state_dict(model.state_dict())
    resumed = make(name, other)
    resumed.load_state_dict(optimizer.state_dict())
    for o, m in ((optimizer, model), (resumed, other)):
        for _ in range(3):
            o.step(loss_of(m))
    assert same_bits(tensors(model), tensors(other))
    assert plain(optimizer) == plain(resumed)
    with pytest.raises(ValueError, match="Invalid buffer_dtype: 'float16'"):
        make(name, Model(), buffer_dtype="float16")


@with_buffers
def test_a_state_without_its_buffers_is_refused(name):
    model = Model()
    optimizer = make(name, model)
    optimizer.step(loss_of(model))
    before = plain(optimizer)
    buffer = next(iter(optimizer.buffers))
    for value, message in (
        (None, f"has {buffer} NoneType of dtype None"),
        (torch.zeros(3), "its weight has"),
        (torch.zeros(30, 8, dtype=torch.int64), "dtype int64"),
    ):
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0][buffer] = value
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    assert plain(optimizer) == before


@with_buffers
def test_a_state_that_was_not_saved_whole_is_refused(name):
    model = Model()
    optimizer = make(name, model)
    optimizer.step(loss_of(model))
    state = {**optimizer.state_dict(), "state": {}}
    with pytest.raises(ValueError, match=r"has taken steps and has no .* not saved whole"):
        optimizer.load_state_dict(state)
    make(name, Model()).load_state_dict(make(name, Model()).state_dict())  # before any step


@with_buffers
def test_a_group_may_have_no_buffers_of_its_own(name):
    """As where its weights are another group's too, or were frozen until now."""
    method = METHODS[name].method
    weight, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    alias = nn.Parameter(weight.detach())
    groups = [{"params": [p]} for p in (weight, alias, frozen)]
    optimizer = method(groups, **METHODS[name].options)
    optimizer.step(lambda: weight.sum())
    state = optimizer.state_dict()
    frozen.requires_grad_(True)
    again = method([{"params": [p]} for p in (weight, alias, frozen)], **METHODS[name].options)
    again.load_state_dict(state)
    assert again.state_dict()["state"].keys() == {0}


@with_buffers
def test_buffers_are_those_that_hooks_leave(name):
    model = Model()
    optimizer = make(name, model)
    optimizer.step(loss_of(model))
    seen = []

    def sevens(_, state):
        kept = {
            p: {n: torch.full_like(b, 7.0) for n, b in bs.items()}
            for p, bs in state["state"].items()
        }
        return {**state, "state": kept}

    optimizer.register_load_state_dict_pre_hook(sevens)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.extend(b for bs in o.state.values() for b in bs.values())
    )
    optimizer.load_state_dict(optimizer.state_dict())
    now = [b for bs in optimizer.state.values() for b in bs.values()]
    assert all((b == 7).all() for b in now)
    assert all(a is b for a, b in zip(seen, now, strict=True))


@with_buffers
def test_buffers_put_into_the_state_are_used(name):
    model, other = Model(), Model()
    optimizer, twin = make(name, model), make(name, other)
    for _ in range(2):
        optimizer.step(loss_of(model))
        twin.step(loss_of(other))
    for kept in optimizer.state.values():
        kept.update({n: b.clone() for n, b in kept.items()})
    old = [b for bs in optimizer.state.values() for b in bs.values()]
    before = [b.clone() for b in old]
    for _ in range(2):
        optimizer.step(loss_of(model))
        twin.step(loss_of(other))
    assert plain(optimizer) == plain(twin)
    assert any(not torch.equal(a, b) for a, b in zip(old, before, strict=True))
    optimizer.state.clear()
    optimizer.step(loss_of(model))
    assert len(optimizer.state) == 4


@with_buffers
def test_a_log_notices_changed_buffers(name, tmp_path):
    model = Model()
    optimizer = make(name, model)
    with runlog.StepLog.create(tmp_path / "log", optimizer):
        optimizer.step(loss_of(model))
        next(iter(optimizer.state[model.body.weight].values())).mul_(2)
        with pytest.raises(runlog.LogError, match=r"body\.weight"):
            optimizer.step(loss_of(model))


def test_due_is_right_with_capturable():
    model = Model()
    optimizer = make("HELENE", model, capturable=True)
    due = []
    for _ in range(7):
        due.append(optimizer.due)
        optimizer.step(loss_of(model))
    assert due == [True, False, False, True, False, False, True]


@with_buffers
def test_a_skipped_step_leaves_the_buffers(name):
    model = Model()
    optimizer = make(name, model, perturbation="out_of_place")
    for _ in range(4):
        optimizer.step(loss_of(model))
    before, weights = plain(optimizer)["state"], tensors(model)
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step(lambda: math.nan)
    assert plain(optimizer)["state"] == before
    assert same_bits(weights, tensors(model))


@with_buffers
def test_a_skipped_step_leaves_the_buffers_on_a_device(name):
    if name == "ZOAdaMU":
        return  # has no such steps
    model = Model()
    optimizer = make(name, model, perturbation="out_of_place", capturable=True)
    for _ in range(4):
        optimizer.step(loss_of(model))
    before, weights = plain(optimizer)["state"], tensors(model)
    optimizer.step(lambda: torch.tensor(math.nan))
    assert int(optimizer.skipped) == 1
    assert plain(optimizer)["state"] == before
    assert same_bits(weights, tensors(model))


# --- what all methods hold ------------------------------------------------------------------------

both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@needs_native
@all_methods
@both_types
def test_backends_give_the_same_bits(name, dtype):
    ends = []
    for fused in (False, True):
        model = Model(dtype)
        optimizer = make(name, model, fused=fused)
        for _ in range(10):
            optimizer.step(loss_of(model))
        ends.append((tensors(model), optimizer.losses))
    assert same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@all_methods
@both_types
def test_a_saved_state_goes_on_bit_for_bit(name, dtype):
    model = Model(dtype)
    optimizer = make(name, model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=20)
    for _ in range(9):
        optimizer.step(loss_of(model))
        schedule.step()
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    weights, state, scheduled = torch.load(file, weights_only=True)
    other = Model(dtype)
    other.load_state_dict(weights)
    resumed = make(name, other, seed=1)
    again = torch.optim.lr_scheduler.LinearLR(resumed, 1.0, 0.5, total_iters=20)
    resumed.load_state_dict(state)
    again.load_state_dict(scheduled)
    for _ in range(9):
        for o, s, m in ((optimizer, schedule, model), (resumed, again, other)):
            o.step(loss_of(m))
            s.step()
    assert same_bits(tensors(model), tensors(other))
    assert plain(optimizer) == plain(resumed)
    # The weight that is there twice has one set of buffers, which keep their type.
    buffers = getattr(optimizer, "buffers", {})
    assert len(optimizer.state) == (4 if buffers else 0)
    for p, kept in resumed.state.items():
        assert [*kept] == [*buffers]
        assert all(b.dtype == torch.float32 and b.shape == p.shape for b in kept.values())


@all_methods
@both_types
@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
@pytest.mark.filterwarnings("ignore:the losses of a step")
def test_records_replay_bit_for_bit(name, dtype, perturbation):
    """Skipped and failed steps too, which perturb 16-bit weights and leave a trace there."""
    model = Model(dtype)
    replica = Model(dtype)
    optimizer = make(name, model, perturbation=perturbation)
    twin = make(name, replica)
    records: list[Any] = []
    optimizer.recorder = records.append
    for step in range(14):
        loss, evaluations = loss_of(model), iter(range(100))

        def closure(step=step, loss=loss, evaluations=evaluations):
            number = next(evaluations)
            if step == 9 and number == 1:
                raise KeyError("of the closure")
            return loss() * (math.nan if step == 6 else 1.0)

        try:
            optimizer.step(closure)
        except KeyError:
            assert step == 9
    outcomes = [record.outcome for record in records]
    # Where nothing was perturbed a failed step has no record.
    assert outcomes.count("skipped") == 1
    assert outcomes.count("failed") == (perturbation == "inplace")
    for record in records:
        twin.replay(record)
    assert same_bits(tensors(model), tensors(replica))
    assert not same_bits(tensors(model), tensors(Model(dtype)))
    for kept_by, too in zip(optimizer.state.values(), twin.state.values(), strict=True):
        assert same_bits([*kept_by.values()], [*too.values()])
    for group, other in zip(optimizer.param_groups, twin.param_groups, strict=True):
        kept = (*optimizer.history, "steps", "next_direction")
        assert {k: group[k] for k in kept} == {k: other[k] for k in kept}


@all_methods
def test_a_log_replays_bit_for_bit(name, tmp_path):
    model = Model(torch.bfloat16)
    optimizer = make(name, model)
    begin = 3
    if RULES[optimizer.rule].buffers:
        begin = 0  # a log has no tensors
    for _ in range(begin):
        optimizer.step(loss_of(model))
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    with runlog.StepLog.create(tmp_path / "log", optimizer):
        for _ in range(16):  # over changes of the number of directions
            optimizer.step(loss_of(model))
    log = runlog.read(tmp_path / "log")
    twin = runlog.optimizer_for(log.header, base)
    assert type(twin) is type(optimizer)
    assert runlog.replay(log, twin) == 16
    ends = dict(model.named_parameters())
    for group, original in zip(twin.param_groups, optimizer.param_groups, strict=True):
        for n, p in zip(group["param_names"], group["params"], strict=True):
            if p.numel():
                assert torch.equal(p, ends[n])
        assert group["steps"] == original["steps"] == begin + 16
    for p, q in zip(twin.state.values(), optimizer.state.values(), strict=True):
        assert same_bits([*p.values()], [*q.values()])
    if begin == 0:
        with pytest.raises(runlog.LogError, match="before the first step"):
            runlog.StepLog.create(tmp_path / "another", optimizer)


@all_methods
def test_a_closure_that_raises_leaves_the_weights(name):
    model = Model()
    optimizer = make(name, model, perturbation="out_of_place")
    optimizer.step(lambda: 1.0)
    before, state = tensors(model), plain(optimizer)
    calls = iter(range(10))

    def closure() -> float:
        if next(calls) == 1:
            raise RuntimeError("of the closure")
        return 1.0

    with pytest.raises(RuntimeError, match="of the closure"):
        optimizer.step(closure)
    assert same_bits(tensors(model), before)
    assert plain(optimizer) == state


@all_methods
@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
def test_all_evaluations_of_a_step_see_the_same_random_numbers(name, perturbation):
    """As dropout does; and the next step sees others."""
    model = Model()
    optimizer = make(name, model, perturbation=perturbation)
    steps = []
    for _ in range(3):
        drawn: list[float] = []
        loss = loss_of(model)

        def closure(drawn=drawn, loss=loss):
            drawn.append(torch.rand(()).item())
            return loss()

        optimizer.step(closure)
        assert len(drawn) > 1
        assert len(set(drawn)) == 1
        steps.append(drawn[0])
    assert len(set(steps)) == 3


@all_methods
def test_a_group_added_later_joins_in(name):
    """Also where the groups have not taken equally many steps."""
    model = Model()
    row = METHODS[name]
    first, second = groups(model, row.lr)
    optimizer = row.method([first], lr=row.lr, seed=SEED, zo_eps=ZO_EPS, **row.options)
    for _ in range(8):
        optimizer.step(loss_of(model))
    before = model.head.bias.detach().clone()
    optimizer.add_param_group(second)
    for _ in range(3):
        optimizer.step(loss_of(model))
    assert [group["steps"] for group in optimizer.param_groups] == [11, 3]
    assert not torch.equal(before, model.head.bias)


def test_a_group_added_later_has_the_schedule_of_the_others(monkeypatch):
    calls = []

    def noted(call, backend):
        calls.append([state.counter for state in call.terms.states()])

    model = Model()
    first, second = groups(model, 0.02)
    optimizer = MeZO([first], lr=0.02, seed=SEED, **LINEAR)
    for _ in range(8):
        optimizer.step(loss_of(model))
    optimizer.add_param_group(second)
    monkeypatch.setattr(adamezo.engine.optimizer, "run", noted)
    optimizer.step(loss_of(model))
    assert calls == [[9, 8], [9, 8]]  # the last probed first


def test_the_control_warms_up_as_adamezo_does():
    ends = []
    for method in (AdaMeZO, ScalarAdaMeZO):
        model = Model()
        optimizer = method(groups(model, 0.02), seed=SEED, horizon=3, warmup_lr=0.01, lr=0.02)
        for step in range(5):
            optimizer.step(loss_of(model))
            if step == 3:
                ends.append(tensors(model))
        ends.append(tensors(model))
    assert same_bits(ends[0], ends[2])
    assert not same_bits(ends[1], ends[3])


@all_methods
def test_a_capturable_run_has_the_bits_of_an_ordinary_one(name):
    """Where a step has a constant number of directions, and they are what the stream gives. Others
    say so at once."""
    few, many = METHODS[name].directions(0), METHODS[name].directions(STEPS - 1)
    if few != many or name == "ZOAdaMU":
        reason = "its number of directions" if few != many else "is scheduled"
        with pytest.raises(ValueError, match=rf"capturable=True: .*{reason}"):
            make(name, Model(), capturable=True)
        return
    ends = []
    for capturable in (False, True):
        model = Model()
        optimizer = make(name, model, capturable=capturable)
        losses = [optimizer.step(loss_of(model)).item() for _ in range(8)]
        losses += [float(loss) for loss in optimizer.losses]
        kept = (*optimizer.history, "steps", "next_direction")
        groups_ = optimizer.state_dict()["param_groups"]
        buffers = [b for bs in optimizer.state.values() for b in bs.values()]
        ends.append(
            ([*tensors(model), *buffers], losses, [{k: g[k] for k in kept} for g in groups_])
        )
    assert same_bits(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


@all_methods
def test_the_state_of_another_method_is_refused(name):
    model = Model()
    state = AdaMeZO(groups(model, 0.1), seed=SEED).state_dict()
    with pytest.raises(ValueError, match="of another optimizer|has method 'AdaMeZO'"):
        make(name, model).load_state_dict(state)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (MeZO, {"queries": 0}, "Invalid queries: 0"),
        (MeZO, {"linear_over": 0.5}, "Invalid linear_over: 0.5"),
        (MeZO, {"zo_eps": 0.0}, "Invalid zo_eps value: 0.0"),
        (FZOO, {"queries": 1}, "at least 2"),
        (AdaZeta, {"steps_per_epoch": 0, "exponent": 1.0}, "Invalid steps_per_epoch: 0"),
        (AdaZeta, {"steps_per_epoch": 1, "exponent": math.inf}, "Invalid exponent: inf"),
        (AdaZeta, {"steps_per_epoch": 1, "exponent": 1.0, "alpha": 0.0}, "Invalid alpha: 0.0"),
        (MEAZO, {"beta": 1.0}, "Invalid beta parameter: 1.0"),
        (MEAZO, {"eps": 0.0}, "Invalid epsilon value: 0.0"),
        (ZOAdam, {"betas": (0.9,)}, "Invalid betas"),
        (ZOAdam, {"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        (ZOAdam, {"eps": 0.0}, "Invalid epsilon value: 0.0"),
        (HiZOO, {"alpha": 1.0}, "Invalid alpha: 1.0"),
        (HELENE, {"clip": 0.0}, "Invalid clip: 0.0"),
        (HELENE, {"curvature": "hessian"}, "Invalid curvature: 'hessian'"),
        (HELENE, {"curvature_every": 0}, "Invalid curvature_every: 0"),
        (ZOAdaMU, {"ends": (0.5, 0.9)}, "Invalid ends"),
        (ZOAdaMU, {"ends": (0.5, 0.9, 1.1)}, "Invalid beta2 of ends: 1.1"),
        (ZOAdaMU, {"warmup": 9, "anneal": 8}, "Invalid anneal: 8"),
    ],
)
def test_options_out_of_range(method, options, message):
    with pytest.raises(ValueError, match=message):
        method([nn.Parameter(torch.zeros(3))], **options)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match=r"MeZO has no option horizon, expected .*linear_over"):
        MeZO([nn.Parameter(torch.zeros(3))], horizon=3)


@pytest.mark.parametrize("s", [-1.0, math.inf, 3, "1"])
def test_a_damaged_mean_of_squares_is_refused(s):
    model = Model()
    optimizer = make("MEAZO", model)
    state = optimizer.state_dict()
    state["param_groups"][1]["s"] = s
    with pytest.raises(ValueError, match=r"group 1 of the state is damaged: s is"):
        optimizer.load_state_dict(state)


# --- the examples ---------------------------------------------------------------------------------


def test_the_papers_first_toy_function():
    """Its lengths to 1e-3 and its last values to the digits that are given.

    With another horizon, or MeZO's steps for AdaMeZO's, the length is further off than that.
    """
    toy = toy_functions.TOYS["quartic"]
    paths = {
        "Adam": toy_functions.adam(toy),
        "MeZO": toy_functions.published(toy, "MeZO"),
        "AdaMeZO": toy_functions.published(toy, "AdaMeZO"),
    }
    for method, length, last, digit in (
        ("Adam", 3.0227, 1.01e-3, 1e-5),
        ("MeZO", 4.6659, 1.235, 1e-3),
        ("AdaMeZO", 4.5078, 1.27e-4, 1e-6),
    ):
        assert toy_functions.length(paths[method]) == pytest.approx(length, abs=1e-3), method
        end = toy_functions.value(toy, paths[method][-1])
        assert end == pytest.approx(last, abs=0.51 * digit), method
    other = toy_functions.published(toy, "AdaMeZO", horizon=10)
    assert abs(toy_functions.length(other) - 4.5078) > 1e-2


@pytest.mark.parametrize("method", toy_functions.FAMILY)
def test_the_family_walks_on_the_toy_functions(method):
    for toy in toy_functions.TOYS.values():
        path = toy_functions.family(toy._replace(steps=5), method)
        assert path.shape == (6, 2)
        assert torch.equal(path[0], torch.tensor(toy.start))
        assert toy_functions.length(path) > 0


def test_the_drawing_of_the_toy_functions(tmp_path):
    path = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    toys, sides = toy_functions.TOYS, toy_functions.SIDES
    paths = {(name, side): {"MeZO": path} for name in toys for side in sides}
    toy_functions.draw(paths, tmp_path / "toys.png")
    assert (tmp_path / "toys.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("method", train_on_accuracy.METHODS)
def test_training_on_accuracy(method):
    """On rows of which a plane parts nine in ten, with evaluations enough for a few dozen steps."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 20, generator=generator)
    noise = torch.randn(400, generator=generator)
    rows = train_on_accuracy.Rows(features, features[:, 0] - features[:, 1] + 0.3 * noise > 0)
    before = train_on_accuracy.accuracy(train_on_accuracy.new_head(20, 0), rows)
    head = train_on_accuracy.train(method, rows, seed=0, evaluations=300)
    after = train_on_accuracy.accuracy(head, rows)
    assert after > before + 0.1
    assert all(p.grad is None for p in head.parameters())
