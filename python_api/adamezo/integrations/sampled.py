"""Labels that a model draws from its own predictions, from which curvatures are estimated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")
"""Kinds of losses, as transformers calls them, with a label for each row of logits. Those of causal
models, "ForCausalLM", are moved by a place."""


def draw_labels(
    kind: str | None, forward: Callable[..., Any], inputs: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """A batch with labels drawn from what the model predicts for it.

    Where a label is -100 it stays so. The same seed draws the same labels.

    Args:
        kind: of the model's loss, its ``loss_type``.
        forward: the model. It is called once, without the labels.
        inputs: the batch.
        seed: of the draws.

    Raises:
        ValueError: the model's loss is not the cross-entropy of one class for each label.
    """
    labels = inputs.get("labels")
    given = "no labels" if not isinstance(labels, Tensor) else _words(labels)
    refused = (
        f"curvature='sampled' draws labels from the model's predictions, which takes a causal "
        f"model or a classification head with integer labels; got {given} and a loss of the kind "
        f"{kind}{{}}. Take curvature='loss'"
    )
    if not isinstance(labels, Tensor) or labels.is_floating_point() or "shift_labels" in inputs:
        raise ValueError(refused.format(", and shift_labels" * ("shift_labels" in inputs)))
    if kind != "ForCausalLM" and kind not in HEADS:
        raise ValueError(refused.format(""))
    outputs = forward(**{name: value for name, value in inputs.items() if name != "labels"})
    logits = outputs["logits"]
    first = 1 if kind == "ForCausalLM" else 0  # nothing predicts a row's first token
    if first:
        logits = logits[:, :-1]
    wanted = labels[:, first:] if first else labels
    if logits.shape[:-1] != wanted.shape or logits.shape[-1] < 2:
        raise ValueError(refused.format(f" with {_words(logits)} of predictions"))
    drawn, known = labels.clone(), wanted != -100
    if known.any():
        generator = torch.Generator(logits.device).manual_seed(seed)
        # Of predictions that are not finite any label: the loss will not be finite either.
        chances = logits[known].float().softmax(-1).nan_to_num(nan=1.0)
        classes = torch.multinomial(chances, 1, generator=generator)[:, 0]
        (drawn[:, first:] if first else drawn)[known] = classes.to(drawn.dtype)
    return {**inputs, "labels": drawn}


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} labels of shape {tuple(tensor.shape)}"
