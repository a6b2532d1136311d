"""HELENE's curvature of labels that the model draws itself, in a ZOTrainer."""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch

from adamezo import HELENE
from adamezo.integrations.accelerate import unwrapped
from adamezo.runlog import StepLog, read
from helpers import families
from helpers.trainers import loader, same, trainer, weights

transformers = pytest.importorskip("transformers")

from adamezo.integrations.sampled import draw_labels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SAMPLED = {"curvature": "sampled", "curvature_every": 2}
HEADS = transformers.RobertaConfig(**families.SIZES, max_position_embeddings=34, num_labels=3)


def labelled(batch):
    """One label of each row, for a classification head."""
    ids = torch.tensor([row["input_ids"][:5] for row in batch])
    return {"input_ids": ids, "labels": ids[:, 3] % 2}


def tagged(batch):
    """A label of each token but the first."""
    ids = torch.tensor([row["input_ids"][:5] for row in batch])
    labels = ids % 3
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels}


def token_head():
    torch.manual_seed(0)
    return transformers.RobertaForTokenClassification(HEADS).eval()


MODELS = {
    "causal": (lambda: families.make("llama"), {}),
    "rows": (lambda: families.make("roberta"), {"data_collator": labelled}),
    "tokens": (token_head, {"data_collator": tagged}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_steps_are_bitwise_those_of_a_loop_by_hand(tmp_path, kind):
    make, own = MODELS[kind]
    made = trainer(
        tmp_path, make(), max_steps=4, lr_scheduler_type="constant", logging_steps=1,
        optimizer_cls_and_kwargs=(HELENE, SAMPLED), **own,
    )  # fmt: skip
    made.train()
    model = make()
    model.eval()
    optimizer = HELENE.for_model(model, lr=1e-2, seed=3, **SAMPLED)
    batches = loader(tmp_path, make(), **own)
    measured = []
    for step in range(4):
        micro = list(itertools.islice(batches, 2))
        shift = 1 if kind == "causal" else 0
        places = [b["labels"][:, shift:] if shift else b["labels"] for b in micro]
        items = sum((labels != -100).sum() for labels in places)

        def summed(batches, items=items):
            return sum(model(**b, num_items_in_batch=items).loss.double() for b in batches)

        drawn = []
        for i, batch in enumerate(micro):
            seed = zlib.crc32(repr((3, step, i)).encode())
            with torch.no_grad():
                drawn.append(draw_labels(model.loss_type, model, batch, seed))
        optimizer.step(lambda: summed(micro), lambda: summed(drawn))  # noqa: B023
        measured.append(optimizer.measured)
    assert same(weights(made.model), weights(model))
    assert [p_hat != 0 for _, p_hat in measured] == [True, False] * 2
    assert any(p != p_hat for p, p_hat in measured[::2])  # a head may draw the labels themselves
    logged = made.state.log_history[:4]
    assert [entry["projected_grad"] for entry in logged] == [p for p, _ in measured]
    # Two evaluations of two micro-batches; of the sampled labels as many, and their predictions.
    assert [entry["forward_passes"] for entry in logged] == [10, 14, 24, 28]


def predicted(logits: torch.Tensor):
    return lambda **inputs: {"logits": logits}


@pytest.mark.parametrize("kind", ["ForCausalLM", "ForSequenceClassification"])
def test_labels_are_drawn_as_the_model_predicts_them(kind):
    rows, chances = 20000, torch.tensor([0.1, 0.6, 0.3])
    logits = chances.log().expand(rows, 3)
    labels = torch.zeros(rows, dtype=torch.long)
    if kind == "ForCausalLM":
        wrong = torch.full((1, 3), 50.0)  # of the last token, which predicts no label
        logits = torch.cat([logits, wrong])[None]
        labels = torch.zeros(1, rows + 1, dtype=torch.long)
    drawn = draw_labels(kind, predicted(logits), {"labels": labels}, seed=1)["labels"]
    assert drawn.shape == labels.shape
    assert drawn.reshape(-1)[0] in (0, 1, 2)
    found = (drawn.reshape(-1)[-rows:].bincount(minlength=3) / rows).tolist()
    for share, chance in zip(found, chances.tolist(), strict=True):
        # Five standard deviations of a share.
        assert abs(share - chance) < 5 * (chance * (1 - chance) / rows) ** 0.5
    again = draw_labels(kind, predicted(logits), {"labels": labels}, seed=1)["labels"]
    other = draw_labels(kind, predicted(logits), {"labels": labels}, seed=2)["labels"]
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


def test_places_without_a_label_and_the_first_token_stay():
    labels = torch.tensor([[7, -100, 1, 1], [7, 1, -100, -100]])
    logits = torch.zeros(2, 4, 5)
    logits[..., 4] = 100.0  # sure of 4
    seen = []

    def forward(**inputs):
        seen.append(sorted(inputs))
        return {"logits": logits}

    inputs = {"input_ids": labels.clamp(min=0), "labels": labels}
    drawn = draw_labels("ForCausalLM", forward, inputs, seed=0)
    assert drawn["labels"].tolist() == [[7, -100, 4, 4], [7, 4, -100, -100]]
    assert seen == [["input_ids"]]
    assert labels[0].tolist() == [7, -100, 1, 1]
    unlabelled = {"labels": torch.full((2, 4), -100)}
    assert draw_labels("ForCausalLM", forward, unlabelled, seed=0)["labels"].eq(-100).all()
    logits[0, 1] = float("nan")
    assert draw_labels("ForCausalLM", forward, inputs, seed=0)["labels"][1, 1] == 4


@pytest.mark.parametrize(
    ("kind", "inputs", "logits", "said"),
    [
        ("ForMaskedLM", {"labels": torch.zeros(2, 3).long()}, (2, 3, 5), "kind ForMaskedLM"),
        (None, {"labels": torch.zeros(2).long()}, (2, 5), "a loss of the kind None"),
        ("ForSequenceClassification", {"labels": torch.zeros(2)}, (2, 1), "got float32 labels of"),
        ("ForTokenClassification", {"labels": torch.zeros(2).long()}, (2, 1), r"\(2, 1\) of pre"),
        ("ForSequenceClassification", {}, (2, 3), "got no labels"),
        (
            "ForCausalLM", {"labels": torch.zeros(2, 3).long(), "shift_labels": 0}, (2, 3, 5),
            "and shift_labels",
        ),
    ],
)  # fmt: skip
def test_losses_whose_labels_cannot_be_drawn_are_refused(kind, inputs, logits, said):
    with pytest.raises(ValueError, match=f"takes a causal model or a classification.*{said}"):
        draw_labels(kind, predicted(torch.zeros(logits)), inputs, seed=0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor makes it another one"),
        ({"compute_loss_func": lambda *a, **k: None}, "compute_loss_func makes it another one"),
        ({"objective": "f1"}, "an objective makes it another one"),
    ],
)
def test_other_losses_than_the_likelihood_are_refused(tmp_path, changed, said):
    with pytest.raises(ValueError, match=f"curvature='sampled' needs.*{said}"):
        trainer(tmp_path, optimizer_cls_and_kwargs=(HELENE, SAMPLED), **changed)
    optimizer = HELENE.for_model(model := families.make("llama"), **SAMPLED)
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, model, optimizers=(optimizer, None), **changed)


def test_slopes_are_clipped_and_logged_for_each_loss_by_itself(tmp_path):
    own = dict(max_steps=1, logging_steps=1, optimizer_cls_and_kwargs=(HELENE, SAMPLED))
    free = trainer(tmp_path, **own)
    free.train()
    p, p_hat = unwrapped(free.optimizer).measured
    assert min(abs(p), abs(p_hat)) > 0.1
    clipped = trainer(tmp_path, max_projected_grad=0.1, **own)
    clipped.train()
    # A difference of two float64 losses of size 4 over 2e-3: 2^-52 * 4 / 2e-3 = 4e-13 of it.
    for slope in unwrapped(clipped.optimizer).measured:
        assert abs(slope) == pytest.approx(0.1, rel=1e-11)
    assert clipped.state.log_history[0]["projected_grad"] == p


def test_a_resumed_run_draws_the_same_labels(tmp_path):
    own = dict(
        max_steps=6, save_strategy="steps", save_steps=3, step_log=StepLog, train_mode=True,
        optimizer_cls_and_kwargs=(HELENE, SAMPLED),
    )  # fmt: skip
    ends = []
    for resume in (False, str(tmp_path / "checkpoint-3")):
        made = trainer(tmp_path, families.make("opt"), **own)
        made.train(resume_from_checkpoint=resume)
        ends.append((weights(made.model), (tmp_path / "steps.log").read_bytes()))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert len(read(tmp_path / "steps.log").records) == 6
