"""Classification: a text, and the label whose word the model puts behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...engine.batched import PerturbedBatch
from ...integrations.sequences import SequenceScorer
from ...integrations.transformers import LabelScorer, SeveralTokens
from ..data import Example, labelled
from ..options import Options
from ..table import Table
from .base import Evaluation, Task
from .choices import encoded, scores_of


class WordsScorer:
    """A :class:`LabelScorer` for words of several tokens: a text is scored once for each label, by
    the probability of all tokens of its word."""

    def __init__(
        self, model: Any, tokenizer: Any, template: str, words: dict[str, str], max_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.labels = tuple(words)
        before = template[: -len("{label}")]
        self._prompt = before.rstrip(" ")
        self._answers = [before[len(self._prompt) :] + word for word in words.values()]
        self._scorer = SequenceScorer(model, tokenizer)
        for word, tokens in zip(words.values(), self.encode(["text"])[0], strict=True):
            if tokenizer.unk_token_id in tokens.ids[-tokens.targets :]:
                raise ValueError(
                    f"label word {word!r}: it is not in the model's vocabulary; choose another "
                    "with --label-words LABEL=WORD"
                )

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """For each text its prompt with every word."""
        prompts = [self._prompt.replace("{text}", text) for text in texts]
        return [
            encoded(self.tokenizer, prompt, self._answers, self.max_tokens)[0] for prompt in prompts
        ]

    def __call__(self, prompts: Sequence[Any]) -> Tensor:
        """Log-probabilities of the words: float32, of shape (prompts, labels)."""
        return scores_of(self._scorer, prompts, mean=False)


class Classification(Task):
    """Labelled texts. The loss is the cross entropy over the labels' words."""

    def __init__(self, scorer: LabelScorer | WordsScorer, examples: Sequence[Example]) -> None:
        self.scorer = scorer
        self.model = scorer.model
        self.examples = examples
        self.prompts = scorer.encode([example.text for example in examples])
        self.targets = torch.tensor([scorer.labels.index(e.label) for e in examples])

    @classmethod
    def read(cls, options: Options, table: Table) -> list[Example]:
        column = options.text_column or "text", options.label_column or "label"
        return labelled(table, *column, tuple(options.label_words))

    @classmethod
    def resolved(cls, options: Options, examples: Sequence[Example]) -> Options:
        if options.label_words:
            return options
        labels = sorted({example.label for example in examples})
        return replace(options, label_words={label: label for label in labels})

    @classmethod
    def make(
        cls, options: Options, model: Any, tokenizer: Any
    ) -> Callable[[Sequence[Example]], Classification]:
        words = dict(options.label_words)
        template = options.template or DEFAULT_TEMPLATE
        scorer: LabelScorer | WordsScorer
        try:
            scorer = LabelScorer(model, tokenizer, template, words, max_tokens=options.max_tokens)
        except SeveralTokens:
            scorer = WordsScorer(model, tokenizer, template, words, options.max_tokens)
        return lambda examples: cls(scorer, examples)

    def __len__(self) -> int:
        return len(self.examples)

    def width(self, row: int) -> int:
        prompt: Any = self.prompts[row]
        return len(prompt) if isinstance(self.scorer, LabelScorer) else len(prompt[0].ids)

    def losses(self, rows: Sequence[int], batch: PerturbedBatch) -> Tensor:
        scores = self.scorer([self.prompts[row] for row in rows] * batch.count)
        targets = self.targets[list(rows)].to(scores.device)
        return torch.stack([cross_entropy(block, targets) for block in batch.split(scores)])

    def measure(self, rows: Sequence[int]) -> Evaluation:
        scores = self.scorer([self.prompts[row] for row in rows]).cpu()
        return Evaluation.of_scores(scores, self.targets[list(rows)])

    def question(self, row: int) -> dict[str, str]:
        return self.examples[row]._asdict()

    def answers(self, evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
        assert evaluation.scores is not None
        found = []
        for scores in evaluation.scores[:count]:
            probabilities = scores.softmax(dim=0)
            best = int(probabilities.argmax())
            label = self.scorer.labels[best]
            found.append({"label": label, "probability": probabilities[best].item()})
        return found

    def describe(self) -> dict[str, Any]:
        counts = [int((self.targets == i).sum()) for i in range(len(self.scorer.labels))]
        return {"labels": dict(zip(self.scorer.labels, counts, strict=True))}


DEFAULT_TEMPLATE = "{text} It was {label}"
