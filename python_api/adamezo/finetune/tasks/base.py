"""What a task is: examples from a table, their loss for a closure, and what is measured of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...engine.batched import PerturbedBatch
from ..options import Options
from ..table import Table


@dataclass
class Evaluation:
    """Measurements of examples, each of shape ``(examples,)``."""

    losses: Tensor
    right: Tensor
    """Shares of right answers, or of right tokens."""
    weights: Tensor
    """Of an example in the means: 1, or how many of its tokens are predicted."""
    scores: Tensor | None = None
    """Of the answers, of shape ``(examples, answers)``, where a task has some to choose from."""

    @classmethod
    def of_scores(cls, scores: Tensor, targets: Tensor) -> Evaluation:
        """Of answers, the right ones of which have the numbers ``targets``."""
        losses = cross_entropy(scores, targets, reduction="none")
        right = (scores.argmax(dim=1) == targets).float()
        return cls(losses, right, torch.ones_like(losses), scores)

    def summary(self) -> dict[str, float]:
        """Mean loss and accuracy."""
        return {"loss": self._mean(self.losses), "accuracy": self._mean(self.right)}

    def _mean(self, values: Tensor) -> float:
        return ((values * self.weights).double().sum() / self.weights.double().sum()).item()


class Task(ABC):
    """Examples of one kind, encoded for a model.

    A kind is a file: a subclass with what is abstract here, and its line of TASKS. From a table to
    a run it is used in this order: :meth:`read`, :meth:`resolved`, :meth:`make`, then the rest.
    """

    unit: ClassVar[str] = "texts"
    """What the task counts, which the accuracy is a share of."""

    model: Any
    examples: Sequence[Any]
    shortened: int = 0
    """How many examples lost tokens beyond ``--max-tokens``."""

    @classmethod
    @abstractmethod
    def read(cls, options: Options, table: Table) -> list[Any]:
        """The examples of a table, each with its ``text``. Needs no model, so that bad data is
        refused before one is loaded."""

    @classmethod
    def resolved(cls, options: Options, examples: Sequence[Any]) -> Options:
        """The options, with what only the examples can say."""
        return options

    @classmethod
    @abstractmethod
    def make(cls, options: Options, model: Any, tokenizer: Any) -> Callable[[Sequence[Any]], Task]:
        """A function that makes a task of examples: called for those to train on and the others."""

    @abstractmethod
    def __len__(self) -> int:
        """How many rows a batch can be drawn from."""

    @abstractmethod
    def width(self, row: int) -> int:
        """The tokens of a row."""

    @abstractmethod
    def losses(self, rows: Sequence[int], batch: PerturbedBatch) -> Tensor:
        """The mean loss of these rows, in nats, for each perturbation of a batch, of shape
        (perturbations,)."""

    @abstractmethod
    def measure(self, rows: Sequence[int]) -> Evaluation:
        """Measurements of a few rows."""

    @abstractmethod
    def question(self, row: int) -> dict[str, str]:
        """What a sample shows of a row besides the model's answer: ``text`` and ``label``."""

    @abstractmethod
    def answers(self, evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
        """The model's answers to the first rows: ``label``, or ``text`` that it went on with."""

    def identity(self) -> Any:
        """What a resumed run must share of the training examples; its ``repr`` is hashed."""
        return [tuple(example) for example in self.examples]

    def describe(self) -> dict[str, Any]:
        """More about the held-out examples for the report."""
        return {}

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Mean loss of these rows, in nats."""
        return self.losses(rows, PerturbedBatch(1))[0]

    @torch.inference_mode()
    def evaluate(
        self, batch_size: int, *, advance: Callable[[int], None] = lambda done: None
    ) -> Evaluation:
        """Measures every row, without gradients, in batches of ``batch_size``.

        Args:
            batch_size: rows in a forward.
            advance: told how many rows have been measured since it was told last.
        """
        # Sorted by length, so that a batch has little padding.
        order = sorted(range(len(self)), key=self.width)
        parts = []
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            parts.append(self.measure(rows))
            advance(len(rows))
        back = torch.tensor(order).argsort()

        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat([tensor.cpu() for tensor in tensors])[back]

        scores = [part.scores for part in parts if part.scores is not None]
        return Evaluation(
            joined([part.losses for part in parts]),
            joined([part.right for part in parts]),
            joined([part.weights for part in parts]),
            joined(scores) if scores else None,
        )
