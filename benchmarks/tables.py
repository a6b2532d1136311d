"""Rewrites the tables of the documents in PAGES from the CSV files.

python -m benchmarks.tables
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import drift, faithful, methods, small_steps
from benchmarks.horizon import BETAS, HORIZONS
from benchmarks.kernels import KINDS
from benchmarks.method_costs import Cost, read_costs
from benchmarks.paper import LENGTHS, METHODS, PUBLISHED, TYPES
from benchmarks.plots import line_of, linear_lines
from benchmarks.report import KERNELS_AND_STEP, PAPER, Demand, judged, load
from benchmarks.rows import RESULTS, Row, find, linear_fit, markdown, quantile, read_rows
from benchmarks.step import LONG, MEZO, RELEASED, SHORT, Method, share

ROOT = Path(__file__).parent.parent


def demands_block(rows: list[Row], demands: Sequence[Demand]) -> str:
    return markdown(("asked for", "bound", "measured", "verdict"), judged(rows, demands))


def performance_blocks(rows: list[Row]) -> dict[str, str]:
    """The text of every marked block of docs/performance.md, by its name."""
    return {
        "conditions": conditions_block(rows, "kernels", "step"),
        "demands": demands_block(rows, KERNELS_AND_STEP),
        "kernels": kernels_block(rows),
        "baselines": baselines_block(rows),
        "kinds": kinds_block(rows),
        "threads": threads_block(rows),
        "fits": fits_block(rows),
        "step": step_block(rows, "step"),
        "memory": memory_block(rows),
        "budget": budget_block(rows),
    }


def paper_blocks(rows: list[Row]) -> dict[str, str]:
    """Those of docs/paper.md."""
    return {
        "paper_conditions": conditions_block(rows, "step", "paper"),
        "paper_gpu": on_a_gpu(rows, "paper", "python -m benchmarks.paper"),
        "paper_time": beside_the_paper(rows, "step"),
        "paper_memory": beside_the_paper(rows, "peak"),
        "paper_demands": demands_block(rows, PAPER),
        "paper_split": step_block(rows, "paper"),
    }


def horizon_blocks(rows: list[Row]) -> dict[str, str]:
    """Those of docs/horizon.md."""
    some = find(rows, benchmark="horizon")
    return {
        "horizon_conditions": conditions_block(rows, "horizon"),
        "horizon_gpu": on_a_gpu(some, "horizon", "python -m benchmarks.horizon --device cuda"),
        "horizon_advice": advice_block(some),
        "horizon_cost": cost_block(some),
        "horizon_distance": distance_block(some),
    }


def readme_blocks(rows: list[Row]) -> dict[str, str]:
    return {"numbers": summary_block(rows)}


def perturbation_blocks(rows: list[Row]) -> dict[str, str]:
    return {
        **drift.blocks(read_rows(RESULTS / "drift.csv")),
        "faithful": faithful.block(RESULTS / "faithful.csv"),
        "small-steps": small_steps.block(RESULTS / "small_steps.csv"),
    }


def methods_blocks(rows: list[Row]) -> dict[str, str]:
    runs, costs = methods.read(methods.RUNS), read_costs(methods.COSTS)
    tables = {
        f"methods_{job}_{mode}": compared_block(runs, costs, job, mode)
        for job in methods.BUDGETS
        for mode in methods.MODES
    }
    return {"methods_conditions": methods_conditions(runs, costs), **tables}


PAGES: dict[Path, Callable[[list[Row]], dict[str, str]]] = {
    ROOT / "docs" / "performance.md": performance_blocks,
    ROOT / "docs" / "paper.md": paper_blocks,
    ROOT / "docs" / "horizon.md": horizon_blocks,
    ROOT / "docs" / "perturbation.md": perturbation_blocks,
    ROOT / "docs" / "methods.md": methods_blocks,
    ROOT / "README.md": readme_blocks,
}


def summary_block(rows: list[Row]) -> str:
    """The few numbers of the README: one core's kernels, then the main job's step."""
    body: list[tuple[object, ...]] = []
    kernel = dict(benchmark="kernels", type="bfloat16", elements=10_000_000, threads=1)
    for title, what, horizon in [
        ("theta += c z, one core", "perturb", 1),
        ("AdaMeZO update, H = 10, one core", "update", 10),
        ("AdaMeZO update, H = 20, one core", "update", 20),
    ]:
        columns = dict(kernel, what=what, horizon=horizon)
        ours = max(find(rows, variant="native", **columns), key=lambda r: r.elements_per_s or 0)
        fastest, plain = (
            find(rows, variant=v, **columns)[0].elements_per_s or 1.0
            for v in ("torch", "torch plain")
        )
        speed = ours.elements_per_s or 0.0
        body.append(
            (
                f"{title}, bfloat16",
                f"{speed / 1e6:,.0f} M/s",
                f"{fastest / 1e6:,.0f} M/s ({speed / fastest:.1f}x)",
                f"{plain / 1e6:,.0f} M/s ({speed / plain:.1f}x)",
            )
        )
    for tokens in ("16x32", "16x128"):
        columns = dict(benchmark="step", tokens=tokens)
        for method, horizon in (("MeZO", 1), ("AdaMeZO", 10)):
            found = {
                r.variant: r
                for r in find(rows, **columns, what=f"{method} step", horizon=horizon)
                if r.median_s
            }
            if "ours" in found and "torch" in found:
                ours, fast = found["ours"].median_s or 0.0, found["torch"].median_s or 0.0
                of_h = "" if method == "MeZO" else f", H = {horizon}"
                title = f"{method} step{of_h}, {tokens.replace('x', ' x ')} tokens"
                body.append((title, f"{ours:.2f} s", f"{fast:.2f} s ({fast / ours:.1f}x)", ""))
    header = ("", "adamezo", "torch at its fastest", "torch as one writes it")
    return markdown(header, body)


def conditions_block(rows: list[Row], *names: str) -> str:
    body = []
    some_of: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        if r.benchmark in names:
            some_of.setdefault((r.benchmark, r.device), []).append(r)
    for some in some_of.values():
        row = some[0]
        spreads = [
            ((r.q80_s or 0) - (r.q20_s or 0)) / r.median_s for r in some if r.median_s is not None
        ]
        spread = f"{quantile(spreads, 0.5):.1%}" if spreads else ""
        clock = f"{row.clock_hz / 1e9:.2f} GHz ({row.clock_source})" if row.clock_hz else ""
        software = f"torch {row.torch}, Python {row.python}, {row.compiler}"
        body.append((f"`{row.command}`", row.device, clock, software, row.commit, row.date, spread))
    return markdown(
        ("command", "device", "clock of a core", "software", "commit", "date", "spread"), body
    )


def kernels_block(rows: list[Row]) -> str:
    """One thread, at the largest size that all instruction sets were timed at."""
    some = [r for r in find(rows, benchmark="kernels", threads=1) if r.what != "memcpy"]
    body = []
    for what, horizon in [
        ("sample", 1),
        ("perturb", 1),
        *(("update", h) for h in (1, 5, 10, 20, 50)),
    ]:
        for kind in ("float32", "bfloat16", "float16"):
            group = find(some, what=what, horizon=horizon, type=kind)
            full = [r.elements for r in group if r.isa == "avx2"] or [r.elements for r in group]
            if not full:
                continue
            group = find(group, elements=max(full))
            cells = {line_of(r): r for r in group}
            name = what if what != "update" else f"update H = {horizon}"
            body.append(
                [f"{name}, {kind}", f"{max(full):,}"]
                + [_speed(cells.get(line)) for line in ("torch", "portable", "avx2", "avx512")]
            )
    return markdown(("M elements/s", "elements", "torch", "portable", "AVX2", "AVX-512"), body)


def _speed(row: Row | None) -> str:
    if row is None:
        return ""
    text = f"{(row.elements_per_s or 0) / 1e6:.3g}"
    if row.variant == "torch":
        return text
    cycles = f", {row.cycles_per_normal:.2f} c" if row.cycles_per_normal else ""
    return f"{text} ({row.ratio or 0:.1f}x{cycles})"


def baselines_block(rows: list[Row]) -> str:
    """The three ways to do it with library calls, beside each other."""
    body = []
    for what, horizon in (("perturb", 1), ("update", 10), ("update", 20)):
        group = find(rows, benchmark="kernels", what=what, horizon=horizon, threads=1)
        other = [r for r in group if r.variant in ("torch plain", "as released")]
        if not other:
            continue
        same = find(group, type=other[0].type, elements=other[0].elements)
        fastest = min(same, key=lambda r: r.median_s or 0.0)
        cells = {r.variant: r for r in same}
        body.append(
            [
                f"{what}{f' H = {horizon}' if what == 'update' else ''}, {fastest.type}",
                f"{(fastest.elements_per_s or 0) / 1e6:.3g} ({fastest.isa})",
                *(
                    f"{(cells[name].elements_per_s or 0) / 1e6:.3g} "
                    f"({(cells[name].median_s or 0) / (fastest.median_s or 1):.1f}x)"
                    for name in ("torch", "torch plain", "as released")
                ),
            ]
        )
    header = ("M elements/s (ours is so many times as fast)", "ours")
    return markdown((*header, "torch", "torch plain", "as released"), body)


def kinds_block(rows: list[Row]) -> str:
    """Stochastic stores and signs, beside normals stored to nearest."""
    body = []
    for what, horizon in (("perturb", 1), ("update", 10)):
        for kind in ("bfloat16", "float16"):
            group = find(
                rows,
                benchmark="kernels",
                what=what,
                horizon=horizon,
                type=kind,
                threads=1,
                elements=10_000_000,
            )
            others = {r.variant: r for r in group if r.variant in KINDS}
            if not others:
                continue
            plain = min(find(group, variant="native"), key=lambda r: r.median_s or 0.0)
            body.append(
                [
                    f"{what}{f' H = {horizon}' if what == 'update' else ''}, {kind}",
                    f"{(plain.elements_per_s or 0) / 1e6:.3g}",
                    *(
                        f"{(others[name].elements_per_s or 0) / 1e6:.3g} "
                        f"({(plain.median_s or 0) / (others[name].median_s or 1):.2f}x)"
                        for name in KINDS
                    ),
                ]
            )
    if not body:
        return "Not measured yet."
    header = ("M elements/s, one thread", "exact", *(k.removeprefix("native, ") for k in KINDS))
    return markdown(header, body)


def threads_block(rows: list[Row]) -> str:
    """Native kernels with all threads over one, and the memory traffic beside memcpy's."""
    body = []
    several = [r for r in find(rows, benchmark="kernels", variant="native") if r.threads > 1]
    for two in several:
        wanted = [("perturb", 1), ("update", 10)]
        if (two.what, two.horizon) not in wanted or two.elements < 1_000_000:
            continue
        columns = dict(type=two.type, elements=two.elements)
        one = find(rows, **columns, what=two.what, horizon=two.horizon, isa=two.isa, threads=1)
        copy = find(rows, **columns, what="memcpy", threads=two.threads)
        if not one or not two.median_s:
            continue
        copied = f"{(copy[0].bytes_per_s or 0) / 1e9:.3g}" if copy else ""
        body.append(
            (
                f"{two.what}{f' H = {two.horizon}' if two.what == 'update' else ''}, {two.type}",
                f"{two.elements:,}",
                two.threads,
                f"{(one[0].median_s or 0) / two.median_s:.2f}x",
                f"{two.ratio or 0:.1f}x",
                f"{(two.bytes_per_s or 0) / 1e9:.3g}",
                copied,
            )
        )
    header = ("", "elements", "threads", "over one thread", "over torch", "GB/s", "memcpy GB/s")
    return markdown(header, body)


def fits_block(rows: list[Row]) -> str:
    """The lines of kernels_linear.png as numbers."""
    some = find(rows, benchmark="kernels", threads=1)
    over_horizon, over_elements = linear_lines(some)
    body = []
    for title, unit, scale, fits in (
        ("H", "ms a direction", 1e3, over_horizon),
        ("elements, H = 10", "ns an element", 1e9, over_elements),
    ):
        for name, x, y in fits:
            slope, intercept, r2 = linear_fit(x, y)
            worst = max(abs(slope * a + intercept - b) / b for a, b in zip(x, y, strict=True))
            body.append(
                (
                    f"{name}, over {title}",
                    f"{len(x)}",
                    f"{slope * scale:.4g} {unit}",
                    f"{intercept * 1e3:.3g} ms",
                    f"{r2:.6f}",
                    f"{worst:.1%}",
                )
            )
    header = ("update of bfloat16, one thread", "points", "slope", "intercept", "R^2")
    return markdown((*header, "farthest point off the line"), body)


def title(row: Row) -> str:
    """What a row of a step or a peak is of."""
    method, what = row.what.rsplit(" ", 1)
    if method == "bare" and what == "peak":
        return "a bare forward"
    return str(Method(row.variant, method, row.horizon)).replace(" H=", " H = ")


def step_block(rows: list[Row], benchmark: str) -> str:
    """Seconds of a step and its parts."""
    body = []
    whole = [r for r in find(rows, benchmark=benchmark) if r.what.endswith(" step")]
    if not whole:
        return "Not measured yet."
    several = len({r.type for r in whole}) > 1
    for row in whole:
        method = row.what.rsplit(" ", 1)[0]
        columns = dict(variant=row.variant, horizon=row.horizon, tokens=row.tokens, type=row.type)
        job = f"{row.tokens} {row.type}" if several else row.tokens
        if row.median_s is None:
            body.append((title(row), job, *[""] * 3, "did not fit into memory", *[""] * 3))
            continue
        parts = [
            find(rows, benchmark=benchmark, what=f"{method} {part}", **columns)[0]
            for part in ("forwards", "perturbation", "update")
        ]
        digits = 3 if row.median_s > 0.5 else 4
        q20, q80 = (f"{q or 0:.{digits}f}" for q in (row.q20_s, row.q80_s))
        body.append(
            (
                title(row),
                job,
                *(f"{p.median_s or 0:.{digits}f}" for p in parts),
                f"{row.median_s:.{digits}f} [{q20}, {q80}]",
                row.repeats,
                "" if method == "AdamW" else f"{share(parts):.1%}",
                f"{row.ratio:.2f}x" if row.ratio else "",
            )
        )
    header = ("seconds, medians", "tokens", "forwards", "perturbation", "update")
    return markdown(
        (*header, "step [20 %, 80 %]", "repeats", "optimizer", "step over pure torch's"), body
    )


def memory_block(rows: list[Row]) -> str:
    """Peaks of resident memory, and what the largest module's weights are of that."""
    some = find(rows, benchmark="step")
    body = [
        (title(r), r.tokens, f"{(r.peak_bytes or 0) / 2**20:.0f}", f"{r.ratio or 0:.3f}x")
        for r in some
        if r.what.endswith(" peak") and r.peak_bytes
    ]
    body += [
        ("the largest module's weights", "", f"{(r.peak_bytes or 0) / 2**20:.0f}", "")
        for r in find(some, what="largest module")[:1]
    ]
    return markdown(("", "tokens", "peak MiB", "over a bare forward"), body)


def budget_block(rows: list[Row]) -> str:
    """Instructions and predicted times of the GPU kernels, those of both compilers."""
    some = [r for r in rows if r.benchmark in ("cuda_budget", "triton_budget")]
    keys = dict.fromkeys((r.isa, r.what, r.variant, r.horizon) for r in some)
    body = []
    for isa, what, variant, horizon in sorted(keys, key=lambda k: (k[0] != "sm_90", k[0])):
        cells: list[str] = []
        for benchmark in ("cuda_budget", "triton_budget"):
            columns = dict(what=what, variant=variant, horizon=horizon, isa=isa)
            row = next(iter(find(some, benchmark=benchmark, **columns)), None)
            count, seconds = (row.cycles_per_normal, row.median_s) if row else (None, None)
            cells += [f"{count:.1f}" if count else "", f"{seconds * 1e3:.2f}" if seconds else ""]
        if any(cells):
            of_h = f" H = {horizon}" if what == "update" else ""
            body.append((f"{what}{of_h}, {variant}, {isa}", *cells))
    header = ("", "CUDA: instructions a normal", "predicted ms")
    return markdown((*header, "Triton: instructions a normal", "predicted ms"), body)


# docs/paper.md -----------------------------------------------------------------------------------


def on_a_gpu(rows: list[Row], benchmark: str, command: str) -> str:
    """What GPU its rows are from, or that there are none."""
    found = [r for r in find(rows, benchmark=benchmark) if r.type in TYPES]
    if found:
        row = found[0]
        return f"The GPU columns are from one {row.device}: `{row.command}`, {row.date}."
    return (
        "The GPU columns are empty: this has not been measured on a GPU. "
        f"`{command}` on a machine with one fills them."
    )


def beside_the_paper(rows: list[Row], what: str) -> str:
    """Steps ("step") or peaks ("peak") of every job in a column; in brackets the multiple of MeZO's
    with library calls in the same column."""
    column, unit = ("median_s", "s") if what == "step" else ("peak_bytes", "MB")
    kinds = [*TYPES] if what == "step" else TYPES[:1]
    jobs = [("step", SHORT.type, job.tokens) for job in (SHORT, LONG)]
    jobs += [("paper", kind, f"{SHORT.batch}x{length}") for kind in kinds for length in LENGTHS]
    base = RELEASED[MEZO]

    def row_of(method: Method, job: tuple[str, str, str]) -> Row | None:
        columns = dict(zip(("benchmark", "type", "tokens"), job, strict=True))
        wanted = f"{method.method} {what}"
        found = find(rows, what=wanted, variant=method.variant, horizon=method.horizon, **columns)
        return found[0] if found else None

    def text(value: float, over: float | None) -> str:
        number = f"{value:.3g} {unit}" if what == "step" else f"{value:,.0f} {unit}"
        return f"{number} ({value / over:.2f}x)" if over else number

    def cell(method: Method, job: tuple[str, str, str]) -> str:
        row = row_of(method, job)
        if row is None:
            return ""
        value = getattr(row, column)
        if value is None:
            return "did not fit"
        of = row_of(base, job)
        over = getattr(of, column) if of else None
        scale = 1.0 if what == "step" else 1e-6
        return text(value * scale, over * scale if over else None)

    i = 0 if what == "step" else 1
    body = [
        (f"{name}, in the paper", text(values[i], PUBLISHED["MeZO"][i]), *[""] * len(jobs))
        for name, values in PUBLISHED.items()
    ]
    for method in METHODS:
        cells = [cell(method, job) for job in jobs]
        name = str(method).replace(" H=", " H = ")
        if what == "peak" and method.method == "bare":
            name = "a bare forward"
        if any(cells):
            body.append((name, "", *cells))
    devices = {"step": "CPU", "paper": "GPU"}
    header = [f"{devices[benchmark]}, {kind}, {tokens}" for benchmark, kind, tokens in jobs]
    return markdown(("", "the paper", *header), body)


# docs/horizon.md ---------------------------------------------------------------------------------

COSINES = (0.9, 0.95, 0.99)


def _at(rows: list[Row], horizon: int, **wanted: object) -> Row | None:
    return next(iter(find(rows, horizon=horizon, **wanted)), None)


def _ratio(rows: list[Row], horizon: int, **wanted: object) -> float:
    row = _at(rows, horizon, **wanted)
    return row.ratio or 0.0 if row else 0.0


def advice_block(rows: list[Row]) -> str:
    """The smallest horizon that brings the update so near to the untruncated one, and its price."""
    if not find(rows, what="cosine"):
        return "Not measured yet."
    cpu = find(rows, type=SHORT.type)
    first = _at(cpu, 1, what="AdaMeZO step")
    body = []
    for betas in BETAS:
        variant = f"betas {betas[0]}, {betas[1]}"
        cells = []
        for wanted in COSINES:
            enough = [r.horizon for r in rows if r.what == "cosine" and r.variant == variant]
            enough = [
                h for h in enough if _ratio(rows, h, what="cosine", variant=variant) >= wanted
            ]
            step = _at(cpu, min(enough), what="AdaMeZO step") if enough else None
            price = (
                f" ({(step.median_s or 0) / (first.median_s or 1):.2f}x)" if step and first else ""
            )
            cells.append(f"{min(enough)}{price}" if enough else f"above {HORIZONS[-1]}")
        body.append((f"{betas[0]}, {betas[1]}", *cells))
    return markdown(("betas", *(f"cosine {c} at H =" for c in COSINES)), body)


def cost_block(rows: list[Row]) -> str:
    """Time and memory against the horizon."""
    body = []
    devices = (find(rows, type=SHORT.type), [r for r in rows if r.type in TYPES])
    first = _at(devices[0], 1, what="AdaMeZO step")
    horizons = sorted({r.horizon for some in devices for r in some if r.what == "AdaMeZO step"})
    if not horizons:
        return "Not measured yet."
    for horizon in horizons:
        cells = []
        for some in devices:
            for part in ("update", "step"):
                row = _at(some, horizon, what=f"AdaMeZO {part}")
                cells.append(f"{row.median_s or 0:.3g} s" if row else "")
                if part == "step" and some is devices[0]:
                    over = (row.median_s or 0) / (first.median_s or 1) if row and first else 0
                    cells.append(f"{over:.2f}x" if over else "")
            peak = _at(some, horizon, what="AdaMeZO peak")
            cells.append(f"{peak.ratio:.3f}x" if peak and peak.ratio else "")
        body.append((horizon, *cells))
    header = ("H", "CPU: update", "step", "over H = 1", "peak memory over a bare forward's")
    return markdown((*header, "GPU: update", "step", "peak memory"), body)


def distance_block(rows: list[Row]) -> str:
    """What truncation leaves out, for each pair of betas."""
    tables = []
    for betas in BETAS:
        variant = f"betas {betas[0]}, {betas[1]}"
        body = []
        for row in find(rows, what="cosine", variant=variant):
            h = row.horizon
            body.append(
                (
                    h,
                    *(f"{_ratio(rows, h, what='kept', variant=f'beta {b}'):.1%}" for b in betas),
                    f"{row.ratio or 0:.3f}",
                    f"{_ratio(rows, h, what='cosine, worst', variant=variant):.3f}",
                    *(
                        f"{_ratio(rows, h, what='error', variant=f'{variant}, {name}'):.3f}"
                        for name in ("paper", "bias_corrected")
                    ),
                )
            )
        if body:
            header = (f"H, betas {betas[0]}, {betas[1]}", "of m kept", "of v kept", "cosine")
            tables.append(
                markdown((*header, "the worst", 'error, "paper"', '"bias_corrected"'), body)
            )
    return "\n\n".join(tables) or "Not measured yet."


# docs/methods.md ---------------------------------------------------------------------------------


def methods_conditions(runs: list[methods.Run], costs: list[Cost]) -> str:
    """Where, with what and when; the command of the first row of each."""
    body = [
        (f"`{r.command}`", r.device, r.threads, f"torch {r.torch}, Python {r.python}", r.commit)
        for some in (runs, costs)
        for r in {(r.job, r.device, r.commit, r.threads): r for r in reversed(some)}.values()
    ]
    if not body:
        return "Not measured yet."
    return markdown(("command", "device", "threads", "software", "commit"), body)


def compared_block(runs: list[methods.Run], costs: list[Cost], job: str, mode: str) -> str:
    """Every method at the lr that the validation rows chose, the lowest test loss first."""
    body: list[tuple[float, tuple[object, ...]]] = []
    for entry in methods.ENTRIES:
        some = methods.found(runs, job, mode, entry.name, methods.BUDGETS[job])
        chosen = methods.best(some)
        if not chosen:
            continue
        of = (job, mode, entry.name)
        cost = next((c for c in costs if (c.job, c.mode, c.method) == of), None)
        losses, accuracies = zip(*(r.end for r in chosen), strict=True)
        each = statistics.fmean(r.forwards / r.steps for r in chosen if r.steps)
        time = f"{cost.ratio:.2f}x" if cost and cost.ratio else ""
        edge = ", at an edge" if methods.at_an_edge(some) else ""
        cells = (
            entry.name,
            entry.forwards or f"{each:.1f} (mean)",
            f"{round(cost.kept_bytes / cost.weights, 2):g}" if cost else "",
            cost.history_bytes if cost else "",
            time,
            f"{cost.ratio * 2 / entry.forwards:.2f}x" if cost and cost.ratio else "",
            _of_seeds(losses),
            _of_seeds(accuracies),
            f"{chosen[0].lr:g} (of {len(methods.by_lr(some))}{edge})",
            len(chosen),
        )
        body.append((statistics.fmean(losses), cells))
    if not body:
        return "Not measured yet."
    header = ("", "forwards a step", "bytes kept a weight", "bytes kept a group")
    time_header = ("a step over MeZO's", "a forward over MeZO's")
    return markdown(
        (*header, *time_header, "test loss", "test accuracy", "lr (of so many)", "seeds"),
        [cells for _, cells in sorted(body, key=lambda pair: pair[0])],
    )


def _of_seeds(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    arguments = parser.parse_args()
    rows = load(arguments.results)
    for path, blocks in PAGES.items():
        text = path.read_text(encoding="utf-8")
        new = rewrite(text, blocks(rows))
        if arguments.check and new != text:
            raise SystemExit(f"{path.name} is out of date: run `python -m benchmarks.tables`")
        if not arguments.check:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
