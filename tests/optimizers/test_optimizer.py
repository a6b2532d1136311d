"""The optimizer: its rule in float64 and in torch's own optimizers, what happens to weights,
generators and history when a step goes wrong, and what torch's world does to an optimizer."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

import adamezo.engine.optimizer
import adamezo.methods.adamezo
from adamezo import AdaMeZO
from adamezo.engine.perturb import inplace
from adamezo.methods.history import coefficients
from adamezo_kernels import PhiloxState, sample_
from adamezo_kernels.backends import native
from helpers.backends import needs_native

SEED = 0x243F6A8885A308D3
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The largest relative error of one store to the type."""

OPERATIONS = (inplace, adamezo.engine.optimizer)  # which run calls
"""Where a step calls the kernels."""

LR, ZO_EPS = 0.05, 1e-2
"""Large, so that a wrong term is far outside the bounds."""


@pytest.fixture(autouse=True)
def automatic_backend(monkeypatch):
    """`fused` is about the automatic choice, which the environment may override."""
    monkeypatch.delenv("ADAMEZO_BACKEND", raising=False)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(*sizes: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(normal(n, seed=i).to(dtype)) for i, n in enumerate(sizes)]


def direction(numel: int, counter: int, parameter: int, seed: int = SEED) -> torch.Tensor:
    """z in float64, asked from the kernels without the optimizer."""
    out = torch.empty(numel)
    return sample_(out, PhiloxState(seed, counter), parameter=parameter).double()


def loss_pairs(count: int) -> list[tuple[float, float]]:
    """(loss at +mu, loss at -mu), whose projected gradients have both signs and many sizes."""
    return [
        (2 + 0.01 * math.sin(5 * t + 1) * 1.3 ** (t % 7), 2 - 0.02 * math.cos(3 * t))
        for t in range(count)
    ]


def projected(pairs: list[tuple[float, float]], zo_eps: float = ZO_EPS) -> list[float]:
    return [(plus - minus) / (2 * zo_eps) for plus, minus in pairs]


def take_steps(optimizer: AdaMeZO, pairs: list[tuple[float, float]]) -> AdaMeZO:
    """Steps whose losses are given. Then nothing depends on how the weights were rounded."""
    for pair in pairs:
        values = iter(pair)
        optimizer.step(lambda values=values: next(values))
    return optimizer


def snapshot(parameters) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


def same_bits(a, b) -> bool:
    """Of two lists of tensors without NaN; -0 is not 0."""
    return all(
        x.dtype == y.dtype and torch.equal(x, y) and torch.equal(x.signbit(), y.signbit())
        for x, y in zip(a, b, strict=True)
    )


def history(optimizer: AdaMeZO) -> list[dict]:
    names = ("directions", "projected_grads", "steps", "next_direction")
    return [
        copy.deepcopy({name: group[name] for name in names}) for group in optimizer.param_groups
    ]


def restored_bound(p: torch.Tensor, z: torch.Tensor, zo_eps: float = ZO_EPS) -> torch.Tensor:
    """Weights perturbed and put back went through at most three stores (+mu, -2 mu, +mu), each off
    by a unit of a number of at most |theta| + mu |z|, the last by two as it is stochastic; the
    scales themselves cancel exactly, as float32 has 2 mu where it has mu. The last 1 % is for the
    products of errors."""
    return 4.04 * UNIT[p.dtype] * (p.detach().double().abs() + zo_eps * z.abs()).view(p.shape)


# --- the rule -----------------------------------------------------------------------------------


def by_the_rule(theta, z, p, options):
    """The weights in float64 after len(p) steps by the formulas of the paper, and a bound on what
    float32 may add, from directions ``z`` of shape (steps, n) and projected gradients ``p``.

    As p does not depend on the weights, the errors of steps add up. One step: the weights are
    rounded at +mu, -mu and when restored; the decay is a rounded scalar and a rounded product; the
    result is rounded: six units of a number of at most |theta| + mu |z|. lr is a rounded scalar and
    the step has K + 1 units in S1 (K sums of rounded coefficients), half of K + 2 in the root of
    S2, and four in the root itself, eps, their sum and the quotient.
    """
    defaults = inspect.signature(AdaMeZO).parameters
    o = {name: options.get(name, defaults[name].default) for name in defaults if name != "params"}
    beta1, beta2 = o["betas"]
    unit = UNIT[torch.float32]
    theta, bound = theta.detach().double(), torch.zeros(theta.shape, dtype=torch.float64)
    for t in range(len(p)):
        kept = min(o["horizon"], t + 1)
        s1, s2, s1_size = 0.0, 0.0, 0.0
        weight1, weight2 = 0.0, 0.0
        for k in range(kept):
            s1 = s1 + beta1**k * p[t - k] * z[t - k]
            s1_size = s1_size + (beta1**k * p[t - k] * z[t - k]).abs()
            s2 = s2 + beta2**k * p[t - k] ** 2 * z[t - k] ** 2
            weight1, weight2 = weight1 + beta1**k, weight2 + beta2**k
        if o["normalization"] == "paper":
            scale, v = 1 - beta1, (1 - beta2) * s2
        elif o["normalization"] == "bias_corrected":
            scale, v = 1 / weight1, s2 / weight2
        else:
            scale, v = 100.0, s2
        m, m_size = scale * s1, scale * s1_size
        lr = o["lr"][t] if isinstance(o["lr"], list) else float(o["lr"])
        root = 1.0 if beta2 == 0 else v.sqrt() + o["eps"]
        if o["warmup_lr"] is not None and t < o["horizon"] + 1:
            lr, root = o["warmup_lr"], 1.0
            m = p[t] * z[t]
            m_size = m.abs()
        if o["maximize"]:
            m = -m
        size = theta.abs() + o["zo_eps"] * z[t].abs()
        bound = bound + 6 * unit * size
        bound = bound + lr * unit * ((kept + 1) * m_size + (kept / 2 + 7) * m.abs()) / root
        theta = theta * (1 - lr * o["weight_decay"]) - lr * m / root
    return theta, 1.01 * bound


RULES = {
    "defaults": {},
    "bias corrected": {"normalization": "bias_corrected"},
    "official": {"normalization": "official", "eps": 1e-5, "lr": LR / 100},
    "other betas": {"betas": (0.9, 0.99)},
    "large eps": {"eps": 0.3},
    "no first moment": {"betas": (0.0, 0.9)},
    "momentum MeZO": {"betas": (0.7, 0.0)},
    "momentum MeZO, bias corrected": {"betas": (0.7, 0.0), "normalization": "bias_corrected"},
    "MeZO": {"betas": (0.0, 0.0)},
    "horizon 1": {"horizon": 1},
    "horizon 4": {"horizon": 4},
    "horizon beyond the run": {"horizon": 100},
    "warm-up": {"horizon": 5, "warmup_lr": 0.02},
    "weight decay": {"weight_decay": 0.3},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "all": {
        "betas": (0.6, 0.95),
        "horizon": 6,
        "warmup_lr": 0.01,
        "weight_decay": 0.2,
        "maximize": True,
        "normalization": "bias_corrected",
    },
}


@pytest.mark.parametrize("case", RULES)
def test_the_rule(case):
    n, steps = 400, 25
    options = {"lr": LR, "zo_eps": ZO_EPS, **RULES[case]}
    pairs = loss_pairs(steps)
    parameters = weights(3, n)
    before = snapshot(parameters)
    take_steps(AdaMeZO(parameters, seed=SEED, **options), pairs)
    for index, (p, start) in enumerate(zip(parameters, before, strict=True)):
        z = torch.stack([direction(p.numel(), t, index) for t in range(steps)])
        expected, bound = by_the_rule(start, z, projected(pairs), options)
        assert ((p.detach().double() - expected).abs() <= bound).all()
    # The bound is sharp: 0.02 % of the way that the typical weight went is already a failure, and
    # a window that is one step longer or shorter is one, where anything lies outside of it.
    assert bound.median() < 2e-4 * (expected - start).abs().median()
    horizon = options.get("horizon", 10)
    if horizon < steps and options.get("betas") != (0.0, 0.0):
        for other in {horizon + 1, max(horizon - 1, 1)} - {horizon}:
            wrong, _ = by_the_rule(start, z, projected(pairs), {**options, "horizon": other})
            assert ((p.detach().double() - wrong).abs() > bound).float().mean() > 0.9


def test_no_two_of_these_rules_are_alike():
    """Otherwise a test above could pass with an option that is ignored."""
    n, steps = 400, 25
    z = torch.stack([direction(n, t, 0) for t in range(steps)])
    ends = [
        by_the_rule(
            normal(n), z, projected(loss_pairs(steps)), {"lr": LR, "zo_eps": ZO_EPS, **options}
        )
        for options in RULES.values()
    ]
    for i, (end, bound) in enumerate(ends):
        for other, _ in ends[:i]:
            assert ((end - other).abs() > 10 * bound).float().mean() > 0.5


ORACLES = {
    # As long as nothing has left the window, these are the stored moments of torch's optimizers.
    "Adam": (
        {"normalization": "bias_corrected"},
        lambda p: torch.optim.Adam(p, lr=LR, betas=(0.7, 0.9)),
    ),
    "AdamW": (
        {"normalization": "bias_corrected", "weight_decay": 0.3, "betas": (0.8, 0.95)},
        lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.8, 0.95), weight_decay=0.3),
    ),
    "Adam, maximize": (
        {"normalization": "bias_corrected", "maximize": True},
        lambda p: torch.optim.Adam(p, lr=LR, betas=(0.7, 0.9), maximize=True),
    ),
    "RMSprop": (
        {"betas": (0.0, 0.9)},
        lambda p: torch.optim.RMSprop(p, lr=LR, alpha=0.9),
    ),
    "SGD with momentum": (
        {"betas": (0.7, 0.0)},
        lambda p: torch.optim.SGD(p, lr=LR * (1 - 0.7), momentum=0.7),
    ),
    "SGD": ({"betas": (0.0, 0.0), "horizon": 1}, lambda p: torch.optim.SGD(p, lr=LR)),
}


@pytest.mark.parametrize("case", ORACLES)
def test_a_horizon_as_long_as_the_run_is_torchs_optimizer(case):
    """Fed with the gradient estimates p z, in float64. The bound is that of ``by_the_rule``."""
    n, steps = 400, 20
    options, make = ORACLES[case]
    options = {"horizon": steps, "lr": LR, "zo_eps": ZO_EPS, **options}
    pairs = loss_pairs(steps)
    (parameter,) = weights(n)
    stored = nn.Parameter(parameter.detach().double())
    z = torch.stack([direction(n, t, 0) for t in range(steps)])
    _, bound = by_the_rule(parameter, z, projected(pairs), options)
    take_steps(AdaMeZO([parameter], seed=SEED, **options), pairs)
    oracle = make([stored])
    for t, p in enumerate(projected(pairs)):
        stored.grad = p * z[t]
        oracle.step()
    assert ((parameter.double() - stored).abs() <= bound).all()


def test_coefficients():
    """By hand: betas (1/2, 1/4), two directions."""
    p, betas = [3.0, -2.0], (0.5, 0.25)
    assert coefficients(p, betas, "paper") == ([1.5, -0.5], [6.75, 0.75])
    assert coefficients(p, betas, "official") == ([300.0, -100.0], [9.0, 1.0])
    first, second = coefficients(p, betas, "bias_corrected")
    assert first == pytest.approx([2.0, -2 / 3], rel=1e-15)
    assert second == pytest.approx([7.2, 0.8], rel=1e-15)
    assert coefficients(p, (0.5, 0.0), "paper") == ([1.5, -0.5], None)
    assert coefficients(p, (0.0, 0.0), "paper") == ([3.0], None)


def test_warm_up_takes_horizon_plus_one_steps():
    """Then the moments of the warm-up's steps count: lr = 0 shows which steps moved the weights."""
    (parameter,) = weights(50)
    optimizer = AdaMeZO([parameter], lr=0.0, warmup_lr=0.1, horizon=3, zo_eps=ZO_EPS, seed=SEED)
    moved = []
    for pair in loss_pairs(8):
        before = parameter.detach().clone()
        take_steps(optimizer, [pair])
        # lr = 0 still restores the weights, to within rounding.
        moved.append((parameter - before).abs().max().item() > 1e-5)
    assert moved == [True] * 4 + [False] * 4
    assert len(optimizer.param_groups[0]["directions"]) == 3


def test_groups_have_their_own_options():
    """Directions are numbered through all the groups, the perturbation is one."""
    steps, pairs = 12, loss_pairs(12)
    own = [
        {"lr": 0.02, "betas": (0.5, 0.8), "horizon": 3, "weight_decay": 0.2},
        {"lr": 0.07, "normalization": "bias_corrected", "maximize": True, "eps": 0.1},
        {"warmup_lr": 0.03, "horizon": 4},
    ]
    a, b, c, d = weights(100, 7, 90, 80)
    before = snapshot((a, b, c, d))
    groups = [{"params": tensors, **o} for tensors, o in zip(([a, b], c, [d]), own, strict=True)]
    take_steps(AdaMeZO(groups, lr=LR, zo_eps=ZO_EPS, seed=SEED), pairs)
    for index, (p, start, o) in enumerate(
        zip((a, b, c, d), before, (own[0], own[0], own[1], own[2]), strict=True)
    ):
        z = torch.stack([direction(p.numel(), t, index) for t in range(steps)])
        o = {"lr": LR, "zo_eps": ZO_EPS, **o}
        expected, bound = by_the_rule(start, z, projected(pairs), o)
        assert ((p.detach().double() - expected).abs() <= bound).all(), index


def test_sixteen_bit_weights_are_rounded_three_times_a_step():
    """To their type at +mu, at -mu and after the update; in between there is float32.

    Emulated in float64 and rounded by torch, that gives the same bits except where float32 moved a
    number across the middle between two of the type: a few of 2**13 (float16) or fewer a store.
    """
    n, steps = 20000, 4
    parameters = [nn.Parameter(normal(n, seed=t.itemsize).to(t)) for t in UNIT]
    expected = [p.detach().double() for p in parameters]
    pairs = loss_pairs(steps)
    options = {"lr": LR, "zo_eps": ZO_EPS, "seed": SEED, "betas": (0.0, 0.0)}
    take_steps(AdaMeZO(parameters, **options, rounding="nearest"), pairs)
    for t, p in enumerate(projected(pairs)):
        for index, dtype in enumerate(UNIT):
            z, theta = direction(n, t, index), expected[index]
            plus = (theta + ZO_EPS * z).to(dtype).double()
            minus = (plus - 2 * ZO_EPS * z).to(dtype).double()
            expected[index] = (minus + ZO_EPS * z - LR * p * z).to(dtype).double()
    for parameter, end in zip(parameters[1:], expected[1:], strict=True):  # float32: see the rule
        assert (parameter.double() == end).double().mean() > 1 - 4 * 3 * 4 / 2**13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_far_below_the_last_place_are_not_lost(dtype):
    """Of weights at 1, MeZO steps of lr p |z| = 2**-4 units of the last place move some, and all of
    them by the sum of the steps on average; to nearest they move none."""
    n, steps = 2**18, 8
    unit = 2 * UNIT[dtype]  # above 1; below it is half of that
    small = {"lr": 2.0**-4 * unit, "zo_eps": 2.0**-30, "seed": SEED, "betas": (0.0, 0.0)}
    pairs = [(2.0**-30, -(2.0**-30))] * steps  # p = 1
    moved = {}
    for rounding in ("nearest", "stochastic"):
        theta = nn.Parameter(torch.ones(n, dtype=dtype))
        optimizer = AdaMeZO([theta], **small, rounding=rounding, distribution="rademacher")
        take_steps(optimizer, pairs)
        moved[rounding] = theta.detach().double() - 1
    assert (moved["nearest"] == 0).all()
    z = torch.zeros(n, dtype=torch.float64)
    for t in range(steps):
        out = torch.empty(n)
        sample_(out, PhiloxState(SEED, t), distribution="rademacher")
        z += out
    expected = -(2.0**-4) * unit * z
    # A store's error lies within a unit and has mean 0; those of n weights and 8 steps are
    # independent, so that by Hoeffding's inequality their sum exceeds 5 sqrt(8 n) units once in
    # 2 exp(-2 * 25 / 4) = 7e-6. Against the direction of the steps, not to see a mean of 0 twice.
    error = ((moved["stochastic"] - expected) * z.sign()).sum().item()
    bound = 5 * math.sqrt(steps * n) * unit
    assert abs(error) < bound
    assert (expected * z.sign()).sum().item() < -4 * bound


# --- a model ------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers of three types, dropout, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 12)
        self.middle = nn.Linear(12, 12, dtype=torch.bfloat16)
        self.low = nn.Linear(12, 7, dtype=torch.float16)
        self.out = nn.Linear(12, 7, bias=False)
        self.out.weight = nn.Parameter(normal(7, 12, seed=9))
        self.again = nn.Linear(12, 7, bias=False)
        self.again.weight = self.out.weight
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        h = self.dropout(torch.tanh(self.embed(x)))
        h = h + self.middle(h.bfloat16()).float()
        return self.out(h) + self.low(h.half()).float() + 0.1 * self.again(h * h)


def make_model(seed: int = 0) -> Mixed:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Mixed()


INPUTS, TARGETS = normal(16, 7, seed=1), normal(16, 7, seed=2)


def loss_of(model: nn.Module):
    return lambda: (model(INPUTS) - TARGETS).square().mean()


MODEL_OPTIONS = {"lr": 1e-3, "zo_eps": 1e-3, "horizon": 4, "seed": SEED}


@needs_native
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization": "bias_corrected", "weight_decay": 0.1},
        {"betas": (0.7, 0.0), "warmup_lr": 1e-4, "maximize": True},
    ],
    ids=str,
)
def test_a_run_has_the_bits_of_the_reference(options):
    """Losses feed back into the weights, so one wrong bit would spread over all of them."""
    ends = []
    for fused in (True, False):
        torch.manual_seed(3)
        model = make_model()
        groups = [
            {"params": [*model.embed.parameters(), *model.middle.parameters()]},
            {"params": [*model.low.parameters(), model.out.weight], "lr": 3e-3, "horizon": 7},
        ]
        optimizer = AdaMeZO(groups, **{**MODEL_OPTIONS, **options}, fused=fused)
        losses = [(optimizer.step(loss_of(model)).item(), optimizer.losses) for _ in range(20)]
        ends.append((snapshot(model.parameters()), losses, history(optimizer)))
    assert same_bits(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    assert not any(
        torch.equal(p, q)
        for p, q in zip(ends[0][0], snapshot(make_model().parameters()), strict=True)
    )


@pytest.mark.parametrize("fused", [None, False])
def test_losses_are_taken_at_both_sides_of_the_weights(fused):
    (parameter,) = weights(300)
    before = parameter.detach().double()
    seen, losses = [], []

    def closure():
        assert not torch.is_grad_enabled()
        seen.append(parameter.detach().double())
        losses.append(parameter.square().mean())
        return losses[-1]

    optimizer = AdaMeZO([parameter], zo_eps=ZO_EPS, seed=SEED, fused=fused)
    assert math.isnan(optimizer.projected_grad)
    result = optimizer.step(closure)
    assert torch.is_grad_enabled()
    z = direction(300, 0, 0)
    for side, theta in zip((1, -1), seen, strict=True):
        bound = restored_bound(parameter, z)
        assert ((theta - (before + side * ZO_EPS * z)).abs() <= bound).all()
    plus, minus = (loss.item() for loss in losses)
    assert plus != minus
    assert optimizer.losses == (plus, minus)
    assert optimizer.projected_grad == (plus - minus) / (2 * ZO_EPS)
    assert result.shape == ()
    assert not result.requires_grad
    assert result.item() == pytest.approx((plus + minus) / 2, rel=2**-23)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.tensor(2.0, dtype=torch.float64), torch.float64),
        (torch.tensor(2.0, dtype=torch.bfloat16), torch.bfloat16),
        (torch.tensor([[2.0]]), torch.float32),
        (torch.tensor(2.0, requires_grad=True), torch.float32),
        (2.0, torch.float32),
        (2, torch.float32),
    ],
    ids=repr,
)
def test_what_a_closure_may_return(value, dtype):
    optimizer = AdaMeZO(weights(4))
    result = optimizer.step(lambda: value)
    assert result.shape == ()
    assert result.dtype == dtype
    assert not result.requires_grad
    assert result.item() == 2
    assert optimizer.losses == (2, 2)


def test_without_a_closure_nothing_happens():
    parameters = weights(9)
    optimizer = AdaMeZO(parameters, seed=SEED)
    before, state = snapshot(parameters), torch.get_rng_state()
    assert optimizer.step() is None
    assert optimizer.step(None) is None
    assert same_bits(parameters, before)
    assert history(optimizer)[0] == {
        "directions": [],
        "projected_grads": [],
        "steps": 0,
        "next_direction": 0,
    }
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), state)


def test_the_history_is_plain_numbers_newest_first():
    optimizer = AdaMeZO(
        [{"params": [a], "horizon": h} for a, h in zip(weights(4, 5), (3, 10), strict=True)],
        zo_eps=ZO_EPS,
    )
    pairs = loss_pairs(5)
    take_steps(optimizer, pairs)
    p = projected(pairs)
    for group, kept in zip(optimizer.param_groups, (3, 5), strict=True):
        assert group["directions"] == [4, 3, 2, 1, 0][:kept]
        assert group["projected_grads"] == p[::-1][:kept]
        assert {type(x) for x in group["directions"]} == {int}
        assert {type(x) for x in group["projected_grads"]} == {float}
        assert (group["steps"], group["next_direction"]) == (5, 5)
    assert not optimizer.state


def test_a_step_leaves_addresses_and_tells_autograd():
    a, frozen = weights(10, 10)
    frozen.requires_grad_(False)
    where, versions = a.data_ptr(), (a._version, frozen._version)
    loss = (a * a).sum()
    optimizer = AdaMeZO([a, frozen])
    take_steps(optimizer, loss_pairs(1))
    assert a.data_ptr() == where
    assert a._version > versions[0]
    assert frozen._version == versions[1]
    assert a.requires_grad
    assert a.is_leaf
    assert a.grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_inference_mode():
    model = nn.Linear(7, 7)
    optimizer = AdaMeZO(model.parameters(), lr=LR)
    before = snapshot(model.parameters())
    with torch.inference_mode():
        optimizer.step(loss_of(model))
    assert optimizer.projected_grad != 0
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    loss_of(model)().backward()  # the weights are still ordinary ones


@pytest.mark.parametrize("side", ["inside", "outside"])
def test_autocast_sees_the_weights_move(side):
    """Autocast keeps casts of trainable weights until its outermost context ends; a step within
    that context has to make it forget them, or both losses are those of the first cast."""
    model = nn.Linear(7, 7)
    optimizer = AdaMeZO(model.parameters(), lr=0.3, zo_eps=0.1, seed=SEED)
    autocast = lambda on=True: torch.autocast("cpu", torch.bfloat16, enabled=on)  # noqa: E731

    def closure():
        with autocast(side == "inside" or torch.is_autocast_enabled("cpu")):
            return (model(INPUTS).float() - TARGETS).square().mean()

    with autocast(side == "outside"):
        for _ in range(3):
            optimizer.step(closure)
            assert optimizer.projected_grad != 0
        last = closure()
    with autocast():
        assert closure() == last


# --- which weights ------------------------------------------------------------------------------


def test_tied_weights_move_once():
    """One Parameter in two modules, given twice in a list, and two Parameters over one storage: all
    move as one weight that was given once."""
    pairs = loss_pairs(5)
    options = {"lr": LR, "zo_eps": ZO_EPS, "seed": SEED}

    def end(wanted, parameters):
        take_steps(AdaMeZO(parameters, **options), pairs)
        return wanted.detach()

    (once,) = weights(60)
    expected = end(once, [once])
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False))
    model[0].weight = model[1].weight = nn.Parameter(normal(60).view(10, 6))
    assert same_bits([end(model[0].weight, model.parameters()).flatten()], [expected])
    (p,) = weights(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the duplicate
        assert same_bits([end(p, [p, p])], [expected])
    (p,) = weights(60)
    assert same_bits([end(p, [p, nn.Parameter(p.detach())])], [expected])
    (p,) = weights(60)
    groups = [{"params": [p]}, {"params": [nn.Parameter(p.detach())]}]
    assert same_bits([end(p, groups)], [expected])


def test_overlapping_weights_are_refused_by_name():
    buffer = torch.zeros(20)
    a, b = nn.Parameter(buffer[:12]), nn.Parameter(buffer[8:])
    for parameters in (
        [("down", a), ("up", b)],
        [{"params": [("down", a)]}, {"params": [("up", b)]}],
    ):
        with pytest.raises(ValueError, match="down and up share memory"):
            AdaMeZO(parameters).step(lambda: 1.0)
    assert not buffer.any()


def test_frozen_weights_are_left_alone_and_change_nobody_else():
    pairs = loss_pairs(5)
    options = {"lr": LR, "zo_eps": ZO_EPS, "seed": SEED}
    free, partly = weights(30, 40, 50), weights(30, 40, 50)
    partly[1].requires_grad_(False)
    before = partly[1].detach().clone()
    take_steps(AdaMeZO(free, **options), pairs)
    take_steps(AdaMeZO(partly, **options), pairs)
    assert same_bits([partly[1]], [before])
    assert same_bits([partly[0], partly[2]], [free[0], free[2]])
    assert not torch.equal(free[1], before)


def test_freezing_and_unfreezing_between_steps():
    a, b = weights(30, 40)
    optimizer = AdaMeZO([a, b], lr=LR, zo_eps=ZO_EPS, seed=SEED, betas=(0.0, 0.0))
    b.requires_grad_(False)
    start = snapshot([a, b])
    take_steps(optimizer, loss_pairs(1))
    assert same_bits([b], start[1:])
    a.requires_grad_(False)
    b.requires_grad_(True)
    middle = a.detach().clone()
    pairs = loss_pairs(2)[1:]
    take_steps(optimizer, pairs)
    assert same_bits([a], [middle])
    options = {"lr": LR, "zo_eps": ZO_EPS, "betas": (0.0, 0.0)}
    expected, bound = by_the_rule(start[1], direction(40, 1, 1)[None], projected(pairs), options)
    assert ((b.detach().double() - expected).abs() <= bound).all()


@pytest.mark.filterwarnings("ignore")  # nested tensors are a prototype, and say so
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, device="meta"),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.zeros(3, dtype=torch.float64),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["meta", "sparse", "float64", "nested"],
)
def test_a_frozen_weight_may_be_of_any_kind(make):
    (a,) = weights(30)
    before = a.detach().clone()
    optimizer = AdaMeZO([nn.Parameter(make(), requires_grad=False), a], lr=LR)
    take_steps(optimizer, loss_pairs(1))
    assert not torch.equal(a, before)


@pytest.mark.parametrize("how", ["all frozen", "no elements"])
def test_a_model_with_nothing_to_train(how):
    (a,) = weights(0 if how == "no elements" else 5)
    a.requires_grad_(how == "no elements")
    before = a.detach().clone()
    optimizer = AdaMeZO([a], lr=LR)
    assert optimizer.step(lambda: torch.tensor(2.5)).item() == 2.5
    assert same_bits([a], [before])


def test_no_parameters_at_all_is_torchs_error():
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        AdaMeZO([])


def test_empty_groups_and_empty_tensors():
    a, empty, also_empty = weights(40, 0, 0)
    (expected,) = weights(40)
    options = {"lr": LR, "zo_eps": ZO_EPS, "seed": SEED}
    groups = [{"params": [a, empty]}, {"params": []}, {"params": [also_empty]}]
    take_steps(AdaMeZO(groups, **options), loss_pairs(3))
    take_steps(AdaMeZO([expected], **options), loss_pairs(3))
    assert same_bits([a], [expected])


def test_names_are_in_messages():
    bad = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"head\.weight has dtype torch\.float64"):
        AdaMeZO([("body.weight", weights(4)[0]), ("head.weight", bad)]).step(lambda: 1.0)
    with pytest.raises(TypeError, match=r"parameter 1 has dtype torch\.float64"):
        AdaMeZO([weights(4)[0], bad]).step(lambda: 1.0)


REPLACEMENTS = {
    "data": lambda group, p: setattr(p, "data", normal(60, seed=7)),
    "data of another type": lambda group, p: setattr(p, "data", normal(60, seed=7).bfloat16()),
    "the parameter": lambda group, p: group["params"].__setitem__(
        0, nn.Parameter(normal(60, seed=7).half())
    ),
}


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_parameters_may_change_between_steps(kind):
    """Frameworks move, cast and swap them; the next step is on what is there then, as it is for an
    optimizer made anew with the same history."""
    parameter, other = weights(60, 20)
    optimizer = AdaMeZO([parameter, other], lr=LR, zo_eps=ZO_EPS, seed=SEED)
    take_steps(optimizer, loss_pairs(3))
    old = parameter.detach()
    old_bits = old.clone()
    REPLACEMENTS[kind](optimizer.param_groups[0], parameter)
    new = optimizer.param_groups[0]["params"]
    copies = [nn.Parameter(p.detach().clone()) for p in new]
    anew = AdaMeZO(copies)
    anew.load_state_dict(optimizer.state_dict())
    take_steps(optimizer, loss_pairs(5)[3:])
    take_steps(anew, loss_pairs(5)[3:])
    assert same_bits(new, copies)
    assert not torch.equal(new[0].detach().flatten()[:9], normal(9, seed=7).to(new[0].dtype))
    assert same_bits([old], [old_bits])


# --- random numbers -----------------------------------------------------------------------------


def test_both_forwards_have_one_mask_and_the_next_step_another():
    masks = []

    def closure():
        masks.append(nn.functional.dropout(torch.ones(64)))
        return masks[-1].mean()

    optimizer = AdaMeZO(weights(9))
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert torch.equal(masks[4], masks[5])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[2], masks[4])
    assert optimizer.projected_grad == 0


def test_generators_are_left_where_one_evaluation_leaves_them():
    def closure():
        return torch.rand(17).mean()

    optimizer = AdaMeZO(weights(9))
    start = torch.get_rng_state()
    closure()
    expected = torch.get_rng_state()
    torch.set_rng_state(start)
    optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), expected)


def test_an_evaluation_that_raises_leaves_the_generators_as_they_were():
    def closure():
        torch.rand(17)
        raise LookupError

    optimizer = AdaMeZO(weights(9))
    start = torch.get_rng_state()
    with pytest.raises(LookupError):
        optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), start)


def test_the_seed_is_drawn_from_torchs_generator():
    def drawn():
        return AdaMeZO(weights(2)).param_groups[0]["seed"]

    torch.manual_seed(5)
    first, second = drawn(), drawn()
    torch.manual_seed(5)
    assert drawn() == first
    assert first != second
    with torch.device("meta"):  # as when a large model is made without memory
        torch.manual_seed(5)
        assert AdaMeZO([nn.Parameter(torch.zeros(2))]).param_groups[0]["seed"] == first
    state = torch.get_rng_state()
    AdaMeZO(weights(2), seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_directions_are_those_of_the_seed():
    ends = []
    for seed in (0, 0, 1, 2**64 - 1):
        (p,) = weights(50)
        take_steps(AdaMeZO([p], lr=LR, seed=seed), loss_pairs(3))
        ends.append(p.detach())
    assert same_bits([ends[0]], [ends[1]])
    for i, j in ((0, 2), (0, 3), (2, 3)):
        assert (ends[i] != ends[j]).all()


# --- when a step goes wrong ---------------------------------------------------------------------


class Stop(Exception):
    pass


def raising(error: BaseException, evaluation: int):
    count = iter(range(1, 3))

    def closure():
        if next(count) == evaluation:
            raise error
        return 1.0

    return closure


def returning(value, evaluation: int):
    values = iter((1.0, value) if evaluation == 2 else (value,))
    return lambda: next(values)


FAILURES = {
    "an error": (lambda n: raising(Stop("at sea"), n), Stop, "at sea"),
    "Ctrl-C": (lambda n: raising(KeyboardInterrupt(), n), KeyboardInterrupt, "^$"),
    "None": (lambda n: returning(None, n), TypeError, "NoneType: does it lack a `return`"),
    "a vector": (lambda n: returning(torch.ones(3), n), ValueError, r"shape \(3,\)"),
    "no elements": (lambda n: returning(torch.ones(0), n), ValueError, r"shape \(0,\)"),
    "a complex tensor": (lambda n: returning(torch.tensor(1j), n), ValueError, "complex64"),
    "a sparse tensor": (lambda n: returning(torch.ones(()).to_sparse(), n), ValueError, "layout"),
    "a truth value": (lambda n: returning(torch.tensor(True), n), TypeError, "dtype torch.bool"),
    "another truth value": (lambda n: returning(True, n), TypeError, "got bool"),
    "meta": (lambda n: returning(torch.ones((), device="meta"), n), ValueError, "meta device"),
    "out of memory": (lambda n: raising(MemoryError("no room"), n), MemoryError, "no room"),
    "exit": (lambda n: raising(SystemExit(3), n), SystemExit, "3"),
    "a complex number": (lambda n: returning(1j, n), TypeError, "complex"),
    "a string": (lambda n: returning("1.0", n), TypeError, "str"),
    "a tuple": (lambda n: returning((torch.tensor(1.0), None), n), TypeError, "tuple"),
}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("evaluation", [1, 2])
@pytest.mark.parametrize("kind", FAILURES)
def test_weights_come_back_when_a_closure_fails(kind, evaluation, fused):
    make, error, message = FAILURES[kind]
    parameters = [*weights(40, 50), nn.Parameter(normal(60).bfloat16())]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    optimizer = AdaMeZO(groups, lr=LR, zo_eps=ZO_EPS, seed=SEED, fused=fused)
    take_steps(optimizer, loss_pairs(2))
    before, kept, last = snapshot(parameters), history(optimizer), optimizer.losses
    with pytest.raises(error, match=message):
        optimizer.step(make(evaluation))
    for index, (p, start) in enumerate(zip(parameters, before, strict=True)):
        z = direction(p.numel(), 2, index)
        off = (p.detach().double() - start.double()).abs()
        assert (off <= restored_bound(start, z)).all()
    assert history(optimizer) == kept
    assert optimizer.losses == last
    assert optimizer.skipped == 0
    # What follows is what would have followed.
    copies = [nn.Parameter(p) for p in snapshot(parameters)]
    anew = AdaMeZO([{"params": copies[:1]}, {"params": copies[1:]}], fused=fused)
    anew.load_state_dict(optimizer.state_dict())
    for o in (optimizer, anew):
        take_steps(o, loss_pairs(4)[2:])
    assert same_bits(parameters, copies)
    assert history(optimizer) == history(anew)


NOT_FINITE = [
    (math.nan, 1.0),
    (1.0, math.nan),
    (math.inf, 1.0),
    (1.0, -math.inf),
    (math.inf, math.inf),
    (torch.tensor(math.nan), torch.tensor(1.0)),
]


@pytest.mark.parametrize("pair", NOT_FINITE, ids=str)
def test_a_loss_that_is_not_finite_is_skipped(pair):
    (parameter,) = weights(50)
    optimizer = AdaMeZO([parameter], lr=LR, zo_eps=ZO_EPS, seed=SEED)
    take_steps(optimizer, loss_pairs(2))
    before, kept = parameter.detach().clone(), history(optimizer)[0]
    values = iter(pair)
    with pytest.warns(RuntimeWarning, match="skipped") as caught:
        result = optimizer.step(lambda: next(values))
    assert caught[0].filename == __file__, "the warning does not point at the caller of step"
    assert not result.isfinite()
    assert optimizer.skipped == 1
    off = (parameter.detach().double() - before.double()).abs()
    assert (off <= restored_bound(before, direction(50, 2, 0))).all()
    # The direction is used up, the step is not in the history.
    assert history(optimizer)[0] == {**kept, "next_direction": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # only the first is told
        take_steps(optimizer, [(math.nan, math.nan)])
        assert optimizer.skipped == 2
        take_steps(optimizer, loss_pairs(3)[2:])
    assert optimizer.param_groups[0]["directions"] == [4, 1, 0]
    assert parameter.isfinite().all()
    assert (parameter != before).any()


def test_too_many_skipped_steps_in_a_row_are_an_error():
    (parameter,) = weights(50)
    optimizer = AdaMeZO([parameter], lr=LR, zo_eps=ZO_EPS, seed=SEED, max_skipped=3)
    nan = [(math.nan, 1.0)]
    with pytest.warns(RuntimeWarning, match="skipped"):
        take_steps(optimizer, nan * 2 + loss_pairs(1) + nan * 2)
    with pytest.raises(FloatingPointError, match="skipped, as were the 2 before it"):
        take_steps(optimizer, nan)
    assert optimizer.skipped == 5
    take_steps(optimizer, loss_pairs(1))
    assert parameter.isfinite().all()
    assert optimizer.param_groups[0]["directions"] == [6, 2]


@pytest.mark.parametrize("how", ["a state", "records"])
def test_skipped_steps_in_a_row_are_counted_over_a_resume(how):
    options = {"seed": SEED, "max_skipped": 3}
    nan = [(math.nan, 1.0)]
    before = AdaMeZO(weights(50), **options)
    records = []
    before.recorder = records.append
    with pytest.warns(RuntimeWarning, match="skipped"):
        take_steps(before, loss_pairs(1) + nan * 2)
    after = AdaMeZO(weights(50), **options)
    if how == "a state":
        after.load_state_dict(before.state_dict())
    else:
        for record in records:
            after.replay(record)
        assert after.state_dict() == before.state_dict()
    with pytest.raises(FloatingPointError, match="skipped, as were the 2 before it"):
        take_steps(after, nan)
    take_steps(after, loss_pairs(1))
    assert after.param_groups[0]["skipped_in_a_row"] == 0


@pytest.mark.parametrize("count", [None, -1, 1.0, True])
def test_a_state_without_the_skipped_steps_is_refused(count):
    optimizer = take_steps(AdaMeZO(weights(5)), loss_pairs(2))
    state = optimizer.state_dict()
    message = r"group 0 of the state is damaged: skipped_in_a_row is"
    if count is None:
        del state["param_groups"][0]["skipped_in_a_row"]
        message = r"group 0 of the state lacks skipped_in_a_row: .* an earlier version"
    else:
        state["param_groups"][0]["skipped_in_a_row"] = count
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)


def test_a_non_finite_loss_can_be_an_error():
    (parameter,) = weights(50)
    start = parameter.detach().clone()
    optimizer = AdaMeZO([parameter], lr=LR, zo_eps=ZO_EPS, seed=SEED, nonfinite="raise")
    with pytest.raises(FloatingPointError, match="losses of a step were"):
        take_steps(optimizer, [(math.inf, 1.0)])
    bound = restored_bound(start, direction(50, 0, 0))
    assert ((parameter.detach().double() - start.double()).abs() <= bound).all()
    assert history(optimizer)[0]["projected_grads"] == []


def test_every_step_that_touched_the_weights_is_recorded():
    def fails():
        raise OSError("no data")

    one_loss = iter((1.0,))
    optimizer = AdaMeZO(
        [{"params": [p]} for p in weights(5, 6)], lr=LR, zo_eps=ZO_EPS, seed=SEED, max_skipped=9
    )
    records = []
    optimizer.recorder = records.append
    pairs = loss_pairs(2)
    take_steps(optimizer, pairs[:1])
    with pytest.warns(RuntimeWarning, match="skipped"):
        take_steps(optimizer, [(math.nan, 1.0)])
    with pytest.raises(OSError, match="no data"):
        optimizer.step(fails)
    with pytest.raises(StopIteration):
        optimizer.step(lambda: next(one_loss))
    optimizer.param_groups[1]["lr"] = 0.5
    take_steps(optimizer, pairs[1:])
    assert [record.outcome for record in records] == [
        "updated",
        "skipped",
        "failed",
        "failed",
        "updated",
    ]
    assert [record.perturbations for record in records] == [2, 2, 1, 2, 2]
    assert [record.direction for record in records] == [0, 1, 2, 2, 2]
    measured = [record.measured for record in records if record.outcome == "updated"]
    assert measured == [(p,) for p in projected(pairs)]
    assert [record.lrs for record in records][::4] == [(LR, LR), (LR, 0.5)]


def test_an_operation_that_fails_half_way_is_recorded_as_such(monkeypatch):
    calls = iter(range(100))

    def perturb_once(*arguments, real=inplace.run):
        if next(calls) == 1:
            raise RuntimeError("the device is gone")
        real(*arguments)

    monkeypatch.setattr(inplace, "run", perturb_once)
    optimizer = AdaMeZO([{"params": [p]} for p in weights(5, 6)], seed=SEED)
    records = []
    optimizer.recorder = records.append
    with pytest.raises(RuntimeError, match="the device is gone"):
        take_steps(optimizer, loss_pairs(1))
    assert [record.outcome for record in records] == ["broken"]


def test_a_projected_gradient_whose_square_overflows_is_skipped():
    (parameter,) = weights(50)
    optimizer = AdaMeZO([parameter], lr=LR, zo_eps=ZO_EPS, seed=SEED)
    with pytest.warns(RuntimeWarning, match="skipped"):
        take_steps(optimizer, [(1e18, -1e18)])
    assert history(optimizer)[0]["projected_grads"] == []
    take_steps(optimizer, loss_pairs(2))
    assert parameter.isfinite().all()


@pytest.mark.parametrize("call", range(1, 7))
def test_ctrl_c_during_a_kernel(call, monkeypatch):
    """It arrives while the kernel of the first or second group perturbs (+mu, -2 mu) or updates.
    The weights are put back, or the step is complete, for both groups alike."""
    calls = iter(range(1, 100))

    def interrupted(operation):
        def run(*arguments):
            operation(*arguments)
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)

        return run

    parameters, finished = weights(40, 50), weights(40, 50)
    start = snapshot(parameters)
    options = {"lr": LR, "zo_eps": ZO_EPS, "seed": SEED}
    take_steps(AdaMeZO([{"params": [p]} for p in finished], **options), loss_pairs(1))
    optimizer = AdaMeZO([{"params": [p]} for p in parameters], **options)
    for module in OPERATIONS:
        monkeypatch.setattr(module, "run", interrupted(module.run))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            take_steps(optimizer, loss_pairs(1))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    if call <= 4:
        for index, (p, theta) in enumerate(zip(parameters, start, strict=True)):
            bound = restored_bound(theta, direction(p.numel(), 0, index))
            assert ((p.detach().double() - theta.double()).abs() <= bound).all()
        assert [group["steps"] for group in optimizer.param_groups] == [0, 0]
    else:
        assert same_bits(parameters, finished)
        assert [group["steps"] for group in optimizer.param_groups] == [1, 1]


def test_a_step_in_another_thread():
    """Where handlers of signals can be neither set nor run."""
    here, there = weights(20), weights(20)
    take_steps(AdaMeZO(here, lr=LR, seed=SEED), loss_pairs(1))
    optimizer = AdaMeZO(there, lr=LR, seed=SEED)
    thread = threading.Thread(target=take_steps, args=(optimizer, loss_pairs(1)))
    thread.start()
    thread.join()
    assert same_bits(here, there)


# --- groups, schedulers, hooks ------------------------------------------------------------------


def test_a_group_added_later_has_its_own_history():
    a, b = weights(30, 40)
    (alone,) = weights(30)
    options = {"lr": LR, "zo_eps": ZO_EPS, "seed": SEED}
    pairs = loss_pairs(7)
    optimizer = take_steps(AdaMeZO([a], **options), pairs[:4])
    optimizer.add_param_group({"params": [b], "lr": 0.02})
    start = b.detach().clone()
    assert history(optimizer)[1] == {
        "directions": [],
        "projected_grads": [],
        "steps": 0,
        "next_direction": 4,
    }
    take_steps(optimizer, pairs[4:])
    assert [group["directions"] for group in optimizer.param_groups] == [
        [6, 5, 4, 3, 2, 1, 0],
        [6, 5, 4],
    ]
    take_steps(AdaMeZO([alone], **options), pairs)
    assert same_bits([a], [alone])
    z = torch.stack([direction(40, t, 1) for t in (4, 5, 6)])
    expected, bound = by_the_rule(start, z, projected(pairs[4:]), {**options, "lr": 0.02})
    assert ((b.detach().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    ("name", "value"), [("zo_eps", 0.5), ("fused", False), ("seed", 12)], ids=str
)
def test_a_group_cannot_set_what_the_step_shares(name, value):
    a, b = weights(3, 4)
    optimizer = AdaMeZO([a], seed=SEED, zo_eps=ZO_EPS)
    message = f"{name} is .* for the whole step, a group cannot set it to {value}"
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [b], name: value})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [b], name: optimizer.param_groups[0][name]})
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=f"{name} must be the same in all parameter groups"):
        optimizer.step(lambda: 1.0)
    optimizer.param_groups[0][name] = value
    optimizer.step(lambda: 1.0)


def test_a_group_added_after_loading_shares_what_was_loaded():
    """The seed that the new object drew for itself is of no use any more."""
    a, b = weights(3, 4)
    saved = take_steps(AdaMeZO([a], seed=SEED, zo_eps=0.5), loss_pairs(2)).state_dict()
    optimizer = AdaMeZO([a])
    optimizer.load_state_dict(saved)
    optimizer.add_param_group({"params": [b]})
    optimizer.step(lambda: 1.0)
    assert [(g["seed"], g["zo_eps"]) for g in optimizer.param_groups] == [(SEED, 0.5)] * 2


def test_options_may_be_changed_in_the_groups():
    """As schedules of other kinds than lr do."""
    (p,) = weights(50)
    pairs = loss_pairs(2)
    optimizer = AdaMeZO([p], lr=LR, zo_eps=ZO_EPS, seed=SEED, betas=(0.0, 0.0))
    take_steps(optimizer, pairs[:1])
    optimizer.param_groups[0].update(zo_eps=0.05, weight_decay=0.1, lr=0.2)
    middle = p.detach().clone()
    take_steps(optimizer, pairs[1:])
    expected, bound = by_the_rule(
        middle,
        direction(50, 1, 0)[None],
        projected(pairs[1:], 0.05),
        {"lr": 0.2, "zo_eps": 0.05, "weight_decay": 0.1, "betas": (0.0, 0.0)},
    )
    assert ((p.detach().double() - expected).abs() <= bound).all()


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "OneCycleLR, which also moves beta1": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=8
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(kind, tensor_lr):
    (scheduled,), (by_hand,) = weights(50), weights(50)
    lr = torch.tensor(LR) if tensor_lr else LR
    optimizer = AdaMeZO([scheduled], lr=lr, seed=SEED)
    other = AdaMeZO([by_hand], seed=SEED)
    scheduler = SCHEDULERS[kind](optimizer)
    rates = []
    for pair in loss_pairs(6):
        rates.append(float(scheduler.get_last_lr()[0]))
        other.param_groups[0]["lr"] = rates[-1]
        other.param_groups[0]["betas"] = optimizer.param_groups[0]["betas"]
        take_steps(optimizer, [pair])
        take_steps(other, [pair])
        scheduler.step()
    assert len(set(rates)) >= 3
    assert same_bits([scheduled], [by_hand])


def test_hooks_run_around_a_step():
    (p,) = weights(9)
    optimizer = AdaMeZO([p])
    calls = []
    optimizer.register_step_pre_hook(lambda *arguments: calls.append(("before", p.sum().item())))
    optimizer.register_step_post_hook(lambda *arguments: calls.append(("after", p.sum().item())))
    before = p.sum().item()
    take_steps(optimizer, loss_pairs(1))
    assert calls == [("before", before), ("after", p.sum().item())]


# --- saving and loading -------------------------------------------------------------------------


def saved_and_loaded(optimizer: AdaMeZO, model: Mixed) -> tuple[Mixed, AdaMeZO]:
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    weights_, state = torch.load(buffer, weights_only=True)
    model = make_model(1)
    model.load_state_dict(weights_)
    optimizer = AdaMeZO(model.parameters())  # other options: they come with the state
    optimizer.load_state_dict(state)
    return model, optimizer


def through_distributed_checkpoints(flatten: bool):
    def copied(optimizer: AdaMeZO, model: Mixed) -> tuple[Mixed, AdaMeZO]:
        from torch.distributed.checkpoint import state_dict as checkpoint

        options = checkpoint.StateDictOptions(flatten_optimizer_state_dict=flatten)
        state = checkpoint.get_optimizer_state_dict(model, optimizer, options=options)
        model = copy.deepcopy(model)
        optimizer = AdaMeZO(model.parameters())
        checkpoint.set_optimizer_state_dict(model, optimizer, state, options=options)
        return model, optimizer

    return copied


COPIES = {
    "state_dict": saved_and_loaded,
    "pickle": lambda o, m: pickle.loads(pickle.dumps((m, o))),
    "deepcopy": lambda o, m: copy.deepcopy((m, o)),
    "distributed checkpoint": through_distributed_checkpoints(False),
    "distributed checkpoint, flat": through_distributed_checkpoints(True),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_run_that_was_saved_goes_on_with_the_same_bits(how):
    torch.manual_seed(4)
    model = make_model()
    optimizer = AdaMeZO(
        model.parameters(), **{**MODEL_OPTIONS, "horizon": 8, "seed": 2**64 - 1, "warmup_lr": 1e-4}
    )
    for _ in range(5):
        optimizer.step(loss_of(model))
    copied_model, copied = COPIES[how](optimizer, model)
    assert history(copied) == history(optimizer)
    assert math.isnan(copied.projected_grad)
    ends = []
    generator = torch.get_rng_state()
    for m, o in ((model, optimizer), (copied_model, copied)):
        torch.set_rng_state(generator)
        for _ in range(8):  # through the end of the warm-up, which is counted in the state
            o.step(loss_of(m))
        ends.append(snapshot(m.parameters()))
    assert same_bits(*ends)
    assert history(copied) == history(optimizer)
    assert copied.losses == optimizer.losses


def test_a_state_dict_in_memory_stays_what_it_was():
    optimizer = take_steps(AdaMeZO(weights(9)), loss_pairs(3))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    take_steps(optimizer, loss_pairs(3))
    assert state == before
    assert optimizer.state_dict() != before
    optimizer.load_state_dict(state)
    take_steps(optimizer, loss_pairs(3))
    assert state == before


def test_names_survive_loading():
    state = take_steps(AdaMeZO([("a", weights(3)[0])]), loss_pairs(1)).state_dict()
    bad = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = AdaMeZO([("a", bad)])
    optimizer.load_state_dict(state)
    with pytest.raises(TypeError, match="a has dtype"):
        optimizer.step(lambda: 1.0)


# --- memory -------------------------------------------------------------------------------------

MEMORY = """
import torch
from adamezo import AdaMeZO

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024

def stepped(numel):
    weight = torch.nn.Parameter(torch.ones(numel))
    optimizer = AdaMeZO([weight], horizon=2, weight_decay=0.1)
    before = peak()
    for _ in range(3):
        optimizer.step(lambda: weight[0])
    return weight, peak() - before

stepped(1000)
weight, growth = stepped(2**24)
before = peak()
weight.clone()
print(growth, peak() - before)
"""


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_step_makes_no_temporary():
    """64 MB of weights; the process's peak grows by less than 4 MB. A single copy is seen."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    growth, of_a_copy = map(float, done.stdout.split())
    assert growth < 4
    assert of_a_copy > 60


# --- what is refused ----------------------------------------------------------------------------

AS_TORCH = [
    {"lr": -1.0},
    {"lr": math.nan},
    {"lr": torch.tensor([0.1, 0.2])},
    {"eps": -1e-8},
    {"eps": math.nan},
    {"betas": (-0.1, 0.9)},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (0.9, math.nan)},
    {"weight_decay": -0.1},
]


@pytest.mark.parametrize("options", AS_TORCH, ids=str)
def test_options_are_refused_in_torchs_words(options):
    with pytest.raises(ValueError, match=".") as of_torch:
        torch.optim.Adam(weights(2), **options)
    with pytest.raises(ValueError, match=".") as ours:
        AdaMeZO(weights(2), **options)
    assert str(ours.value) == str(of_torch.value)
    with pytest.raises(ValueError, match=".") as of_a_group:
        AdaMeZO([{"params": weights(2), **options}])
    assert str(of_a_group.value) == str(of_torch.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.inf}, "Invalid learning rate: inf"),
        ({"eps": 0.0}, "Invalid epsilon value: 0.0"),
        ({"betas": (0.9,)}, "Invalid betas: .*, expected 2 values"),
        ({"betas": (0.9, 0.9, 0.9)}, "Invalid betas: .*, expected 2 values"),
        ({"zo_eps": 0.0}, "Invalid zo_eps value: 0.0"),
        ({"zo_eps": -1e-3}, "Invalid zo_eps value"),
        ({"zo_eps": math.inf}, "Invalid zo_eps value"),
        ({"horizon": 0}, "Invalid horizon: 0, expected an integer of at least 1"),
        ({"horizon": 2.0}, "Invalid horizon: 2.0"),
        ({"horizon": True}, "Invalid horizon: True"),
        ({"normalization": "adam"}, "Invalid normalization: 'adam', expected one of .*paper"),
        ({"warmup_lr": -1e-3}, "Invalid warmup_lr value"),
        ({"warmup_lr": math.inf}, "Invalid warmup_lr value"),
        ({"weight_decay": math.inf}, "Invalid weight_decay value"),
        ({"distribution": "cauchy"}, "Invalid distribution: 'cauchy', expected one of .*exact"),
        ({"seed": -1}, r"Invalid seed: -1, expected an integer in \[0, 2\*\*64\)"),
        ({"seed": 2**64}, "Invalid seed"),
        ({"seed": 0.5}, "Invalid seed: 0.5"),
        ({"differentiable": True}, "differentiable=True is not possible"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaMeZO(weights(2), **options)


def test_a_group_that_is_refused_is_not_added():
    optimizer = AdaMeZO(weights(2))
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optimizer.add_param_group({"params": weights(3), "lr": -1})
    with pytest.raises(TypeError, match="list"):
        optimizer.add_param_group(weights(3))
    assert len(optimizer.param_groups) == 1


@needs_native
def test_fused_takes_the_kernels():
    parameters = weights(9)
    optimizer = AdaMeZO(parameters, fused=True, lr=LR)
    before = snapshot(parameters)
    take_steps(optimizer, loss_pairs(1))
    assert not same_bits(parameters, before)


def test_fused_without_kernels_is_an_error(monkeypatch):
    monkeypatch.setattr(native, "availability", lambda: (False, "there is no compiler"))
    message = (
        r"fused=True, but no compiled kernels for 'exact' directions run on cpu "
        r".*native: there is no compiler.*None"
    )
    with pytest.raises(RuntimeError, match=message):
        AdaMeZO(weights(3), fused=True)
    for fused in (None, False):
        take_steps(AdaMeZO(weights(3), fused=fused), loss_pairs(1))


def test_fused_where_the_kernels_went_away(monkeypatch):
    """A state saved with fused=True, loaded where nothing was compiled."""
    monkeypatch.setattr(native, "availability", lambda: (False, "there is no compiler"))
    optimizer = AdaMeZO(weights(3))
    optimizer.param_groups[0]["fused"] = True
    with pytest.raises(RuntimeError, match="fused=True, but no compiled kernels"):
        optimizer.step(lambda: 1.0)


@needs_native
@pytest.mark.parametrize(("fused", "name"), [(None, "native"), (False, "reference")])
def test_fused_chooses_the_backend(fused, name, monkeypatch):
    used = []
    for module in OPERATIONS:

        def record(call, backend, real=module.run):
            used.append(backend.NAME)
            real(call, backend)

        monkeypatch.setattr(module, "run", record)
    take_steps(AdaMeZO(weights(3), fused=fused), loss_pairs(1))
    assert used == [name] * 3
