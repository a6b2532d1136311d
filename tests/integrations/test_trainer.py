"""ZOTrainer: the real Trainer of transformers, on tiny models with real configurations."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import adamezo
from adamezo import AdaMeZO, AdaZeta, HiZOO, MeZO, ZOAdam, methods
from adamezo.runlog import LogError, StepLog, optimizer_for, read, replay

transformers = pytest.importorskip("transformers")

from adamezo.integrations import ZOTrainer, ZOTrainerMixin  # noqa: E402
from adamezo.integrations.accelerate import unwrapped  # noqa: E402
from helpers import families  # noqa: E402
from helpers.trainers import arguments, collate, rows, same, trainer, weights  # noqa: E402

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
            return sum(model(**batch, num_items_in_batch=items).loss for batch in micro)

        optimizer.step(closure)
    return weights(model)


def loader(folder, model=None, **changed):
    """The batches of the Trainer itself, over and over."""
    plain = trainer(folder, model, kind=transformers.Trainer, **changed)
    return itertools.chain.from_iterable(itertools.repeat(plain.get_train_dataloader()))


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


def test_auto_find_batch_size_halves_it_and_begins_again(tmp_path):
    """At the weights that it had: those are restored when a closure runs out of memory."""
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
    assert sizes[-4:] == [2] * 4
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


# --- checkpoints, resumed runs and logs -----------------------------------------------------------


class Stop(transformers.TrainerCallback):
    """Ends a run as a kill after a checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **objects):
        if state.global_step == self.step:
            raise KeyboardInterrupt


SAVED = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1,
         "lr_scheduler_type": "cosine"}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (AdaMeZO, {}),
        (MeZO, {"queries": 2}),
        (ZOAdam, {}),
        (AdaZeta, {"steps_per_epoch": 3, "exponent": 0.5}),
    ],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, method, options):
    def run(name: str, resume: bool = False, **own):
        torch.manual_seed(len(name))  # what the process had drawn before
        made = trainer(
            tmp_path / name, families.make("opt"), train_mode=True, step_log=StepLog,
            optimizer_cls_and_kwargs=(method, options), **SAVED, **own,
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", callbacks=[Stop(6)])
    assert read(tmp_path / "cut" / "steps.log").steps == 6
    resumed = run("cut", resume=True)
    assert same(weights(whole.model), weights(resumed.model))
    states = [unwrapped(x.optimizer).state_dict() for x in (whole, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    numbers = ("loss", "projected_grad", "learning_rate", "forward_passes", "skipped_steps", "step")
    histories = [
        [[entry.get(name) for name in numbers] for entry in x.state.log_history]
        for x in (whole, resumed)
    ]
    assert histories[0] == histories[1]
    logs = [(tmp_path / name / "steps.log").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_the_log_in_a_checkpoint_makes_base_weights_those_of_the_checkpoint(tmp_path):
    made = trainer(tmp_path, step_log=StepLog, **SAVED)
    made.train()
    for step in (4, 12):
        folder = tmp_path / f"checkpoint-{step}"
        log, base = read(folder / "steps.log"), families.make("llama")
        tensors = dict(base.named_parameters())
        assert replay(log, optimizer_for(log.header, tensors)) == step
        saved = type(base).from_pretrained(folder)
        assert same(weights(base), weights(saved))
    with pytest.raises(FileExistsError, match="steps.log is there already"):
        trainer(tmp_path, step_log=StepLog, **SAVED).train()


def test_a_log_follows_only_the_checkpoint_that_it_was_saved_with(tmp_path):
    made = trainer(tmp_path, step_log=StepLog, **SAVED)
    made.train()
    later, earlier = tmp_path / "checkpoint-12" / "steps.log", tmp_path / "checkpoint-4"
    (earlier / "steps.log").write_bytes(later.read_bytes())
    before = later.read_bytes()
    with pytest.raises(LogError, match="group 0 has taken 4 steps, at the end.*12"):
        trainer(tmp_path, step_log=StepLog, **SAVED).train(str(earlier))
    optimizer = AdaMeZO.for_model(families.make("llama"), zo_eps=0.01, seed=3)
    with pytest.raises(LogError, match="group 0 had zo_eps 0.001, here it is 0.01"):
        StepLog.follow(later, optimizer)
    assert later.read_bytes() == before
    (earlier / "steps.log").unlink()
    with pytest.raises(FileNotFoundError, match="of a run without step_log"):
        trainer(tmp_path, step_log=StepLog, **SAVED).train(str(earlier))


def test_a_log_of_a_model_with_batch_norm_that_evaluates_in_evaluation_mode(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))

        def forward(self, x, labels=None):
            logits = self.inner(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.full((4,), float(i)), "labels": i % 3} for i in range(12)]
    options = dict(max_steps=2, train_dataset=data, step_log=StepLog,
                   data_collator=transformers.default_data_collator)  # fmt: skip
    trainer(tmp_path / "eval", Net(), **options).train()
    assert read(tmp_path / "eval" / "steps.log").steps == 2
    with pytest.raises(LogError, match="running statistics of inner.1"):
        trainer(tmp_path / "train", Net(), train_mode=True, **options).train()


def test_counts_go_on_after_a_checkpoint_of_another_trainer(tmp_path):
    """Whose state knows nothing of ours."""
    trainer(tmp_path, **(SAVED | {"max_steps": 4})).train()
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"].pop("StepCounts")["args"]["forward_passes"] == 16
    path.write_text(json.dumps(state))
    made = trainer(tmp_path, **(SAVED | {"max_steps": 8}))
    made.train(resume_from_checkpoint=True)
    assert made.state.log_history[-1]["forward_passes"] == 16


def test_a_model_init_and_a_second_call_of_train(tmp_path):
    made = trainer(tmp_path, model_init=lambda: families.make("llama"), max_steps=3)
    ends = []
    for _ in range(2):
        made.train()
        ends.append(weights(made.model))
    assert same(*ends)  # each call begins anew


# --- generated text -------------------------------------------------------------------------------


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    vocabulary = {"<unk>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, families.VOCABULARY)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>"
    )


def test_the_score_of_generated_text_is_the_objective(tmp_path):
    calls = []

    def metric(predictions, references):
        calls.append((predictions, references))
        return [float(p.startswith("w7")) + len(p) / 100 for p in predictions]

    made = trainer(
        tmp_path, objective=metric, processing_class=tokenizer(), max_steps=2, logging_steps=1,
        optimizer_cls_and_kwargs=(MeZO, {"zo_eps": 0.1}),
    )  # fmt: skip
    made.train()
    predictions, references = calls[0]
    first = next(loader(tmp_path, processing_class=tokenizer()))
    labels = [row[row != -100] for row in first["labels"]]
    assert references == [" ".join(f"w{i}" for i in row.tolist()) for row in labels]
    assert max(len(p.split()) for p in predictions) <= max(map(len, labels))
    assert len(calls) == 2 * 2 * 2
    scores = [metric(*call) for call in calls[:2]]
    assert unwrapped(made.optimizer).losses != ()
    assert made.state.log_history[0]["loss"] <= 0
    assert len(scores[0]) == 2


def test_prompts_are_what_stands_before_the_answer(tmp_path):
    """A model that repeats its last token, so that what it read is seen."""
    from adamezo.integrations.objectives import GeneratedScore

    model, seen = families.make("llama"), {}

    def generate(input_ids, attention_mask, **options):
        seen.update(ids=input_ids, mask=attention_mask, options=options)
        return torch.cat([input_ids, input_ids[:, -1:].expand(-1, options["max_new_tokens"])], 1)

    model.generate = generate
    score = GeneratedScore("f1", tokenizer())
    inputs = {
        "input_ids": torch.tensor([[5, 6, 8, 8, 8], [9, 7, 1, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 6, 8, 8], [-100, 7, -100, -100, -100]]),
    }
    scores = score(model, inputs)
    assert seen["ids"].tolist() == [[5, 6], [1, 9]]
    assert seen["mask"].tolist() == [[1, 1], [0, 1]]
    assert seen["options"] == {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1}
    assert scores.tolist() == pytest.approx([2 / 6, 0.0])
    inputs["labels"][1] = -100
    with pytest.raises(ValueError, match="a row has no prompt or no reference"):
        score(model, inputs)


def test_an_objective_is_not_maximized_twice(tmp_path):
    made = trainer(
        tmp_path, objective="f1", processing_class=tokenizer(),
        optimizer_cls_and_kwargs=(MeZO, {"maximize": True}),
    )  # fmt: skip
    with pytest.raises(ValueError, match="maximize=True would unlearn it"):
        made.train()


def test_metrics():
    from adamezo.integrations.objectives import exact_match, f1

    predictions = ["The cat sat.", "a dog", "", "no"]
    references = ["cat sat on", "Dog", "", "yes"]
    assert f1(predictions, references) == pytest.approx([4 / 5, 1, 1, 0])
    assert exact_match(predictions, references) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("objective", "processing", "message"),
    [("rouge", True, "Invalid objective: 'rouge'.*f1"), ("f1", False, "processing_class=token")],
)
def test_objectives_that_are_refused(tmp_path, objective, processing, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, objective=objective, processing_class=tokenizer() if processing else None)


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


@pytest.mark.parametrize(
    ("processes", "gpus", "message"), [(2, 1, "got 2 processes"), (1, 2, "got 2 GPUs")]
)
def test_several_devices_are_refused(tmp_path, monkeypatch, processes, gpus, message):
    name = "create_accelerator_and_postprocess"
    original = getattr(transformers.Trainer, name)
    monkeypatch.setattr(transformers.Trainer, name, _with_processes(original, processes, gpus))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path)


def _with_processes(original, processes, gpus):
    def create(self):
        original(self)
        self.args._n_gpu = gpus

        class Several(type(self.accelerator)):
            num_processes = processes

        self.accelerator.__class__ = Several

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
