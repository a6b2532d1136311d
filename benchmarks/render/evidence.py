"""Tables and plots of benchmarks/evidence.py: docs/long_runs.md."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from adamezo.plots import PALE, PALETTE, figure, save
from benchmarks.evidence import (
    BUDGET,
    EVERY,
    FEW,
    FINALISTS,
    JOBS,
    LONG,
    QUESTIONS,
    SEEDS,
    budget_of,
)
from benchmarks.methods import MODES, at_an_edge, ended, of_finalists, validated
from benchmarks.render.seeds import interval, when_reached
from benchmarks.render.style import NOT_YET, band, markdown
from benchmarks.render.training import at_the_end
from benchmarks.results import pick

PANELS = tuple(itertools.product(JOBS, MODES))
MOST = 4
"""Panels side by side."""


def slug(question: str) -> str:
    """A question's name in names of files and blocks."""
    return question.translate(str.maketrans(" -", "__", ","))


def runs_of(
    rows: pandas.DataFrame, job: str, mode: str, name: str, budget: int = BUDGET
) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """The runs of a method at the lr that the validation rows chose, none if the search has not
    ended; and the losses that chose."""
    of = dict(job=job, mode=mode, variant=name, budget=budget)
    some = pick(rows, benchmark="evidence", **of)
    losses = validated(some, "evidence")
    if not ended(losses, len(SEEDS), FINALISTS):
        return some.iloc[:0], losses
    return pick(some, lr=of_finalists(losses)), losses


def curves_of(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Test losses by forward passes and seed. One that was lost is infinite, and a run that ended
    early stays where it was."""
    some = pick(runs, metric="test loss").fillna({"median": math.inf})
    return some.pivot(index="forwards", columns="seed", values="median").ffill()


def answer(rows: pandas.DataFrame, question: str, job: str, mode: str) -> str:
    """The methods of a question whose searches have ended, the lowest test loss first; how far they
    end below the question's first method, seed by seed, and after how many forward passes their
    mean is what its mean ends at."""
    entries, budget = QUESTIONS[question], budget_of(question)
    found = {entry.name: runs_of(rows, job, mode, entry.name, budget) for entry in entries}
    first = found[entries[0].name][0]
    body = [
        (at_the_end(runs, "test loss").mean(), _cells(name, runs, losses, first))
        for name, (runs, losses) in found.items()
        if not runs.empty
    ]
    of_first = entries[0].name
    columns = (
        *("", "test loss", "test accuracy", f"below {of_first}, seed by seed"),
        *(f"forward passes to the loss of {of_first}", "lr (of so many)"),
    )
    ordered = [cells for _, cells in sorted(body, key=lambda pair: pair[0])]
    return markdown(columns, ordered) if body else NOT_YET


def _cells(
    name: str, runs: pandas.DataFrame, losses: pandas.DataFrame, first: pandas.DataFrame
) -> tuple[str, ...]:
    """A row of a table. The columns that compare with the first method are empty in its own row and
    where there is nothing to compare with."""
    loss, accuracy = (at_the_end(runs, f"test {m}") for m in ("loss", "accuracy"))
    below, when = "", ""
    if not first.empty and first.variant.iloc[0] != name:
        ends = at_the_end(first, "test loss")
        below = _with_interval((ends - loss).tolist(), "+.3f")
        at, low, high = map(_passes, when_reached(curves_of(runs), ends))
        when = at if at == low == high else f"{at} ({low} to {high})"
    edge = ", at an edge" if at_an_edge(losses, runs.lr.iloc[0]) else ""
    return (
        name,
        _with_interval(loss.tolist(), ".3f"),
        f"{accuracy.mean():.3f}",
        below,
        when,
        f"{runs.lr.iloc[0]:g} (of {len(losses)}{edge})",
    )


def _with_interval(values: Sequence[float], form: str) -> str:
    if not all(map(math.isfinite, values)):
        return "a seed was lost"
    # Without the sign of a zero.
    mean, low, high = (round(x, 3) + 0.0 for x in (sum(values) / len(values), *interval(values)))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def _passes(forwards: float) -> str:
    return f"{forwards:,.0f}" if math.isfinite(forwards) else "never"


def references(rows: pandas.DataFrame) -> str:
    """What a fitted bias and a linear probe reach, and AdamW by backpropagation in the first mode
    in which it was run, on every job that has one of them."""
    some = pick(rows, benchmark="evidence")
    body = []
    for job in JOBS:
        cells = []
        for name in ("fitted bias", "linear probe"):
            found = pick(some, job=job, variant=name)
            both = [pick(found, metric=f"test {m}")["median"] for m in ("loss", "accuracy")]
            cells.append("" if found.empty else f"{both[0].iloc[0]:.3f}, {both[1].iloc[0]:.3f}")
        cells.append(next(filter(None, (_of_adamw(some, job, mode) for mode in MODES)), ""))
        if any(cells):
            body.append((job, *cells))
    header = ("loss, accuracy", "a fitted bias", "a linear probe", "AdamW by backpropagation")
    return markdown(header, body) if body else NOT_YET


def _of_adamw(rows: pandas.DataFrame, job: str, mode: str) -> str:
    runs, _ = runs_of(rows, job, mode, "AdamW, by backpropagation")
    if runs.empty:
        return ""
    loss, accuracy = (at_the_end(runs, f"test {m}").mean() for m in ("loss", "accuracy"))
    return f"{loss:.3f}, {accuracy:.3f}, {mode}"


def wrong_lr(rows: pandas.DataFrame) -> str:
    """What lrs beside the best cost in validation loss, by method: over all its options, jobs and
    modes whose searches have ended, but for the text, whose losses have another unit."""
    places = (-2, -1, 1, 2)
    body = []
    for method in FEW:
        costs: dict[int, list[float]] = {place: [] for place in places}
        names = [name for name in EVERY if name.split(",")[0] == method]
        for name, (job, mode), budget in itertools.product(names, PANELS, (BUDGET, LONG)):
            runs, losses = runs_of(rows, job, mode, name, budget)
            if job == "text" or runs.empty:
                continue
            best = losses.loc[runs.lr.iloc[0]]
            for lr, some in losses.drop(index=best.name).iterrows():
                place = round(4 * math.log10(lr / best.name))
                if place in costs:
                    costs[place].append((some - best).mean())  # of the seeds that both have
        body.append((method, *map(_median, costs.values())))
    columns = (f"{10 ** (place / 4):.2g} times the best" for place in places)
    return markdown(("", *columns), body) if any(any(cells[1:]) for cells in body) else NOT_YET


def _median(costs: list[float]) -> str:
    if not costs:
        return ""
    highest = f"{max(costs):.2f}" if max(costs) < 10 else "over 10"
    return f"{statistics.median(costs):.2f} ({min(costs):.2f} to {highest}; of {len(costs)})"


def spent(rows: pandas.DataFrame) -> str:
    """Runs, forward passes and hours of one core in steps, by job and mode."""
    some = pick(rows, benchmark="evidence", metric="time")
    body = [
        (f"{job}, {mode}", len(of), f"{of.forwards.sum():,.0f}", f"{of['median'].sum() / 3600:.1f}")
        for (job, mode), of in some.groupby(["job", "mode"], sort=False)
    ]
    return markdown(("job, mode", "runs", "forward passes", "hours"), body) if body else NOT_YET


def plot(rows: pandas.DataFrame, folder: Path) -> None:
    """A figure for each question: test loss against forward passes, at the chosen lr, a panel for
    each job and mode that has an answer; bands from the lowest to the highest seed."""
    everywhere = {entry.name for entry in QUESTIONS["methods"]}
    for question, entries in QUESTIONS.items():
        own = {entry.name for entry in entries} - everywhere or everywhere
        drawn: dict[tuple[str, str], dict[str, pandas.DataFrame]] = {}
        for job, mode in PANELS:
            budget = budget_of(question)
            found = {e.name: runs_of(rows, job, mode, e.name, budget)[0] for e in entries}
            curves = {name: runs for name, runs in found.items() if not runs.empty}
            if len(curves) > 1 and own & curves.keys():
                drawn[job, mode] = curves
        if drawn:
            rows_of = math.ceil(len(drawn) / MOST)
            made, axes = figure(math.ceil(len(drawn) / rows_of), rows=rows_of)
            for axis in axes[len(drawn) :]:
                axis.remove()
            for axis, ((job, mode), curves) in zip(axes, drawn.items(), strict=False):
                _panel(axis, curves, [entry.name for entry in entries])
                _levels(axis, rows, job)
                axis.set(title=textwrap.fill(f"{job}, {mode}", 28), xlabel="forward passes")
                axis.set_ylabel("bits per byte" if job == "text" else "test loss")
            save(made, folder / f"evidence_{slug(question)}.png")


def _panel(axis: Any, curves: dict[str, pandas.DataFrame], names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if name in curves:
            curve = curves_of(curves[name])
            style = "-" if i < len(PALETTE) else "--"
            band(axis, curve, PALETTE[i % len(PALETTE)], name, style)


def _levels(axis: Any, rows: pandas.DataFrame, job: str) -> None:
    """What a fitted bias and a linear probe reach."""
    for reference, style in (("fitted bias", "--"), ("linear probe", ":")):
        of = pick(rows, benchmark="evidence", job=job, variant=reference, metric="test loss")
        for level in of["median"]:
            axis.axhline(level, color=PALE, linestyle=style, label=f"a {reference}")
