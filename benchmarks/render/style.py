"""How tables and plots look, and where tables stand in the documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas

from benchmarks.results import pick

COLOURS = {
    "torch": "#8c8c8c",
    "portable": "#e0a030",
    "avx2": "#4c9be8",
    "avx512": "#1b4f9c",
    "forwards": "#d5d8dc",
    "perturbation": "#e0a030",
    "update": "#1b4f9c",
    "step": "#333333",
    "float32": "#333333",
    "bfloat16": "#c8553d",
    "float16": "#1b4f9c",
    "bfloat16 in place, nearest": "#c8553d",
    "bfloat16 in place, stochastic": "#e0a030",
    "bfloat16 exact": "#1b4f9c",
    "bfloat16 exact, nearest": "#6a9a3a",
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


def fit(x: Any, y: Any) -> tuple[float, float, float]:
    """Least squares y = slope x + intercept of positive y; returns slope, intercept, R^2.

    Points weigh 1 / y^2, since a time's noise is proportional to it: unweighted, the largest of
    sizes over four decades would decide alone.
    """
    x, y = numpy.asarray(x, float), numpy.asarray(y, float)
    slope, intercept = numpy.polyfit(x, y, 1, w=1 / y)
    mean = numpy.average(y, weights=y**-2)
    left, all_of_it = ((slope * x + intercept - y) / y) ** 2, ((y - mean) / y) ** 2
    return float(slope), float(intercept), float(1 - left.sum() / all_of_it.sum())


def conditions(rows: pandas.DataFrame, *benchmarks: str) -> str:
    """Where, with what and when, of the first row of each benchmark and device; and how far the
    timings of the same spread, in the middle."""
    body = []
    for _, some in pick(rows, benchmark=benchmarks).groupby(["benchmark", "device"], sort=False):
        first = some.iloc[0]
        timed = pick(some, metric="time").dropna(subset="median")
        spread = ((timed.p80 - timed.p20) / timed["median"]).median()
        known = first.clock_hz > 0
        clock = f"{first.clock_hz / 1e9:.2f} GHz ({first.clock_source})" if known else ""
        software = f"torch {first.torch}, Python {first.python}, {first.compiler}"
        cells = (first.device, clock, software, first.commit, first.date, f"{spread:.1%}")
        body.append((f"`{first.command}`", *cells))
    header = ("command", "device", "clock of a core", "software", "commit", "date", "spread")
    return markdown(header, body)


def figure(
    columns: int, title: str, width: float = 4.2, height: float = 3.6
) -> tuple[Any, list[Any]]:
    """A figure with its axes beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    made, axes = plt.subplots(
        1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained"
    )
    made.suptitle(title, fontsize=10)
    return made, list(axes[0])


def save(made: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    for axis in made.axes:
        if not axis.containers or axis.get_xscale() == "log":  # of lines, and not of bars
            axis.grid(True, which="major", color="#eeeeee")
    # No date or version inside, so that the same rows give the same file.
    made.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(made)


def band(axis: Any, curves: pandas.DataFrame, colour: str, label: str, style: str = "o-") -> None:
    """The mean over seeds (the columns) against the index, and a band from lowest to highest."""
    curves = curves.dropna()
    axis.plot(curves.index, curves.mean(axis=1), style, color=colour, label=label, markersize=3)
    low, high = curves.min(axis=1), curves.max(axis=1)
    axis.fill_between(curves.index, low, high, color=colour, alpha=0.1)
