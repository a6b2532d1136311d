"""ZOTrainer's runs: checkpoints, resumed runs, logs, and scores of generated text as objective."""

from __future__ import annotations

import json

import pytest
import torch

from adamezo import AdaMeZO, AdaZeta, MeZO, ZOAdam
from adamezo.integrations.accelerate import unwrapped
from adamezo.runlog import LogError, StepLog, optimizer_for, read, replay
from helpers import families
from helpers.trainers import loader, same, trainer, weights

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


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
