"""``adamezo finetune --adapt`` and ``adamezo replay``: runs that train adapters alone."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from adamezo import cli, finetune
from adamezo.adapters import SCHEMES, adapt, adapters_of, load_adapters
from adamezo.integrations import transformers as language_models
from adamezo.runlog import LogError, read, replay_file
from helpers.jobs import WORDS, options

LR = 1e-2


@pytest.fixture
def run(model_folder, data_file):
    return lambda **changed: options(model_folder, data_file, **{"lr": LR, **changed})


@pytest.mark.parametrize("way", ["inplace", "out_of_place"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_trains_and_saves_adapters_alone(run, model_folder, tmp_path, scheme, way):
    folder = tmp_path / "adapters"
    chosen = run(adapt=scheme, perturbation=way, save_to=str(folder))
    report = finetune.finetune(chosen)
    base, tokenizer = language_models.load(model_folder)
    untouched = {name: p.clone() for name, p in base.named_parameters()}
    adapted = adapt(language_models.load(model_folder)[0], scheme, seed=0)
    count = sum(p.numel() for p in adapters_of(adapted).values())
    assert report["model"]["trained"] == count
    load_adapters(base, folder)
    scorer = language_models.LabelScorer(base, tokenizer, chosen.template, WORDS)
    examples = finetune.read_examples(chosen.data, tuple(WORDS))
    held_out = finetune.Classification(scorer, finetune.split(examples, chosen.held_out)[1])
    summary = held_out.evaluate(2 * chosen.batch_size).summary()
    assert summary == report["after"]  # the same batches, so the same bits
    assert report["before"] != report["after"]
    now = [p for name, p in base.named_parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(untouched.values(), now, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_killed_run_goes_on_and_replays_to_the_same_adapters(
    run, model_folder, tmp_path, scheme, dtype
):
    log = str(tmp_path / "run.log")
    whole = run(adapt=scheme, dtype=dtype, save_to=str(tmp_path / "whole"))
    finetune.finetune(whole)
    finetune.finetune(replace(whole, steps=2, log=log, save_to=None))
    finetune.finetune(replace(whole, log=log, save_to=str(tmp_path / "resumed")))
    expected = load_file(tmp_path / "whole" / "adapters.safetensors")

    def same(file):
        found = load_file(file)
        return found.keys() == expected.keys() and all(
            torch.equal(found[name], tensor) for name, tensor in expected.items()
        )

    assert same(tmp_path / "resumed" / "adapters.safetensors")
    # Replayed on the base model, to a folder and to a file: the log says which adapters.
    assert cli.main(["replay", str(model_folder), log, "--out", str(tmp_path / "again")]) == 0
    assert same(tmp_path / "again" / "adapters.safetensors")
    descriptions = [(tmp_path / f / "adapters.json").read_text() for f in ("again", "whole")]
    assert descriptions[0] == descriptions[1]
    assert replay_file(model_folder, log, tmp_path / "again.safetensors") == 4
    assert same(tmp_path / "again.safetensors")


def test_a_log_goes_on_with_its_own_adapters_alone(run, tmp_path):
    log = str(tmp_path / "run.log")
    finetune.finetune(run(adapt="tensor-train", steps=1, log=log))
    with pytest.raises(LogError, match="of another run"):
        finetune.finetune(run(adapt="lora", log=log))
    with pytest.raises(LogError, match="of another run"):
        finetune.finetune(run(log=log))


def test_a_log_without_adapters_has_the_header_that_it_always_had(run, tmp_path):
    """So that a run of an earlier version goes on."""
    log = tmp_path / "run.log"
    finetune.finetune(run(steps=1, log=str(log), lr=1e-4))
    assert "adapt" not in read(log).header.run


def test_the_command_takes_adapters(model_folder, data_file, tmp_path, capsys):
    arguments = [
        *("finetune", "--model", str(model_folder), "--data", str(data_file)),
        *("--label-words", *(f"{k}={v}" for k, v in WORDS.items())),
        *("--held-out", "10", "--steps", "1", "--batch-size", "4", "--device", "cpu"),
        *("--lr", "1e-2", "--adapt", "tensor-train", "--output", str(tmp_path / "out")),
    ]
    assert cli.main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["options"]["adapt"] == "tensor-train"
    assert report["model"]["trained"] < report["model"]["parameters"]
    with pytest.raises(SystemExit):
        cli.main([*arguments[:-4], "--adapt", "dora"])
    assert "'tensor-train', 'tensor-train-linear', 'lora', 'prefix'" in capsys.readouterr().err


def test_an_lr_of_another_scheme_is_warned_of(run):
    with pytest.warns(UserWarning, match=r"AdaMeZO has lr=1e-05 on lora adapters.*factor of 1000"):
        finetune.finetune(run(adapt="lora", lr=1e-5, steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finetune.finetune(run(lr=1e-5, steps=1))
        finetune.finetune(run(adapt="lora", lr=1e-2, steps=1))
