"""``adamezo finetune --find-lr``: the lr of a run, found before its first step."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from adamezo import cli, finetune
from adamezo.finetune import run
from adamezo.runlog import read
from helpers.command import arguments
from helpers.jobs import options


@pytest.fixture
def finding(model_folder, data_file):
    return replace(options(model_folder, data_file), lr=None, find_lr=True)


def test_it_is_the_run_with_that_lr(finding):
    found = finetune.finetune(finding)
    lr = found["options"]["lr"]
    assert 1e-4 < lr < 1
    given = finetune.finetune(replace(finding, lr=lr, find_lr=False))
    assert found["curve"] == given["curve"]
    assert found["training"]["forward_passes_to_find_lr"] >= 28
    assert given["training"]["forward_passes_to_find_lr"] == 0
    assert found["after"] == given["after"]
    assert found["after"] != found["before"]


@pytest.mark.parametrize("method", ["FZOO", "GRZO", "MEAZO", "ScalarAdaMeZO", "ZOAdam"])
def test_methods_that_divide_by_the_size_of_p_have_one(finding, method):
    more = {"examples": 4} if method == "GRZO" else {}
    perturbation = "regenerated" if method == "GRZO" else "inplace"
    given = replace(finding, method=method, method_option=more, perturbation=perturbation)
    assert finetune.finetune(given)["options"]["lr"] > 0


def test_a_run_that_goes_on_keeps_what_was_found(finding, tmp_path, monkeypatch):
    whole = replace(finding, log=str(tmp_path / "whole.log"), steps=5)
    parts = replace(finding, log=str(tmp_path / "parts.log"), steps=2)
    end = finetune.finetune(whole)
    finetune.finetune(parts)

    def never(*given):
        raise AssertionError("it has an lr")

    monkeypatch.setattr(run, "find_lr", never)
    went_on = finetune.finetune(replace(parts, steps=5))
    assert went_on["after"] == end["after"]
    assert went_on["options"]["lr"] == read(whole.log).header.run["lr"]
    # With the number in place of the option too.
    with_number = replace(parts, steps=6, lr=went_on["options"]["lr"], find_lr=False)
    assert finetune.finetune(with_number)["training"]["replayed"] == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "MeZO"}, "--find-lr: MeZO .* steps as long as .* give an --lr"),
        ({"betas": (0.9, 0.0)}, "--find-lr: AdaMeZO with these options"),
        ({"lr": 1e-3}, "--find-lr: there is an lr, 0.001: expected one of the two"),
        ({"method_option": {"lr": 0.5}}, "--find-lr: there is an lr, 0.5: expected one of the two"),
    ],
)
def test_what_has_no_lr_to_be_found_is_refused(finding, changed, message):
    with pytest.raises(ValueError, match=message):
        finetune.finetune(replace(finding, **changed))


def test_the_command_says_what_it_found(model_folder, data_file, tmp_path, capsys):
    given = arguments(model_folder, data_file, tmp_path)
    place = given.index("--lr")
    given[place : place + 2] = ["--find-lr"]
    assert cli.main(given) == 0
    said = capsys.readouterr()
    lr = json.loads((tmp_path / "report.json").read_text())["options"]["lr"]
    assert f"lr: {lr:.3g}, found in " in said.out + said.err
    assert re.search(r"forward passes and \d+ to find the lr, no backward", said.out)
    assert "takes its default" not in said.out + said.err
