"""Tables and plots of benchmarks/evidence.py: docs/long_runs.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas

from adamezo.plots import PALE, PALETTE, figure, save
from benchmarks.evidence import BUDGET, JOBS, QUESTIONS, SEEDS, budget_of
from benchmarks.methods import MODES, at_an_edge, of_finalists, validated
from benchmarks.render.style import NOT_YET, band, markdown
from benchmarks.render.training import at_the_end
from benchmarks.results import pick

RESAMPLES = 10_000
PANELS = tuple(itertools.product(JOBS, MODES))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % of the means of resamples of the seeds, which are few: a bootstrap."""
    generator = numpy.random.default_rng(0)
    drawn = generator.choice(numpy.asarray(values), size=(RESAMPLES, len(values)))
    low, high = numpy.quantile(drawn.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def reached(curve: pandas.Series, target: float) -> float:
    """The forward passes at which a loss comes down to the target, on straight lines between the
    places where it was measured; infinity if it never does."""
    places, losses = curve.index.to_numpy(float), curve.to_numpy(float)
    for i in range(len(losses)):
        if losses[i] <= target:
            if i == 0:
                return float(places[0])
            share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
            return float(places[i - 1] + share * (places[i] - places[i - 1]))
    return math.inf


def runs_of(
    rows: pandas.DataFrame, job: str, mode: str, name: str, budget: int = BUDGET
) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """The runs of a method at the lr that the validation rows chose; and the losses that chose."""
    of = dict(job=job, mode=mode, variant=name, budget=budget)
    some = pick(rows, benchmark="evidence", **of)
    losses = validated(some, "evidence")
    lr = of_finalists(losses) if len(losses) else None
    return (some.iloc[:0] if lr is None else pick(some, lr=lr)), losses


def mean_curve(runs: pandas.DataFrame) -> pandas.Series:
    """Test loss by forward passes, mean over seeds."""
    some = pick(runs, metric="test loss")
    return some.pivot(index="forwards", columns="seed", values="median").mean(axis=1)


def answer(rows: pandas.DataFrame, question: str, job: str, mode: str) -> str:
    """The methods of a question whose runs have all seeds, the lowest test loss first; and after
    how many forward passes the mean test loss is what the question's first method ends at."""
    entries = QUESTIONS[question]
    budget = budget_of(question)
    found = {entry.name: runs_of(rows, job, mode, entry.name, budget) for entry in entries}
    first, _ = found[entries[0].name]
    target = mean_curve(first).iloc[-1] if whole(first) else math.nan
    body: list[tuple[float, tuple[object, ...]]] = []
    for name, (runs, losses) in found.items():
        if whole(runs):
            loss, cells = ended(runs, losses, target)
            body.append((loss, (name, *cells)))
    reached_by = f"forward passes to the loss of {entries[0].name}"
    columns = ("", "test loss", "test accuracy", reached_by, "lr (of so many)")
    ordered = [cells for _, cells in sorted(body, key=lambda pair: pair[0])]
    return markdown(columns, ordered) if body else NOT_YET


def whole(runs: pandas.DataFrame) -> bool:
    """Whether there are runs with all seeds: if not, the search has not ended."""
    return not runs.empty and runs.seed.nunique() == len(SEEDS)


def ended(
    runs: pandas.DataFrame, losses: pandas.DataFrame, target: float
) -> tuple[float, tuple[str, ...]]:
    """The mean test loss at the end of some runs; and the cells of a table about them."""
    loss, accuracy = (at_the_end(runs, f"test {m}") for m in ("loss", "accuracy"))
    low, high = interval(loss.tolist())
    at = reached(mean_curve(runs), target)
    when = f"{at:,.0f}" if math.isfinite(at) else "not reached"
    edge = ", at an edge" if at_an_edge(losses, runs.lr.iloc[0]) else ""
    return loss.mean(), (
        f"{loss.mean():.3f} ({low:.3f} to {high:.3f})",
        f"{accuracy.mean():.3f}",
        "" if math.isnan(target) else when,
        f"{runs.lr.iloc[0]:g} (of {len(losses)}{edge})",
    )


def references(rows: pandas.DataFrame) -> str:
    """What a fitted bias and a linear probe reach on every job."""
    some = pick(rows, benchmark="evidence")
    body = []
    for job in some.job.dropna().unique():
        cells = []
        for name in ("fitted bias", "linear probe"):
            found = pick(some, job=job, variant=name)
            both = [pick(found, metric=f"test {m}")["median"] for m in ("loss", "accuracy")]
            cells.append("" if found.empty else f"{both[0].iloc[0]:.3f}, {both[1].iloc[0]:.3f}")
        body.append((job, *cells))
    header = ("job", "a fitted bias: loss, accuracy", "a linear probe: loss, accuracy")
    return markdown(header, body) if body else NOT_YET


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
            curves = {name: runs for name, runs in found.items() if whole(runs)}
            if len(curves) > 1 and own & curves.keys():
                drawn[job, mode] = curves
        if drawn:
            made, axes = figure(len(drawn), "", 4.2, 3.6)
            for axis, ((job, mode), curves) in zip(axes, drawn.items(), strict=True):
                _panel(axis, curves, [entry.name for entry in entries])
                _levels(axis, rows, job)
                axis.set(title=f"{job}, {mode}", xlabel="forward passes")
            axes[0].set_ylabel("test loss")
            save(made, folder / f"evidence_{question.replace(' ', '_')}.png")


def _panel(axis: Any, curves: dict[str, pandas.DataFrame], names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if name in curves:
            some = pick(curves[name], metric="test loss")
            curve = some.pivot(index="forwards", columns="seed", values="median")
            style = "-" if i < len(PALETTE) else "--"
            band(axis, curve, PALETTE[i % len(PALETTE)], name, style)


def _levels(axis: Any, rows: pandas.DataFrame, job: str) -> None:
    """What a fitted bias and a linear probe reach."""
    for reference, style in (("fitted bias", "--"), ("linear probe", ":")):
        of = pick(rows, benchmark="evidence", job=job, variant=reference, metric="test loss")
        for level in of["median"]:
            axis.axhline(level, color=PALE, linestyle=style, label=f"a {reference}")
