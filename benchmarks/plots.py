"""Plots, from the CSV alone: `python -m benchmarks.plots` draws them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import RESULTS, Row, find, linear_fit, read_rows

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
    """The parts of a step as stacked bars."""
    _step(find(read_rows(path), benchmark="step"), path.parent / "step.png")


def line_of(row: Row) -> str:
    """The name by which a row's line is known: its instruction set if it is native."""
    return row.isa or row.variant


def lines(rows: Sequence[Row]) -> list[str]:
    """The lines present, in the order of COLOURS."""
    present = {line_of(row) for row in rows}
    return [name for name in COLOURS if name in present]


def _figure(columns: int, title: str, width: float = 4.2) -> tuple[Any, list[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        1, columns, figsize=(width * columns, 3.6), squeeze=False, layout="constrained"
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


def _step(rows: list[Row], path: Path) -> None:
    lengths = sorted({r.tokens for r in rows}, key=lambda t: int(t.split("x")[1]))
    figure, axes = _figure(len(lengths), f"A step of SmolLM2-135M, float32 ({rows[0].device})", 6.0)
    for axis, tokens in zip(axes, lengths, strict=True):
        bars: dict[tuple[str, int, str], dict[str, float]] = {}
        for row in find(rows, tokens=tokens):
            method, part = row.what.rsplit(" ", 1)
            if part in PART_COLOURS:
                bars.setdefault((method, row.horizon, row.variant), {})[part] = row.median_s or 0
        names = sorted(bars, key=lambda b: (b[0] != "MeZO", b[1], b[2]))
        left = [0.0] * len(names)
        for part, colour in PART_COLOURS.items():
            widths = [bars[name].get(part, 0.0) for name in names]
            axis.barh(range(len(names)), widths, left=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for i, name in enumerate(names):
            optimizer = 1 - bars[name]["forwards"] / left[i] if left[i] else 0
            axis.text(left[i], i, f" {left[i]:.2f} s, {optimizer:.0%} optimizer", va="center")
        labels = [f"{m}{f' H={h}' if m != 'MeZO' else ''}, {v}" for m, h, v in names]
        axis.set_yticks(range(len(names)), labels)
        axis.invert_yaxis()
        axis.set(xlabel="seconds a step", title=f"{tokens} tokens", xlim=(0, 1.65 * max(left)))
    figure.legend(
        *axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3
    )
    _save(figure, path)


if __name__ == "__main__":
    for name, draw in (("kernels_cpu.csv", plot_kernels), ("step_cpu.csv", plot_step)):
        if (RESULTS / name).exists():
            draw(RESULTS / name)
