"""Tasks whose answer is one of several texts, each scored by the tokens that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...integrations.sequences import SequenceScorer, Tokens, target_sequence


def scores_of(scorer: SequenceScorer, rows: Sequence[Sequence[Tokens]], *, mean: bool) -> Tensor:
    """The log-probability of each answer of each row, of shape (rows, most answers of a row).

    Args:
        scorer: of the model.
        rows: the answers of each row as tokens, behind what they answer.
        mean: divided by the number of tokens, so that a long answer is no worse for its length.
    """
    found = scorer([answer for row in rows for answer in row])
    totals = found.log_probs.sum(dim=1)
    if mean:
        totals = totals / found.mask.sum(dim=1)
    lengths = [len(row) for row in rows]
    if len(set(lengths)) == 1:
        return totals.view(len(rows), -1)
    scores = totals.new_full((len(rows), max(lengths)), -torch.inf)  # of no probability
    for row, part in enumerate(totals.split(lengths)):
        scores[row, : len(part)] = part
    return scores


def encoded(
    tokenizer: Any, prompt: str, answers: Sequence[str], max_tokens: int
) -> tuple[list[Tokens], bool]:
    """A prompt with each of its answers as tokens, and whether tokens were left out.

    All answers are scored behind the same tokens: those that the prompt has in common with all.
    """
    before = tokenizer(prompt).input_ids
    whole = [tokenizer(prompt + answer).input_ids for answer in answers]
    same = len(before)
    for ids in whole:
        while before[:same] != ids[:same] or same >= len(ids):
            same -= 1
    made = [target_sequence(before[:same], ids, max_tokens) for ids in whole]
    return [tokens for tokens, _ in made], any(cut for _, cut in made)
