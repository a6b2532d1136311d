"""Tasks whose loss is that of tokens: what they share, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...engine.batched import PerturbedBatch
from ...integrations.sequences import SequenceScorer, Tokens
from .base import Evaluation, Task


class Generative(Task):
    """Rows of tokens, some of which are predicted. The loss is the mean over these tokens.

    Attributes:
        rows: as the model sees them, which may be more than there are examples.
        starts: what a sample lets the model go on from, as tokens, and the texts to show.
    """

    unit: ClassVar[str] = "tokens"

    def __init__(self, model: Any, tokenizer: Any, sample_tokens: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.rows: list[Tokens] = []
        self.starts: list[tuple[list[int], dict[str, str]]] = []
        self._scorer = SequenceScorer(model, tokenizer)
        self._sample_tokens = sample_tokens

    def identity(self) -> Any:
        return [(row.ids, row.targets) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def width(self, row: int) -> int:
        return len(self.rows[row].ids)

    def losses(self, rows: Sequence[int], batch: PerturbedBatch) -> Tensor:
        found = self._scorer([self.rows[row] for row in rows] * batch.count)
        totals = batch.split(found.log_probs).flatten(1).sum(dim=1)
        return -totals / batch.split(found.mask).flatten(1).sum(dim=1)

    def measure(self, rows: Sequence[int]) -> Evaluation:
        found = self._scorer([self.rows[row] for row in rows], right=True)
        counts = found.mask.sum(dim=1).float()
        losses = -found.log_probs.sum(dim=1) / counts
        return Evaluation(losses, found.right.sum(dim=1) / counts, counts)

    def question(self, row: int) -> dict[str, str]:
        return self.starts[row][1]

    @torch.inference_mode()
    def answers(self, evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
        """What the model goes on with, taking the likeliest token each time."""
        found = []
        for ids, _ in self.starts[:count]:
            tokens = torch.tensor([ids], device=self.model.device)
            made = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=self._sample_tokens,
                pad_token_id=_first(self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0),
            )
            text = self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
            found.append({"text": text.strip()})
        return found


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
