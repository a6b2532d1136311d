"""Scoring the last tokens of texts by a transformers language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .transformers import Inputs


class Tokens(NamedTuple):
    """Token ids of a text, of which the last ``targets`` are predicted."""

    ids: list[int]
    targets: int


class TokenScores(NamedTuple):
    """Of the predicted tokens of some texts, all of shape (texts, most targets of a text)."""

    log_probs: Tensor
    """Float32, and 0 where a text has no target: sums need no mask."""
    right: Tensor
    """Whether the token is the likeliest there."""
    mask: Tensor
    """Whether there is a target."""


class SequenceScorer:
    """Scores the targets of sequences. Logits are computed at the positions of targets alone, where
    the model can do that (``logits_to_keep``)."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._inputs = Inputs(model)

    def __call__(self, sequences: Sequence[Tokens], *, right: bool = False) -> TokenScores:
        """Scores of a batch of sequences; which tokens are right only if asked for."""
        width = max(s.targets for s in sequences)
        logits = self._inputs.logits([s.ids for s in sequences], width + 1)
        targets = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros(len(sequences), width, dtype=torch.bool)
        for row, (ids, count) in enumerate(sequences):
            targets[row, width - count :] = torch.tensor(ids[len(ids) - count :])
            mask[row, width - count :] = True
        targets, mask = targets.to(logits.device), mask.to(logits.device)
        best = torch.zeros_like(mask)
        if right:
            best = (logits[:, :-1].argmax(dim=-1) == targets) & mask
        return TokenScores(log_probs_of(logits, targets).where(mask, 0.0), best, mask)


def log_probs_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of tokens, float32 of the shape of ``targets``.

    Args:
        logits: of shape (texts, tokens + 1, vocabulary): the last position predicts nothing here.
        targets: of shape (texts, tokens).
    """
    # Text by text: of all together, what cross_entropy makes would be as large as the logits, and
    # these are the largest tensor of a forward.
    losses = [
        cross_entropy(row[:-1].float(), target, reduction="none")
        for row, target in zip(logits, targets, strict=True)
    ]
    return -torch.stack(losses)


def target_sequence(
    before: Sequence[int], whole: Sequence[int], max_tokens: int
) -> tuple[Tokens, bool]:
    """The tokens of a text whose beginning ``before`` is given and whose rest is predicted.

    Where a token lies across the end of what is given, the tokens are no continuation of those of
    the beginning alone: then all tokens from the first that differs are predicted. A text of more
    than ``max_tokens`` tokens loses its beginning, and its end where that is not enough.

    Returns:
        The sequence, and whether it was shortened.
    """
    same = 0
    while same < min(len(before), len(whole) - 1) and before[same] == whole[same]:
        same += 1
    same = max(same, 1)  # the first token of a text cannot be predicted
    ids, targets = list(whole), len(whole) - same
    if len(ids) <= max_tokens:
        return Tokens(ids, targets), False
    if targets >= max_tokens:  # one token at least is given
        begin = same - 1
        return Tokens(ids[begin : begin + max_tokens], max_tokens - 1), True
    return Tokens(ids[-max_tokens:], targets), True
