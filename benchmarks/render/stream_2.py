"""Tables of the trial of a second stream: docs/stream_2.md."""

from __future__ import annotations

import math

import pandas

from benchmarks.render.style import NOT_YET, markdown
from benchmarks.results import pick
from benchmarks.stream_2_trial import TAILS

FIRST = "version 1"
# Means of independent normals, and their variances.
MEANS = {
    **{"moment 2": (1, 2), "moment 4": (3, 96), "moment 6": (15, 10170)},
    **{"z0 z1": (0, 1), "z0^2 z1^2": (1, 8), "z0^3 z1": (0, 15), "z0^4 z1^2": (3, 306)},
}


def of_trial(rows: pandas.DataFrame, **wanted: object) -> pandas.DataFrame:
    return pick(rows, benchmark="stream 2", **wanted)


def times(rows: pandas.DataFrame) -> str:
    """Million elements a second by the least time of each, how many times as fast as version 1 that
    is, the cycles for each normal, and the gain that the predicted instructions would give."""
    least = of_trial(rows, metric="least time")
    if least.empty:
        return NOT_YET
    predicted = of_trial(rows, metric="instructions predicted")
    cases = [(isa, what) for isa in ("avx512", "avx2") for what in ("sample", "update")]
    cases = [c for c in cases if len(pick(least, isa=c[0], what=c[1]))]
    body = []
    for version in least.variant.drop_duplicates():
        cells = []
        for isa, what in cases:
            at = pick(least, isa=isa, what=what).set_index("variant")
            speed = at.elements[version] / at["median"][version] / 1e6
            gain = at["median"][FIRST] / at["median"][version]
            cycles = at.clock_hz[version] / speed / 1e6 / at.horizon[version]
            cell = f"{speed:,.0f} ({gain:.2f}x, {cycles:.2f} c)"
            count = pick(predicted, isa=isa, what=what).set_index("variant")["median"]
            if version in count:
                cell += f", predicted {count[FIRST] / count[version]:.2f}x"
            cells.append(cell)
        body.append((version, *cells))
    titles = [f"{what}, {isa.upper().replace('AVX512', 'AVX-512')}" for isa, what in cases]
    return markdown(("M elements/s", *titles), body)


def noticed(of: pandas.Series) -> float:
    """How many normals it takes until a test of a mean or of a tail is off by 4.5 standard errors,
    the bound of the tests: the least over them."""
    offs = [(of[name] * (mean or 1.0), variance) for name, (mean, variance) in MEANS.items()]
    for limit in TAILS:
        p = math.erfc(limit / math.sqrt(2))
        offs.append((of[f"beyond {limit:g}"] * p, p * (1 - p)))
    return min(4.5**2 * variance / off**2 for off, variance in offs if off)


def words(rows: pandas.DataFrame) -> str:
    """How far what all words of a version add up to is from a normal's, beside draws of version
    1."""
    some = of_trial(rows, what=["all words", "sampled"])
    if some.empty:
        return NOT_YET
    table = some.pivot(index="metric", columns="variant", values="median")
    order = some.variant.drop_duplicates()

    def line(title: str, metric: str, form: str) -> tuple[str, ...]:
        values = (table[v].get(metric, math.nan) for v in order)
        return (title, *(form.format(n) if n == n else "" for n in values))

    body = [
        line(f"mean of {name}" + f", over {mean:.0f} and less 1" * (mean != 0), key, "{:+.1e}")
        for key, (mean, _) in MEANS.items()
        for name in [key.replace("moment ", "z^")]
    ]
    body.append(line("distance of the distribution function", "distance", "{:.1e}"))
    for limit in TAILS:
        title = f"part beyond {limit:g}, over a normal's and less 1"
        body.append(line(title, f"beyond {limit:g}", "{:+.2%}"))
    body.append(line("largest size of z", "largest", "{:.2f}"))
    body.append(line("distinct values", "distinct values", "{:,.0f}"))
    exact = set(pick(some, what="all words").variant)
    cells = [f"{noticed(table[v]):.0e}" if v in exact else "" for v in order]
    body.append(("normals until a test would notice", *cells))
    return markdown(("", *order), body)


def sass(rows: pandas.DataFrame) -> str:
    """Cycles of the busiest part of a multiprocessor for each normal of an update, by nvcc for an
    H100: those of issue are the instructions."""
    some = of_trial(rows, by="CUDA")
    if some.empty:
        return NOT_YET
    table = some.pivot(index="metric", columns="variant", values="median")
    of = " cycles a normal"
    pipes = {name: table.loc[name] for name in table.index if name.endswith(of)}
    busiest = {v: max(float(pipe[v]) for pipe in pipes.values()) for v in table.columns}
    body = []
    for v in some.variant.drop_duplicates():
        by = ", ".join(n.removesuffix(of) for n, pipe in pipes.items() if pipe[v] == busiest[v])
        gain = f"{busiest[FIRST] / busiest[v]:.2f}x"
        used = (f"{table[v][name]:.0f}" for name in ("registers", "spilled"))
        body.append((v, f"{table[v][f'issue{of}']:.1f}", f"{busiest[v]:.1f}", by, gain, *used))
    header = ("update of bfloat16", "instructions a normal", "cycles of the busiest part", "which")
    return markdown((*header, "gain", "registers", "bytes spilled"), body)
