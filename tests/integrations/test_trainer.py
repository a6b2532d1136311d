"""ZOTrainer: the real Trainer of transformers, on tiny models with real configurations."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import adamezo
from adamezo import AdaMeZO, HiZOO, MeZO, ZOAdam, methods

transformers = pytest.importorskip("transformers")

from adamezo.integrations import ZOTrainer, ZOTrainerMixin  # noqa: E402
from adamezo.integrations.accelerate import unwrapped  # noqa: E402
from helpers import families  # noqa: E402
from helpers.trainers import arguments, collate, loader, rows, same, trainer, weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def by_hand(model, batches, optimizer, steps, accumulation=2, schedule=None, most=None):
    """The loop that a user would write: one step for each ``accumulation`` micro-batches."""
    model.eval()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1.0 if schedule is None else schedule(step))
        micro = list(itertools.islice(batches, accumulation))
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro)

        def closure(micro=micro, items=items):
            losses = [model(**batch, num_items_in_batch=items).loss for batch in micro]
            return sum(loss.double() for loss in losses)

        optimizer.step(closure)
    return weights(model)


OPTIONS = {
    "AdaMeZO": {"betas": (0.7, 0.9)}, "MeZO": {"queries": 2}, "FZOO": {"queries": 2},
    "AdaZeta": {"steps_per_epoch": 10, "exponent": 0.5}, "HELENE": {"curvature_every": 2},
}  # fmt: skip


@pytest.mark.parametrize("method", methods.__all__)
def test_steps_are_bitwise_those_of_a_loop_by_hand(tmp_path, method):
    kind, options = getattr(adamezo, method), OPTIONS.get(method, {})
    steps = 20 if method in ("AdaMeZO", "MeZO", "ZOAdam") else 6
    own = (kind, options)
    made = trainer(
        tmp_path, lr_scheduler_type="linear", max_steps=steps, optimizer_cls_and_kwargs=own
    )
    start = weights(made.model)
    made.train()
    model = families.make("llama")
    expected = by_hand(
        model, loader(tmp_path), kind.for_model(model, lr=1e-2, seed=3, **options), steps,
        schedule=lambda step: 1 - step / steps,
    )  # fmt: skip
    assert same(weights(made.model), expected)
    assert not same(start, expected)
    assert made.state.global_step == steps


def test_without_an_optimizer_it_is_adamezo_and_one_that_was_made_is_taken(tmp_path):
    made = trainer(tmp_path, max_steps=3)
    made.train()
    optimizer = unwrapped(made.optimizer)
    assert type(optimizer) is AdaMeZO
    assert (optimizer.param_groups[0]["seed"], optimizer.model is made.model) == (3, True)
    model = families.make("llama")
    given = AdaMeZO.for_model(model, lr=1e-2, seed=3)
    other = trainer(tmp_path, model, optimizers=(given, None), max_steps=3)
    other.train()
    assert unwrapped(other.optimizer) is given
    assert same(weights(model), weights(made.model))


def test_weight_decay_spares_biases_and_norms_as_in_the_trainer(tmp_path):
    made = trainer(tmp_path, weight_decay=0.5, max_steps=2)
    made.train()
    decayed, others = unwrapped(made.optimizer).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert all("norm" in name for name in others["param_names"])
    assert not any("norm" in name for name in decayed["param_names"])
    count = len(decayed["params"]) + len(others["params"])
    assert count == len(list(made.model.parameters()))


# --- accumulation -------------------------------------------------------------------------------


def test_an_accumulation_is_one_step_on_the_loss_of_all_its_rows(tmp_path):
    """Weighted by their tokens, of which the micro-batches have different numbers."""
    losses = []
    for size, accumulation in ((8, 1), (2, 4)):
        made = trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            max_steps=1, logging_steps=1,
        )  # fmt: skip
        made.train()
        optimizer = unwrapped(made.optimizer)
        assert optimizer.param_groups[0]["steps"] == 1
        losses.append(torch.tensor(optimizer.losses))
        assert made.state.log_history[-1]["forward_passes"] == 2 * accumulation
    # Sums of 40 float32 terms of size 4 in another order: some units of 2^-24 of them.
    torch.testing.assert_close(*losses, rtol=2e-6, atol=0)


def test_a_loss_function_of_the_users_is_divided_where_the_trainer_divides(tmp_path):
    """A mean of each micro-batch is averaged over them, a sum over all items is not."""

    class Own(ZOTrainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return torch.tensor(3.0)

    made = trainer(tmp_path, kind=Own, max_steps=1)
    made.train()
    assert unwrapped(made.optimizer).losses == (3.0, 3.0)
    made = trainer(
        tmp_path, max_steps=1, compute_loss_func=lambda outputs, labels, **_: torch.tensor(3.0)
    )
    made.train()
    assert unwrapped(made.optimizer).losses == (6.0, 6.0)


def test_memory_is_that_of_one_micro_batch(tmp_path):
    """The forwards of an accumulation run one after the other: never two batches in one."""
    seen = []
    model = families.make("llama")
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer(tmp_path, model, max_steps=2, gradient_accumulation_steps=4).train()
    assert seen == [2] * (2 * 2 * 4)


# --- what the Trainer does around the steps ------------------------------------------------------


def test_what_is_logged(tmp_path):
    made = trainer(tmp_path, max_steps=4, logging_steps=2, optimizer_cls_and_kwargs=(MeZO, {}))
    made.train()
    first, second, end = made.state.log_history
    optimizer = unwrapped(made.optimizer)
    assert second["projected_grad"] == optimizer.measured[0]
    assert (first["forward_passes"], second["forward_passes"]) == (8, 16)
    assert (second["skipped_steps"], end["forward_passes"]) == (0, 16)
    assert "grad_norm" not in second
    assert 3 < first["loss"] < 6  # of a vocabulary of 50, and wide initial weights


def test_several_directions_are_logged_as_their_root_mean_square(tmp_path):
    made = trainer(
        tmp_path, max_steps=1, logging_steps=1, optimizer_cls_and_kwargs=(MeZO, {"queries": 3})
    )
    made.train()
    measured = torch.tensor(unwrapped(made.optimizer).measured, dtype=torch.float64)
    logged = made.state.log_history[0]["projected_grad"]
    assert logged == pytest.approx(measured.square().mean().sqrt().item(), rel=1e-12)


@pytest.mark.filterwarnings("ignore:the losses of a step were")
def test_skipped_steps_are_counted_and_leave_the_weights(tmp_path):
    calls = itertools.count()

    def broken(outputs, labels, **_):
        return outputs.logits.mean() * (float("nan") if next(calls) % 8 < 4 else 1.0)

    made = trainer(tmp_path, max_steps=4, logging_steps=1, compute_loss_func=broken)
    made.train()
    assert [x["skipped_steps"] for x in made.state.log_history[:4]] == [1, 1, 2, 2]
    assert unwrapped(made.optimizer).param_groups[0]["steps"] == 2


def test_the_projected_gradient_is_clipped(tmp_path):
    free = trainer(tmp_path, max_steps=1, optimizer_cls_and_kwargs=(MeZO, {}))
    free.train()
    p = unwrapped(free.optimizer).measured[0]
    assert abs(p) > 0.1
    for kind in (MeZO, HiZOO, ZOAdam):
        made = trainer(
            tmp_path, max_steps=3, logging_steps=1, max_projected_grad=0.1,
            optimizer_cls_and_kwargs=(kind, {}),
        )  # fmt: skip
        made.train()
        # A difference of two float64 losses of size 4 over 2e-3: 2^-52 * 4 / 2e-3 = 4e-13 of it.
        assert abs(unwrapped(made.optimizer).measured[0]) <= 0.1 * (1 + 1e-11)
        # Logged as the Trainer logs the norm of a gradient: as it was before.
        assert abs(made.state.log_history[0]["projected_grad"]) > 0.1
    wide = trainer(
        tmp_path, max_steps=1, max_projected_grad=abs(p) * 2, optimizer_cls_and_kwargs=(MeZO, {})
    )
    wide.train()
    assert unwrapped(wide.optimizer).measured[0] == p
    with pytest.raises(ValueError, match="Invalid max_projected_grad: 0"):
        trainer(tmp_path, max_projected_grad=0)


@pytest.mark.filterwarnings("ignore:the losses of a step were")
def test_clipping_does_not_hide_a_loss_that_is_infinite(tmp_path):
    calls = itertools.count()

    def broken(outputs, labels, **_):
        return outputs.logits.mean() + (float("inf") if next(calls) == 2 else 0.0)

    made = trainer(tmp_path, max_steps=2, max_projected_grad=0.1, compute_loss_func=broken)
    made.train()
    assert made.state.log_history[-1]["skipped_steps"] == 1


def test_evaluation_schedules_callbacks_and_early_stopping(tmp_path):
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **objects):
            seen.append((state.global_step, objects["optimizer"].param_groups[0]["lr"]))

    stop = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    made = trainer(
        tmp_path, max_steps=12, eval_strategy="steps", eval_steps=1, eval_dataset=rows(4),
        metric_for_best_model="eval_loss", save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, greater_is_better=True, callbacks=[stop, Watch()],
        lr_scheduler_type="linear", learning_rate=1e-3,
    )  # fmt: skip
    made.train()
    evaluated = [x["eval_loss"] for x in made.state.log_history if "eval_loss" in x]
    best = max(evaluated)
    assert made.state.best_metric == best
    assert len(evaluated) == evaluated.index(best) + 3 < 12  # two more, and it stopped
    assert [step for step, _ in seen] == list(range(1, len(evaluated) + 1))
    assert seen[1][1] == pytest.approx(1e-3 * 10 / 12)
    assert made.evaluate()["eval_loss"] == best  # the best weights are loaded


def test_label_smoothing_is_the_trainers(tmp_path):
    made = trainer(tmp_path, max_steps=1, label_smoothing_factor=0.3, learning_rate=0.0)
    made.train()
    plain = trainer(tmp_path, kind=transformers.Trainer, max_steps=1, label_smoothing_factor=0.3)
    batches = list(itertools.islice(loader(tmp_path), 2))
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    with torch.no_grad():
        expected = sum(
            plain.compute_loss(plain.model.eval(), dict(b), num_items_in_batch=items)
            for b in batches
        )
    plus, minus = unwrapped(made.optimizer).losses
    # The mean of both sides differs from the middle by the curvature times zo_eps^2 = 1e-6.
    assert (plus + minus) / 2 == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
def test_bf16_computes_in_bfloat16_on_float32_weights(tmp_path, perturbation):
    types = set()
    model = families.make("llama")
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: types.add(output.dtype)
    )
    made = trainer(
        tmp_path, model, max_steps=3, bf16=True,
        optimizer_cls_and_kwargs=(AdaMeZO, {"zo_eps": 0.05, "perturbation": perturbation}),
    )  # fmt: skip
    start = weights(model)
    made.train()
    assert types == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    optimizer = unwrapped(made.optimizer)
    assert optimizer.losses[0] != optimizer.losses[1]  # no cast of a weight was kept between them
    assert not same(start, weights(model))


def test_bfloat16_weights(tmp_path):
    model = families.make("llama").bfloat16()
    made = trainer(
        tmp_path, model, max_steps=3,
        optimizer_cls_and_kwargs=(AdaMeZO, {"perturbation": "out_of_place"}),
    )  # fmt: skip
    start = weights(model)
    made.train()
    assert not same(start, weights(model))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow
        ),
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": False},
        {"auto_find_batch_size": True},
        {"eval_on_start": True, "eval_dataset": rows(4)},
    ],
    ids=lambda changed: next(iter(changed)),
)
@pytest.mark.filterwarnings("ignore")
def test_what_changes_no_bit(tmp_path, changed):
    ends = []
    for extra in ({}, changed):
        made = trainer(tmp_path, max_steps=3, **extra)
        made.train()
        ends.append(weights(made.model))
    assert same(*ends)


def test_auto_find_batch_size_lowers_it_and_begins_again(tmp_path):
    """At the weights that it had: those are restored when a closure runs out of memory. How far
    down it goes is accelerate's affair."""
    model = families.make("llama")
    start, sizes = weights(model), []

    def full(module, args, kwargs):
        size = len(kwargs["input_ids"])
        sizes.append(size)
        if size > 2:
            assert not same(start, weights(model))  # perturbed
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    hook = model.register_forward_pre_hook(full, with_kwargs=True)
    made = trainer(
        tmp_path, model, per_device_train_batch_size=3, auto_find_batch_size=True, max_steps=2,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    made.train()
    hook.remove()
    assert sizes[0] == 3
    assert sizes[-4:] == [min(sizes)] * 4 < [3] * 4
    assert unwrapped(made.optimizer).param_groups[0]["steps"] == 2


def test_modules_are_in_evaluation_mode_but_for_the_models_own_flag(tmp_path):
    model = families.make("opt")
    modes = []
    model.model.decoder.register_forward_pre_hook(
        lambda module, args: modes.append((model.training, module.training))
    )
    made = trainer(tmp_path, model, max_steps=1, learning_rate=0.0)
    made.train()
    assert set(modes) == {(True, False)}
    assert all(module.training for module in model.modules())
    modes.clear()
    losses = unwrapped(made.optimizer).losses
    other = trainer(tmp_path, model, max_steps=1, learning_rate=0.0, train_mode=True)
    other.train()
    assert set(modes) == {(True, True)}
    assert unwrapped(other.optimizer).losses != losses


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, TypeError, "SGD, which needs grad"),
        ({"optim": "adafactor"}, ValueError, "optim='adafactor' names an optimizer that needs"),
        ({"neftune_noise_alpha": 5.0}, ValueError, "pass train_mode=True"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(tmp_path, changed, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, **changed)


def test_fp16_is_refused_before_a_scaler_is_made(tmp_path):
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(ValueError, match="GradScaler refuses steps with a closure"):
        ZOTrainer(families.make("llama"), args, train_dataset=rows(), data_collator=collate)


PARALLEL = SimpleNamespace(sp_backend=None, sp_enabled=False)  # what the Trainer looks at


@pytest.mark.parametrize(
    ("accelerator", "gpus", "changed", "message"),
    [
        ({"num_processes": 2, "distributed_type": "FSDP"}, 1, {}, "got 2 processes of the kind FS"),
        ({"num_processes": 2, "distributed_type": "DEEPSPEED"}, 1, {}, "kind DEEPSPEED: expected"),
        (
            {"num_processes": 2, "distributed_type": "MULTI_GPU", "parallelism_config": PARALLEL},
            1, {}, "kind MULTI_GPU and a model in pieces",
        ),
        ({"mixed_precision": "fp16"}, 1, {}, "GradScaler refuses steps with a closure"),
        (
            {"num_processes": 2, "distributed_type": "MULTI_CPU"}, 1,
            {"accelerator_config": {"even_batches": False}}, "set dataloader_drop_last=True",
        ),
        ({}, 2, {}, "got 2 GPUs"),
    ],
)  # fmt: skip
def test_launches_that_cannot_work_are_refused(
    tmp_path, monkeypatch, accelerator, gpus, changed, message
):
    name = "create_accelerator_and_postprocess"
    original = getattr(transformers.Trainer, name)
    monkeypatch.setattr(transformers.Trainer, name, _launched(original, accelerator, gpus))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changed)


def test_processes_that_accelerate_does_not_see_are_refused(tmp_path, monkeypatch):
    """Without a GPU and use_cpu each would train a model of its own, all into one folder."""
    args = arguments(tmp_path)
    assert args.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started.*pass use_cpu=True"):
        ZOTrainer(families.make("llama"), args, train_dataset=rows(), data_collator=collate)


def _launched(original, accelerator, gpus):
    kinds = transformers.trainer.DistributedType
    seen = {k: kinds(v) if k == "distributed_type" else v for k, v in accelerator.items()}

    def create(self):
        original(self)
        self.args._n_gpu = gpus
        self.accelerator.__class__ = type("Launched", (type(self.accelerator),), seen)

    return create


def test_it_is_mixed_into_any_trainer(tmp_path):
    class Seq2Seq(ZOTrainerMixin, transformers.Seq2SeqTrainer):
        pass

    made = trainer(
        tmp_path, kind=lambda args, **k: Seq2Seq(
            args=arguments(tmp_path, transformers.Seq2SeqTrainingArguments, max_steps=2), **k
        )
    )  # fmt: skip
    start = weights(made.model)
    made.train()
    assert not same(start, weights(made.model))


@pytest.mark.slow
def test_the_main_jobs_model(tmp_path):
    """SmolLM2-135M on the demo's reviews: two steps, bit for bit those of a loop by hand."""
    from adamezo.finetune import read_examples
    from adamezo.integrations import transformers as language_models
    from examples.demo import REVIEWS, smollm2

    examples = read_examples(REVIEWS)[:16]
    model, tokenizer = language_models.load(smollm2())
    texts = [f"{example.text} It was {example.label}" for example in examples]
    data = [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts).input_ids]
    options = dict(
        max_steps=2, train_dataset=data, learning_rate=1e-2, per_device_train_batch_size=4,
        logging_steps=1,
    )  # fmt: skip
    made = trainer(tmp_path, model, **options)
    made.train()
    other = language_models.load(smollm2())[0]
    batches = loader(tmp_path, model=other, **options)
    expected = by_hand(other, batches, AdaMeZO.for_model(other, lr=1e-2, seed=3), 2,
                       schedule=lambda step: 1 - step / 2)  # fmt: skip
    assert same(weights(model), expected)
    assert made.state.log_history[1]["loss"] > 0


def test_integrations_has_no_other_names():
    from adamezo import integrations

    with pytest.raises(AttributeError, match="no attribute 'ZOTrainr'"):
        _ = integrations.ZOTrainr
    assert Path(integrations.__file__).parent.name == "integrations"
