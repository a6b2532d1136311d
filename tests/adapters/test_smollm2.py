"""Adapters of SmolLM2-135M, the model of the demo."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from adamezo import AdaMeZO, AdaZeta
from adamezo.adapters import adapt, adapters_of, load_adapters, merge, remove, save_adapters
from adamezo.integrations import transformers as language_models
from examples.demo import smollm2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base():
    return language_models.load(smollm2())[0]


IDS = torch.randint(1000, (2, 8), generator=torch.Generator().manual_seed(0))


def loss_of(model):
    logits = model(input_ids=IDS).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("way", ["inplace", "out_of_place"])
def test_its_tensor_trains_are_trained_saved_and_taken_out(tmp_path, base, way):
    model, untouched = copy.deepcopy(base), logits(base)
    adapt(model, seed=0)
    adapters = adapters_of(model)
    # Of 30 layers, three adapters each: maps 576 to 64 (8 x 8 x 9 and 4 x 4 x 4) and back.
    map_576 = 8 * 5 + 5 * 8 * 5 + 5 * 9 * 5 + 5 * 4 * 5 + 5 * 4 * 5 + 5 * 4
    map_64 = 4 * 5 + 5 * 4 * 5 + 5 * 4 * 5 + 5 * 8 * 5 + 5 * 8 * 5 + 5 * 9
    assert sum(p.numel() for p in adapters.values()) == 90 * (map_576 + map_64 + 64 + 576)
    for optimizer in (
        AdaZeta(
            adapters.items(), lr=1e-3, model=model, seed=1, perturbation=way,
            **AdaZeta.schedule(1, epochs=2),
        ),
        AdaMeZO(adapters.items(), lr=1e-3, model=model, seed=2, perturbation=way),
    ):  # fmt: skip
        before = {name: p.clone() for name, p in adapters.items()}
        for _ in range(2):
            optimizer.step(lambda: loss_of(model))
        assert not any(torch.equal(before[name], p) for name, p in adapters.items())
    save_adapters(model, tmp_path)
    assert torch.equal(logits(load_adapters(copy.deepcopy(base), tmp_path)), logits(model))
    assert not torch.equal(logits(model), untouched)
    assert torch.equal(logits(remove(model)), untouched)


def test_its_tensor_trains_beside_layers_are_merged(base):
    model, untouched = adapt(copy.deepcopy(base), "tensor-train-linear", seed=0), logits(base)
    optimizer = AdaMeZO(adapters_of(model).items(), lr=1e-2, seed=1)
    for _ in range(3):
        optimizer.step(lambda: loss_of(model))
    trained = logits(model)
    # Merged weights are rounded once, to 2^-25 of their size. Logits are of order 10, and come
    # through 30 layers of sums of 576 and 1,536 terms: a thousand such errors are 3e-4 of them.
    torch.testing.assert_close(logits(merge(model)), trained, rtol=1e-3, atol=1e-3)
    assert (trained - untouched).abs().max() > 0.1
