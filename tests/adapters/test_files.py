"""Saved adapters are loaded bit for bit, or not at all."""

from __future__ import annotations

import json
import sys

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from adamezo import integrations
from adamezo.adapters import (
    SCHEMES,
    adapt,
    adapters_of,
    load_adapters,
    remove,
    save_adapters,
)
from helpers.families import MODELS, make, tokens


def moved(model, seed=9):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapters_of(model).values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


CASES = [(f, s) for f in MODELS for s in SCHEMES if (f, s) != ("roberta", "prefix")]


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_a_fresh_base_gets_the_same_logits_bit_for_bit(tmp_path, family, scheme):
    model = moved(adapt(make(family), scheme))
    save_adapters(model, tmp_path / "new" / "folder")
    base = make(family)
    untouched = logits(base)
    assert load_adapters(base, tmp_path / "new" / "folder") is base
    assert torch.equal(logits(base), logits(model))
    assert not torch.equal(logits(base), untouched)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == set(adapters_of(base))


def test_options_and_targets_come_with_the_file(tmp_path):
    options = dict(rank=(2, 3, 2, 3, 2), bottleneck=8, activation="tanh", bias=False)
    model = moved(adapt(make("llama"), targets={"layers.1.mlp.up_proj": "input"}, **options))
    save_adapters(model, tmp_path)
    assert torch.equal(logits(load_adapters(make("llama"), tmp_path)), logits(model))


def test_names_in_the_file_are_those_of_the_model(tmp_path):
    model = adapt(make("llama"))
    save_adapters(model, tmp_path)
    saved = load_file(tmp_path / "adapters.safetensors")
    assert saved.keys() == adapters_of(model).keys()
    assert all(torch.equal(p, saved[name]) for name, p in adapters_of(model).items())


def test_values_of_a_model_with_adapters_are_replaced(tmp_path):
    """So that an optimizer of them goes on with the parameters that it has."""
    saved = moved(adapt(make("llama"), seed=1))
    save_adapters(saved, tmp_path)
    model = adapt(make("llama"), seed=2)
    parameters = adapters_of(model)
    load_adapters(model, tmp_path)
    assert all(p is parameters[name] for name, p in adapters_of(model).items())
    assert torch.equal(logits(model), logits(saved))


def test_a_head_that_is_trained_too_is_saved_with_them(tmp_path):
    model = moved(adapt(make("roberta")))
    model.classifier.requires_grad_(True)
    with torch.no_grad():
        model.classifier.out_proj.weight += 1
    save_adapters(model, tmp_path)
    other = load_adapters(make("roberta"), tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert other.classifier.out_proj.weight.requires_grad
    assert not other.roberta.embeddings.word_embeddings.weight.requires_grad


def refused(model, folder, message, error=ValueError):
    before = {n: (id(p), p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        load_adapters(model, folder)
    after = {n: (id(p), p, p.requires_grad) for n, p in model.named_parameters()}
    assert before.keys() == after.keys()
    for name, (identity, value, trained) in before.items():
        assert (identity, trained) == (after[name][0], after[name][2])
        assert torch.equal(value, after[name][1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in make("llama").modules())


def test_a_base_without_the_modules_is_refused(tmp_path):
    save_adapters(adapt(make("llama")), tmp_path)
    refused(
        make("opt"), tmp_path, r"no linear layer 'model\.layers\.0\.mlp\.gate_proj', nor 5 others"
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_base_of_another_size_is_refused_by_name(tmp_path, scheme):
    from transformers import LlamaConfig, LlamaForCausalLM

    from helpers.families import SIZES

    save_adapters(adapt(make("llama"), scheme), tmp_path)
    sizes = SIZES | {"hidden_size": 48, "intermediate_size": 80}
    other = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    last = list(adapters_of(adapt(make("llama"), scheme)))
    refused(other, tmp_path, rf"({'|'.join(last)}) is float32 of shape .*, in the model float32")


def test_adapters_of_another_kind_than_the_models_are_refused(tmp_path):
    save_adapters(adapt(make("llama"), bottleneck=8), tmp_path)
    refused(adapt(make("llama")), tmp_path, "saved options are .*'bottleneck': 8.* 64")
    refused(adapt(make("llama"), "lora"), tmp_path, "saved scheme.*'tensor-train'.*'lora'")
    refused(
        adapt(make("llama"), bottleneck=8, targets="o_proj"), tmp_path, "saved places.*gate_proj"
    )


def edit(folder, change):
    path = folder / "adapters.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    model = adapt(make("llama"))
    save_adapters(model, tmp_path)
    path = tmp_path / "adapters.safetensors"
    tensors = load_file(path)
    first, second = list(tensors)[:2]
    save_file({k: v for k, v in tensors.items() if k != first}, path)
    refused(make("llama"), tmp_path, f"{first} of adapters.json is missing")
    save_file(tensors | {"more": torch.ones(2)}, path)
    refused(make("llama"), tmp_path, "more is not in adapters.json")
    save_file(tensors | {second: tensors[second].bfloat16()}, path)
    refused(make("llama"), tmp_path, f"{second} is bfloat16 of shape .*, in adapters.json float32")
    save_file(tensors | {"more": torch.ones(2)}, path)
    edit(tmp_path, lambda d: d["tensors"].update({"more": ["float32", [2]]}))
    refused(make("llama"), tmp_path, "more is not in the model")


def test_damaged_descriptions_are_refused(tmp_path):
    save_adapters(adapt(make("llama")), tmp_path)
    path = tmp_path / "adapters.json"
    good = path.read_text()
    edit(tmp_path, lambda d: d.update(format=2))
    refused(make("llama"), tmp_path, "got format 2, expected 1")
    path.write_text(good)
    edit(tmp_path, lambda d: d.update(scheme="dora"))
    refused(make("llama"), tmp_path, "scheme: 'dora'")
    path.write_text(good)
    edit(tmp_path, lambda d: d["options"].update(more=1))
    refused(make("llama"), tmp_path, "unknown options: more")
    path.write_text(good)
    edit(tmp_path, lambda d: d["options"].update(rank="five"))
    refused(make("llama"), tmp_path, str(tmp_path))
    path.write_text(good)
    edit(tmp_path, lambda d: d.pop("places"))
    refused(make("llama"), tmp_path, "expected what save_adapters writes, with format, scheme")
    path.write_text(good[:40])
    refused(make("llama"), tmp_path, "expected JSON")
    path.unlink()
    refused(make("llama"), tmp_path, "adapters.json", FileNotFoundError)


def test_places_that_are_no_places_are_refused(tmp_path):
    save_adapters(adapt(make("llama"), targets="up_proj"), tmp_path)
    good = (tmp_path / "adapters.json").read_text()
    for place, side, message in (
        ("model.norm", "output", r"no linear layer 'model\.norm'"),
        ("", "output", "no linear layer ''"),
        ("model.layers.0.mlp.up_proj", "inside", "'input', 'output'"),
        ("model.layers.0.mlp.up_proj", None, "'input', 'output'"),
    ):
        edit(tmp_path, lambda d, place=place, side=side: d["places"].update({place: side}))
        refused(make("llama"), tmp_path, message)
        (tmp_path / "adapters.json").write_text(good)
    forms = json.loads(good)["tensors"]
    for form in (1, None, ["float32"], ["float32", 5]):
        edit(tmp_path, lambda d, form=form: d.update(tensors=dict.fromkeys(forms, form)))
        refused(make("llama"), tmp_path, "adapters.safetensors does not fit")
        (tmp_path / "adapters.json").write_text(good)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_damaged_file_of_tensors_is_refused(tmp_path, kept):
    save_adapters(adapt(make("llama")), tmp_path)
    path = tmp_path / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(make("llama"), tmp_path, r"adapters\.safetensors: expected a \.safetensors file")


def test_numbers_of_other_libraries_can_be_saved(tmp_path):
    model = adapt(make("llama"), rank=numpy.int64(2), bottleneck=numpy.int32(8))
    save_adapters(model, tmp_path)
    assert torch.equal(logits(load_adapters(make("llama"), tmp_path)), logits(model))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_meta_device_holds_no_adapters(tmp_path, scheme):
    """torch copies to it without a word, and nothing is there."""
    save_adapters(adapt(make("llama"), scheme), tmp_path / "saved")
    with torch.device("meta"):
        model, adapted = MODELS["llama"](), adapt(MODELS["llama"](), scheme)
    with pytest.raises(ValueError, match=r"is on the meta device.*to_empty"):
        load_adapters(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="has no adapters"):
        adapters_of(model)
    with pytest.raises(ValueError, match="is on the meta device"):
        save_adapters(adapted, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_lost_adapters_are_not_passed_over(tmp_path):
    model = adapt(make("llama"), targets=["lm_head", "q_proj"])
    model.resize_token_embeddings(60, mean_resizing=False)
    for act in (adapters_of, remove, lambda m: save_adapters(m, tmp_path / "new")):
        with pytest.raises(ValueError, match=r"lost its adapter's 'lm_head.* and 13 others"):
            act(model)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch):
    from adamezo.integrations import safetensors

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(OSError, match=r"adapters\.safetensors cannot be written: No space left"):
        save_adapters(adapt(make("llama")), tmp_path)


def forget(monkeypatch, name):
    """An integration is imported anew."""
    monkeypatch.delitem(sys.modules, f"adamezo.integrations.{name}", raising=False)
    monkeypatch.delattr(integrations, name, raising=False)


def test_without_safetensors_there_is_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    forget(monkeypatch, "safetensors")
    with pytest.raises(ImportError, match=r"pip install 'adamezo\[transformers\]'"):
        save_adapters(adapt(make("llama")), tmp_path)


def test_without_peft_there_is_a_hint_and_tensor_trains(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    forget(monkeypatch, "peft")
    model = make("llama")
    with pytest.raises(ImportError, match=r"pip install 'adamezo\[lora\]'"):
        adapt(model, "lora")
    adapt(model)
