"""Multiple choice: a question, its choices as texts, and which of them is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...engine.batched import PerturbedBatch
from ...integrations.sequences import SequenceScorer
from ..options import Options
from ..table import Table
from .base import Evaluation, Task
from .choices import encoded, scores_of


class Question(NamedTuple):
    """A question, its choices, and the number of the right one."""

    text: str
    choices: tuple[str, ...]
    right: int


class MultipleChoice(Task):
    """Questions with choices of their own. The loss is the cross entropy over the choices, which
    are scored by the mean log-probability of their tokens, as in MeZO (arXiv 2305.17333)."""

    def __init__(
        self, scorer: SequenceScorer, template: str, max_tokens: int, examples: Sequence[Question]
    ) -> None:
        self.model = scorer.model
        self.examples = examples
        self._scorer = scorer
        self._rows = []
        before = template[: -len("{label}")]
        prompt = before.rstrip(" ")
        space = before[len(prompt) :]
        for question in examples:
            answers = [space + choice for choice in question.choices]
            text = prompt.replace("{text}", question.text)
            row, cut = encoded(scorer.tokenizer, text, answers, max_tokens)
            self._rows.append(row)
            self.shortened += cut
        self._right = torch.tensor([question.right for question in examples])

    @classmethod
    def read(cls, options: Options, table: Table) -> list[Question]:
        texts = table.texts(options.text_column or "text", "text-column")
        labels = table.column(options.label_column or "label", "label-column")
        names = options.choice_columns or ("choices",)
        columns = [table.column(name, "choice-columns") for name in names]
        questions = []
        for number, text in enumerate(texts):
            values = [column[number] for column in columns]
            choices = values[0] if len(values) == 1 else values
            if (
                not isinstance(choices, (list, tuple))
                or len(choices) < 2
                or not all(isinstance(choice, str) and choice.strip() for choice in choices)
            ):
                raise ValueError(
                    f"{table.at(number)}: got the choices {choices!r}, expected a list of two "
                    "texts or more; name a column for each with --choice-columns where the file "
                    "has no lists"
                )
            right = _right(table.at(number), labels[number], list(choices), options.label_is)
            questions.append(Question(text, tuple(c.strip() for c in choices), right))
        return questions

    @classmethod
    def make(
        cls, options: Options, model: Any, tokenizer: Any
    ) -> Callable[[Sequence[Question]], MultipleChoice]:
        template = options.template or "{text} {label}"
        if template.count("{text}") != 1 or not template.endswith("{label}"):
            raise ValueError(
                f"--template: got {template!r}, expected {{text}} once and {{label}}, which is a "
                "choice, at the end"
            )
        scorer = SequenceScorer(model, tokenizer)
        return lambda examples: cls(scorer, template, options.max_tokens, examples)

    def __len__(self) -> int:
        return len(self.examples)

    def width(self, row: int) -> int:
        return max(len(answer.ids) for answer in self._rows[row])

    def losses(self, rows: Sequence[int], batch: PerturbedBatch) -> Tensor:
        scores = self._scores(rows, batch.count)
        targets = self._right[list(rows)].to(scores.device)
        return torch.stack([cross_entropy(block, targets) for block in batch.split(scores)])

    def measure(self, rows: Sequence[int]) -> Evaluation:
        scores = self._scores(rows, 1).cpu()
        missing = max(len(row) for row in self._rows) - scores.shape[1]
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        return Evaluation.of_scores(scores, self._right[list(rows)])

    def _scores(self, rows: Sequence[int], count: int) -> Tensor:
        return scores_of(self._scorer, [self._rows[row] for row in rows] * count, mean=True)

    def question(self, row: int) -> dict[str, str]:
        question = self.examples[row]
        return {"text": question.text, "label": question.choices[question.right]}

    def answers(self, evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
        assert evaluation.scores is not None
        found = []
        for question, scores in zip(self.examples[:count], evaluation.scores, strict=False):
            probabilities = scores.softmax(dim=0)
            best = int(probabilities.argmax())
            label = question.choices[best]
            found.append({"label": label, "probability": probabilities[best].item()})
        return found


def _right(where: str, label: Any, choices: list[str], kind: str) -> int:
    """The number of the right choice, from a label of this kind."""
    if kind == "text":
        if label in choices:
            return choices.index(label)
        raise ValueError(
            f"{where}: got the label {label!r}, expected one of the choices {choices}; where "
            "labels are numbers or letters of choices, say --label-is index or letter"
        )
    if kind == "index":
        number = int(label) if str(label).strip().isdecimal() else -1
        if isinstance(label, float) and label.is_integer():
            number = int(label)
    else:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        name = str(label).strip().upper()
        number = letters.index(name) if len(name) == 1 and name in letters else -1
    if not 0 <= number < len(choices):
        last = (
            len(choices) - 1 if kind == "index" else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[len(choices) - 1]
        )
        raise ValueError(
            f"{where}: got the label {label!r}, expected {'0' if kind == 'index' else 'A'} to "
            f"{last}, as there are {len(choices)} choices"
        )
    return number
