"""find_lr: the size of a harmful move, what it makes of it, and that it leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import adamezo
from adamezo import FZOO, GRZO, MEAZO, AdaMeZO, MeZO, ScalarAdaMeZO, ZOAdam, find_lr

SIZE = 4096


def bowl(weight, curvature=100.0, at=1.0):
    """A loss of ``at`` with equal curvature everywhere: moves of size s raise it by
    curvature s^2 / 2, up to sqrt(2 / SIZE) of that, which is 2.2 %."""
    return lambda: at + 0.5 * curvature * weight.square().mean()


def zeros():
    return nn.Parameter(torch.zeros(SIZE))


def test_the_radius_of_a_bowl_is_known():
    weight = zeros()
    optimizer = AdaMeZO([weight], seed=0)
    found = find_lr(optimizer, [bowl(weight)] * 4)
    # curvature s^2 / 2 = 0.5; half the relative error of the loss, and that of a mean of four.
    assert found.radius == pytest.approx(0.1, rel=0.02)
    assert found.losses[0] == (0.0, 1.0)
    sizes = [size for size, _ in found.losses[1:]]
    assert sizes == [1e-3 * 2**k for k in range(len(sizes))]
    assert sizes[-2] < found.radius <= sizes[-1]
    assert found.forwards == 4 * len(found.losses)


def test_it_looks_below_zo_eps_where_that_does_harm():
    weight = zeros()
    optimizer = AdaMeZO([weight], seed=0, zo_eps=1.0)
    found = find_lr(optimizer, [bowl(weight)] * 4)
    assert found.radius == pytest.approx(0.1, rel=0.02)
    assert [size for size, _ in found.losses[1:]] == [1.0, 0.5, 0.25, 0.125, 0.0625]


def test_a_step_is_a_thirtieth_of_the_radius():
    weight = zeros()
    found = find_lr(FZOO([weight], seed=0, queries=4, zo_eps=1e-3), [bowl(weight)])
    # A step of FZOO at lr = 1 is the mean of four directions, each of 1 / zo_eps.
    assert found.lr == pytest.approx(found.radius / 30 * 1e-3 * 2)


def test_what_is_maximized_falls():
    weight = zeros()
    optimizer = MEAZO([weight], seed=0, maximize=True)
    found = find_lr(optimizer, [bowl(weight, curvature=-100.0)] * 4)
    assert found.radius == pytest.approx(0.1, rel=0.02)


def test_a_loss_without_a_number_is_harm():
    weight = zeros()

    def closure():
        return math.nan if weight.abs().max() > 1 else 1.0

    with pytest.warns(UserWarning, match="not finite for harm: where") as caught:
        found = find_lr(MEAZO([weight], seed=0), [closure])
    assert [of.filename for of in caught] == [__file__]
    *_, (low, below), (high, above) = found.losses
    assert (below, above) == (1.0, math.inf)
    assert found.radius == pytest.approx(math.sqrt(low * high))


METHODS = {
    "AdaMeZO": lambda w: AdaMeZO(w, seed=0, lr=1e-4),
    "AdaMeZO, official": lambda w: AdaMeZO(w, seed=0, lr=1e-6, normalization="official"),
    "AdaMeZO, long": lambda w: AdaMeZO(w, seed=0, lr=1e-4, horizon=40, betas=(0.9, 0.95)),
    "ScalarAdaMeZO": lambda w: ScalarAdaMeZO(w, seed=0, lr=1e-4),
    "MEAZO": lambda w: MEAZO(w, seed=0, lr=1e-4),
    "ZOAdam": lambda w: ZOAdam(w, seed=0, lr=1e-4, betas=(0.7, 0.9)),
    "FZOO": lambda w: FZOO(w, seed=0, lr=1e-8),
    "GRZO": lambda w: GRZO(w, seed=0, lr=1e-7, distribution="exact"),
}


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_as_long_as_a_method_says(name):
    """On a plane steps are random but for what they go down the slope: after T of them a weight is
    unit_length * lr * sqrt(T) away from that, as a root mean square."""
    torch.manual_seed(1)
    weight, slope = zeros(), torch.randn(SIZE)
    optimizer = METHODS[name]([weight])
    steps = 100 if name in ("FZOO", "GRZO") else 400
    for _ in range(steps):
        optimizer.step(lambda: (slope * weight).sum().double())
    group = optimizer.param_groups[0]
    expected = optimizer.unit_length(group) * group["lr"] * math.sqrt(steps)
    moved = weight.detach()
    moved = moved - slope * (moved @ slope) / slope.square().sum()
    # What is left out: p is normal and not of one size, so that short averages of it vary, and
    # 1 / sqrt(v) is larger on average than at the average v (1.3 times with ten terms).
    assert moved.square().mean().sqrt().item() == pytest.approx(expected, rel=0.35)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place", "regenerated"])
def test_a_run_with_it_has_the_bits_of_one_without(perturbation, dtype):
    def trained(finding):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1)).to(dtype)
        optimizer = AdaMeZO.for_model(model, lr=1e-3, seed=0, perturbation=perturbation)
        batches = torch.randn(6, 4, 8, dtype=dtype)

        def closure(x):
            return lambda: 1 + model(x).float().square().mean()

        for step in range(6):
            if finding and step == 3:
                find_lr(optimizer, [closure(x) for x in batches[:4]])
            optimizer.step(closure(batches[step]))
        return [p.detach().clone() for p in model.parameters()], optimizer.state_dict()

    (with_it, state), (without, other) = trained(True), trained(False)
    assert all(map(torch.equal, with_it, without))
    assert state == other


def test_closures_of_batches_are_evaluated_each_on_its_own():
    torch.manual_seed(0)
    model = nn.Linear(8, 1, bias=False)
    optimizer = FZOO.for_model(model, seed=0, perturbation="regenerated")
    batches = torch.randn(3, 4, 8)

    def losses(x):
        return lambda batch: batch.mean(1 + model(batch.repeat(x)).square()[:, 0])

    closures = [adamezo.batched(losses(x)) for x in batches]
    found = find_lr(optimizer, closures)
    with torch.no_grad():
        mean = sum(float(1 + model(x).square().mean()) for x in batches) / 3
    assert found.losses[0][1] == pytest.approx(mean)


def test_an_error_in_a_closure_leaves_the_weights():
    weight = nn.Parameter(torch.randn(SIZE))
    before = weight.detach().clone()
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return bowl(weight)()

    with pytest.raises(RuntimeError, match="out of memory"):
        find_lr(AdaMeZO([weight], seed=0), [closure] * 2)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("make", [MeZO, lambda w, **o: AdaMeZO(w, betas=(0.9, 0.0), **o)])
def test_steps_that_follow_the_loss_are_refused(make):
    weight = zeros()
    with pytest.raises(TypeError, match="as long as the loss differences"):
        find_lr(make([weight], seed=0), [bowl(weight)])


@pytest.mark.parametrize(
    "make",
    [
        lambda w: FZOO(w, seed=0, queries=2),
        lambda w: GRZO(w, seed=0, examples=2),
        lambda w: ZOAdam(w, seed=0, betas=(0.9, 0.0)),
    ],
    ids=["FZOO", "GRZO", "ZOAdam"],
)
def test_steps_without_a_typical_length_are_refused(make):
    """Each divides a number by another that is often near 0."""
    weight = zeros()
    with pytest.raises(TypeError, match="no typical length"):
        find_lr(make([weight]), [bowl(weight)])


def test_some_groups_that_are_not_trained_are_refused():
    weight, frozen = zeros(), zeros()
    groups = [{"params": [weight]}, {"params": [frozen], "lr": 0.0}]
    with pytest.raises(ValueError, match="some parameter groups have lr = 0"):
        find_lr(AdaMeZO(groups, lr=1e-3, seed=0), [bowl(weight)])
    for group in groups:  # as a warm-up leaves them before its first step
        group["lr"] = 0.0
    assert find_lr(AdaMeZO(groups, lr=1e-3, seed=0), [bowl(weight)] * 4).lr > 0


def test_statistics_of_a_known_model_stay_what_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.randn(16, 8)
    find_lr(AdaMeZO.for_model(model, seed=0), [lambda: 1 + model(x).square().mean()] * 4)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("zo_eps", [1e-8, 2000.0])
def test_it_begins_at_a_size_that_it_can_look_at(zo_eps):
    weight = zeros()
    found = find_lr(MEAZO([weight], seed=0, zo_eps=zo_eps), [bowl(weight)] * 4)
    assert found.radius == pytest.approx(0.1, rel=0.02)


def test_what_cannot_be_found_is_said():
    weight = zeros()
    optimizer = MEAZO([weight], seed=0)
    with pytest.raises(ValueError, match="Does the loss depend on the trained weights"):
        find_lr(optimizer, [lambda: 1.0])
    with pytest.raises(ValueError, match="is 0.0, expected a finite number other than 0"):
        find_lr(optimizer, [bowl(weight, at=0.0)])
    with pytest.raises(ValueError, match="is not finite, expected a finite number"):
        find_lr(optimizer, [lambda: math.nan])
    with pytest.raises(ValueError, match="somewhere it falls by half"):
        find_lr(MEAZO([weight], seed=0, maximize=True), [lambda: 1.0])
    weight.requires_grad_(False)
    with pytest.raises(ValueError, match="all parameters are frozen or empty"):
        find_lr(optimizer, [bowl(weight)])
    with pytest.raises(TypeError, match="expected closures"):
        find_lr(optimizer, [])
    with pytest.raises(TypeError, match="expected closures"):
        find_lr(optimizer, bowl(weight))
    assert not weight.any()
