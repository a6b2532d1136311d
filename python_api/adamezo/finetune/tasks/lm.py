"""Language modelling: texts, each token of which is predicted from those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...integrations.sequences import Tokens
from ..options import Options
from ..table import Table
from .generative import Generative

SHOWN = 24
"""The most tokens of a text that a sample lets the model go on from."""


class Text(NamedTuple):
    """A text."""

    text: str


class LanguageModelling(Generative):
    """Texts, each with the token that ends one, in pieces of at most ``max_tokens`` tokens."""

    def __init__(
        self, options: Options, model: Any, tokenizer: Any, examples: Sequence[Text]
    ) -> None:
        super().__init__(model, tokenizer, options.sample_tokens)
        self.examples = examples
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for example in examples:
            ids = tokenizer(example.text).input_ids
            begin = ids[: max(1, min(SHOWN, len(ids) // 2))]
            rest = ids[len(begin) : len(begin) + options.sample_tokens]
            shown = {"text": tokenizer.decode(begin), "label": tokenizer.decode(rest)}
            self.starts.append((begin, shown))
            ids = ids if ids[-1:] == end else ids + end
            pieces = [
                ids[i : i + options.max_tokens] for i in range(0, len(ids), options.max_tokens)
            ]
            # A piece of one token has nothing to predict.
            self.rows += [Tokens(piece, len(piece) - 1) for piece in pieces if len(piece) > 1]

    @classmethod
    def read(cls, options: Options, table: Table) -> list[Text]:
        return [Text(text) for text in table.texts(options.text_column or "text", "text-column")]

    @classmethod
    def make(
        cls, options: Options, model: Any, tokenizer: Any
    ) -> Callable[[Sequence[Text]], LanguageModelling]:
        def task(examples: Sequence[Text]) -> LanguageModelling:
            made = cls(options, model, tokenizer, examples)
            if not made.rows:
                raise ValueError(
                    f"{options.data}: no text has two tokens, so there is nothing to predict"
                )
            return made

        return task

    def describe(self) -> dict[str, Any]:
        return {"texts": len(self.examples)}
