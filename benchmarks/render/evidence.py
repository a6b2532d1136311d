"""Tables and plots of benchmarks/evidence.py: docs/long_runs.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy
import pandas

from adamezo.plots import PALETTE, figure, save
from benchmarks.evidence import BUDGET, QUESTIONS, SEEDS
from benchmarks.methods import at_an_edge, chosen_lr, validated
from benchmarks.render.style import NOT_YET, band, markdown
from benchmarks.render.training import at_the_end
from benchmarks.results import pick

RESAMPLES = 10_000
PANELS = (("layer", "full"), ("layer", "lora"), ("reviews", "full"), ("tweets", "full"))


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
    rows: pandas.DataFrame, job: str, mode: str, name: str
) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """The runs of a method at the lr that the validation rows chose; and the losses that chose."""
    some = pick(
        rows, benchmark="evidence", job=job, mode=mode, variant=name, budget=BUDGET, schedule=None
    )
    losses = validated(some, "evidence")
    lr = chosen_lr(losses) if len(losses) else None
    return (some.iloc[:0] if lr is None else pick(some, lr=lr)), losses


def mean_curve(runs: pandas.DataFrame) -> pandas.Series:
    """Test loss by forward passes, mean over seeds."""
    some = pick(runs, metric="test loss")
    return some.pivot(index="forwards", columns="seed", values="median").mean(axis=1)


def answer(
    rows: pandas.DataFrame, question: str, job: str, mode: str, seeds: int = len(SEEDS)
) -> str:
    """The methods of a question whose runs have all seeds, the lowest test loss first; and after
    how many forward passes the mean test loss is what the question's first method ends at."""
    body: list[tuple[float, tuple[object, ...]]] = []
    first = runs_of(rows, job, mode, QUESTIONS[question][0].name)[0]
    target = math.nan if first.empty else mean_curve(first).iloc[-1]
    for entry in QUESTIONS[question]:
        runs, losses = runs_of(rows, job, mode, entry.name)
        if runs.empty:
            continue
        loss, accuracy = (at_the_end(runs, f"test {m}") for m in ("loss", "accuracy"))
        if len(loss) < seeds:  # its search has not ended
            continue
        low, high = interval(loss.tolist())
        at = reached(mean_curve(runs), target)
        edge = ", at an edge" if at_an_edge(losses) else ""
        cells = (
            entry.name,
            f"{loss.mean():.3f} ({low:.3f} to {high:.3f})",
            f"{accuracy.mean():.3f}",
            f"{at:,.0f}" if math.isfinite(at) else "not reached",
            f"{runs.lr.iloc[0]:g} (of {len(losses)}{edge})",
            len(loss),
        )
        body.append((loss.mean(), cells))
    reached_by = f"forward passes to the loss of {QUESTIONS[question][0].name}"
    columns = ("", "test loss", "test accuracy", reached_by, "lr (of so many)", "seeds")
    ordered = [cells for _, cells in sorted(body, key=lambda pair: pair[0])]
    return markdown(columns, ordered) if body else NOT_YET


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
    """Test loss against forward passes, at the chosen lr; bands from the lowest to the highest
    seed."""
    entries = [e for e in QUESTIONS["methods"] if not e.backward]
    panels = [p for p in PANELS if len(pick(rows, benchmark="evidence", job=p[0], mode=p[1]))]
    if not panels:
        return
    made, axes = figure(len(panels), "Methods over 2,000 forward passes", 4.2, 3.6)
    for axis, (job, mode) in zip(axes, panels, strict=True):
        for i, entry in enumerate(entries):
            points = pick(runs_of(rows, job, mode, entry.name)[0], metric="test loss")
            if points.seed.nunique() == len(SEEDS):
                curve = points.pivot(index="forwards", columns="seed", values="median")
                band(axis, curve, PALETTE[i], entry.name, "-")
        for reference, style in (("fitted bias", "--"), ("linear probe", ":")):
            of = pick(rows, benchmark="evidence", job=job, variant=reference, metric="test loss")
            for level in of["median"]:
                axis.axhline(level, color=PALETTE[-1], linestyle=style, label=f"a {reference}")
        axis.set(title=f"{job}, {mode}", xlabel="forward passes")
    axes[0].set_ylabel("test loss")
    save(made, folder / "evidence.png")
