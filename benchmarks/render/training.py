"""Tables and plots of runs: docs/perturbation.md, comparison.md and reliability.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas

from adamezo.plots import PALETTE, figure, save
from benchmarks.method_entries import BY_DIRECTIONS, ENTRIES
from benchmarks.methods import BUDGETS, MODES, at_an_edge, chosen_lr, validated
from benchmarks.render.style import COLOURS, NOT_YET, band, markdown
from benchmarks.results import pick


def still(rows: pandas.DataFrame, what: str, metrics: tuple[str, ...]) -> pandas.DataFrame:
    """Changes of weights that should stay: a row for each type, variant and number of repeats."""
    found = pick(rows, benchmark="still", what=what, metric=metrics)
    wide = found.pivot(index=["type", "variant", "repeats"], columns="metric", values="median")
    keys = found[["type", "variant", "repeats"]].drop_duplicates()
    return wide.reindex(pandas.MultiIndex.from_frame(keys)).reset_index()


def cycles(rows: pandas.DataFrame) -> str:
    found = still(rows, "cycles", ("drift", "mean"))
    ends = (100, found.repeats.max())
    body = []
    for (kind, variant), some in found.groupby(["type", "variant"], sort=False):
        at = some.set_index("repeats")
        cells = [f"{at[metric][n]:.2g}" for n in ends for metric in ("drift", "mean")]
        body.append((f"{kind}, {variant}", *cells))
    header = [f"{metric} after {n:,}" for n in ends for metric in ("drift", "mean")]
    return markdown(("weights", *header), body)


def update(rows: pandas.DataFrame) -> str:
    found = still(rows, "update", ("changed", "followed")).itertuples()
    return markdown(
        ("weights, rounding", "weights that changed", "followed"),
        [(f"{r.type}, {r.variant}", f"{r.changed:.1%}", f"{r.followed:.2f}") for r in found],
    )


def curves(rows: pandas.DataFrame, kind: str, metric: str) -> dict[str, pandas.DataFrame]:
    """Of each variant of the longest runs, the metric by step and seed."""
    some = pick(rows, benchmark=kind, metric=metric)
    some = some[some.steps == some.steps.max()]
    return {
        str(variant): of.pivot(index="step", columns="seed", values="median")
        for variant, of in some.groupby("variant", sort=False)
    }


def with_range(values: pandas.Series, digits: int = 3) -> str:
    low, mean, high = (f"{v:.{digits}f}" for v in (values.min(), values.mean(), values.max()))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def ends(rows: pandas.DataFrame, kind: str, second: str) -> str:
    """Where runs end: their held-out loss, how far that is from float32's with the same seed, and a
    second metric."""
    losses, others = curves(rows, kind, "held-out loss"), curves(rows, kind, second)
    reference = losses["float32"]
    body = []
    for variant, curve in losses.items():
        apart = (curve - reference).iloc[-1].dropna()
        cells = (with_range(curve.iloc[-1]), with_range(apart) if variant != "float32" else "")
        body.append((variant, *cells, with_range(others[variant].iloc[-1], 4)))
    table = markdown(("weights", "held-out loss", "over float32's", second), body)
    lr, seeds = pick(rows, benchmark=kind).lr.iloc[0], reference.shape[1]
    return (
        f"Mean of {seeds} seeds (lowest to highest) after {reference.index.max():,.0f} steps at "
        f"lr {lr:g}; before, the loss with float32 weights is {reference.iloc[0].mean():.3f}."
        f"\n\n{table}"
    )


def plot_sixteen_bit(rows: pandas.DataFrame, folder: Path) -> None:
    """Held-out loss over steps, and over that of float32 with the same seed."""
    for kind, title in (("large", "The main job"), ("small", "Small steps")):
        made, (left, right) = figure(2, title, 5, 4)
        losses = curves(rows, kind, "held-out loss")
        for variant, curve in losses.items():
            band(left, curve, COLOURS[variant], variant)
            band(right, curve - losses["float32"], COLOURS[variant], variant)
        left.set(xlabel="step", title="held-out loss")
        right.set(xlabel="step", title="over that of float32, same seed")
        save(made, folder / f"sixteen_bit_{kind}.png")


def chosen(rows: pandas.DataFrame, job: str, mode: str, name: str) -> pandas.DataFrame:
    """The rows of a method's runs at the lr that the validation rows chose."""
    wanted = dict(job=job, mode=mode, variant=name, budget=BUDGETS[job])
    some = pick(rows, benchmark="methods", **wanted)
    lr = chosen_lr(validated(some)) if len(some) else None
    return some.iloc[:0] if lr is None else pick(some, lr=lr)


def at_the_end(some: pandas.DataFrame, metric: str) -> pandas.Series:
    """By seed, after the last forward pass. A loss that was lost is infinite."""
    last = pick(some, metric=metric).sort_values("forwards").groupby("seed").tail(1)
    found = last.set_index("seed")["median"].sort_index()
    return found.fillna(math.inf) if metric.endswith("loss") else found


def compared(rows: pandas.DataFrame, job: str, mode: str) -> str:
    """Every method at the lr that the validation rows chose, the lowest test loss first."""
    body: list[tuple[float, tuple[object, ...]]] = []
    for entry in ENTRIES:
        runs = chosen(rows, job, mode, entry.name)
        if runs.empty:
            continue
        of = dict(job=job, mode=mode, variant=entry.name)
        losses = validated(rows, budget=BUDGETS[job], **of)
        costs = pick(rows, benchmark="methods costs", **of)
        cost = costs.set_index("metric")["median"]
        steps = pick(runs, metric="time")
        loss, accuracy = (at_the_end(runs, f"test {m}") for m in ("loss", "accuracy"))
        ratio = cost.get("time over MeZO's")
        kept = f"{round(cost['kept'] / costs.weights.iloc[0], 2):g}" if len(cost) else ""
        edge = ", at an edge" if at_an_edge(losses) else ""
        cells = (
            entry.name,
            entry.forwards or f"{(steps.forwards / steps.repeats).mean():.1f} (mean)",
            kept,
            f"{ratio:.2f}x" if ratio else "",
            f"{ratio * 2 / entry.forwards:.2f}x" if ratio else "",
            with_range(loss),
            with_range(accuracy),
            f"{runs.lr.iloc[0]:g} (of {len(losses)}{edge})",
            len(loss),
        )
        body.append((loss.mean(), cells))
    header = ("", "forwards a step", "bytes kept a weight")
    times = ("a step over MeZO's", "a forward over MeZO's")
    cells_in_order = [cells for _, cells in sorted(body, key=lambda pair: pair[0])]
    columns = (*header, *times, "test loss", "test accuracy", "lr (of so many)", "seeds")
    return markdown(columns, cells_in_order) if body else NOT_YET


def by_directions(rows: pandas.DataFrame, job: str, modes: Sequence[str]) -> str:
    """Some methods with directions of every kind, at the lr that the validation rows chose."""
    body = []
    for (name, kind), entry in BY_DIRECTIONS.items():
        cells: list[str] = []
        for mode in modes:
            runs = chosen(rows, job, mode, entry.name)
            if runs.empty:
                cells += ["", ""]
                continue
            losses = validated(rows, budget=BUDGETS[job], job=job, mode=mode, variant=entry.name)
            edge = ", at an edge" if at_an_edge(losses) else ""
            lr = f"{runs.lr.iloc[0]:g} (of {len(losses)}{edge})"
            cells += [with_range(at_the_end(runs, "test loss")), lr]
        body.append((name, kind, *cells))
    header = [f"{mode}: {what}" for mode in modes for what in ("test loss", "lr (of so many)")]
    return markdown(("", "directions", *header), body)


def plot_methods(rows: pandas.DataFrame, folder: Path) -> None:
    """Loss on the test rows against forward passes, at the chosen lr; without backpropagation,
    which is in the tables. A row of panels for each job, with one scale, from which losses that
    went up leave: the tables have them."""
    made, axes = figure(len(MODES), "Methods at equal forward passes", 4.2, 3.6, len(BUDGETS))
    panels = [(job, mode) for job in BUDGETS for mode in MODES]
    for axis, (job, mode) in zip(axes, panels, strict=True):
        for i, entry in enumerate(e for e in ENTRIES if not e.backward):
            points = pick(chosen(rows, job, mode, entry.name), metric="test loss")
            curve = points.pivot(index="forwards", columns="seed", values="median")
            band(axis, curve, PALETTE[i % 8], entry.name, ("o-", "s--")[i // 8])
        axis.set(title=f"{job}, {mode}", ylim=(0.38, 0.92), xlabel="forward passes")
    for axis in axes[:: len(MODES)]:
        axis.set_ylabel("test loss")
    save(made, folder / "methods.png")


def attacks(rows: pandas.DataFrame) -> str:
    """What `python -m tests.stress` counted."""
    some = pick(rows, benchmark="reliability")
    whole, body = some[some.outcome.isna()], []
    for r in pick(whole, metric="count").itertuples():
        shown = f"{r.median:,.0f}" if r.median >= 10 or r.median % 1 == 0 else f"{r.median:.3g}"
        of = dict(attack=r.attack, variant=r.variant)
        kinds = pick(some[some.outcome.notna()], **of).itertuples()
        outcome = [f"{kind.outcome} {kind.median:.0f}" for kind in kinds]
        outcome += [f"{x:.3g}x" for x in pick(whole, metric="over training", **of)["median"]]
        command = f"python -m tests.stress {r.attack}"
        body.append((r.variant, f"{shown} {r.unit}".strip(), ", ".join(outcome), command))
    return markdown(("", "count", "outcome", "command"), body)
