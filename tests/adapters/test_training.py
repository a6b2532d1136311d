"""Everything that an optimizer promises holds on adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from adamezo import AdaMeZO, AdaZeta, MeZO, check_closure
from adamezo.adapters import SCHEMES, adapt, adapters_of, load_adapters, merge, save_adapters
from adamezo.runlog import StepLog, read, replay, replay_file
from helpers.families import make, tokens

STEPS = 6
METHODS = {
    "AdaZeta": lambda params, **o: AdaZeta(params, lr=1e-3, **AdaZeta.schedule(2, epochs=3), **o),
    "AdaMeZO": lambda params, **o: AdaMeZO(params, lr=1e-3, horizon=3, **o),
}
WAYS = ("inplace", "out_of_place")


def start(scheme, method, way):
    model = adapt(make("llama"), scheme, seed=1)
    named = adapters_of(model).items()
    optimizer = METHODS[method](named, model=model, seed=2, perturbation=way)
    return model, optimizer


def loss_of(model):
    ids = tokens()
    logits = model(input_ids=ids).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.step(lambda: loss_of(model))


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_the_adapters_saves_resumes_and_replays(tmp_path, method, way, scheme):
    model, optimizer = start(scheme, method, way)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = copy.deepcopy(adapters_of(model))
    save_adapters(model, tmp_path / "before")
    check_closure(optimizer, lambda: loss_of(model))
    with StepLog.create(tmp_path / "run.log", optimizer):
        train(model, optimizer, STEPS // 2)
        save_adapters(model, tmp_path / "half")
        state = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, STEPS - STEPS // 2)
    after = adapters_of(model)
    assert not any(torch.equal(before[name], p) for name, p in after.items())
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in base.items())
    assert not optimizer.state

    # Resumed from a saved half, on a fresh base.
    resumed = load_adapters(make("llama"), tmp_path / "half")
    other = METHODS[method](adapters_of(resumed).items(), model=resumed, seed=2, perturbation=way)
    other.load_state_dict(state)
    train(resumed, other, STEPS - STEPS // 2)
    assert same(adapters_of(resumed), after)
    assert torch.equal(logits(resumed), logits(model))

    # Replayed, without evaluating the model: on a model, and from file to file.
    log = read(tmp_path / "run.log")
    replayed, fresh = start(scheme, method, way)
    assert replay(log, fresh) == STEPS
    assert same(adapters_of(replayed), after)
    saved = tmp_path / "before" / "adapters.safetensors"
    replay_file(saved, tmp_path / "run.log", tmp_path / "before" / "again.safetensors")
    (tmp_path / "before" / "again.safetensors").replace(saved)
    assert same(adapters_of(load_adapters(make("llama"), tmp_path / "before")), after)


@pytest.mark.parametrize("scheme", ["tensor-train-linear", "lora"])
def test_a_trained_model_is_merged(scheme):
    model, optimizer = start(scheme, "AdaMeZO", "inplace")
    untouched = logits(model)
    train(model, optimizer, 3)
    expected = logits(model)
    # Merged weights are rounded once, to 2^-25 of their size, and logits are of order 1.
    torch.testing.assert_close(logits(merge(model)), expected, rtol=1e-4, atol=1e-4)
    assert (expected - untouched).abs().max() > 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_ways_of_perturbing_see_the_same_losses(scheme):
    """In place weights are restored up to rounding, and then they see nearly the same."""
    losses = {}
    for way in WAYS:
        model, optimizer = start(scheme, "AdaMeZO", way)
        losses[way] = [float(optimizer.step(lambda m=model: loss_of(m))) for _ in range(3)]
    # A first step perturbs the same weights along the same direction: w + mu z is rounded in the
    # same way, and theirs - mu z from there or from w. Losses of order 4 have a last place of 5e-7,
    # and later steps differ by what 1 / (2 mu) makes of that.
    torch.testing.assert_close(losses["inplace"], losses["out_of_place"], rtol=1e-4, atol=0)
    assert len(set(losses["inplace"])) == 3


def test_the_gradient_that_is_estimated_is_that_of_the_adapters():
    """Many directions at a small scale, against backpropagation through the adapter."""
    options = dict(bottleneck=4, rank=1, bias=False, init="published", seed=1)
    model = adapt(make("llama"), targets="layers.1.mlp.down_proj", **options)
    params = adapters_of(model)
    loss_of(model).backward()
    gradient = torch.cat([p.grad.flatten() for p in params.values()])
    before = torch.cat([p.detach().flatten() for p in params.values()])
    optimizer = MeZO(params.items(), lr=1.0, queries=200, zo_eps=1e-3, seed=0)
    optimizer.step(lambda: loss_of(model))
    estimate = before - torch.cat([p.detach().flatten() for p in params.values()])
    assert len(gradient) == 28
    # The mean of n estimates p z of d weights has the relative error sqrt((d + 1) / n) = 0.38. One
    # of nothing, or along other directions, has an error of 1 and more.
    error = float((estimate - gradient).norm() / gradient.norm())
    assert error < 2 * (29 / 200) ** 0.5


def test_adazeta_takes_its_schedule_from_a_data_loader():
    loader = torch.utils.data.DataLoader(range(100), batch_size=16)
    schedule = AdaZeta.schedule(loader, epochs=6)
    assert schedule["steps_per_epoch"] == 7
    optimizer = AdaZeta([torch.nn.Parameter(torch.ones(2))], **schedule)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["zo_eps"], group["queries"]) == (1e-4, 1e-3, 15)
    # floor(0.85 epoch^(ln(20 / 0.85) / ln 6)), at least 1 and at most 15, by hand
    assert [optimizer.queries_at(7 * e, group) for e in range(8)] == [1, 1, 2, 5, 9, 14, 15, 15]
    assert optimizer.queries_at(6, group) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batches=7, epochs=1), "epochs: 1, expected two or more"),
        (dict(batches=7, epochs=3, alpha=30.0), "alpha: 30.0"),
        (dict(batches=7, epochs=3, alpha=0.0), "alpha: 0.0"),
        (dict(batches=0, epochs=3), "steps_per_epoch: 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaZeta.schedule(**arguments)
