"""Tables and plots of the kernels: docs/performance.md."""

from __future__ import annotations

from pathlib import Path

import pandas

from benchmarks.render.style import COLOURS, NOT_YET, figure, fit, markdown, over, save
from benchmarks.results import pick

LINES = ("torch", "portable", "avx2", "avx512")
KINDS = ("stochastic", "rademacher", "rademacher, stochastic")
KEY = ["what", "type", "horizon", "threads", "elements"]


def table_of(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The kernels' rows with their line (an instruction set, or another variant), million elements
    a second, how many times as fast as torch at its best, and cycles a normal."""
    some = pick(rows, benchmark="kernels")
    some = some.assign(
        line=some.isa.where(some.isa.notna(), some.variant),
        speed=some.elements / some["median"] / 1e6,
        cycles=some.clock_hz * some["median"] / (some.elements * some.horizon),
    )
    return some.assign(ratio=over(some, KEY, variant="torch"))


def named(what: str, horizon: float) -> str:
    return f"update H = {horizon:.0f}" if what == "update" else what


def speeds(rows: pandas.DataFrame) -> str:
    """One thread, at the largest size that all instruction sets were timed at."""
    body = []
    cases = [("sample", 1), ("perturb", 1), *(("update", h) for h in (1, 5, 10, 20, 50))]
    for what, horizon in cases:
        for kind in ("float32", "bfloat16", "float16"):
            group = pick(table_of(rows), threads=1, what=what, horizon=horizon, type=kind)
            full = pick(group, line="avx2").elements
            size = (full if len(full) else group.elements).max()
            cells = {r.line: r for r in pick(group, elements=size).itertuples()}
            texts = [""] * len(LINES)
            for i, line in enumerate(LINES):
                if r := cells.get(line):
                    more = "" if line == "torch" else f" ({r.ratio:.1f}x, {r.cycles:.2f} c)"
                    texts[i] = f"{r.speed:.3g}{more}"
            if cells:
                body.append((f"{named(what, horizon)}, {kind}", f"{size:,.0f}", *texts))
    return markdown(("M elements/s", "elements", "torch", "portable", "AVX2", "AVX-512"), body)


def beside(rows: pandas.DataFrame, others: tuple[str, ...], cases: list, header: tuple) -> str:
    """The fastest exact kernel beside others at the same size, one thread."""
    body = []
    for what, horizon, kind in cases:
        group = pick(table_of(rows), threads=1, what=what, horizon=horizon, type=kind)
        group = pick(group, elements=pick(group, variant=others[-1]).elements.max())
        cells = {r.variant: r for r in group.itertuples() if r.variant in others}
        if not cells:
            continue
        ours = group.loc[pick(group, variant="native")["median"].idxmin()]
        library = "torch" in others
        isa = f" ({ours.isa})" if library else ""
        texts = []
        for name in others:
            ratio = ours.speed / cells[name].speed
            shown = f"{ratio:.1f}x" if library else f"{1 / ratio:.2f}x"
            texts.append(f"{cells[name].speed:.3g} ({shown})")
        body.append((f"{named(what, horizon)}, {kind}", f"{ours.speed:.3g}{isa}", *texts))
    return markdown(header, body) if body else NOT_YET


def baselines(rows: pandas.DataFrame) -> str:
    """The three ways to do it with library calls, beside each other."""
    others = ("torch", "torch plain", "as released")
    cases = [(what, h, "bfloat16") for what, h in (("perturb", 1), ("update", 10), ("update", 20))]
    return beside(
        rows, others, cases, ("M elements/s (ours is so many times as fast)", "ours", *others)
    )


def kinds(rows: pandas.DataFrame) -> str:
    """Stochastic stores and signs, beside normals stored to nearest."""
    cases = [
        (what, h, kind)
        for what, h in (("perturb", 1), ("update", 10))
        for kind in ("bfloat16", "float16")
    ]
    others = tuple(f"native, {kind}" for kind in KINDS)
    return beside(rows, others, cases, ("M elements/s, one thread", "exact", *KINDS))


def threads(rows: pandas.DataFrame) -> str:
    """Native kernels with all threads over one, and the memory traffic beside memcpy's."""
    some = table_of(rows)
    several = pick(some, variant="native")
    several = several[(several.threads > 1) & (several.elements >= 1e6)]
    size = {"float32": 4, "bfloat16": 2, "float16": 2}
    body = []
    for r in several.itertuples():
        if (r.what, r.horizon) not in (("perturb", 1), ("update", 10)):
            continue
        same = dict(type=r.type, elements=r.elements)
        one = pick(some, **same, what=r.what, horizon=r.horizon, line=r.isa, threads=1)["median"]
        copies = pick(some, **same, what="memcpy", threads=r.threads).speed

        def traffic(speed: float, bytes_moved: int = 2 * size[r.type]) -> str:
            return f"{bytes_moved * speed / 1e3:.3g}"

        cells = (f"{r.elements:,.0f}", int(r.threads), f"{one.iloc[0] / r.median:.2f}x")
        copied = traffic(copies.iloc[0]) if len(copies) else ""
        name = f"{named(r.what, r.horizon)}, {r.type}"
        body.append((name, *cells, f"{r.ratio:.1f}x", traffic(r.speed), copied))
    header = ("", "elements", "threads", "over one thread", "over torch", "GB/s", "memcpy GB/s")
    return markdown(header, body)


def common_size(some: pandas.DataFrame) -> float:
    """The largest size at which every horizon was timed for all instruction sets and types."""
    updates = pick(some, what="update", variant="native", threads=1)
    counts = updates.groupby("elements").size()
    return float(counts[counts == counts.max()].index.max())


def lines(rows: pandas.DataFrame) -> list[tuple[str, str, pandas.Series]]:
    """(line, x, seconds by x) of the one-thread bfloat16 update: over the horizon at `common_size`,
    and over the elements at H = 10."""
    some = table_of(rows)
    update = pick(some, what="update", type="bfloat16", threads=1)
    made = []
    for x, fixed in (("horizon", {"elements": common_size(some)}), ("elements", {"horizon": 10})):
        for line in LINES:
            at = pick(update, line=line, **fixed).set_index(x)["median"].sort_index()
            if len(at) >= 3:
                made.append((line, x, at))
    return made


def fits(rows: pandas.DataFrame) -> str:
    """The lines of kernels_linear.png as numbers."""
    body = []
    units = {
        "horizon": ("H", "ms a direction", 1e3),
        "elements": ("elements, H = 10", "ns an element", 1e9),
    }
    for line, x, at in lines(rows):
        title, unit, scale = units[x]
        slope, intercept, r2 = fit(at.index, at)
        worst = abs(slope * at.index + intercept - at) / at
        cells = (f"{slope * scale:.4g} {unit}", f"{intercept * 1e3:.3g} ms", f"{r2:.6f}")
        body.append((f"{line}, over {title}", len(at), *cells, f"{worst.max():.1%}"))
    header = ("update of bfloat16, one thread", "points", "slope", "intercept", "R^2")
    return markdown((*header, "farthest point off the line"), body)


def budget(rows: pandas.DataFrame) -> str:
    """Instructions and predicted times of the GPU kernels, those of both compilers."""
    some = pick(rows, benchmark="budget")
    counts = pick(some, metric="instructions a normal").set_index(
        ["target", "what", "variant", "by"]
    )
    times = pick(some, metric="time")
    keys = times[["target", "what", "variant", "horizon"]].drop_duplicates()
    body = []
    for key in sorted(keys.itertuples(index=False), key=lambda k: (k.target != "sm_90", k.target)):
        cells: list[str] = []
        for by in ("CUDA", "Triton"):
            count = counts["median"].get((key.target, key.what, key.variant, by))
            at = pick(times, **key._asdict(), by=by)["median"].dropna()
            predicted = f"{at.iloc[0] * 1e3:.2f}" if len(at) else ""
            there = len(pick(times, **key._asdict(), by=by)) > 0
            cells += [f"{count:.1f}" if count and there else "", predicted]
        if any(cells):
            body.append((f"{named(key.what, key.horizon)}, {key.variant}, {key.target}", *cells))
    header = ("", "CUDA: instructions a normal", "predicted ms")
    return markdown((*header, "Triton: instructions a normal", "predicted ms"), body)


# Plots -------------------------------------------------------------------------------------------


def plot(rows: pandas.DataFrame, folder: Path) -> None:
    """Speed over size, ratio over horizon, and time over horizon and size with its fit."""
    some = pick(table_of(rows), threads=1)
    made, axes = figure(3, f"One thread, bfloat16 weights ({some.iloc[0].device})")
    panels = {"sample": "z", "perturb": "theta += scale z", "update": "AdaMeZO update, H = 10"}
    for axis, (what, title) in zip(axes, panels.items(), strict=True):
        for line in LINES:
            at = pick(
                some, what=what, line=line, type="bfloat16", horizon=10 if what == "update" else 1
            )
            at = at.sort_values("elements")
            ends = [abs(at.elements / at[q] / 1e6 - at.speed) for q in ("p80", "p20")]
            style = dict(color=COLOURS[line], marker="o", markersize=4, capsize=2, label=line)
            axis.errorbar(at.elements, at.speed, yerr=ends, **style)
        axis.set(xscale="log", yscale="log", xlabel="elements", title=title)
    axes[0].set_ylabel("million elements a second")
    axes[0].legend(frameon=False)
    save(made, folder / "kernels_speed.png")

    size = common_size(some)
    made, axes = figure(3, f"Update against pure torch, one thread, {size:,.0f} elements")
    for axis, kind in zip(axes, ("float32", "bfloat16", "float16"), strict=True):
        at = pick(some, what="update", type=kind, elements=size, variant="native")
        bars = at.pivot(index="horizon", columns="line", values="ratio")[list(LINES[1:])]
        bars.index = bars.index.astype(int)
        bars.plot.bar(ax=axis, color=COLOURS, width=0.8, rot=0, legend=kind == "float32")
        for container in axis.containers:
            axis.bar_label(container, fmt="%.1f", fontsize=7)
        axis.axhline(1, color=COLOURS["torch"], linewidth=1)
        axis.set(xlabel="horizon H", title=kind, ylim=(0, 1.15 * bars.max(axis=None)))
    axes[0].set_ylabel("times as fast as pure torch")
    save(made, folder / "kernels_ratio.png")

    made, axes = figure(2, "Update of bfloat16 weights, one thread", 5.0)
    for line, x, at in lines(rows):
        axis = axes[x == "elements"]
        slope, intercept, r2 = fit(at.index, at)
        axis.plot(at.index, at, "o", color=COLOURS[line], markersize=4)
        label = f"{line}: R² = {r2:.5f}"
        axis.plot(at.index, slope * at.index + intercept, color=COLOURS[line], label=label)
    axes[0].set(xlabel="horizon H", ylabel="seconds", title=f"over H, {size:,.0f} elements")
    axes[0].set(xlim=(0, None), ylim=(0, None))
    axes[1].set(xlabel="elements", ylabel="seconds", title="over elements, H = 10")
    axes[1].set(xscale="log", yscale="log")  # or all but the largest would sit in one corner
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    save(made, folder / "kernels_linear.png")
