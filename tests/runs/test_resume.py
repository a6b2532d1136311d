"""A run that is stopped and goes on is the run that was not stopped, to the bit."""

from __future__ import annotations

import copy
import io
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import stress as attacks
from adamezo import AdaMeZO
from adamezo.integrations import transformers as language_models
from adamezo.runlog import read
from helpers.backends import needs_native
from helpers.jobs import llama
from stress import loss_of, same_bits, small, values

STEPS = 12
CASES = {
    "plain": {},
    "all options": {
        "betas": (0.5, 0.8),
        "normalization": "bias_corrected",
        "weight_decay": 0.1,
        "warmup_lr": 1e-4,
        "maximize": True,
        "rounding": "nearest",
    },
    "exact perturbation": {"perturbation": "out_of_place"},
    "signs": {"distribution": "rademacher", "horizon": 9},
}


def make(**options) -> tuple[nn.Module, AdaMeZO, torch.optim.lr_scheduler.LRScheduler]:
    model = small()
    named = list(model.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "lr": 3e-3, "horizon": 3}]
    optimizer = AdaMeZO(groups, model=model, **{**attacks.OPTIONS, "horizon": 5, **options})
    return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)


def train(run, steps: range) -> None:
    """One step in the middle of all is skipped, and one fails."""
    model, optimizer, schedule = run
    for step in steps:
        if step == 5:
            optimizer.skipped = 0  # it warns but once
            with pytest.warns(RuntimeWarning, match="skipped"):
                optimizer.step(lambda: math.nan)
        else:
            optimizer.step(loss_of(model))
        schedule.step()


def through_torch_save(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_safetensors_and_json(state):
    weights, optimizer, schedule = state
    assert not optimizer["state"]  # there are no tensors in it
    text = json.dumps([optimizer["param_groups"], schedule])
    groups, schedule = json.loads(text)
    return load(save(weights)), {"state": {}, "param_groups": groups}, schedule


WAYS = {
    "in memory": copy.deepcopy,
    "torch.save": through_torch_save,
    "safetensors and JSON": through_safetensors_and_json,
}


@pytest.fixture(scope="module")
def whole():
    """The end of each uninterrupted run."""
    ends = {}
    for name, options in CASES.items():
        run = make(**options)
        train(run, range(STEPS))
        ends[name] = values(run[0])
    return ends


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_stopped_at_any_step(case, way, whole):
    for stop in range(STEPS + 1):
        first = make(**CASES[case])
        train(first, range(stop))
        state = WAYS[way]([part.state_dict() for part in first])
        second = make(**CASES[case])
        for part, saved in zip(second, state, strict=True):
            part.load_state_dict(saved)
        train(second, range(stop, STEPS))
        assert same_bits(values(second[0]), whole[case]), stop


@needs_native
@pytest.mark.parametrize("case", CASES)
def test_stopped_on_one_backend_and_resumed_on_the_other(case, whole):
    for native_first in (True, False):
        first = make(**CASES[case], fused=None if native_first else False)
        train(first, range(6))
        state = copy.deepcopy([part.state_dict() for part in first])
        for group in state[1]["param_groups"]:
            group["fused"] = False if native_first else None
        second = make(**CASES[case])
        for part, saved in zip(second, state, strict=True):
            part.load_state_dict(saved)
        train(second, range(6, STEPS))
        assert same_bits(values(second[0]), whole[case])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_through_a_distributed_checkpoint_on_disk(case, flatten, whole, tmp_path):
    """Single process. It finds parameters by their names in the model, and on the way calls
    ``step()`` without a closure to make the optimizer's state."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as states

    options = states.StateDictOptions(flatten_optimizer_state_dict=flatten)
    first = make(**CASES[case])
    train(first, range(6))
    model_state, optimizer_state = states.get_state_dict(first[0], first[1], options=options)
    checkpoint.save(
        {"model": model_state, "optimizer": optimizer_state, "schedule": first[2].state_dict()},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    second = make(**CASES[case])
    with torch.no_grad():
        for p in second[0].parameters():
            p.zero_()
    model_state, optimizer_state = states.get_state_dict(second[0], second[1], options=options)
    loaded = {"model": model_state, "optimizer": optimizer_state}
    loaded["schedule"] = second[2].state_dict()
    checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    states.set_state_dict(
        second[0],
        second[1],
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )
    second[2].load_state_dict(loaded["schedule"])
    assert attacks.history(second[1]) == attacks.history(first[1])
    train(second, range(6, STEPS))
    assert same_bits(values(second[0]), whole[case])


def test_the_state_is_plain():
    model, optimizer, _ = make()
    train((model, optimizer, _), range(4))

    def plain(value) -> bool:
        if isinstance(value, dict):
            return all(type(key) is str and plain(item) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    state = optimizer.state_dict()
    assert state["state"] == {}
    assert all(map(plain, state["param_groups"]))
    assert state["param_groups"][0]["stream_version"] == 1
    assert state["param_groups"][0]["method"] == "AdaMeZO"


@pytest.mark.slow
def test_a_killed_job_ends_where_the_other_ends(tmp_path, tokenizer):
    """SIGKILL, three times; `python -m tests.stress kills` does it fifty times."""
    model = llama()
    base = tmp_path / "base"
    words = tokenizer
    words.add_tokens(["terrible"])
    language_models.save(model, words, base)
    seen = attacks.kills(3, base, tmp_path, steps=40, seed=2)
    assert seen.total() == 3
    assert read(tmp_path / "killed.log").steps == 40
    shutil.rmtree(tmp_path / "out")
