"""Classification with a language model: the loss that training follows, and held-out scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ..engine.batched import PerturbedBatch
from ..integrations.transformers import LabelScorer
from .data import Example


class Evaluation:
    """Scores of examples, of shape ``(examples, labels)``, compared with their labels."""

    def __init__(self, scores: Tensor, targets: Tensor) -> None:
        self.scores = scores
        self.losses = cross_entropy(scores, targets, reduction="none")
        self.right = (scores.argmax(dim=1) == targets).float()

    def summary(self) -> dict[str, float]:
        """Mean loss and accuracy."""
        return {"loss": self.losses.mean().item(), "accuracy": self.right.mean().item()}


class Task:
    """Examples encoded for a scorer."""

    def __init__(self, scorer: LabelScorer, examples: Sequence[Example]) -> None:
        self.scorer = scorer
        self.examples = examples
        self.prompts = scorer.encode([example.text for example in examples])
        self.targets = torch.tensor([scorer.labels.index(e.label) for e in examples])

    def __len__(self) -> int:
        return len(self.examples)

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Mean cross entropy over the label words, in nats."""
        return self.losses(rows, PerturbedBatch(1))[0]

    def losses(self, rows: Sequence[int], batch: PerturbedBatch) -> Tensor:
        """The same for each perturbation of a batch, of shape (perturbations,)."""
        scores = self.scorer([self.prompts[row] for row in rows] * batch.count)
        targets = self.targets[list(rows)].to(scores.device)
        return torch.stack([cross_entropy(block, targets) for block in batch.split(scores)])

    @torch.inference_mode()
    def evaluate(self, batch_size: int, *, describe: str = "held-out") -> Evaluation:
        """Scores every example, without gradients, in batches of ``batch_size``."""
        # Sorted by length, so that a batch has little padding.
        order = sorted(range(len(self)), key=lambda row: len(self.prompts[row]))
        scores = torch.empty(len(self), len(self.scorer.labels))
        with tqdm(total=len(self), desc=describe, unit="text", leave=False) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                scores[rows] = self.scorer([self.prompts[row] for row in rows]).cpu()
                bar.update(len(rows))
        return Evaluation(scores, self.targets)
