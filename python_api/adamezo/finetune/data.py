"""Examples: labelled texts, their split into training and held-out ones, and batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from .table import Table, read_table


class HasText(Protocol):
    """What an example of every task has: the text that decides whether it is held out."""

    @property
    def text(self) -> str: ...


_Example = TypeVar("_Example", bound=HasText)


class Example(NamedTuple):
    """A text and its label."""

    text: str
    label: str


def read_examples(path: str | Path, labels: Sequence[str] = (), **table: Any) -> list[Example]:
    """Reads labelled texts from a file or folder (:func:`read_table`), of the columns ``text`` and
    ``label``; others are ignored.

    Args:
        path: of the file.
        labels: the labels that are allowed; empty allows all.
        table: further arguments of :func:`read_table`.

    Raises:
        ValueError: a column is missing, a text is empty, a label is not allowed, or there are no
            rows.
    """
    return labelled(read_table(path, **table), "text", "label", labels)


def labelled(
    table: Table, text_column: str, label_column: str, labels: Sequence[str] = ()
) -> list[Example]:
    """The labelled texts of a table. See :func:`read_examples`."""
    table.column(text_column, "text-column")
    found = [_label(value) for value in table.column(label_column, "label-column")]
    examples = []
    for number, text in enumerate(table.texts(text_column, "text-column")):
        label = found[number]
        if labels and label not in labels:
            raise ValueError(
                f"{table.at(number)}: got the label {label!r}, expected one of "
                f"{', '.join(labels)}; correct the row, or give the label a word with --label-words"
            )
        if not label:
            raise ValueError(f"{table.at(number)}: the label is empty; remove the row")
        examples.append(Example(text, label))
    return examples


def _label(value: Any) -> str:
    """A label as a word: one may be a number or a truth value, where the file knows such."""
    missing = value is None or (isinstance(value, float) and value != value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes floats of a column of integers in which one is missing
    return "" if missing else str(value).strip()


def split(examples: Sequence[_Example], held_out: int) -> tuple[list[_Example], list[_Example]]:
    """Training and held-out examples; the held-out texts are those with the smallest SHA-256.

    So the split depends on the texts alone, and not on their order, a seed or a library's version.
    """
    if not 0 < held_out < len(examples):
        raise ValueError(
            f"--held-out: got {held_out} of {len(examples)} rows, expected between 1 and "
            f"{len(examples) - 1}"
        )
    ordered = sorted(examples, key=lambda e: hashlib.sha256(e.text.encode()).digest())
    return ordered[held_out:], ordered[:held_out]


def batches(rows: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Row numbers of each step's batch, in a new random order for each pass over the rows."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, rows)
    chosen: list[list[int]] = []
    while len(chosen) < steps:
        order = torch.randperm(rows, generator=generator).tolist()
        chosen += [order[i : i + size] for i in range(0, rows - size + 1, size)]
    return chosen[:steps]
