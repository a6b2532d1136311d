"""The table of docs/memory.md."""

from __future__ import annotations

import pandas

from benchmarks.memory import MODELS, SETUPS
from benchmarks.render.style import NOT_YET, markdown
from benchmarks.results import pick

CARDS = (8, 12, 16, 24, 32, 48, 80, 141)
FREE = 0.1
"""The share of a card that a step should leave."""


def _card(size: float) -> str:
    """The smallest card, in GB, that a step leaves a tenth of."""
    return next((f"{card}" for card in CARDS if size <= (1 - FREE) * card * 1e9), "several")


def cards(rows: pandas.DataFrame) -> str:
    """What a step needs by model, in GB, and the smallest card that has it."""
    body = []
    for name in MODELS:
        some = pick(rows, benchmark="needs", variant=name)
        if some.empty:
            continue
        step = pick(some, metric="step").set_index("what")["median"]
        weights = pick(some, metric="weights")["median"].iloc[0]
        body.append(
            (
                name,
                f"{weights / 1e9:.2f}e9",
                f"{2 * weights / 1e9:.2f}",
                *(f"{step[kind] / 1e9:.2f}" for kind in SETUPS),
                f"{12 * weights / 1e9:.1f}",
                _card(step["one position"]),
            )
        )
    header = ("GB", "weights", "their bytes", *SETUPS, "AdamW, no activations", "smallest card")
    return markdown(header, body) if body else NOT_YET
