"""How tables and plots look, and where tables stand in the documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import pandas

from adamezo.plots import PALE, PALETTE
from benchmarks.results import pick

BLUE, RED, GREEN, _, ORANGE, SKY, GREY, BLACK = PALETTE
COLOURS = {
    "torch": GREY,
    "portable": ORANGE,
    "avx2": SKY,
    "avx512": BLUE,
    "forwards": PALE,
    "perturbation": ORANGE,
    "update": BLUE,
    "float32": BLACK,
    "bfloat16 in place, nearest": RED,
    "bfloat16 in place, stochastic": ORANGE,
    "bfloat16 out of place": BLUE,
    "bfloat16 out of place, nearest": GREEN,
}
NOT_YET = "Not measured yet."


def markdown(header: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, rule, *body])


def rewrite(text: str, made: dict[str, str]) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- /NAME -->` replaced.

    Raises:
        ValueError: a block has no place in the text, or more than one.
    """
    for name, block in made.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"expected {start} and {end} once each: put them where the table goes")
        before, rest = text.split(start)
        text = f"{before}{start}\n{block}\n{end}{rest.split(end)[1]}"
    return text


def over(table: pandas.DataFrame, by: Sequence[str], **reference: Any) -> numpy.ndarray:
    """Of each row, the median of the reference with the same of the columns `by`, over its own; nan
    where there is none."""
    base = pick(table, **reference).set_index(list(by))["median"]
    found = base.reindex(pandas.MultiIndex.from_frame(table[list(by)]))
    return found.to_numpy() / table["median"].to_numpy()


def conditions(rows: pandas.DataFrame, benchmarks: Sequence[str]) -> str:
    """Where, with what and when each benchmark was run, of the first row of each commit; and how
    far its timings spread, in the middle."""
    key = ["benchmark", "device", "commit"]
    some = pick(rows, benchmark=benchmarks)
    timed = pick(some, metric="time").dropna(subset="p80")
    spread = ((timed.p80 - timed.p20) / timed["median"]).groupby([timed[k] for k in key]).median()
    body = []
    for first in some.drop_duplicates(key).itertuples():
        clock = f"{first.clock_hz / 1e9:.2f} GHz" if first.clock_hz > 0 else ""
        found = (f"torch {first.torch}", f"Python {first.python}", first.compiler)
        software = ", ".join(filter(None, found))
        middle = spread.get(tuple(getattr(first, k) for k in key))
        cells = (first.device, clock, software, first.commit, first.date)
        body.append((f"`{first.command}`", *cells, f"{middle:.1%}" if middle else ""))
    header = ("command", "device", "clock of a core", "software", "commit", "date", "spread")
    return markdown(header, body) if body else NOT_YET


def band(axis: Any, curves: pandas.DataFrame, colour: str, label: str, style: str = "o-") -> None:
    """The mean over seeds (the columns) against the index, and a band from lowest to highest."""
    curves = curves.dropna()
    axis.plot(curves.index, curves.mean(axis=1), style, color=colour, label=label, markersize=3)
    low, high = curves.min(axis=1), curves.max(axis=1)
    axis.fill_between(curves.index, low, high, color=colour, alpha=0.1)
