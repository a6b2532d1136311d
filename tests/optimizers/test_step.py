"""``fused_adamezo_step``: an AdaMeZO that is kept for each model and goes with it."""

from __future__ import annotations

import copy
import gc
import re
import weakref

import pytest
import torch
from torch import nn

from adamezo import AdaMeZO, forget_optimizer, fused_adamezo_step, optimizer_of
from adamezo.fused_step import _optimizers as optimizers

OPTIONS = {"lr": 0.01, "zo_eps": 1e-2, "seed": 7}


def make_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.2), nn.Linear(6, 2))


INPUTS = torch.linspace(-1, 1, 40).view(8, 5)


def loss_of(model: nn.Module):
    return lambda: model(INPUTS).square().mean()


def untouched():
    raise AssertionError("the closure was called")


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_is_the_optimizer_on_all_parameters():
    ends = []
    for functional in (True, False):
        torch.manual_seed(1)
        model = make_model()
        optimizer = AdaMeZO(model.parameters(), **OPTIONS)
        losses = []
        for _ in range(5):
            if functional:
                losses.append(fused_adamezo_step(model, loss_of(model), **OPTIONS).item())
            else:
                losses.append(optimizer.step(loss_of(model)).item())
        ends.append((values(model), losses))
    assert equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert not equal(ends[0][0], values(make_model()))
    assert len(set(ends[0][1])) == 5


def test_options_may_be_repeated_or_left_out():
    model = make_model()
    fused_adamezo_step(model, loss_of(model), betas=(0.5, 0.9), **OPTIONS)
    first = optimizer_of(model)
    for options in (
        {},
        OPTIONS,
        {"lr": 0.01},
        {"betas": (0.5, 0.9)},
        # Defaults that were left out at first.
        {"horizon": 10, "weight_decay": 0.0, "fused": None, "differentiable": False},
    ):
        fused_adamezo_step(model, loss_of(model), **options)
    assert optimizer_of(model) is first
    assert first.param_groups[0]["steps"] == 6
    model = make_model()
    for options in ({}, {"seed": None}, {}, {"lr": 1e-5}):
        fused_adamezo_step(model, loss_of(model), **options)
    assert optimizer_of(model).param_groups[0]["steps"] == 4


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"lr": 0.02, "zo_eps": 0.02}, ["zo_eps (was 0.01, got 0.02)"]),
        ({"seed": 8}, ["seed (was 7, got 8)"]),
        ({"seed": None}, ["seed (was 7, got None)"]),
        ({"horizon": 11}, ["horizon (was 10, got 11)"]),
        ({"fused": False}, ["fused (was None, got False)"]),
        (
            {"lr": 0.01, "betas": (0.7, 0.95), "eps": 1e-6},
            ["betas (was (0.7, 0.9), got (0.7, 0.95))", "eps (was 1e-08, got 1e-06)"],
        ),
    ],
    ids=str,
)
def test_changed_options_are_refused_by_name(options, changes):
    model = make_model()
    fused_adamezo_step(model, loss_of(model), **OPTIONS)
    before = values(model)
    with pytest.raises(ValueError, match="options changed") as raised:
        fused_adamezo_step(model, untouched, **options)
    for change in changes:
        assert change in str(raised.value)
    assert str(raised.value).count("(was ") == len(changes)
    assert equal(values(model), before)
    assert optimizer_of(model).param_groups[0]["steps"] == 1
    # What the message proposes.
    forget_optimizer(model)
    fused_adamezo_step(model, loss_of(model), **options)
    assert optimizer_of(model).param_groups[0]["steps"] == 1
    for name, value in options.items():
        if value is not None:
            assert optimizer_of(model).param_groups[0][name] == value


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_lr_and_weight_decay_follow_the_call(kind):
    ends = []
    for functional in (True, False):
        model = make_model().eval()
        optimizer = AdaMeZO(model.parameters(), **OPTIONS)
        for lr, decay in ((0.01, 0.0), (0.02, 0.0), (0.02, 0.5), (0.01, 0.5)):
            if functional:
                options = {**OPTIONS, "lr": kind(lr), "weight_decay": decay}
                fused_adamezo_step(model, loss_of(model), **options)
            else:
                optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
                optimizer.step(loss_of(model))
        ends.append(values(model))
    # A tensor holds the float32 nearest to lr.
    if kind is float:
        assert equal(*ends)
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(*ends, strict=True))


def test_a_repeated_lr_leaves_a_schedulers_alone():
    model = make_model()
    fused_adamezo_step(model, loss_of(model), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer_of(model), 0.5)
    for step in range(3):
        fused_adamezo_step(model, loss_of(model), **OPTIONS)
        assert optimizer_of(model).param_groups[0]["lr"] == 0.01 * 0.5**step
        scheduler.step()
    fused_adamezo_step(model, loss_of(model), lr=0.3)
    assert optimizer_of(model).param_groups[0]["lr"] == 0.3


def test_a_changed_lr_is_checked_before_anything_happens():
    model = make_model()
    fused_adamezo_step(model, loss_of(model), **OPTIONS)
    before = values(model)
    with pytest.raises(ValueError, match="Invalid weight_decay value: -1"):
        fused_adamezo_step(model, untouched, lr=0.5, weight_decay=-1)
    assert equal(values(model), before)
    assert optimizer_of(model).param_groups[0]["lr"] == OPTIONS["lr"]


def test_the_optimizer_of_a_model_that_was_not_stepped():
    model = make_model()
    with pytest.raises(ValueError, match="has not stepped this Sequential yet.*for_model"):
        optimizer_of(model)
    forget_optimizer(model)
    fused_adamezo_step(model, loss_of(model))
    assert isinstance(optimizer_of(model), AdaMeZO)
    forget_optimizer(model)
    with pytest.raises(ValueError, match="has not stepped"):
        optimizer_of(model)


def test_options_may_be_changed_in_the_groups():
    model = make_model()
    fused_adamezo_step(model, loss_of(model), **OPTIONS)
    before = values(model)
    optimizer_of(model).param_groups[0]["lr"] = 0.0
    fused_adamezo_step(model, loss_of(model), **OPTIONS)
    # Put back at lr 0: within the roundings of three stores of numbers below 1.
    for p, q in zip(values(model), before, strict=True):
        assert (p - q).abs().max() < 3 * 2.0**-24
    assert optimizer_of(model).param_groups[0]["steps"] == 2


@pytest.mark.parametrize("steps_before", [0, 1])
def test_an_unknown_option_is_a_type_error(steps_before):
    model = make_model()
    for _ in range(steps_before):
        fused_adamezo_step(model, loss_of(model))
    with pytest.raises(TypeError, match="unknown options: momentum, nesterov.*betas, eps, zo_eps"):
        fused_adamezo_step(model, untouched, lr=1e-5, momentum=0.9, nesterov=True)
    with pytest.raises(TypeError, match="unknown options: params"):
        fused_adamezo_step(model, untouched, params=[])
    assert (model in optimizers) == bool(steps_before)


def test_options_that_are_refused_leave_nothing_behind():
    model = make_model()
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        fused_adamezo_step(model, untouched, lr=-1)
    assert model not in optimizers
    fused_adamezo_step(model, loss_of(model), lr=1e-4)


def test_a_closure_that_fails_at_the_first_step():
    model = make_model()

    def closure():
        raise LookupError("no such label")

    with pytest.raises(LookupError, match="no such label"):
        fused_adamezo_step(model, closure, **OPTIONS)
    assert optimizer_of(model).param_groups[0]["steps"] == 0
    fused_adamezo_step(model, loss_of(model), **OPTIONS)


def test_new_parameters_are_refused_by_name():
    model = make_model()
    fused_adamezo_step(model, loss_of(model))
    model.append(nn.Linear(2, 3, bias=False))
    model[0].bias = nn.Parameter(torch.zeros(6))
    before = values(model)
    with pytest.raises(ValueError, match=re.escape("first step: 0.bias, 3.weight. Start anew")):
        fused_adamezo_step(model, untouched)
    assert equal(values(model), before)
    forget_optimizer(model)
    fused_adamezo_step(model, loss_of(model), lr=0.1)
    for p, q in zip(values(model), before, strict=True):
        assert not torch.equal(p, q)


def test_messages_have_the_models_names():
    model = make_model()
    model[2].double()
    with pytest.raises(TypeError, match=r"2\.weight has dtype torch\.float64"):
        fused_adamezo_step(model, untouched)


def test_data_may_be_replaced():
    """Parameters keep their identity when a model is cast or moved, or its weights are loaded."""
    model = make_model()
    fused_adamezo_step(model, loss_of(model), **OPTIONS)
    model.load_state_dict(make_model().state_dict())
    model.bfloat16()
    fused_adamezo_step(model, lambda: model(INPUTS.bfloat16()).float().square().mean())
    assert optimizer_of(model).projected_grad != 0
    fresh = make_model().bfloat16()
    assert not any(torch.equal(p, q) for p, q in zip(values(model), values(fresh), strict=True))


def test_frozen_parameters_wait_until_they_are_not():
    model = make_model()
    model[0].requires_grad_(False)
    before = values(model)
    for _ in range(2):
        fused_adamezo_step(model, loss_of(model), **OPTIONS)
    after = values(model)
    assert equal(after[:2], before[:2])
    assert not any(torch.equal(p, q) for p, q in zip(after[2:], before[2:], strict=True))
    model[0].requires_grad_(True)
    fused_adamezo_step(model, loss_of(model))
    assert not any(torch.equal(p, q) for p, q in zip(values(model), after, strict=True))


def test_the_optimizer_goes_with_the_model():
    model = make_model()
    fused_adamezo_step(model, loss_of(model), **OPTIONS)
    fused_adamezo_step(model, loss_of(model))
    gc.collect()  # models of other tests, too
    optimizer, count = weakref.ref(optimizer_of(model)), len(optimizers)
    assert optimizer() is optimizer_of(model)
    watch = weakref.ref(model)
    del model
    gc.collect()  # a module is part of reference cycles
    assert watch() is None
    assert optimizer() is None
    assert len(optimizers) == count - 1


def test_two_models_are_independent():
    a, b = make_model().eval(), make_model().eval()
    for _ in range(3):
        fused_adamezo_step(a, loss_of(a), lr=0.01, seed=1)
    start = values(b)
    fused_adamezo_step(b, loss_of(b), lr=0.02, seed=2)
    assert optimizer_of(a) is not optimizer_of(b)
    assert [optimizer_of(m).param_groups[0]["steps"] for m in (a, b)] == [3, 1]
    assert [optimizer_of(m).param_groups[0]["lr"] for m in (a, b)] == [0.01, 0.02]
    alone = make_model().eval()
    assert equal(values(alone), start)
    AdaMeZO(alone.parameters(), lr=0.02, seed=2).step(loss_of(alone))
    assert equal(values(alone), values(b))


def test_models_draw_seeds_of_their_own():
    a, b = make_model(), make_model()
    for model in (a, b):
        fused_adamezo_step(model, loss_of(model))
    assert optimizer_of(a).param_groups[0]["seed"] != optimizer_of(b).param_groups[0]["seed"]


def test_a_copied_model_begins_anew():
    model = make_model()
    fused_adamezo_step(model, loss_of(model), **OPTIONS)
    copied = copy.deepcopy(model)
    assert copied not in optimizers
    before = values(model)
    fused_adamezo_step(copied, loss_of(copied), lr=0.5)
    assert equal(values(model), before)
    assert not equal(values(copied), before)
    assert optimizer_of(copied).param_groups[0]["steps"] == 1
    assert optimizer_of(copied).param_groups[0]["lr"] == 0.5
    assert optimizer_of(model).param_groups[0]["steps"] == 1


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        fused_adamezo_step(nn.ReLU(), untouched)
