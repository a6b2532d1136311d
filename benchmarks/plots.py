"""Plots, from the CSV alone: `python -m benchmarks.plots` draws them again."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import methods
from benchmarks.paper import PUBLISHED
from benchmarks.rows import RESULTS, Row, find, linear_fit, read_rows
from benchmarks.step import MEZO, RELEASED, Method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "torch": "#8c8c8c",
    "torch plain": "#b0b0b0",
    "as released": "#c9c9c9",
    "portable": "#e0a030",
    "avx2": "#4c9be8",
    "avx512": "#1b4f9c",
}
PART_COLOURS = {"forwards": "#d5d8dc", "perturbation": "#e0a030", "update": "#1b4f9c"}


def plot_kernels(path: Path) -> None:
    """Speed over size, ratio over horizon, and time over horizon with its fit."""
    rows = find(read_rows(path), benchmark="kernels", threads=1)
    folder = path.parent
    _speed(rows, folder / "kernels_speed.png")
    _ratio(rows, folder / "kernels_ratio.png")
    _linear(rows, folder / "kernels_linear.png")


def plot_step(path: Path) -> None:
    """The parts of a step as stacked bars, in seconds."""
    rows = find(read_rows(path), benchmark="step")
    jobs = _jobs(rows)
    count = max(len(_bars(some)) for _, some in jobs)
    title = f"A step of SmolLM2-135M, float32 ({rows[0].device})"
    figure, axes = _figure(len(jobs), title, 6.0, 1.2 + 0.28 * count)
    for axis, (name, some) in zip(axes, jobs, strict=True):
        _stack(axis, _bars(some), 1.0, "s")
        axis.set(xlabel="seconds a step", title=f"{name} tokens")
    _parts_legend(figure, axes[0])
    _save(figure, path.parent / "step.png")


def plot_paper(folder: Path) -> None:
    """The same bars over MeZO's step as released, beside the two that the paper has."""
    files = [folder / "step_cpu.csv", folder / "paper_gpu.csv"]
    rows = [r for file in files if file.exists() for r in read_rows(file)]
    base = RELEASED[MEZO]
    panels = []
    for name, some in _jobs([r for r in rows if r.benchmark in ("step", "paper")]):
        bars = _bars(some)
        if base in bars:
            device = "CPU" if some[0].benchmark == "step" else "GPU"
            panels.append((f"{device}, {some[0].type}, {name} tokens", bars, bars[base]))
    published = {
        Method("in the paper", name): {"forwards": seconds}
        for name, (seconds, _) in PUBLISHED.items()
    }
    panels.insert(0, ("the paper's Table 7 (no split)", published, {"all": PUBLISHED["MeZO"][0]}))
    count = max(len(bars) for _, bars, _ in panels)
    title = "A step over MeZO's with library calls"
    figure, axes = _figure(len(panels), title, 5.5, 1.2 + 0.28 * count)
    for axis, (name, bars, unit) in zip(axes, panels, strict=True):
        _stack(axis, bars, sum(unit.values()), "x")
        axis.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
        axis.set(xlabel="times a MeZO step as released", title=name)
    _parts_legend(figure, axes[-1])
    _save(figure, folder / "paper.png")


def plot_horizon(folder: Path) -> None:
    """Time, the shares kept and the cosine against the horizon."""
    files = [folder / "horizon_cpu.csv", folder / "horizon_gpu.csv"]
    both = [read_rows(file) for file in files if file.exists()]
    rows = [r for some in both for r in some]
    figure, axes = _figure(2 + len(both), "AdaMeZO against its horizon H")
    for axis, some in zip(axes, both, strict=False):
        for part, colour in (("step", "#333333"), ("update", PART_COLOURS["update"])):
            line = sorted(find(some, what=f"AdaMeZO {part}"), key=lambda r: r.horizon)
            x, y = [r.horizon for r in line], [r.median_s or 0 for r in line]
            axis.plot(x, y, "o-", color=colour, markersize=4, linewidth=1, label=part)
        axis.set(ylabel="seconds", ylim=(0, None), title=line[0].device)
        axis.title.set_fontsize(8)
    for axis, what, title in (
        (axes[-2], "kept", "share of an average that is kept"),
        (axes[-1], "cosine", "update's cosine with the untruncated one"),
    ):
        found = [r for r in rows if r.what == what]
        for variant in dict.fromkeys(r.variant for r in found):
            line = sorted(find(found, variant=variant), key=lambda r: r.horizon)
            x, y = [r.horizon for r in line], [r.ratio or 0 for r in line]
            axis.plot(x, y, "o-", markersize=4, linewidth=1, label=variant)
        axis.set(title=title, ylim=(0, 1.02), xscale="log")
        ticks = sorted({r.horizon for r in found})
        axis.set_xticks(ticks, [str(h) for h in ticks])
        axis.minorticks_off()
    for axis in axes:
        axis.set_xlabel("horizon H")
        axis.grid(True, which="major", color="#eeeeee")
        axis.legend(frameon=False, fontsize=8)
    _save(figure, folder / "horizon.png")


def plot_methods(path: Path) -> None:
    """Loss on the test rows against forward passes, at the lr that the validation rows chose: the
    mean over seeds, and a band from the lowest to the highest."""
    runs = methods.read(path)
    panels = []
    for job, budget in methods.BUDGETS.items():
        for mode in methods.MODES:
            some = [
                (i, entry.name, methods.best(methods.found(runs, job, mode, entry.name, budget)))
                for i, entry in enumerate(methods.ENTRIES)
                if not entry.backward  # those are in the table
            ]
            if any(chosen for *_, chosen in some):
                panels.append((f"{job}, {mode}", some))
    figure, axes = _figure(len(panels), "Methods at equal forward passes", 5.5, 4.5)
    for axis, (title, some) in zip(axes, panels, strict=True):
        for i, name, chosen in some:
            if not chosen:
                continue
            points = list(zip(*(r.curve() for r in chosen), strict=True))
            x = [statistics.fmean(p[0] for p in at) for at in points]
            columns = [[p[1] for p in at] for at in points]
            colour, dash = f"C{i % 10}", "-" if i < 10 else "--"
            mean = [statistics.fmean(c) for c in columns]
            axis.plot(x, mean, dash, color=colour, label=name, marker="o", markersize=3)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(x, low, high, color=colour, alpha=0.07)
        axis.set(xlabel="forward passes", title=title)
        axis.grid(True, which="major", color="#eeeeee")
    # The first panel has every method that any has.
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        handlelength=3,
    )
    axes[0].set_ylabel("test loss")
    _save(figure, path.with_suffix(".png"))


def line_of(row: Row) -> str:
    """The name by which a row's line is known: its instruction set if it is native."""
    return row.isa or row.variant


def lines(rows: Sequence[Row]) -> list[str]:
    """The lines present, in the order of COLOURS."""
    present = {line_of(row) for row in rows}
    return [name for name in COLOURS if name in present]


def _figure(
    columns: int, title: str, width: float = 4.2, height: float = 3.6
) -> tuple[Any, list[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=10)
    return figure, list(axes[0])


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    # No date or version inside, so that the same CSV gives the same file.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _speed(rows: list[Row], path: Path) -> None:
    figure, axes = _figure(3, f"One thread, bfloat16 weights ({rows[0].device})")
    panels = (
        ("sample", 1, "z"),
        ("perturb", 1, "theta += scale z"),
        ("update", 10, "AdaMeZO update, H = 10"),
    )
    for axis, (what, horizon, title) in zip(axes, panels, strict=True):
        some = find(rows, what=what, horizon=horizon, type="bfloat16")
        for name in lines(some):
            if name in ("torch plain", "as released"):
                continue  # timed at one size alone
            line = sorted((r for r in some if line_of(r) == name), key=lambda r: r.elements)
            axis.errorbar(
                [r.elements for r in line],
                [(r.elements_per_s or 0) / 1e6 for r in line],
                # Quantiles of the time, as errors of the speed.
                yerr=[
                    [r.elements * (1 / (r.median_s or 1) - 1 / (r.q80_s or 1)) / 1e6 for r in line],
                    [r.elements * (1 / (r.q20_s or 1) - 1 / (r.median_s or 1)) / 1e6 for r in line],
                ],
                color=COLOURS[name],
                marker="o",
                markersize=4,
                capsize=2,
                label=name,
            )
        axis.set(xscale="log", yscale="log", xlabel="elements", title=title)
        axis.grid(True, which="major", color="#eeeeee")
    axes[0].set_ylabel("million elements a second")
    axes[0].legend(frameon=False)
    _save(figure, path)


def _ratio(rows: list[Row], path: Path) -> None:
    types = [t for t in ("float32", "bfloat16", "float16") if find(rows, type=t, what="update")]
    size = common_size(rows)
    figure, axes = _figure(len(types), f"Update against pure torch, one thread, {size:,} elements")
    for axis, name in zip(axes, types, strict=True):
        some = find(rows, what="update", type=name, elements=size, variant="native")
        horizons = sorted({r.horizon for r in some})
        isas = lines(some)
        for i, isa in enumerate(isas):
            ratios = [
                next((r.ratio or 0 for r in some if (r.isa, r.horizon) == (isa, h)), 0.0)
                for h in horizons
            ]
            bars = axis.bar(
                [h + (i - (len(isas) - 1) / 2) * 0.27 for h in range(len(horizons))],
                ratios,
                0.26,
                color=COLOURS[isa],
                label=isa,
            )
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.axhline(1, color=COLOURS["torch"], linewidth=1)
        axis.set_xticks(range(len(horizons)), [str(h) for h in horizons])
        axis.set(xlabel="horizon H", title=name)
    axes[0].set_ylabel("times as fast as pure torch")
    axes[0].legend(frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.0))
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top * 1.15)
    _save(figure, path)


def common_size(rows: list[Row]) -> int:
    """The largest size at which every horizon was timed for all instruction sets and types."""
    some = find(rows, what="update", variant="native", threads=1)
    everything = {(r.isa, r.horizon, r.type) for r in some}
    sizes = {r.elements for r in some}
    full = [
        n
        for n in sizes
        if {(r.isa, r.horizon, r.type) for r in some if r.elements == n} == everything
    ]
    return max(full or sizes)


def _linear(rows: list[Row], path: Path) -> None:
    figure, axes = _figure(2, "Update of bfloat16 weights, one thread", 5.0)
    both = linear_lines(rows)
    for axis, fits in zip(axes, both, strict=True):
        for name, x, y in fits:
            slope, intercept, r2 = linear_fit(x, y)
            axis.plot(x, y, "o", color=COLOURS[name], markersize=4)
            axis.plot(
                x,
                [intercept + slope * at for at in x],
                color=COLOURS[name],
                linewidth=1,
                label=f"{name}: R² = {r2:.5f}",
            )
        if fits:
            axis.legend(frameon=False, fontsize=8)
        axis.grid(True, which="major", color="#eeeeee")
    axes[0].set(
        xlabel="horizon H",
        ylabel="seconds",
        title=f"over H, {common_size(rows):,} elements",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes[1].set(xlabel="elements", ylabel="seconds", title="over elements, H = 10")
    # On linear axes all but the largest size would sit in one corner.
    axes[1].set(xscale="log", yscale="log")
    _save(figure, path)


Line = tuple[str, list[float], list[float]]


def linear_lines(rows: list[Row]) -> tuple[list[Line], list[Line]]:
    """(name, x, seconds) of the one-thread bfloat16 update: over the horizon at `common_size`, and
    over the elements at H = 10."""
    some = find(rows, benchmark="kernels", what="update", type="bfloat16", threads=1)
    if not some:
        return [], []
    size = common_size(some)
    over_horizon, over_elements = [], []
    for name in lines(some):
        line = [r for r in some if line_of(r) == name]
        at = sorted(find(line, elements=size), key=lambda r: r.horizon)
        if len(at) >= 3:
            x = [float(r.horizon) for r in at]
            over_horizon.append((name, x, [r.median_s or 0.0 for r in at]))
        at = sorted(find(line, horizon=10), key=lambda r: r.elements)
        if len(at) >= 3:
            x = [float(r.elements) for r in at]
            over_elements.append((name, x, [r.median_s or 0.0 for r in at]))
    return over_horizon, over_elements


Bars = dict[Method, dict[str, float]]


def _jobs(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of a step by job: type, batch and length, in the order of the file."""
    jobs: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        jobs.setdefault((row.benchmark, row.type, row.tokens), []).append(row)
    return [(tokens, some) for (_, _, tokens), some in jobs.items()]


def _bars(rows: list[Row]) -> Bars:
    """Seconds of each part of a step, by method."""
    bars: Bars = {}
    for row in rows:
        method, part = row.what.rsplit(" ", 1)
        if part in PART_COLOURS and row.median_s:
            name = Method(row.variant, method, row.horizon)
            bars.setdefault(name, {})[part] = row.median_s
    return bars


def _stack(axis: Axes, bars: Bars, unit: float, symbol: str) -> None:
    """Stacked bars in multiples of `unit` seconds, with their sums."""
    left = [0.0] * len(bars)
    for part, colour in PART_COLOURS.items():
        widths = [parts.get(part, 0.0) / unit for parts in bars.values()]
        axis.barh(range(len(bars)), widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, ((method, parts), total) in enumerate(zip(bars.items(), left, strict=True)):
        optimizer = 1 - parts["forwards"] / unit / total
        # A backward pass stands in the update.
        told = len(parts) > 1 and method.method != "AdamW"
        split = f", {optimizer:.0%} optimizer" if told else ""
        axis.text(total, i, f" {total:.2f} {symbol}{split}", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [str(name) for name in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.5 * max(left))


def _parts_legend(figure: Any, axis: Axes) -> None:
    figure.legend(
        *axis.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3
    )


if __name__ == "__main__":
    for name, draw in (("kernels_cpu.csv", plot_kernels), ("step_cpu.csv", plot_step)):
        if (RESULTS / name).exists():
            draw(RESULTS / name)
    plot_paper(RESULTS)
    if (RESULTS / "horizon_cpu.csv").exists():
        plot_horizon(RESULTS)
    if methods.RUNS.exists():
        plot_methods(methods.RUNS)
