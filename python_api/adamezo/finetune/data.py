"""Labelled texts: read from a CSV file, split, and drawn in batches."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Example(NamedTuple):
    """A text and its label."""

    text: str
    label: str


def read_examples(path: str | Path, labels: Sequence[str] = ()) -> list[Example]:
    """Reads a UTF-8 CSV file with the columns ``text`` and ``label``; others are ignored.

    Args:
        path: of the file.
        labels: the labels that are allowed; empty allows all.

    Raises:
        ValueError: a column is missing, a text is empty, a label is not allowed, or there are no
            rows.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        for column in ("text", "label"):
            if column not in columns:
                raise ValueError(
                    f"{path}: got the columns {list(columns)}, expected one named {column!r}; "
                    "the first line of the file names the columns"
                )
        examples = []
        for row in reader:
            text, label = (row["text"] or "").strip(), (row["label"] or "").strip()
            where = f"{path}, line {reader.line_num}"
            if not text:
                raise ValueError(f"{where}: the text is empty; remove the row")
            if labels and label not in labels:
                raise ValueError(
                    f"{where}: got the label {label!r}, expected one of {', '.join(labels)}; "
                    "correct the row, or give the label a word with --label-words"
                )
            examples.append(Example(text, label))
    if not examples:
        raise ValueError(f"{path}: no rows, expected at least two")
    return examples


def split(examples: Sequence[Example], held_out: int) -> tuple[list[Example], list[Example]]:
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
