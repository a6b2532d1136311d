"""Recipes, learning rates that are known, and the warning of those of another scheme."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import adamezo
from adamezo import FZOO, HELENE, AdaMeZO, AdaZeta, MeZO
from adamezo.adapters import SCHEMES, adapt, adapters_of
from adamezo.presets import PRESETS, RECIPES, check_lr, known, scheme_of
from helpers.families import make

ROOT = Path(__file__).resolve().parents[2]


def test_presets_are_of_methods_and_schemes_that_there_are():
    for preset in PRESETS:
        assert hasattr(adamezo, preset.method)
        assert preset.scheme in ("none", *SCHEMES)
        assert 0 < preset.lr < 1
        assert preset.source
    assert {p.scheme for p in PRESETS} >= {"none", "lora", "prefix", "tensor-train"}


def test_mezos_published_values_are_there():
    """Of the commands in its code, for OPT-13B and RoBERTa-large."""
    found = {(p.scheme, p.lr, p.zo_eps) for p in PRESETS if "2305.17333" in p.source}
    assert found == {
        *{("none", 1e-7, 1e-3), ("none", 1e-6, 1e-3)},
        *{("lora", 5e-5, 1e-2), ("lora", 1e-4, 1e-3)},
        *{("prefix", 1e-3, 1e-1), ("prefix", 1e-2, 1e-1)},
    }


def lr_in(page: str, table: str, method: str) -> float:
    """The lr of a method's row in a table of a page."""
    text = (ROOT / page).read_text().split(f"<!-- {table} -->")[1].split(f"<!-- /{table} -->")[0]
    (row,) = re.findall(rf"^\| {method} \|.*$", text, re.MULTILINE)
    (cell,) = re.findall(r"([0-9.e-]+) \(of [0-9]+\)", row)
    return float(cell)


def test_our_own_are_the_best_of_the_committed_search():
    """The lr of the tables in the page that a preset names."""
    modes = {"none": "full", "lora": "lora", "tensor-train": "tensor-train"}
    ours = [p for p in PRESETS if p.source.startswith("docs/")]
    assert len(ours) >= 9
    for preset in ours:
        job = "layer" if "layer" in preset.source else "main"
        table = f"methods_{job}_{modes[preset.scheme]}"
        if "long_runs" in preset.source:
            table = f"long_methods_layer_{modes[preset.scheme].replace('-', '_')}"
        assert lr_in(preset.source.split(",")[0], table, preset.method) == pytest.approx(preset.lr)


@pytest.mark.parametrize(
    ("scheme", "table"),
    [
        ("none", "long_methods_layer_full"),
        ("lora", "long_methods_layer_lora"),
        ("tensor-train", "long_methods_layer_tensor_train"),
    ],
)
def test_recipes_have_the_lr_of_the_committed_search(scheme, table):
    recipe = RECIPES[scheme]
    row = f"{recipe.method}, zo_eps = {recipe.options['zo_eps']:g}"
    assert lr_in("docs/long_runs.md", table, row) == pytest.approx(recipe.lr)
    assert known(recipe.method, scheme)


def test_adazeta_has_mezos_too():
    assert set(known("MeZO", "lora")) <= set(known("AdaZeta", "lora"))
    assert known("HELENE", "lora") == ()


def check(method, scheme, **options):
    """Whether there is a warning, and its text."""
    model = make("llama")
    if scheme != "none":
        adapt(model, scheme)
    params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if method is AdaZeta:
        options |= AdaZeta.schedule(10, epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_lr(method(params, **options), model)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("method", "scheme", "lr", "hint"),
    [
        (MeZO, "none", 1e-2, r"all weights.*prefix adapters \(0\.01"),
        (MeZO, "none", 9.48e-3, r"factor of 30\. .*prefix adapters \(0\.01"),
        (
            MeZO,
            "lora",
            1e-7,
            r"lora adapters, for which 5e-05.*factor of 500\..*all weights \(1e-07",
        ),
        (MeZO, "prefix", 1e-6, r"zo_eps=0\.1; MeZO.*factor of 1000"),
        (AdaZeta, "tensor-train", 1e-6, r"AdaZeta.*all weights \(1e-06"),
        (FZOO, "lora", 1e-3, r"for which 1e-05.*\(with zo_eps=0\.0001; docs.*factor of 100\."),
        (AdaMeZO, "lora", 1e-5, r"for which 0\.01.*all weights \(1e-05, AdaMeZO's default"),
    ],
)
def test_an_lr_of_another_scheme_is_warned_of(method, scheme, lr, hint):
    (message,) = check(method, scheme, lr=lr)
    assert re.search(hint, message)
    assert f"known({method.__name__!r}, {scheme!r})" in message


@pytest.mark.parametrize(
    ("method", "scheme", "options"),
    [
        (MeZO, "none", dict(lr=9.1e-3)),  # 29 times the nearest, 3.16e-4
        (MeZO, "none", dict(lr=1e-6)),
        (MeZO, "lora", dict(lr=torch.tensor(1e-4))),
        (MeZO, "none", dict(lr=0.0)),
        (AdaMeZO, "none", dict(lr=1e-5)),
        (AdaMeZO, "none", dict(lr=1e-7, betas=(0.7, 0.0))),  # MeZO with momentum
        (AdaMeZO, "none", dict(lr=1e-8, normalization="official")),  # nothing is known
        (HELENE, "none", dict(lr=1e3)),
        (FZOO, "none", dict()),
        (FZOO, "lora", dict(lr=1e-4, zo_eps=1e-3)),  # the steps of 1e-5 at the default, 1e-4
        (AdaMeZO, "tensor-train-linear", dict(lr=1e3)),
    ],
)
def test_others_are_not(method, scheme, options):
    assert check(method, scheme, **options) == []


def test_an_lr_at_another_zo_eps_is_told_of_as_that():
    """No preset has it: it is one's steps."""
    (message,) = check(FZOO, "lora", lr=1e-7, zo_eps=1e-2)
    assert "for which 0.001 is the nearest" in message
    assert "with zo_eps=0.01, where its steps are those of 1e-05 with zo_eps=0.0001;" in message


def test_the_published_lr_of_every_preset_is_not_warned_of():
    for preset in PRESETS:
        method = getattr(adamezo, preset.method)
        assert check(method, preset.scheme, lr=preset.lr) == []


def test_each_group_is_looked_at():
    model = adapt(make("llama"), "lora")
    groups = [{"params": [p], "lr": lr} for p, lr in zip(
        adapters_of(model).values(), (1e-4, 1e-8), strict=False)]  # fmt: skip
    with pytest.warns(UserWarning, match="lr=1e-08") as caught:
        check_lr(MeZO(groups), model)
    assert len(caught) == 1


# -- recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", RECIPES)
def test_a_recipe_makes_a_run(scheme):
    model = make("llama")
    if scheme != "none":
        adapt(model, scheme)
    recipe = RECIPES[scheme]
    optimizer = recipe.optimizer(model, lr=recipe.lr, seed=7)
    assert type(optimizer).__name__ == recipe.method
    (group,) = optimizer.param_groups
    trained = [p for p in group["params"] if p.requires_grad]
    assert len(trained) == sum(p.requires_grad for p in model.parameters())
    assert recipe.options.items() <= group.items()
    assert (group["seed"], group["lr"]) == (7, recipe.lr)
    scheduler = recipe.scheduler(optimizer, steps=4)
    rates = []
    for _ in range(4):
        rates.append(group["lr"])
        optimizer.step(lambda: sum(p.float().square().mean() for p in trained))
        scheduler.step()
    assert rates == pytest.approx([recipe.lr * share for share in (1, 0.75, 0.5, 0.25)])
    assert group["lr"] == pytest.approx(0, abs=1e-12 * recipe.lr)


def test_a_recipe_finds_its_lr():
    """So that it can be used on a model whose lr is not known."""
    for scheme in RECIPES:
        model = make("llama")
        if scheme != "none":
            adapt(model, scheme)
        optimizer = RECIPES[scheme].optimizer(model, lr=0.0, seed=0)
        assert optimizer.unit_length(optimizer.param_groups[0]) > 0


def test_options_of_a_recipe_may_be_changed():
    optimizer = RECIPES["none"].optimizer(make("llama"), lr=1e-3, zo_eps=1e-2, queries=4)
    (group,) = optimizer.param_groups
    assert (group["zo_eps"], group["queries"]) == (1e-2, 4)


def test_weights_in_bfloat16_want_more_than_a_recipe():
    model, wanted = make("llama").bfloat16(), dict(zo_eps=1e-2, perturbation="out_of_place")
    for missing in wanted:
        given = {name: value for name, value in wanted.items() if name != missing}
        with pytest.warns(
            UserWarning, match=r"Pass zo_eps=0\.01, perturbation='out_of_place'"
        ) as w:
            RECIPES["none"].optimizer(model, lr=1e-4, **given)
        assert [caught.filename for caught in w] == [__file__]
    adapters = adapt(model, "lora")  # in float32, as peft's are
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RECIPES["none"].optimizer(make("llama").bfloat16(), lr=1e-4, **wanted)
        RECIPES["lora"].optimizer(adapters, lr=1e-4)


def test_a_recipe_of_other_adapters_is_refused():
    model = adapt(make("llama"), "lora")
    with pytest.raises(ValueError, match=r"trains lora adapters, expected all weights.*\['lora'\]"):
        RECIPES["none"].optimizer(model, lr=1e-3)
    with pytest.raises(ValueError, match="trains all weights, expected lora adapters"):
        RECIPES["lora"].optimizer(make("llama"), lr=1e-3)


def test_pefts_lora_is_lora():
    peft = pytest.importorskip("peft")
    llama = make("llama")
    model = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert scheme_of(model) == "lora"


def test_pefts_other_adapters_are_not_all_weights():
    peft = pytest.importorskip("peft")
    of = {
        "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "prompt_tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }
    for scheme, config in of.items():
        model = peft.get_peft_model(make("llama"), config)
        assert scheme_of(model) == scheme
        told = rf"trains {scheme} adapters, expected all weights: there are recipes for \['none'"
        with pytest.raises(ValueError, match=told):
            RECIPES["none"].optimizer(model, lr=1e-3)


def test_a_part_with_adapters_is_found():
    model = nn.Sequential(adapt(make("llama"), "lora"), nn.Linear(2, 2))
    assert scheme_of(model) == "lora"


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_a_schedule_has_steps(steps):
    optimizer = RECIPES["none"].optimizer(make("llama"), lr=1e-3)
    with pytest.raises(ValueError, match=rf"steps: got {steps}, expected an integer"):
        RECIPES["none"].scheduler(optimizer, steps)
