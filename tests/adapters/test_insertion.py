"""Adapters go where they are published to go, and leave a model as it was when taken out."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adamezo.adapters import SCHEMES, TensorTrainAdapter, adapt, adapters_of, merge, remove
from helpers.families import MODELS, make, tokens

CAUSAL = ("llama", "qwen2", "qwen3", "opt")
RESIDUAL = {
    "llama": {"mlp.gate_proj": 24, "mlp.up_proj": 24, "mlp.down_proj": 24},
    "opt": {"fc1": 24, "fc2": 24},
    "roberta": {"attention.output.dense": 24, "output.dense": 24},
}
RESIDUAL |= dict.fromkeys(("qwen2", "qwen3"), RESIDUAL["llama"])


def state(model):
    """All that an insertion might change: weights, what is trained, modules and hooks."""
    weights = {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    modules = [
        (name, id(m), list(m._forward_hooks), list(m._forward_pre_hooks), sorted(vars(m)))
        for name, m in model.named_modules()
    ]
    return weights, modules


def same(before, after):
    (weights, modules), (now, modules_now) = before, after
    return (
        modules == modules_now
        and weights.keys() == now.keys()
        and all(w[:2] == n[:2] and torch.equal(w[2], n[2])
                for w, n in zip(weights.values(), now.values(), strict=True))
    )  # fmt: skip


@torch.no_grad()
def logits(model, **inputs):
    return model(input_ids=tokens(), **inputs).logits


def move(model, scale=0.05):
    """Gives all adapters some values that they could have been trained to."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in adapters_of(model).values():
            p += scale * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("family", MODELS)
def test_residual_adapters_are_in_the_published_places(family):
    model = adapt(make(family))
    found = {n: m for n, m in model.named_modules() if isinstance(m, TensorTrainAdapter)}
    layers = [name.removesuffix(".tensor_train") for name in found]
    assert len(layers) == 2 * len(RESIDUAL[family])
    for name, adapter in zip(layers, found.values(), strict=True):
        last = [part for part in RESIDUAL[family] if name.endswith("." + part)]
        assert RESIDUAL[family][last[0]] == adapter.down.in_features
        assert adapter.down.out_features == 64
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapters_of(model))


@pytest.mark.parametrize("family", CAUSAL)
def test_an_adapter_sees_the_input_or_the_output_of_its_layer(family):
    """Written again without hooks: the first layer's first and last place."""
    model = adapt(make(family), bottleneck=8, seed=1)
    move(model)
    names = [n for n, m in model.named_modules() if isinstance(m, TensorTrainAdapter)]
    first, last = (
        model.get_submodule(names[i].removesuffix(".tensor_train"))
        for i in (0, len(RESIDUAL[family]) - 1)
    )
    x = torch.randn(3, 24)
    expected = nn.functional.linear(first.tensor_train(x), first.weight, first.bias)
    torch.testing.assert_close(first(x), expected, rtol=0, atol=0)
    x = torch.randn(3, 40)
    expected = last.tensor_train(nn.functional.linear(x, last.weight, last.bias))
    torch.testing.assert_close(last(x), expected, rtol=0, atol=0)


def test_llama_2_7b_has_610_560_weights_at_rank_5():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    adapted = adapters_of(adapt(model))
    assert len([name for name in adapted if name.endswith("core0")]) == 2 * 3 * 32
    assert sum(p.numel() for p in adapted.values()) == 610_560
    cores = {name: p for name, p in adapted.items() if ".core" in name}
    assert sum(p.numel() for p in cores.values()) == 211_200
    remove(model)
    cores_alone = adapters_of(adapt(model, bias=False))
    assert sum(p.numel() for p in cores_alone.values()) == 211_200


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", CAUSAL)
def test_the_base_is_frozen_and_comes_back(family, scheme):
    model = make(family)
    model.get_input_embeddings().weight.requires_grad_(False)
    before, untouched = state(model), logits(model)
    assert adapt(model, scheme, seed=1) is model
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == adapters_of(model).keys()
    assert all(trained[n] is p for n, p in adapters_of(model).items())
    if scheme != "prefix":  # all others begin as nothing, to the last rounding of a sum with 0
        torch.testing.assert_close(logits(model), untouched, rtol=0, atol=0)
    move(model)
    assert (logits(model) - untouched).abs().max() > 1e-3
    remove(model)
    assert same(before, state(model))
    assert torch.equal(logits(model), untouched)
    with pytest.raises(ValueError, match="has no adapters; adapt"):
        adapters_of(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_seed_decides_the_first_values(scheme):
    def first(seed):
        return adapters_of(adapt(make("llama"), scheme, seed=seed))

    a, again, other = first(3), first(3), first(4)
    assert all(torch.equal(a[name], again[name]) for name in a)
    assert not all(torch.equal(a[name], other[name]) for name in a)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_seed_leaves_the_callers_generators_alone(scheme):
    model = make("llama")
    before = torch.get_rng_state()
    adapt(model, scheme, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scheme", ["tensor-train", "tensor-train-linear", "prefix"])
@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_has_adapters_of_its_own(scheme, through):
    model = adapt(make("llama"), scheme, seed=1)
    move(model)
    expected = logits(model)
    other = through(model)
    with torch.no_grad():
        for p in adapters_of(model).values():
            p.zero_()
    assert torch.equal(logits(other), expected)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(remove(other)), logits(make("llama")))
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("scheme", ["tensor-train-linear", "lora"])
@pytest.mark.parametrize("family", MODELS)
def test_a_merged_model_computes_the_same_without_adapters(family, scheme):
    plain = make(family)
    model = adapt(make(family), scheme, seed=1)
    move(model, scale=0.2)
    expected = logits(model)
    assert merge(model) is model
    # The merged weight is rounded once, to 2^-25 of its size; logits of order 1 and more come
    # through 14 products of 24 to 40 terms.
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert (logits(plain) - expected).abs().max() > 1e-2
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())


def test_a_merged_weight_is_the_sum_rounded_once():
    model = adapt(make("llama").bfloat16(), "tensor-train-linear", seed=1)
    move(model, scale=0.2)
    layer = model.model.layers[0].self_attn.q_proj
    expected = (layer.weight.double() + layer.tensor_train.dense().double()).bfloat16()
    merge(model)
    assert torch.equal(layer.weight, expected)
    assert not torch.equal(
        layer.weight, make("llama").bfloat16().model.layers[0].self_attn.q_proj.weight
    )


def test_the_sum_with_lora_is_rounded_once_too():
    model = adapt(make("llama").bfloat16(), "lora", seed=1)
    move(model, scale=0.2)
    layer = model.model.layers[0].self_attn.q_proj
    a, b = (layer.get_submodule(part)["default"].weight for part in ("lora_A", "lora_B"))
    product = 2 * (b @ a)  # in float32, as peft computes it
    expected = (layer.weight.double() + product.double()).bfloat16()
    merge(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected)


@pytest.mark.parametrize("scheme", ["tensor-train-linear", "lora"])
def test_a_weight_that_others_read_is_not_merged(scheme):
    """The embeddings would be changed with a tied head."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
                         num_attention_heads=4, tie_word_embeddings=True)  # fmt: skip
    model = adapt(LlamaForCausalLM(config).eval(), scheme, targets=["q_proj", "lm_head"], seed=1)
    move(model)
    before = state(model)
    with pytest.raises(ValueError, match="lm_head cannot take .* another module has the same"):
        merge(model)
    assert same(before, state(model))


def test_a_layer_that_a_model_has_twice_is_merged():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    model = adapt(nn.Sequential(layer, nn.Tanh(), layer), "tensor-train-linear", targets="0")
    move(model, scale=0.2)
    x = torch.randn(4, 8)
    with torch.no_grad():
        expected = model(x)
        # Merged weights are rounded to 2^-25 of their size; sums of 8 products, twice.
        torch.testing.assert_close(merge(model)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("number", "dtype"), [(float("nan"), torch.float32), (3e2, torch.float16)])
@pytest.mark.parametrize("scheme", ["tensor-train-linear", "lora"])
def test_nothing_is_merged_if_one_sum_is_not_finite(scheme, number, dtype):
    model = adapt(make("llama").to(dtype), scheme, seed=1)
    move(model)
    last = [name.rpartition("v_proj.")[0] for name in adapters_of(model)][-1]
    with torch.no_grad():
        for name, p in adapters_of(model).items():
            if name.startswith(last + "v_proj"):
                p.fill_(number)
    before = state(model)
    with pytest.raises(ValueError, match=r"layers\.1.*v_proj cannot take .* not finite in"):
        merge(model)
    assert repr(before) == repr(state(model))  # in which nan is like nan


def test_a_bias_that_is_not_finite_is_not_merged_either():
    model = adapt(make("qwen2"), "tensor-train-linear", bias=True)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.tensor_train.bias.fill_(math.inf)
    before = state(model)
    with pytest.raises(ValueError, match=r"layers\.1.*v_proj cannot take .* not finite in"):
        merge(model)
    assert repr(before) == repr(state(model))


@pytest.mark.parametrize("scheme", ["tensor-train", "prefix"])
def test_what_no_weight_can_do_is_not_merged(scheme):
    model = adapt(make("llama"), scheme, seed=1)
    before = state(model)
    with pytest.raises(ValueError, match=f"{scheme!r} cannot be merged"):
        merge(model)
    assert same(before, state(model))


def test_a_bias_without_a_place_is_not_merged():
    model = adapt(make("llama"), "tensor-train-linear", bias=True)
    before = state(model)
    with pytest.raises(ValueError, match=r"layers\.0.*q_proj cannot take.*bias=False"):
        merge(model)
    assert same(before, state(model))
    with_bias = adapt(make("qwen2"), "tensor-train-linear", bias=True)  # its q and v have one
    move(with_bias)
    expected = logits(with_bias)
    torch.testing.assert_close(logits(merge(with_bias)), expected, rtol=1e-4, atol=1e-4)


def test_targets_are_patterns_of_names():
    def places(targets, scheme="tensor-train"):
        adapted = adapters_of(adapt(make("llama"), scheme, targets=targets))
        return {name.split(".tensor_train")[0].removeprefix("model.layers.") for name in adapted}

    assert places("o_proj") == {"0.self_attn.o_proj", "1.self_attn.o_proj"}
    assert places(["layers.1.*.q_proj", "lm_head"]) == {"1.self_attn.q_proj", "lm_head"}
    assert places({"model.layers.0.mlp.up_proj": "input"}) == {"0.mlp.up_proj"}
    assert len(places("layers.0.*")) == 7  # the linear layers alone
    assert len(places("*_proj", "tensor-train-linear")) == 14


def test_a_layer_that_is_never_called_is_no_target():
    """nn.MultiheadAttention reads the weight of its out_proj, whose adapter would never run."""
    model = nn.TransformerEncoderLayer(8, 2, 16).eval()
    with pytest.raises(
        ValueError, match="'out_proj' matches no linear layer.*'linear1', 'linear2'"
    ):
        adapt(model, targets="out_proj")
    x = torch.randn(3, 1, 8)
    with torch.no_grad():
        untouched = model(x)
        # Its fast path, which reads weights without a call too, is not taken where there are hooks.
        move(adapt(model, targets=["linear1", "linear2"], seed=1))
        assert not torch.equal(model(x), untouched)


def test_a_target_with_its_side():
    model = adapt(make("llama"), targets={"mlp.up_proj": "output"})
    assert model.model.layers[0].mlp.up_proj.tensor_train.down.in_features == 40


REFUSED = {
    "scheme": (dict(scheme="dora"), "scheme: 'dora', expected one of tensor-train, "),
    "option": (dict(rank_=3), "unknown options: rank_. .* 'tensor-train' has rank, bottleneck"),
    "option of another": (dict(scheme="lora", bottleneck=8), "bottleneck. .* 'lora' has rank"),
    "rank": (dict(rank=0), "rank: 0"),
    "rank, half": (dict(rank=2.5), "rank: 2.5, expected a whole number"),
    "rank, a word": (dict(rank="5"), "rank: '5'"),
    "rank, one of many": (dict(rank=(2, 2, True, 2, 2)), "rank: True"),
    "ranks, too few": (dict(rank=(2, 2)), r"rank: \(2, 2\), expected .* 5 of them"),
    "rank of LoRA": (dict(scheme="lora", rank=0), "rank: 0"),
    "ranks of LoRA": (dict(scheme="lora", rank=[2, 2]), r"rank: \[2, 2\]"),
    "rank of LoRA, half": (dict(scheme="lora", rank=2.5), "rank: 2.5"),
    "bottleneck": (dict(bottleneck=2.5), "bottleneck: 2.5"),
    "bias": (dict(bias="no"), "bias: 'no', expected True or False"),
    "seed": (dict(seed=2.5), "seed: 2.5"),
    "seed of LoRA": (dict(scheme="lora", seed=-1), r"seed: -1, expected an integer in \[0"),
    "activation": (dict(activation="gelu"), "activation: 'gelu'"),
    "pattern": (dict(targets="gate"), "'gate' matches no linear layer.*'gate_proj'"),
    "one of two patterns": (dict(targets=["gate_proj", "mlp"]), "'mlp' matches no linear"),
    "both": (dict(targets=["up_proj", "mlp.up_proj"]), "both match model.layers.0.mlp.up_proj"),
    "side": (dict(targets={"up_proj": "inside"}), "targets: .*inside.*'input', 'output'"),
    "none": (dict(targets=[]), r"targets: \[\]"),
    "sides of LoRA": (dict(scheme="lora", targets={"q_proj": "input"}), "beside a layer"),
    "of a prefix": (dict(scheme="prefix", targets="q_proj"), "a prefix is of the whole model"),
    "length": (dict(scheme="prefix", length=0), "length: 0"),
    "length, true": (dict(scheme="prefix", length=True), "length: True"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(arguments, message):
    model = make("llama")
    model.lm_head.weight.requires_grad_(False)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        adapt(model, **arguments)
    assert same(before, state(model))


def test_a_second_adapter_is_refused():
    model = adapt(make("llama"), "prefix")
    before = state(model)
    with pytest.raises(ValueError, match=r"'prefix' already: take them out with remove"):
        adapt(model)
    assert same(before, state(model))


@pytest.mark.parametrize("outer", SCHEMES)
@pytest.mark.parametrize("inner", ["tensor-train", "lora"])
def test_a_model_whose_part_has_adapters_is_refused(inner, outer):
    """The same layer would call one adapter twice, and nobody would train the other."""
    model = make("llama")
    adapt(model.model.layers[0], inner, targets="q_proj")
    before = state(model)
    with pytest.raises(ValueError, match=rf"part 'model\.layers\.0' has .*{inner!r} already"):
        adapt(model, outer)
    assert same(before, state(model))


def test_a_part_of_a_model_with_adapters_is_refused():
    model = adapt(make("llama"))
    before = state(model)
    with pytest.raises(ValueError, match="up_proj has a tensor train already"):
        adapt(model.model.layers[0], targets="up_proj")
    assert same(before, state(model))
    model = adapt(make("llama"), "lora")
    before = state(model)
    with pytest.raises(ValueError, match="has adapters of peft already"):
        adapt(model.model.layers[0], "lora", targets="up_proj")
    assert same(before, state(model))


@pytest.mark.parametrize("scheme", ["tensor-train", "prefix"])
def test_a_compiled_model_runs_what_is_put_into_the_model(scheme):
    model = make("llama")
    compiled = torch.compile(model, backend="eager")
    untouched = logits(compiled)
    with pytest.raises(ValueError, match="got a compiled model, expected the one that"):
        adapt(compiled, scheme)
    adapt(model, scheme, seed=1)
    move(model)
    with pytest.raises(ValueError, match="got a compiled model, expected the one that"):
        adapters_of(compiled)
    # The same operations, in graphs: "eager" compiles nothing.
    assert torch.equal(logits(compiled), logits(model))
    remove(model)
    assert torch.equal(logits(compiled), untouched)


def test_adapters_of_peft_are_not_touched():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    before = state(model)
    with pytest.raises(ValueError, match="PeftModel has adapters of peft already"):
        adapt(model, "lora")
    assert same(before, state(model))
    remove(adapt(model, "tensor-train"))  # which do not meet them
    assert same(before, state(model))


def test_a_model_of_no_family_needs_targets():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"a Sequential has no published places.*'0', '2'"):
        adapt(model)
    adapt(model, targets="0")
    assert all(name.startswith("0.tensor_train") for name in adapters_of(model))
    with pytest.raises(ValueError, match="its part '0' has"):
        adapters_of(nn.Sequential(model))


def test_a_model_of_another_family_is_named():
    model = make("llama")
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match=r"type 'mamba' have no published places.*llama.*roberta"):
        adapt(model)


def test_a_layer_that_is_called_by_a_keyword_is_refused():
    model = adapt(nn.Sequential(nn.Linear(4, 4)), "tensor-train-linear", targets="0")
    with pytest.raises(TypeError, match="without a positional argument"):
        model[0](input=torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_adapters_of_a_16_bit_model_are_float32(scheme, dtype):
    model = adapt(make("llama").to(dtype), scheme)
    assert {p.dtype for p in adapters_of(model).values()} == {torch.float32}
    assert logits(model).dtype == dtype
