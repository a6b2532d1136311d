"""integrations.transformers.losses: a model's own loss for each perturbation of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adamezo import FZOO, PerturbedBatch, batched
from helpers import many_families as families

transformers = pytest.importorskip("transformers")
from adamezo.integrations.transformers import losses  # noqa: E402  # after the skip

IDS = families.IDS
MASK = torch.ones_like(IDS)
MASK[0, 6:] = MASK[2, 4:] = 0
NEXT = torch.where(MASK.bool(), IDS, -100)
"""Labels of texts, whose padding is ignored."""
NEXT[:, :2] = -100  # and their prompts
MASKED = torch.full_like(IDS, -100)
MASKED[0, 3], MASKED[1, 2], MASKED[1, 5], MASKED[2, 1] = 7, 8, 9, 10

_BERT = families.FAMILIES["BertForSequenceClassification"]
_TEXT = {"input_ids": IDS, "attention_mask": MASK}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {}, {**_TEXT, "labels": NEXT}),
    "llama": ("LlamaForCausalLM", {}, {**_TEXT, "labels": NEXT}),
    "opt": ("OPTForCausalLM", {}, {**_TEXT, "labels": NEXT}),
    "bloom": ("BloomForCausalLM", {}, {**_TEXT, "labels": NEXT}),
    "masked": ("BertForMaskedLM", _BERT, {**_TEXT, "labels": MASKED}),
    "bart": ("BartForConditionalGeneration", {}, {**_TEXT, "labels": NEXT}),
    "one label": ("RobertaForSequenceClassification", {}, {**_TEXT, "labels": families.LABELS}),
    "llama's label": (
        "LlamaForSequenceClassification",
        {**families.FAMILIES["LlamaForCausalLM"], "pad_token_id": 0},
        {**_TEXT, "labels": families.LABELS},
    ),
    "several labels": (
        "BertForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {**_TEXT, "labels": torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])},
    ),
    "regression": (
        "DistilBertForSequenceClassification",
        {"num_labels": 1},
        {**_TEXT, "labels": torch.tensor([0.5, -1.0, 2.0])},
    ),
    "tokens": ("BertForTokenClassification", _BERT, {**_TEXT, "labels": NEXT.clamp(max=1)}),
    "answers": (
        "BertForQuestionAnswering",
        _BERT,
        {
            **_TEXT,
            "start_positions": torch.tensor([1, 2, 0]),
            "end_positions": torch.tensor([3, 4, 1]),
        },
    ),
    "image": (
        "ViTForImageClassification",
        {},
        {"pixel_values": families.IMAGES, "labels": families.LABELS},
    ),
}  # fmt: skip


def build(name: str, more: dict[str, Any]) -> nn.Module:
    kind = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(kind.config_class(**{**families.FAMILIES.get(name, {}), **more})).eval()


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_the_models_own(case, chunks):
    """Of each perturbation, evaluated alone by ``model(**inputs).loss``: sums of a few hundred
    float32 numbers in another order, within 2^-18 of their value as in test_regenerated.py. The
    perturbations differ by more than 2^-13."""
    name, more, inputs = CASES[case]
    found = {}
    for kind in ("alone", "batched"):
        model = build(name, more)
        optimizer = FZOO.for_model(
            model, lr=0.0, queries=4, zo_eps=1e-2, seed=5, perturbation="regenerated",
            distribution="lowrank",
        )  # fmt: skip
        closure = batched(lambda batch, model=model: losses(model, inputs, batch), chunks=chunks)
        optimizer.step(closure if kind == "batched" else lambda model=model: model(**inputs).loss)
        found[kind] = optimizer.losses
    expected = found["alone"]
    assert max(expected) - min(expected) > 2.0**-13 * max(expected)
    for got, loss in zip(found["batched"], expected, strict=True):
        assert abs(got - loss) < 2.0**-18 * loss


@pytest.mark.parametrize("case", CASES)
def test_unperturbed_blocks_have_the_loss_of_one(case):
    name, more, inputs = CASES[case]
    model = build(name, more)
    with torch.no_grad():
        own = model(**inputs).loss
        assert torch.equal(losses(model, inputs, PerturbedBatch(1)), own.view(1))
        got = losses(model, inputs, PerturbedBatch(3))
    assert got.shape == (3,)
    assert torch.allclose(got, own.expand(3), rtol=2.0**-19, atol=0)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("items", [17, torch.tensor(17)])
def test_the_number_of_items(count, items):
    """The sum of all tokens' losses over it, as the Trainer has it."""
    _, _, inputs = CASES["llama"]
    model = build("LlamaForCausalLM", {})
    with torch.no_grad():
        own = model(**inputs, num_items_in_batch=items).loss
        mean = model(**inputs).loss
        got = losses(model, inputs, PerturbedBatch(count), num_items_in_batch=items)
    assert torch.allclose(got, own.expand(count), rtol=2.0**-19, atol=0)
    predicted = int((NEXT[:, 1:] != -100).sum())
    assert got[0].item() == pytest.approx(mean.item() * predicted / 17, rel=1e-5)


def test_the_next_token_is_predicted():
    """Labels are shifted and ignored as in a sum by hand."""
    _, _, inputs = CASES["gpt2"]
    model = build("GPT2LMHeadModel", {})
    with torch.no_grad():
        logits = model(input_ids=IDS, attention_mask=MASK).logits
        log_p = logits.double().log_softmax(-1)
        terms = [
            -log_p[row, at - 1, NEXT[row, at]]
            for row in range(3)
            for at in range(1, NEXT.shape[1])
            if NEXT[row, at] != -100
        ]
        got = losses(model, inputs, PerturbedBatch(2))
    assert got.tolist() == pytest.approx([float(sum(terms) / len(terms))] * 2, rel=1e-6)


class Ends(nn.Module):
    """A model whose loss is made as ``end`` says."""

    def __init__(self, end) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.end = end

    def forward(self, x, labels=None, **more):
        return {"loss": None if labels is None else self.end(self.linear(x), labels)}


def test_what_cannot_be_told_apart_is_refused():
    x, y = torch.randn(3, 2), torch.tensor([0, 1, 0])

    def of(end, **more):
        return losses(Ends(end), {"x": x, "labels": y, **more}, PerturbedBatch(2))

    with pytest.raises(ValueError, match="Ends has returned no loss: expected.*got labels, x"):
        of(lambda out, labels: None)
    with pytest.raises(ValueError, match="Ends has returned no loss.*got x$"):
        losses(Ends(None), {"x": x}, PerturbedBatch(2))
    with pytest.raises(ValueError, match=r"a loss for each of 2 perturbations, got shape \(\)"):
        of(lambda out, labels: out.square().mean())
    with pytest.raises(ValueError, match=r"further: expected a loss for each.*got shape \(\)"):
        of(lambda out, labels: nn.functional.cross_entropy(out, labels).mean())
    with pytest.raises(ValueError, match=r"cross_entropy of shape \(5, 2\), whose rows are no"):
        of(lambda out, labels: nn.functional.cross_entropy(out[:5], labels[:5]))
    got = of(lambda out, labels: nn.functional.cross_entropy(out, labels, reduction="none")
             .view(2, -1).mean(1))  # fmt: skip
    assert got.shape == (2,)
    bert, inputs = NoMore(build("BertForMaskedLM", _BERT)), CASES["masked"][2]
    with pytest.raises(ValueError, match="NoMore takes no num_items_in_batch"):
        losses(bert, inputs, PerturbedBatch(2), num_items_in_batch=3)


class NoMore(nn.Module):
    """A model that takes nothing but these."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels):
        return self.model(input_ids, attention_mask, labels=labels)


def test_auxiliary_losses_are_refused():
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        output_router_logits=True,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    inputs = {"input_ids": IDS, "labels": NEXT}
    with torch.no_grad(), pytest.raises(ValueError, match="adds an auxiliary loss over all rows"):
        losses(model, inputs, PerturbedBatch(2))
    with torch.no_grad():
        assert losses(model, inputs, PerturbedBatch(1)).shape == (1,)
