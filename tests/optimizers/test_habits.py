"""What users of torch do by habit: it works, or it is told what to do instead."""

from __future__ import annotations

import copy
import gc
import io
import json
import warnings
import weakref
from fractions import Fraction
from importlib import metadata

import numpy as np
import pytest
import torch
from torch import nn

import adamezo
import adamezo.engine.optimizer
from adamezo import (
    HELENE,
    AdaMeZO,
    AdaZeta,
    HiZOO,
    MeZO,
    ZOAdam,
    ZOAdaMU,
    check_closure,
    fused_adamezo_step,
)

INPUTS = torch.linspace(-1, 1, 24).view(4, 6)


def make_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))


def loss_of(model: nn.Module):
    return lambda: model(INPUTS).square().mean()


def copies(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_loss_in_the_place_of_a_closure():
    model = make_model()
    optimizer, before = AdaMeZO.for_model(model, lr=0.1), copies(model)
    with pytest.raises(TypeError, match="step takes a closure.*got Tensor: pass a function"):
        optimizer.step(loss_of(model)())
    with pytest.raises(TypeError, match="in this order; got function and AdaMeZO"):
        check_closure(loss_of(model), optimizer)
    assert same(copies(model), before)


# --- step() without a closure -------------------------------------------------------------------


def test_backpropagation_is_told_once_that_nothing_is_trained():
    model = make_model()
    optimizer, before = AdaMeZO.for_model(model, lr=0.1), copies(model)
    loss_of(model)().backward()
    with pytest.warns(UserWarning, match="without a closure and did nothing.*step\\(closure\\)"):
        assert optimizer.step() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert same(copies(model), before)
    assert optimizer.param_groups[0]["steps"] == 0


def test_the_warning_is_of_the_line_that_calls_step():
    model = make_model()
    for optimizer in (AdaMeZO.for_model(model), HELENE.for_model(model)):
        loss_of(model)().backward()
        with pytest.warns(UserWarning, match="did nothing") as caught:
            optimizer.step()
        assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_without_gradients_or_with_lr_0_nothing_is_said():
    model = make_model()
    optimizer = AdaMeZO.for_model(model, lr=0.1)
    optimizer.step()
    loss_of(model)().backward()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0)  # as torch's checkpoints initialize state
    optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_trainer_of_transformers_is_told(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    before = copies(model)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        ),
        train_dataset=rows,
        optimizers=(AdaMeZO(model.parameters(), lr=0.1), None),
    )
    with pytest.warns(UserWarning, match=r"are not trained.*transformers\.Trainer.*ZOTrainer"):
        trainer.train()
    assert same(copies(model), before)


# --- nothing to train ---------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
def test_frozen_parameters_are_named_once(perturbation):
    model = make_model().requires_grad_(False)
    optimizer = AdaMeZO.for_model(model, perturbation=perturbation)
    with pytest.warns(UserWarning, match=r"frozen or empty \(0\.weight, 0\.bias, 1\.weight and 1"):
        optimizer.step(loss_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(loss_of(model))
        trained = make_model()
        AdaMeZO.for_model(trained).step(loss_of(trained))


def test_only_empty_parameters():
    optimizer = AdaMeZO([nn.Parameter(torch.empty(0, 3))])
    with pytest.warns(UserWarning, match="moves nothing.*parameter 0 of group 0"):
        optimizer.step(lambda: 1.0)


# --- numbers of other libraries -----------------------------------------------------------------

NUMBERS = {
    "numpy": (np.int64, np.float64),
    "small numpy": (np.int16, np.float32),
    "arrays": (np.array, np.array),
    "fractions": (int, Fraction),
    "tensors": (torch.tensor, torch.tensor),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_options_become_plain_numbers(kind, tmp_path):
    integer, real = NUMBERS[kind]
    made = [
        AdaMeZO(
            [nn.Parameter(torch.ones(3))],
            lr=0.5,
            betas=(real(0.5), real(0.25)),
            eps=real(0.5),
            zo_eps=real(0.125),
            horizon=integer(5),
            weight_decay=real(0.25),
            max_skipped=integer(7),
            seed=integer(9),
        ),
        MeZO([nn.Parameter(torch.ones(3))], queries=integer(2), linear_over=integer(4)),
        AdaZeta([nn.Parameter(torch.ones(3))], steps_per_epoch=integer(2), exponent=real(0.5)),
        HiZOO([nn.Parameter(torch.ones(3))], alpha=real(0.5)),
        HELENE([nn.Parameter(torch.ones(3))], batch_size=integer(2), gamma=real(0.5)),
        ZOAdam([nn.Parameter(torch.ones(3))], eps=real(0.5)),
        ZOAdaMU([nn.Parameter(torch.ones(3))], warmup=integer(3), anneal=integer(5)),
    ]
    for optimizer in made:
        if kind != "tensors":  # a tensor lr stays one
            optimizer.param_groups[0]["lr"] = real(0.25)
        optimizer.step(lambda p=optimizer.param_groups[0]["params"][0]: p.sum())
        state = optimizer.state_dict()
        if kind != "tensors":
            assert type(state["param_groups"][0]["lr"]) is float
        assert json.loads(json.dumps(state["param_groups"]))
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        optimizer.load_state_dict(loaded)
    group = made[0].param_groups[0]
    assert (group["horizon"], group["seed"], group["betas"]) == (5, 9, (0.5, 0.25))
    assert type(group["horizon"]) is type(group["seed"]) is int
    assert {type(made[0].defaults[n]) for n in ("eps", "zo_eps", "weight_decay")} == {float}


def test_numbers_that_are_set_in_a_group_later():
    """In float32 the projected gradient would have other bits."""
    ends = []
    for zo_eps in (0.001, np.float64(0.001), np.array(0.001)):
        model = make_model()
        optimizer = AdaMeZO.for_model(model, lr=0.01, seed=1)
        optimizer.param_groups[0]["zo_eps"] = zo_eps
        optimizer.step(loss_of(model))
        assert type(optimizer.projected_grad) is float
        ends.append(copies(model))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_schedulers_may_compute_with_numpy():
    model = make_model()
    optimizer = AdaMeZO.for_model(model, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(1 / (1 + step)))
    optimizer.step(loss_of(model))
    schedule.step()
    assert type(optimizer.state_dict()["param_groups"][0]["lr"]) is float


@pytest.mark.parametrize("truth", [True, False, np.True_, torch.tensor(True)])
def test_truth_values_are_no_counts(truth):
    p = [nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="Invalid seed: (True|False)"):
        AdaMeZO(p, seed=truth)
    with pytest.raises(ValueError, match="Invalid horizon: (True|False)"):
        AdaMeZO(p, horizon=truth)
    with pytest.raises(ValueError, match="Invalid max_skipped: (True|False)"):
        AdaMeZO(p, max_skipped=truth)
    with pytest.raises(ValueError, match="Invalid queries: (True|False)"):
        MeZO(p, queries=truth)


@pytest.mark.parametrize(
    "number",
    [np.float32(2), np.float16(2), np.float64(2), np.int64(2), np.uint8(2), np.array(2.0), 2,
     np.array(2), Fraction(4, 2), torch.tensor(2), torch.tensor([2], dtype=torch.uint8)],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')}",
)  # fmt: skip
def test_losses_that_are_numbers(number):
    optimizer = AdaMeZO([nn.Parameter(torch.ones(3))])
    result = optimizer.step(lambda: number)
    assert result == 2
    assert result.is_floating_point()
    assert optimizer.losses == (2.0, 2.0)
    assert {type(loss) for loss in optimizer.losses} == {float}


# --- what a closure returns ---------------------------------------------------------------------


class Output:
    def __init__(self, loss) -> None:
        self.loss = loss


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("wrap", [Output, lambda loss: {"loss": loss, "logits": torch.ones(3)}])
def test_the_loss_of_an_output(wrap, capturable):
    ends = []
    for around in (wrap, lambda loss: loss):
        model = make_model()
        optimizer = AdaMeZO.for_model(model, lr=0.01, seed=1, capturable=capturable)
        for _ in range(2):
            optimizer.step(lambda m=model, f=around: f(loss_of(m)()))
        ends.append(copies(model))
    assert same(*ends)


def test_the_loss_of_a_model_of_transformers():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    optimizer = AdaMeZO([nn.Parameter(torch.ones(3))])
    result = outputs.CausalLMOutput(loss=torch.tensor(2.0), logits=torch.ones(1, 2))
    assert optimizer.step(lambda: result) == 2
    with pytest.raises(ValueError, match="got a CausalLMOutput without a loss.*`labels`"):
        optimizer.step(lambda: outputs.CausalLMOutput(logits=torch.ones(1, 2)))


EXPECTED = "the closure must return the loss as one real number"


@pytest.mark.parametrize(
    ("loss", "error", "what"),
    [
        (torch.tensor(1.0).to_sparse(), ValueError, "a tensor of layout torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(1)]), ValueError, "a tensor that is nested"),
        (torch.tensor(1.0).to(torch.float8_e4m3fn), TypeError, "dtype torch.float8_e4m3fn"),
        (torch.tensor(True), TypeError, "dtype torch.bool"),
        (torch.ones(2), ValueError, r"shape \(2,\)"),
        (torch.ones((), device="meta"), ValueError, "meta device"),
        (10**400, ValueError, "an int beyond float64"),
        (True, TypeError, "got bool"),
        (np.True_, TypeError, "got bool"),
        (np.ones(2), TypeError, "got ndarray"),
        (1j, TypeError, "got complex"),
        ("1.0", TypeError, "got str"),
        (None, TypeError, "got NoneType: does it lack a `return`"),
        ({"loss": None}, ValueError, "a dict without a loss"),
        ({"logits": torch.ones(2)}, ValueError, "a dict without a loss"),
        ({"loss": torch.ones(2)}, ValueError, r"shape \(2,\)"),
        ((torch.ones(()), torch.ones(2)), TypeError, "got tuple"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_all_other_results_are_refused_in_one_form(loss, error, what):
    model = make_model()
    optimizer = AdaMeZO.for_model(model, lr=0.1, perturbation="out_of_place")
    before = copies(model)
    with pytest.raises(error, match=rf"{EXPECTED}.*{what}"):
        optimizer.step(lambda: loss)
    assert same(copies(model), before)


# --- names ----------------------------------------------------------------------------------------


def test_the_version():
    assert adamezo.__version__ == metadata.version("adamezo")


def test_a_model_in_the_place_of_parameters():
    model = make_model()
    for method in (AdaMeZO, MeZO, ZOAdam):
        with pytest.raises(TypeError, match=rf"a Sequential.*parameters\(\).*{method.__name__}\.f"):
            method(model)


# --- inference mode -------------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
@pytest.mark.parametrize("method", [AdaMeZO, ZOAdam])
@pytest.mark.parametrize("where", ["nowhere", "around steps", "around the model", "everywhere"])
def test_inference_mode_changes_nothing(method, perturbation, where):
    def run(where: str) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        with torch.inference_mode(where in ("around the model", "everywhere")):
            model = make_model()
            optimizer = method.for_model(model, lr=0.01, seed=1, perturbation=perturbation)
        with torch.inference_mode(where in ("around steps", "everywhere")):
            for _ in range(3):
                optimizer.step(loss_of(model))
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step(loss_of(model))
        return copies(model), optimizer

    weights, optimizer = run(where)
    assert same(weights, run("nowhere")[0])
    kept = [t for state in optimizer.state.values() for t in state.values()]
    assert not any(t.is_inference() for t in kept)
    assert bool(kept) == (method is ZOAdam)


# --- CUDA graphs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [AdaMeZO, ZOAdam])
@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
def test_what_a_graph_uses_lives_as_long_as_the_optimizer(method, perturbation, monkeypatch):
    """The bookkeeping, on the host: a graph would go on to read and write these addresses."""
    model, late = make_model(), nn.Parameter(torch.ones(2))
    optimizer = method.for_model(model, lr=0.01, capturable=True, perturbation=perturbation)
    optimizer.step(loss_of(model))
    state = copy.deepcopy(optimizer.state_dict())
    monkeypatch.setattr(adamezo.engine.optimizer, "is_capturing", lambda device: True)
    optimizer.step(loss_of(model))
    monkeypatch.undo()
    used = [
        *(group.terms.words for group in optimizer._device.groups),
        *(group.steps for group in optimizer._device.groups),
        optimizer._device._next,
        optimizer.skipped,
        *(t for kept in optimizer.state.values() for t in kept.values()),
        *(launch.table for plan in optimizer.plans() for launch in plan.launches),
    ]
    alive = [weakref.ref(t) for t in used]
    del used
    with pytest.raises(RuntimeError, match="captured a step.*new optimizer.*capture again"):
        optimizer.load_state_dict(state)
    optimizer.param_groups[0]["weight_decay"] = 0.5  # the numbers are made anew
    optimizer.add_param_group({"params": [("late", late)]})  # and the plans
    for buffers in optimizer.state.values():
        buffers.clear()
    gc.collect()
    assert all(t() is not None for t in alive)
    other = method.for_model(model, lr=0.01, capturable=True, perturbation=perturbation)
    other.load_state_dict(state)
    del optimizer
    gc.collect()
    assert not any(t() is not None for t in alive)


def test_copies_and_the_function_are_not_affected_by_a_capture(monkeypatch):
    model = make_model()
    fused_adamezo_step(model, loss_of(model), capturable=True)
    optimizer = adamezo.optimizer_of(model)
    monkeypatch.setattr(adamezo.engine.optimizer, "is_capturing", lambda device: True)
    optimizer.step(loss_of(model))
    monkeypatch.undo()
    clone = copy.deepcopy(optimizer)
    clone.load_state_dict(optimizer.state_dict())
