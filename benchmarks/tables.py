"""Rewrites the tables of docs/performance.md and README.md from the CSV files.

python -m benchmarks.tables
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.plots import line_of, linear_lines
from benchmarks.report import judged, load
from benchmarks.rows import RESULTS, Row, find, linear_fit, quantile
from benchmarks.step import share

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"


def markdown(header: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, rule, *body])


def blocks(rows: list[Row]) -> dict[str, str]:
    """The text of every marked block, by its name."""
    return {
        "conditions": conditions_block(rows),
        "demands": markdown(("asked for", "bound", "measured", "verdict"), judged(rows)),
        "kernels": kernels_block(rows),
        "baselines": baselines_block(rows),
        "threads": threads_block(rows),
        "fits": fits_block(rows),
        "step": step_block(rows),
        "memory": memory_block(rows),
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


def conditions_block(rows: list[Row]) -> str:
    body = []
    for name in sorted({r.benchmark for r in rows}):
        some = find(rows, benchmark=name)
        row = some[0]
        spreads = [
            ((r.q80_s or 0) - (r.q20_s or 0)) / r.median_s for r in some if r.median_s is not None
        ]
        spread = f"{quantile(spreads, 0.5):.1%}" if spreads else ""
        clock = f"{row.clock_hz / 1e9:.2f} GHz ({row.clock_source})" if row.clock_hz else "unknown"
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


def step_block(rows: list[Row]) -> str:
    """Seconds of a step and its parts."""
    body = []
    whole = [r for r in find(rows, benchmark="step") if r.what.endswith(" step")]
    for row in whole:
        method = row.what.split()[0]
        columns = dict(variant=row.variant, horizon=row.horizon, tokens=row.tokens)
        parts = [
            find(rows, what=f"{method} {part}", **columns)[0]
            for part in ("forwards", "perturbation", "update")
        ]
        body.append(
            (
                f"{method}{f' H = {row.horizon}' if method != 'MeZO' else ''}, {row.variant}",
                row.tokens,
                *(f"{p.median_s or 0:.3f}" for p in parts),
                f"{row.median_s or 0:.3f} [{row.q20_s or 0:.3f}, {row.q80_s or 0:.3f}]",
                row.repeats,
                f"{share(parts):.1%}",
                f"{row.ratio:.2f}x" if row.ratio else "",
            )
        )
    header = ("seconds, medians", "tokens", "forwards", "perturbation", "update")
    return markdown(
        (*header, "step [20 %, 80 %]", "repeats", "optimizer", "step over pure torch's"), body
    )


def memory_block(rows: list[Row]) -> str:
    """Peaks of resident memory."""
    body = [
        (
            r.what.removesuffix(" peak")
            + (f" H = {r.horizon}" if r.horizon > 1 else "")
            + f", {r.variant}",
            r.tokens,
            f"{(r.peak_bytes or 0) / 2**20:.0f}",
            f"{r.ratio or 0:.3f}x",
        )
        for r in rows
        if r.peak_bytes is not None
    ]
    return markdown(("", "tokens", "peak MiB", "over a bare forward"), body)


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
    for path, made in ((DOCUMENT, blocks(rows)), (README, {"numbers": summary_block(rows)})):
        text = path.read_text(encoding="utf-8")
        new = rewrite(text, made)
        if arguments.check and new != text:
            raise SystemExit(f"{path.name} is out of date: run `python -m benchmarks.tables`")
        if not arguments.check:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
