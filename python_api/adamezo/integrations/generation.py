"""Texts that a transformers model generates, as the steps of a zeroth-order run need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Token ids and a mask of shape (rows, longest), padded on the left, so that every row ends
    where the model goes on."""
    longest = max(len(ids) for ids in rows)
    tokens = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, ids in enumerate(rows):
        tokens[i, longest - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        mask[i, longest - len(ids) :] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def pad_id(tokenizer: Any) -> int:
    """The token that fills short rows: any does, as it is masked."""
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    return 0


@torch.no_grad()
def completions(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **generate: Any
) -> list[str]:
    """What a model writes after each prompt, without its special tokens.

    Args:
        model: with transformers' ``generate``; in train mode it stays so.
        tokenizer: decodes.
        prompts: token ids, at least one in each.
        generate: options of ``generate``, such as ``max_new_tokens`` and ``do_sample``.
    """
    if not prompts or not all(map(len, prompts)):
        raise ValueError("expected prompts of at least one token each, got an empty one")
    inputs = {
        name: tensor.to(model.device)
        for name, tensor in left_padded(prompts, pad_id(tokenizer)).items()
    }
    written = model.generate(**inputs, **{"pad_token_id": pad_id(tokenizer), **generate})
    if not model.config.is_encoder_decoder:
        written = written[:, inputs["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(written, skip_special_tokens=True))
