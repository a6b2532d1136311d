"""Metrics of generated text as the objective of a Trainer's steps."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .generation import completions

Metric = Callable[[list[str], list[str]], Any]
"""Takes predictions and references, and returns a score for each; more is better."""


def words(text: str) -> list[str]:
    """Words as SQuAD (arXiv 1606.05250) compares them: lower case, no punctuation, no articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """SQuAD's F1 of words, in [0, 1] for each text."""
    scores = []
    for predicted, expected in zip(map(words, predictions), map(words, references), strict=True):
        common = (Counter(predicted) & Counter(expected)).total()
        both = len(predicted) + len(expected)
        scores.append(2 * common / both if both else 1.0)
    return scores


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 for each text whose words are the reference's, else 0."""
    pairs = zip(map(words, predictions), map(words, references), strict=True)
    return [float(predicted == expected) for predicted, expected in pairs]


METRICS: dict[str, Metric] = {"f1": f1, "exact_match": exact_match}


class GeneratedScore:
    """Scores of what a model generates for the rows of a Trainer's batch.

    In a row the tokens in front of the first label that is not -100 are the prompt, and those
    labels are the reference. An encoder-decoder's prompt is its whole input. Generation is greedy,
    up to as many tokens as the longest reference of the batch has, unless the model's
    ``generation_config`` has a ``max_new_tokens``.

    Args:
        metric: a name of METRICS, or a function like them.
        tokenizer: decodes predictions and references.
    """

    def __init__(self, metric: str | Metric, tokenizer: Any) -> None:
        if isinstance(metric, str) and metric not in METRICS:
            raise ValueError(
                f"Invalid objective: {metric!r}, expected one of {tuple(METRICS)}, or a function "
                "of predictions and references that returns a score for each"
            )
        if not hasattr(tokenizer, "batch_decode"):
            raise ValueError(
                f"objective={metric!r} scores generated texts and needs the tokenizer: pass "
                "processing_class=tokenizer"
            )
        self._metric: Metric = METRICS[metric] if isinstance(metric, str) else metric
        self._tokenizer = tokenizer

    def __call__(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The score of each row, of shape (rows,)."""
        if inputs.get("labels") is None:
            raise ValueError(f"expected labels, which hold the references; got {sorted(inputs)}")
        labels, ids = inputs["labels"], inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        prompts, references = [], []
        for row in range(len(ids)):
            wanted = labels[row] != -100
            end = len(ids[row])
            if not model.config.is_encoder_decoder:
                end = int(wanted.int().argmax()) if wanted.any() else 0
            prompt = ids[row, :end][mask[row, :end]].tolist()
            if not prompt or not wanted.any():
                raise ValueError(
                    "a row has no prompt or no reference: expected labels of -100 for the tokens "
                    "of the prompt, and the answer's tokens after them"
                )
            prompts.append(prompt)
            references.append(labels[row][wanted].tolist())
        options: dict[str, Any] = {"do_sample": False}
        if getattr(model.generation_config, "max_new_tokens", None) is None:
            options["max_new_tokens"] = max(map(len, references))
        predictions = completions(model, self._tokenizer, prompts, **options)
        expected = self._tokenizer.batch_decode(references, skip_special_tokens=True)
        scores = torch.as_tensor(self._metric(predictions, list(expected)), dtype=torch.float32)
        if scores.shape != (len(predictions),):
            raise ValueError(
                f"the objective returned scores of shape {tuple(scores.shape)}, expected one for "
                f"each of {len(predictions)} texts"
            )
        return scores
