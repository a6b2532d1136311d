"""peft's own adapters: LoRA, DoRA, IA3, prefixes and prompts train as they are."""

from __future__ import annotations

import pytest
import torch

from adamezo import AdaMeZO
from helpers import families
from helpers.trainers import rows, same, trainer, weights

peft = pytest.importorskip("peft")

CAUSAL = "CAUSAL_LM"
CONFIGS = {
    "lora": lambda: peft.LoraConfig(task_type=CAUSAL, r=2, target_modules=["q_proj", "v_proj"]),
    "dora": lambda: peft.LoraConfig(
        task_type=CAUSAL, r=2, target_modules=["q_proj", "v_proj"], use_dora=True
    ),
    "ia3": lambda: peft.IA3Config(
        task_type=CAUSAL, target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=3),
    "prompt": lambda: peft.PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=3),
}  # fmt: skip
IDS = families.tokens(rows=6, length=9)


def adapted(kind: str):
    torch.manual_seed(0)
    return peft.get_peft_model(families.make("llama"), CONFIGS[kind]()).eval()


def loss_of(model):
    return lambda: model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_kind_learns_and_leaves_the_base_alone(kind):
    model = adapted(kind)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        before = loss_of(model)()
    optimizer = AdaMeZO.for_model(model, lr=3e-2, zo_eps=1e-2, seed=1)
    for _ in range(60):
        optimizer.step(loss_of(model))
    with torch.no_grad():
        after = loss_of(model)()
    assert after < before - 0.05
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_kind_is_perturbed_out_of_place(kind):
    losses = []
    for perturbation in ("inplace", "out_of_place"):
        model = adapted(kind)
        optimizer = AdaMeZO.for_model(model, lr=0.0, seed=1, perturbation=perturbation)
        optimizer.step(loss_of(model))
        losses.append(torch.tensor(optimizer.losses))
    # The same perturbed weights, but for float32's rounding on the way from one side to the other.
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert losses[0][0] != losses[0][1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_kind_is_trained_saved_and_resumed_by_zotrainer(kind, tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2,
                    optimizer_cls_and_kwargs=(AdaMeZO, {"zo_eps": 1e-2}))  # fmt: skip
    made = trainer(tmp_path, adapted(kind), **settings)
    start = weights(made.model)
    made.train()
    assert not same(start, weights(made.model))
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    again = trainer(tmp_path, adapted(kind), **settings)
    again.train(str(tmp_path / "checkpoint-2"))
    assert same(weights(again.model), weights(made.model))
    loaded = peft.PeftModel.from_pretrained(
        families.make("llama"), tmp_path / "checkpoint-4"
    ).eval()
    with torch.no_grad():
        ids = torch.tensor([rows(1)[0]["input_ids"]])
        assert torch.equal(loaded(input_ids=ids).logits, made.model.eval()(input_ids=ids).logits)
