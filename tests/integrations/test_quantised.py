"""Adapters on quantised bases: bitsandbytes in 4 and 8 bits, torchao in 8 bits."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from adamezo import AdaMeZO
from adamezo.adapters import adapt, adapters_of, load_adapters, merge, remove, save_adapters
from helpers import families
from helpers.trainers import same, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = families.tokens(rows=3, length=9)


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def needs(package: str):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
    )


BASES = {
    "bitsandbytes, 4 bits": (
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "Linear4bit",
        "bitsandbytes",
    ),
    "bitsandbytes, 8 bits": (
        lambda: BitsAndBytesConfig(load_in_8bit=True), "Linear8bitLt", "bitsandbytes"
    ),
    "torchao, 8 bits": (torchao, "Int8Tensor", "torchao"),
}  # fmt: skip
EACH = [pytest.param(name, marks=needs(package)) for name, (*_, package) in BASES.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough for blocks of 64 weights."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = families.SIZES | {"hidden_size": 64, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).save_pretrained(path)
    return path


def load(name: str, folder):
    make, kind, _ = BASES[name]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=make()).eval()
    projection = model.model.layers[0].mlp.up_proj
    assert kind in (type(projection).__name__, type(projection.weight).__name__)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def loss_of(model):
    return lambda: model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize("scheme", ["lora", "tensor-train", "tensor-train-linear"])
@pytest.mark.parametrize("name", EACH)
def test_adapters_are_trained_saved_and_taken_out(name, scheme, folder, tmp_path):
    model = load(name, folder)
    untouched = logits(model)
    adapt(model, scheme, seed=0)
    before = [p.clone() for p in adapters_of(model).values()]
    for perturbation in ("inplace", "out_of_place"):
        optimizer = AdaMeZO(
            adapters_of(model).items(), lr=1e-2, zo_eps=1e-2, seed=1, model=model,
            perturbation=perturbation,
        )  # fmt: skip
        for _ in range(3):
            optimizer.step(loss_of(model))
    after = adapters_of(model).values()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    save_adapters(model, tmp_path)
    again = load_adapters(load(name, folder), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(remove(model)), untouched)  # the base has kept every bit


@pytest.mark.parametrize("scheme", ["lora", "tensor-train-linear"])
@pytest.mark.parametrize("name", EACH)
def test_merging_is_refused_by_the_layers_name(name, scheme, folder):
    """bitsandbytes would quantise the sum again: in 4 bits that lost the adapters."""
    model = adapt(load(name, folder), scheme, seed=0)
    AdaMeZO(adapters_of(model).items(), lr=1e-1, seed=1).step(loss_of(model))
    before = logits(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj cannot take its"):
        merge(model)
    assert torch.equal(logits(model), before)


def test_merging_lora_into_packed_weights_is_refused():
    """The same without a library for quantised weights."""
    pytest.importorskip("peft")
    model = adapt(families.make("llama"), "lora", seed=0)
    layer = model.model.layers[1].self_attn.v_proj.base_layer
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj.*float8_e4m3fn of shape"):
        merge(model)


@pytest.mark.parametrize("name", EACH)
def test_zotrainer_trains_a_peft_model(name, folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(load(name, folder), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    start = [p.detach().clone() for p in trained]
    made = trainer(
        tmp_path, model, max_steps=2, optimizer_cls_and_kwargs=(AdaMeZO, {"zo_eps": 1e-2})
    )
    made.train()
    assert not any(torch.equal(a, b) for a, b in zip(start, trained, strict=True))


@pytest.mark.parametrize("name", EACH)
def test_all_weights_means_those_that_are_not_quantised(name, folder):
    model = load(name, folder)
    packed = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert any("q_proj" in n for n in packed)
    optimizer = AdaMeZO.for_model(model, lr=1e-2, seed=1)
    names = [name for plan in optimizer.plans() for name in plan.names]
    assert "model.norm.weight" in names
    assert not set(names) & set(packed)
    start = weights(model.model.norm)
    optimizer.step(loss_of(model))
    assert not same(start, weights(model.model.norm))
