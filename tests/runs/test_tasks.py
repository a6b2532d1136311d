"""The kinds of tasks on a tiny model: their losses are those of plain formulas, and they learn."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from adamezo import finetune, methods
from adamezo.engine.batched import PerturbedBatch
from adamezo.finetune import TASKS, Options, report
from adamezo.integrations import transformers as language_models
from adamezo.runlog import LogError, read
from helpers.jobs import TEMPLATE, llama, make_tokenizer, options

CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
WORDS = "user assistant : . <end> good bad dull fun film plot acting a the very not It was".split()


@pytest.fixture
def chatty(tokenizer):
    """A tokenizer with a chat template and a token that ends a text."""
    tokenizer.add_tokens(WORDS)
    tokenizer.eos_token = "<end>"
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def model(chatty):
    made = llama()
    made.resize_token_embeddings(len(chatty), mean_resizing=False)
    return made


@pytest.fixture
def folder(tmp_path, model, chatty):
    language_models.save(model, chatty, tmp_path / "chatty")
    return tmp_path / "chatty"


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


DATA = {
    "classification": [
        {"text": f"{'not ' * (i % 3)}{word} film {i}", "label": label}
        for i in range(15)
        for word, label in (("dull", "negative"), ("fun", "positive"))
    ],
    "lm": [{"text": f"{'very ' * (i % 5)}dull film {i} It was bad"} for i in range(30)],
    "instruct": [
        {"prompt": f"film {'very ' * (i % 4)}{i}", "completion": "dull plot"} for i in range(30)
    ],
    "multiple-choice": [
        {"text": f"film {i} It was", "choices": ["bad", "very good"][: 2 + i % 2], "label": "bad"}
        for i in range(30)
    ],
}


@pytest.fixture
def job(folder, tmp_path):
    def made(task, **changed):
        settings = dict(
            model=str(folder), data=lines(tmp_path / f"{task}.jsonl", DATA[task]), task=task,
            held_out=6, steps=4, batch_size=4, lr=1e-2, device="cpu", show=2, sample_tokens=3,
        )  # fmt: skip
        if task == "classification":
            settings["label_words"] = {"negative": "very bad", "positive": "good"}
        return Options(**(settings | changed))

    return made


def log_probs(model, tokenizer, before, after):
    """Of each token of ``after``, by one forward without padding."""
    texts = before, before + after
    given, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return torch.stack([logits[i - 1, whole[i]] for i in range(len(given), len(whole))])


def task_of(options, model, tokenizer):
    kind = TASKS[options.task]
    examples = kind.read(options, finetune.read_table(options.data))
    return kind.make(kind.resolved(options, examples), model, tokenizer)(examples)


# Scores are of order 1 to 10; a batch changes the order of float32 sums of a few dozen terms.
CLOSE = dict(rtol=1e-5, atol=1e-5)


def test_label_words_of_several_tokens_are_scored_by_all_of_them(job, model, chatty):
    task = task_of(job("classification"), model, chatty)
    rows = [0, 5, 9]
    scores = torch.stack([
        torch.stack([
            log_probs(model, chatty, f"{task.examples[row].text} It was", word).sum()
            for word in (" very bad", " good")
        ])
        for row in rows
    ])  # fmt: skip
    expected = torch.nn.functional.cross_entropy(scores, task.targets[rows])
    torch.testing.assert_close(task.loss(rows), expected, **CLOSE)
    assert task.targets[rows].unique().numel() == 2


def test_choices_are_scored_by_the_mean_of_their_tokens(job, model, chatty):
    task = task_of(job("multiple-choice"), model, chatty)
    losses = []
    for row in (1, 2):
        text, choices, right = task.examples[row]
        scores = [log_probs(model, chatty, text, " " + choice).mean() for choice in choices]
        losses.append(-torch.stack(scores).log_softmax(0)[right])
    torch.testing.assert_close(task.loss([1, 2]), torch.stack(losses).mean(), **CLOSE)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("template", ["auto", "none"])
def test_the_loss_of_instructions_is_that_of_the_completions_tokens(
    job, model, chatty, loss_on, template
):
    task = task_of(job("instruct", loss_on=loss_on, chat_template=template), model, chatty)
    found = []
    for row in (0, 3):
        prompt = task.examples[row].text
        if template == "auto":
            before, after = f"user : {prompt} . assistant : ", "dull plot . "
        else:
            before, after = f"{prompt}\n", "dull plot<end>"
        if loss_on == "all":
            first = before.split(" ")[0]
            before, after = first, before[len(first) :] + after
        found.append(log_probs(model, chatty, before, after))
    # The mean over tokens, and not over texts.
    assert len(found[0]) != len(found[1]) or loss_on == "completion"
    torch.testing.assert_close(task.loss([0, 3]), -torch.cat(found).mean(), **CLOSE)
    measured = task.measure([0, 3])
    assert measured.weights.tolist() == [len(part) for part in found]
    torch.testing.assert_close(measured.losses, torch.stack([-p.mean() for p in found]), **CLOSE)


def test_language_modelling_predicts_every_token_of_every_piece(job, model, chatty):
    task = task_of(job("lm", max_tokens=5), model, chatty)
    ids = [token for row in task.rows[:2] for token in row.ids]
    assert ids[:4] == chatty(DATA["lm"][0]["text"]).input_ids[:4]
    assert all(len(row.ids) <= 5 and row.targets == len(row.ids) - 1 for row in task.rows)
    with torch.no_grad():
        logits = model(torch.tensor([task.rows[0].ids])).logits[0].log_softmax(-1)
    expected = -torch.stack([logits[i, t] for i, t in enumerate(task.rows[0].ids[1:])]).mean()
    torch.testing.assert_close(task.loss([0]), expected, **CLOSE)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_of_perturbations_has_the_loss_of_each(job, model, chatty, task):
    made = task_of(job(task), model, chatty)
    alone = made.loss([0, 1, 4])
    together = made.losses([0, 1, 4], PerturbedBatch(3))
    torch.testing.assert_close(together, alone.expand(3), **CLOSE)
    assert alone > 0


def test_a_long_text_keeps_its_completion_and_the_end_of_its_prompt(job, model, chatty, tmp_path):
    rows = [{"prompt": "a " * 30 + "film", "completion": "dull plot"}] * 2
    data = lines(tmp_path / "long.jsonl", rows)
    made = task_of(job("instruct", data=data, max_tokens=8, chat_template="none"), model, chatty)
    assert chatty.decode(made.rows[0].ids) == "a a a a film dull plot <end>"
    assert made.shortened == 2
    made = task_of(job("instruct", data=data, max_tokens=2, chat_template="none"), model, chatty)
    assert chatty.decode(made.rows[0].ids) == "film dull"


@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_each_task_learns_resumes_and_reports(job, tmp_path, task):
    """A model of random weights learns an answer that is always the same."""
    log = str(tmp_path / "run.log")
    chosen = job(task, steps=30, lr=3e-3, batch_size=12, save_to=str(tmp_path / "whole"))
    whole = finetune.finetune(chosen)
    assert whole["after"]["loss"] < whole["before"]["loss"]
    if task != "classification":
        assert whole["after"]["accuracy"] >= whole["before"]["accuracy"]
    finetune.finetune(replace(chosen, steps=12, log=log, save_to=None))
    resumed = finetune.finetune(replace(chosen, log=log, save_to=None))
    assert resumed["training"]["replayed"] == 12
    assert resumed["after"] == whole["after"]
    assert resumed["examples"] == whole["examples"]
    again = finetune.finetune(replace(chosen, model=str(tmp_path / "whole"), steps=1, save_to=None))
    assert again["before"] == whole["after"]
    text = report.text(whole)
    assert f"{whole['after']['loss']:.3f}" in text
    assert ("of tokens" in text) == (task in ("lm", "instruct"))
    first = whole["examples"][0]
    assert first["text"]
    assert first["before"].keys() == first["after"].keys()


def test_another_prompt_or_data_of_a_task_does_not_go_on(job, tmp_path):
    chosen = job("instruct", steps=2, log=str(tmp_path / "log"))
    finetune.finetune(chosen)
    with pytest.raises(LogError, match="training texts was"):
        finetune.finetune(replace(chosen, chat_template="none"))
    texts = lines(tmp_path / "other.jsonl", DATA["lm"])
    with pytest.raises(LogError, match="task was 'instruct'"):
        finetune.finetune(replace(chosen, task="lm", data=texts))
    rows = [{"question": r["prompt"], "answer": r["completion"]} for r in DATA["instruct"]]
    named = dict(prompt_column="question", completion_column="answer")
    data = lines(tmp_path / "named.jsonl", rows)
    assert finetune.finetune(replace(chosen, data=data, **named))["curve"] == []


def test_conversations_are_examples(job, model, chatty, tmp_path):
    turns = [("user", "film"), ("assistant", "bad"), ("user", "plot"), ("assistant", "good")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]}] * 2
    made = task_of(job("instruct", data=lines(tmp_path / "m.jsonl", rows)), model, chatty)
    assert chatty.decode(made.rows[0].ids[-made.rows[0].targets :]) == "good ."
    assert chatty.decode(made.rows[0].ids).startswith("user : film . assistant : bad . user : plot")


BAD = {
    "no choices": (
        "multiple-choice",
        [{"text": "a", "choices": "x", "label": "x"}],
        "line 1: got the choices 'x', expected a list of two texts or more; name a column",
    ),
    "none of the choices": (
        "multiple-choice",
        [{"text": "a", "choices": ["x", "y"], "label": 1}],
        r"line 1: got the label 1, expected one of the choices \['x', 'y'\]; where labels are",
    ),
    "no completion": (
        "instruct",
        [{"prompt": "a", "output": "b"}],
        "expected one named 'completion', or name the column with --completion-column",
    ),
    "the user has the last word": (
        "instruct",
        [{"messages": [{"role": "user", "content": "a"}]}],
        "line 1: got the messages .* the last of the role assistant",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_a_task_cannot_use_are_refused_before_a_model_is_loaded(job, tmp_path, case):
    task, rows, message = BAD[case]
    chosen = job(task, data=lines(tmp_path / "bad.jsonl", rows * 3), model="none such")
    with pytest.raises(ValueError, match=message):
        finetune.finetune(chosen)


@pytest.mark.parametrize(
    ("kind", "label", "right"),
    [("text", "y", 1), ("index", 1, 1), ("index", "0", 0), ("letter", "b", 1), ("letter", "A", 0)],
)
def test_labels_of_choices(tmp_path, kind, label, right):
    rows = [{"text": "q", "a": "x", "b": "y", "label": label}] * 2
    chosen = Options("m", lines(tmp_path / "d.jsonl", rows), "multiple-choice", label_is=kind)
    chosen = replace(chosen, choice_columns=("a", "b"))
    questions = TASKS["multiple-choice"].read(chosen, finetune.read_table(chosen.data))
    assert questions[0] == ("q", ("x", "y"), right)


@pytest.mark.parametrize(("kind", "label"), [("index", 2), ("index", "-1"), ("letter", "C")])
def test_a_label_beyond_the_choices_is_refused(tmp_path, kind, label):
    rows = [{"text": "q", "choices": ["x", "y"], "label": label}] * 2
    chosen = Options("m", lines(tmp_path / "d.jsonl", rows), "multiple-choice", label_is=kind)
    with pytest.raises(ValueError, match="expected (0 to 1|A to B), as there are 2 choices"):
        TASKS["multiple-choice"].read(chosen, finetune.read_table(chosen.data))


# -- methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods.__all__)
def test_every_method_runs_and_goes_on_from_its_log_or_checkpoint(
    model_folder, data_file, tmp_path, method
):
    chosen = options(
        model_folder, data_file, method=method, lr=1e-4, held_out=4, show=0,
        log=str(tmp_path / "log"), save_to=str(tmp_path / "a"),
    )  # fmt: skip
    whole = finetune.finetune(replace(chosen, log=str(tmp_path / "whole")))
    finetune.finetune(replace(chosen, steps=2, checkpoint_every=1, save_to=None))
    saved = (tmp_path / "log.checkpoint").stat().st_size
    resumed = finetune.finetune(replace(chosen, save_to=str(tmp_path / "b")))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert resumed["training"]["replayed"] == 2
    assert saved > 0
    assert (tmp_path / "log").read_bytes() == (tmp_path / "whole").read_bytes()
    run = read(tmp_path / "log").header.run
    assert run.get("method", "AdaMeZO") == method
    assert whole["options"]["lr"] == 1e-4


def test_from_a_checkpoint_only_later_steps_are_replayed(
    model_folder, data_file, tmp_path, monkeypatch
):
    chosen = options(
        model_folder, data_file, log=str(tmp_path / "log"), save_to=str(tmp_path / "a")
    )
    finetune.finetune(replace(chosen, steps=3, checkpoint_every=2))
    replayed = []
    real = methods.AdaMeZO.replay
    monkeypatch.setattr(
        methods.AdaMeZO, "replay", lambda self, record: replayed.append(1) or real(self, record)
    )
    finetune.finetune(chosen)
    assert len(replayed) == 1
    # One of another log is left out: everything is replayed.
    (tmp_path / "log.checkpoint").rename(tmp_path / "other.checkpoint")
    other = replace(chosen, log=str(tmp_path / "other"), seed=5)
    kept = (tmp_path / "other.checkpoint").read_bytes()
    (tmp_path / "other.checkpoint").unlink()
    finetune.finetune(replace(other, steps=2))
    (tmp_path / "other.checkpoint").write_bytes(kept)
    replayed.clear()
    finetune.finetune(other)
    assert len(replayed) == 2
    (tmp_path / "other.checkpoint").write_bytes(kept[:100])
    with pytest.raises(ValueError, match=r"other\.checkpoint: not a checkpoint, or damaged"):
        finetune.finetune(other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "MeZO", "horizon": 3}, "--horizon: MeZO has no such option, expected some of"),
        ({"method_option": {"queries": 2}}, "--method-option queries: AdaMeZO has no such option"),
        ({"method": "MeZO", "method_option": {"queries": "two"}}, "Invalid queries: 'two'"),
        ({"method": "Adam"}, "--method: got 'Adam', expected one of"),
        ({"method_option": {"lr": 1.0}}, "--method-option lr: it is given by its own option too"),
        ({"perturbation": "sideways"}, "Invalid perturbation: 'sideways'"),
        ({"steps": 0}, "--steps: got 0, expected an integer of at least 1"),
        ({"checkpoint_every": 2}, "--checkpoint-every needs --log"),
        ({"device": "abacus"}, "--device: got 'abacus'"),
    ],
)
def test_an_option_that_cannot_be_used_says_why(model_folder, data_file, changed, message):
    with pytest.raises(ValueError, match=message):
        finetune.finetune(options(model_folder, data_file, **changed))


def test_the_options_of_a_method_reach_it_and_the_report(model_folder, data_file):
    chosen = options(model_folder, data_file, method="MeZO", method_option={"queries": 3}, lr=1e-4)
    found = finetune.finetune(chosen)
    assert found["training"]["forward_passes"] == 4 * 6
    assert found["options"]["zo_eps"] == 1e-3
    assert found["options"]["horizon"] is None
    regenerated = replace(chosen, perturbation="regenerated", distribution="lowrank")
    # The first batch of perturbations is compared with each of them alone.
    assert finetune.finetune(regenerated)["training"]["forward_passes"] == 4 * 6 + 6


def test_a_default_hold_out_is_a_fifth_and_that_of_a_log_if_there_is_one(
    model_folder, data_file, tmp_path
):
    log = str(tmp_path / "log")
    chosen = options(model_folder, data_file, held_out=None, steps=1)
    assert finetune.finetune(chosen)["data"]["held_out"] == 8
    finetune.finetune(replace(chosen, held_out=11, log=log))
    assert finetune.finetune(replace(chosen, log=log))["data"]["held_out"] == 11


def test_the_header_of_a_run_of_an_earlier_version_is_that_of_today(
    model_folder, data_file, tmp_path
):
    """Its names and values, written down: a run that began then goes on."""
    chosen = options(model_folder, data_file, steps=1, log=str(tmp_path / "log"))
    finetune.finetune(chosen)
    run = read(tmp_path / "log").header.run
    assert len(run.pop("training texts")) == 64
    assert run == {
        "template": TEMPLATE, "label_words": {"negative": "terrible", "positive": "great"},
        "held_out": 10, "batch_size": 4, "max_tokens": 256, "lr": 1e-3, "lr_schedule": "constant",
        "zo_eps": 1e-3, "horizon": 10, "betas": [0.7, 0.9], "normalization": "paper",
        "warmup_lr": None, "weight_decay": 0.0, "distribution": "exact", "perturbation": "inplace",
        "rounding": "stochastic", "seed": 0, "dtype": "float32",
    }  # fmt: skip


def test_a_tokenizer_without_a_chat_template_joins_plain_texts(job, model):
    plain = make_tokenizer()
    made = task_of(job("instruct"), model, plain)
    assert plain.decode(made.rows[0].ids) == "film <unk> dull plot"
