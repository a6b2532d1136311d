"""Tables and plots of the kernels: docs/performance_kernels.md and performance_gpu.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas

from adamezo.plots import figure, save
from benchmarks.render.style import COLOURS, NOT_YET, markdown, over
from benchmarks.results import pick
from benchmarks.sass import PIPES

LINES = ("torch", "portable", "avx2", "avx512")
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


Columns = dict[str, dict[str, Any]]
"""The columns of a table by title: of which rows each is."""

ISAS: Columns = {
    "torch": dict(line="torch"),
    "portable": dict(line="portable"),
    "AVX2": dict(line="avx2"),
    "AVX-512": dict(line="avx512"),
}
BASELINES: Columns = {
    "ours, AVX-512": dict(line="avx512"),
    "as released": dict(line="as released"),
    "torch": dict(line="torch"),
}
KINDS: Columns = {
    "exact": dict(line="avx512"),
    "stochastic": dict(variant="native, stochastic"),
    "rademacher": dict(variant="native, rademacher"),
    "rademacher, stochastic": dict(variant="native, rademacher, stochastic"),
}
THREADS: Columns = {
    "one thread": dict(line="avx512", threads=1),
    "two threads": dict(line="avx512", threads=2),
    "torch, two threads": dict(line="torch", threads=2),
    "memcpy, two threads": dict(what="memcpy", threads=2, horizon=None),
}
TYPES = ("float32", "bfloat16", "float16")
ALL = [("sample", 1), ("perturb", 1), *(("update", h) for h in (1, 5, 10, 20, 50))]


def speeds(
    rows: pandas.DataFrame,
    columns: Columns,
    cases: Sequence[tuple[str, int]],
    types: Sequence[str] = TYPES,
    sizes: Sequence[float] | None = None,
) -> str:
    """Million elements a second of cases (operation, horizon), on one thread if a column has no
    other number. Without `sizes` at the largest size at which the last but one column was timed."""
    some = table_of(rows)
    body = []
    for what, horizon, kind in [(w, h, t) for w, h in cases for t in types]:
        wanted = dict(what=what, horizon=horizon, type=kind, threads=1)
        found = {t: pick(some, **wanted | columns[t]) for t in columns}
        judged = found[list(columns)[-2]].elements
        for size in sizes or [judged.max()] * (len(judged) > 0):
            cells = []
            for at in (pick(found[title], elements=size) for title in columns):
                cell = f"{at.speed.iloc[0]:.3g}" if len(at) else ""
                if len(at) and at.ratio.notna().all() and at.line.iloc[0] != "torch":
                    cell += f" ({at.ratio.iloc[0]:.1f}x, {at.cycles.iloc[0]:.2f} c)"
                cells.append(cell)
            if any(cells):
                body.append((f"{named(what, horizon)}, {kind}", f"{size:,.0f}", *cells))
    return markdown(("M elements/s", "elements", *columns), body)


def low_rank(rows: pandas.DataFrame) -> str:
    """Million elements a second of each kind of directions, and in brackets the multiple of a
    copy's time."""
    some = pick(rows, benchmark="low_rank")
    if some.empty:
        return NOT_YET
    kinds = [v for v in some.variant.drop_duplicates() if v != "memcpy"]
    body = []
    cases = pick(some, variant=kinds[0])[["what", "type", "horizon", "elements"]]
    for case in cases.drop_duplicates().itertuples(index=False):
        at = pick(some, type=case.type).reset_index(drop=True)
        copies = pick(at, variant="memcpy")["median"].median()
        cells = []
        for kind in kinds:
            seconds = pick(at, variant=kind, what=case.what, horizon=case.horizon)["median"].iloc[0]
            cells.append(f"{case.elements / seconds / 1e6:,.0f} ({seconds / copies:.2g}x)")
        body.append((f"{named(case.what, case.horizon)}, {case.type}", *cells))
    titles = [kind.removeprefix("native, ") for kind in kinds]
    return markdown(("M elements/s", *titles), body)


def normals(rows: pandas.DataFrame) -> str:
    """Million normals a second of each generator, and in brackets the multiple of ours."""
    some = pick(rows, benchmark="normals")
    if some.empty:
        return NOT_YET
    some = some.assign(line=some.variant + ("; " + some.isa).fillna(""))
    sizes = sorted(some.elements.unique())
    ours = {n: pick(some, elements=n).iloc[0]["median"] for n in sizes}  # the fastest set first
    body = []
    for line in some.line.drop_duplicates():
        seconds = {n: pick(some, line=line, elements=n)["median"].iloc[0] for n in sizes}
        cells = [f"{n / t / 1e6:,.0f} ({ours[n] / t:.2f}x)" for n, t in seconds.items()]
        body.append((line.replace("native; ", "ours, "), *cells))
    return markdown(("M normals/s", *(f"{n:,.0f}" for n in sizes)), body)


def fits(rows: pandas.DataFrame) -> str:
    """The update's time as a straight line over the horizon, and over the elements. Points weigh
    1 / seconds^2, as a time's noise is proportional to it."""
    update = pick(table_of(rows), what="update", type="bfloat16", threads=1)
    body = []
    for x, fixed, title, unit in (
        ("horizon", dict(elements=1e6), "H, 1,000,000 elements", 1e3),
        ("elements", dict(horizon=10), "elements, H = 10", 1e9),
    ):
        for line in LINES:
            at = pick(update, line=line, **fixed).set_index(x)["median"].sort_index()
            slope, intercept = numpy.polyfit(at.index, at, 1, w=1 / at)
            worst = (abs(slope * at.index + intercept - at) / at).max()
            cells = (f"{slope * unit:.4g}", f"{intercept * 1e3:.3g} ms", f"{worst:.1%}")
            body.append((f"{line}, over {title}", len(at), *cells))
    header = ("update of bfloat16", "points", "ms a direction, ns an element", "and once")
    return markdown((*header, "farthest point off the line"), body)


# An H100 or H200: four schedulers in each multiprocessor issue one instruction for 32 elements a
# cycle. The clock is assumed; `gpu` has measured ones.
MULTIPROCESSORS = 132
CYCLES_PER_S = MULTIPROCESSORS * 4 * 32 * 1.7e9  # of a pipe, for one of a warp's 32 elements
BYTES_PER_S = 3.0e12  # of a copy, read and written


def at_best_ms(kernel: pandas.Series, horizon: int, weights: float = 1.3e9) -> float:
    """Milliseconds that an H100 needs to issue a kernel's instructions, to compute them or to move
    its bytes."""
    return 1e3 * weights * max(needs(kernel, horizon, CYCLES_PER_S, BYTES_PER_S).values())


def needs(
    kernel: pandas.Series, horizon: int, cycles_per_s: float, bytes_per_s: float
) -> dict[str, float]:
    """Seconds that a weight keeps each part of a GPU busy."""
    found = {"memory": kernel["bytes moved a weight"] / bytes_per_s}
    for pipe in PIPES:
        name = "instructions" if pipe == "issue" else f"{pipe} cycles"
        cycles = horizon * kernel.get(f"{name} a normal", 0) + kernel.get(f"{name} a weight", 0)
        found[pipe] = cycles / cycles_per_s
    return found


def budget(rows: pandas.DataFrame) -> str:
    """What each GPU kernel is made of, by both compilers, and the time that it needs at least."""
    some = pick(rows, benchmark="budget")
    kernels = some.pivot(index=["what", "variant", "by"], columns="metric", values="median")
    body = []
    for what, variant in some[["what", "variant"]].drop_duplicates().itertuples(index=False):
        horizon = 10 if what == "update" else 0
        for by in ("CUDA", "Triton"):
            if (what, variant, by) not in kernels.index:
                continue
            kernel = kernels.loc[what, variant, by]
            counts = [kernel[f"instructions a {of}"] for of in ("normal", "weight")]
            cells = [f"{kernel.registers:.0f}", *(f"{n:.1f}" if n else "" for n in counts)]
            name = f"{named(what, horizon)}, {variant}"
            busy = needs(kernel, horizon, CYCLES_PER_S, BYTES_PER_S)
            bound = max(busy, key=busy.__getitem__)
            body.append((name, by, *cells, f"{at_best_ms(kernel, horizon):.2f}", bound))
    header = ("kernel", "compiler", "registers", "instructions a normal", "a weight besides")
    return markdown((*header, "ms at best", "bound by"), body)


def gpu(rows: pandas.DataFrame) -> str:
    """Kernels on a GPU at the largest size: their speed, and the part of the time that the slower
    of two things needs at least: their bytes at the speed of a copy of the same run, and their
    instructions at the measured clock."""
    some = pick(rows, benchmark="gpu_kernels", type="bfloat16")
    if some.empty:
        return NOT_YET
    made = pick(rows, benchmark="budget").pivot(
        index=["what", "variant", "by"], columns="metric", values="median"
    )
    largest = some[some.elements == some.elements.max()]
    copies = pick(largest, variant="memcpy")
    rate = 4 * copies.elements.iloc[0] / copies["median"].min()  # bytes read and written
    body = []
    for row in largest[largest.variant != "memcpy"].itertuples(index=False):
        name, by = row.variant, "CUDA"
        if name.endswith(", Triton"):
            name, by = name.removesuffix(", Triton"), "Triton"
        key = row.what, name.removesuffix(", nearest"), by
        part, bound = "", ""
        if key in made.index and row.clock_hz > 0:
            kernel = made.loc[key]
            horizon = row.horizon if row.what == "update" else 0
            busy = needs(kernel, horizon, MULTIPROCESSORS * 4 * 32 * row.clock_hz, rate)
            bound = max(busy, key=busy.__getitem__)
            part = f"{busy[bound] * row.elements / row.median:.0%}"
        speed = f"{row.elements / row.median / 1e9:.3g}"
        body.append((f"{named(row.what, row.horizon)}, {row.variant}", speed, part, bound))
    return markdown(("bfloat16", "G weights/s", "of the bound", "bound by"), body)


def plot(rows: pandas.DataFrame, folder: Path) -> None:
    """Speed over size."""
    some = pick(table_of(rows), threads=1)
    made, axes = figure(3, f"One thread, bfloat16 weights ({some.iloc[0].device})")
    for axis, (what, horizon) in zip(axes, ALL[:2] + [("update", 10)], strict=True):
        at = pick(some, what=what, line=LINES, type="bfloat16", horizon=horizon)
        at.pivot(index="elements", columns="line", values="speed").plot(
            ax=axis, style="o-", color=COLOURS, loglog=True, legend=False, markersize=4
        )
        axis.set(xlabel="elements", title=named(what, horizon))
    axes[0].set_ylabel("million elements a second")
    save(made, folder / "kernels_speed.png")
