"""Tables and plots of runs: docs/perturbation.md, methods.md and reliability.md."""

from __future__ import annotations

from pathlib import Path

import pandas

from benchmarks.methods import BUDGETS, ENTRIES, MODES, at_an_edge, chosen_lr, validated
from benchmarks.render.style import COLOURS, NOT_YET, band, figure, markdown, save
from benchmarks.results import pick

PICTURE = "![{}](../benchmarks/results/{}.png)"


# 16 bits -----------------------------------------------------------------------------------------


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


def steps(rows: pandas.DataFrame) -> str:
    body = [
        (f"{r.type}, {r.variant}", f"{r.repeats:,}", f"{r.changed:.2%}", f"{r.drift:.2g}")
        for r in still(rows, "steps", ("changed", "drift")).itertuples()
    ]
    return markdown(("weights, perturbation", "steps", "weights with other bits", "drift"), body)


def curves(rows: pandas.DataFrame, kind: str, metric: str) -> dict[str, pandas.DataFrame]:
    """Of each variant of the longest runs, the metric by step and seed."""
    some = pick(rows, benchmark=kind, metric=metric)
    some = some[some.steps == some.steps.max()]
    return {
        str(variant): of.pivot(index="step", columns="seed", values="median")
        for variant, of in some.groupby("variant", sort=False)
    }


def with_deviation(values: pandas.Series) -> str:
    more = f" +- {values.std():.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{more}"


def with_range(values: pandas.Series, digits: int = 3) -> str:
    low, mean, high = (f"{v:.{digits}f}" for v in (values.min(), values.mean(), values.max()))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def large(rows: pandas.DataFrame) -> str:
    """Held-out loss and accuracy at the end, and how far the loss is from float32's with the same
    seed."""
    losses, accuracies = (curves(rows, "large", f"held-out {m}") for m in ("loss", "accuracy"))
    body = []
    for variant, loss in losses.items():
        end, apart = loss.iloc[-1], loss.iloc[-1] - losses["float32"].iloc[-1]
        last = "" if variant == "float32" else with_deviation(apart.dropna())
        accuracy = with_deviation(accuracies[variant].iloc[-1])
        body.append((variant, len(end), with_deviation(end), accuracy, last))
    first = pick(rows, benchmark="large").iloc[0]
    head = (
        f"{loss.index.max():.0f} steps, lr = {first.lr:g}; mean and standard deviation over seeds."
    )
    header = ("", "seeds", "held-out loss", "accuracy", "loss over float32's")
    picture = PICTURE.format("loss over steps", "sixteen_bit_large")
    return "\n\n".join([head, markdown(header, body), picture])


def small(rows: pandas.DataFrame) -> str:
    losses, moved = (curves(rows, "small", m) for m in ("held-out loss", "distance from the start"))
    body = [
        (variant, with_range(loss.iloc[-1]), with_range(moved[variant].iloc[-1], 4))
        for variant, loss in losses.items()
    ]
    table = markdown(("weights", "held-out loss at the end", "a weight has moved by"), body)
    start, lr = losses["float32"], pick(rows, benchmark="small").iloc[0].lr
    return (
        f"{table}\n\nMean of {start.shape[1]} seeds (lowest to highest) after "
        f"{start.index.max():,.0f} steps at lr {lr:g}; before, the loss with float32 weights is "
        f"{start.loc[0].mean():.3f}.\n\n"
        + PICTURE.format("loss and distance over steps", "sixteen_bit_small")
    )


def plot_sixteen_bit(rows: pandas.DataFrame, folder: Path) -> None:
    found = still(rows, "cycles", ("drift",))
    made, (axis,) = figure(1, "In place, weights N(0, 0.02), mu = 0.001", 6, 4)
    for (kind, variant), line in found.groupby(["type", "variant"], sort=False):
        style = "s--" if "stochastic" in variant else "o-"
        label = f"{kind}, {variant.removeprefix('in place, ')}"
        axis.plot(line.repeats, line.drift, style, color=COLOURS[kind], label=label, markersize=4)
    axis.set(xscale="log", yscale="log", xlabel="cycles of +mu, -2 mu, +mu, and no update")
    axis.set(ylabel="change of the weights, relative (RMS)")
    axis.legend(frameon=False, fontsize=8)
    save(made, folder / "sixteen_bit_still.png")

    made, (left, right) = figure(2, "The main job", 5, 4)
    held_out = curves(rows, "large", "held-out loss")
    for variant, curve in curves(rows, "large", "training loss").items():
        recent = curve.rolling(10, min_periods=1).mean()
        left.plot(recent, color=COLOURS[variant], alpha=0.25, linewidth=1)
        band(left, held_out[variant], COLOURS[variant], variant)
        if variant != "float32":
            band(right, held_out[variant] - held_out["float32"], COLOURS[variant], variant)
    left.set(xlabel="step", ylabel="loss; pale: training batches, mean of ten", title="held-out")
    right.set(xlabel="step", title="held-out loss over that of float32, same seed")
    right.axhline(0, color=COLOURS["float32"], linewidth=1)
    left.legend(frameon=False, fontsize=8)
    save(made, folder / "sixteen_bit_large.png")

    made, axes = figure(2, "Small steps", 5, 4)
    for axis, metric in zip(axes, ("held-out loss", "distance from the start"), strict=True):
        for variant, curve in curves(rows, "small", metric).items():
            band(axis, curve, COLOURS[variant], variant)
        axis.set(xlabel="step", title=metric)
    axes[0].legend(frameon=False, fontsize=8)
    save(made, folder / "sixteen_bit_small.png")


# Methods -----------------------------------------------------------------------------------------


def method_conditions(rows: pandas.DataFrame) -> str:
    """Where, with what and when; the command of the first row of each."""
    body = []
    for benchmark in ("methods", "methods costs"):
        some = pick(rows, benchmark=benchmark)
        if some.empty:
            continue
        keys = ["job", "device", "commit", "threads"]
        order = some[::-1].drop_duplicates(keys)[keys]  # the newest first
        first = some.drop_duplicates(keys).set_index(keys)
        for key in order.itertuples(index=False):
            r = first.loc[tuple(key)]
            software = f"torch {r.torch}, Python {r.python}"
            body.append((f"`{r.command}`", key.device, f"{key.threads:.0f}", software, key.commit))
    header = ("command", "device", "threads", "software", "commit")
    return markdown(header, body) if body else NOT_YET


def chosen(rows: pandas.DataFrame, job: str, mode: str, name: str) -> pandas.DataFrame:
    """The rows of a method's runs at the lr that the validation rows chose."""
    wanted = dict(job=job, mode=mode, variant=name, budget=BUDGETS[job])
    some = pick(rows, benchmark="methods", **wanted)
    lr = chosen_lr(validated(some)) if len(some) else None
    return some.iloc[:0] if lr is None else pick(some, lr=lr)


def at_the_end(some: pandas.DataFrame, metric: str) -> pandas.Series:
    """By seed, after the last forward pass."""
    return pick(some, metric=metric).sort_values("forwards").groupby("seed")["median"].last()


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
            f"{cost['history']:.0f}" if len(cost) else "",
            f"{ratio:.2f}x" if ratio else "",
            f"{ratio * 2 / entry.forwards:.2f}x" if ratio else "",
            with_range(loss),
            with_range(accuracy),
            f"{runs.lr.iloc[0]:g} (of {len(losses)}{edge})",
            len(loss),
        )
        body.append((loss.mean(), cells))
    header = ("", "forwards a step", "bytes kept a weight", "bytes kept a group")
    times = ("a step over MeZO's", "a forward over MeZO's")
    cells_in_order = [cells for _, cells in sorted(body, key=lambda pair: pair[0])]
    columns = (*header, *times, "test loss", "test accuracy", "lr (of so many)", "seeds")
    return markdown(columns, cells_in_order) if body else NOT_YET


def plot_methods(rows: pandas.DataFrame, folder: Path) -> None:
    """Loss on the test rows against forward passes, at the chosen lr."""
    panels = {
        (job, mode): {
            entry.name: pick(chosen(rows, job, mode, entry.name), metric="test loss")
            for entry in ENTRIES
            if not entry.backward  # those are in the table
        }
        for job in BUDGETS
        for mode in MODES
    }
    panels = {key: some for key, some in panels.items() if any(len(c) for c in some.values())}
    made, axes = figure(len(panels), "Methods at equal forward passes", 5.5, 4.5)
    for axis, (key, some) in zip(axes, panels.items(), strict=True):
        for i, (name, points) in enumerate(some.items()):
            if len(points):
                curve = points.pivot(index="forwards", columns="seed", values="median")
                band(axis, curve, f"C{i % 10}", name, "o-" if i < 10 else "o--")
        axis.set(xlabel="forward passes", title=", ".join(key))
    # The first panel has every method that any has.
    labels = axes[0].get_legend_handles_labels()
    made.legend(*labels, loc="outside right upper", frameon=False, fontsize=8, handlelength=3)
    axes[0].set_ylabel("test loss")
    save(made, folder / "methods.png")


# Reliability -------------------------------------------------------------------------------------


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
