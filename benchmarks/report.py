"""What was asked of the speed, beside what was measured: `python -m benchmarks.report`.

Reads the CSV files alone. It is no test: a busy or a different machine gives other numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.plots import linear_lines
from benchmarks.rows import RESULTS, Row, find, linear_fit, read_rows
from benchmarks.step import ADAMEZO, BARE, EXACT, MEZO, RELEASED, Method, share


@dataclass(frozen=True)
class Demand:
    """Something asked for: at least `asked` if `at_least`, else at most."""

    name: str
    asked: float
    at_least: bool
    measure: Callable[[Sequence[Row]], float]
    unit: str = "x"

    def judge(self, rows: Sequence[Row]) -> tuple[str, str, str]:
        """(asked, measured, verdict) as text; what has no rows was not measured."""
        asked = f"{'at least' if self.at_least else 'at most'} {self._text(self.asked)}"
        try:
            measured = self.measure(rows)
        except LookupError:
            return asked, "not measured", "not measured"
        met = measured >= self.asked if self.at_least else measured <= self.asked
        return asked, self._text(measured), "met" if met else "NOT MET"

    def _text(self, value: float) -> str:
        if self.unit == "%":
            return f"{value:.1%}"
        return f"{value:.5g}{self.unit}"


def only(rows: Sequence[Row], **wanted: object) -> Row:
    """The row with these columns at the largest size; LookupError where there is none."""
    found = find(rows, **wanted)
    if not found:
        raise LookupError(f"no row with {wanted}")
    return max(found, key=lambda r: r.elements)


def _kernel_ratio(
    what: str, kind: str, isa: str, horizon: int, reference: str
) -> Callable[[Sequence[Row]], float]:
    def measure(rows: Sequence[Row]) -> float:
        columns = dict(benchmark="kernels", what=what, type=kind, horizon=horizon, threads=1)
        at = only(rows, **columns, variant=reference, elements=10_000_000)
        ours = only(rows, **columns, variant="native", isa=isa, elements=10_000_000)
        return (at.median_s or 0.0) / (ours.median_s or 1.0)

    return measure


def _speed_up(rows: Sequence[Row]) -> float:
    columns = dict(what="update", variant="native", type="bfloat16", horizon=10)
    two = only([r for r in rows if r.threads == 2], **columns)
    one = only(rows, **columns, threads=1, isa=two.isa, elements=two.elements)
    return (one.median_s or 0.0) / (two.median_s or 1.0)


def _least_r2(rows: Sequence[Row]) -> float:
    fits = [fit for some in linear_lines(list(rows)) for fit in some if fit[0] != "torch"]
    if not fits:
        raise LookupError("no line with three points")
    return min(linear_fit(x, y)[2] for _, x, y in fits)


def _share(tokens: str, variant: str) -> Callable[[Sequence[Row]], float]:
    def measure(rows: Sequence[Row]) -> float:
        columns = dict(benchmark="step", variant=variant, horizon=10, tokens=tokens)
        return share(
            [only(rows, what=f"AdaMeZO {p}", **columns) for p in ("forwards", "perturbation")]
            + [only(rows, what="AdaMeZO update", **columns)]
        )

    return measure


def _peak(tokens: str) -> Callable[[Sequence[Row]], float]:
    def measure(rows: Sequence[Row]) -> float:
        columns = dict(benchmark="step", variant="ours", horizon=10, tokens=tokens)
        return only(rows, what="AdaMeZO peak", **columns).ratio or 0.0

    return measure


def _pairs(
    rows: Sequence[Row], benchmark: str, part: str, one: Method, other: Method, tokens: str
) -> list[tuple[Row, Row]]:
    """Rows of two methods for the same job, of every job of a benchmark or of those with `tokens`
    (or their end)."""

    def measured(method: Method) -> list[Row]:
        some = find(
            rows,
            benchmark=benchmark,
            what=f"{method.method} {part}",
            variant=method.variant,
            horizon=method.horizon,
        )
        return [r for r in some if (r.median_s or r.peak_bytes) and r.tokens.endswith(tokens)]

    others = {(r.type, r.tokens): r for r in measured(other)}
    found = [
        (row, others[row.type, row.tokens])
        for row in measured(one)
        if (row.type, row.tokens) in others
    ]
    if not found:
        raise LookupError(f"no rows of {one} and {other}")
    return found


def _time(
    benchmark: str, one: Method, other: Method, tokens: str = ""
) -> Callable[[Sequence[Row]], float]:
    """Seconds of a step of one method over the other's, of all jobs the most."""

    def measure(rows: Sequence[Row]) -> float:
        pairs = _pairs(rows, benchmark, "step", one, other, tokens)
        return max((a.median_s or 0.0) / (b.median_s or 1.0) for a, b in pairs)

    return measure


def _memory(
    benchmark: str, one: Method, other: Method, tokens: str = ""
) -> Callable[[Sequence[Row]], float]:
    """Peak bytes of one method over the other's, of all jobs the most."""

    def measure(rows: Sequence[Row]) -> float:
        pairs = _pairs(rows, benchmark, "peak", one, other, tokens)
        return max((a.peak_bytes or 0) / (b.peak_bytes or 1) for a, b in pairs)

    return measure


def _exact_memory(rows: Sequence[Row]) -> float:
    """What exact perturbation takes more than in-place, over the largest module's weights."""
    ((exact, in_place),) = _pairs(rows, "step", "peak", EXACT, ADAMEZO, "16x32")
    module = only(rows, benchmark="step", what="largest module", tokens="16x32")
    more = (exact.peak_bytes or 0) - (in_place.peak_bytes or 0)
    return more / (module.peak_bytes or 1)


def _over_torch(reference: str, label: str) -> list[Demand]:
    def demand(
        name: str,
        least: float,
        what: str,
        horizon: int,
        kind: str = "bfloat16",
        isa: str = "avx512",
    ) -> Demand:
        ratio = _kernel_ratio(what, kind, isa, horizon, reference)
        return Demand(f"{name}, one thread, over {label}", least, True, ratio)

    demands = [
        demand("update bfloat16 H = 10, AVX-512", 10, "update", 10),
        demand("update bfloat16 H = 20, AVX-512", 9, "update", 20),
        demand("perturb bfloat16, AVX-512", 6, "perturb", 1),
        demand("update bfloat16 H = 10, AVX2", 6, "update", 10, isa="avx2"),
    ]
    if reference == "torch":  # float32 has only one way to write it
        demands.append(demand("perturb float32, AVX-512", 5, "perturb", 1, kind="float32"))
    return demands


KERNELS_AND_STEP = [
    *_over_torch("torch plain", "torch as one writes it"),
    *_over_torch("torch", "torch at its fastest"),
    Demand("two threads over one, update bfloat16 H = 10", 1.85, True, _speed_up),
    Demand("R^2 of time against H and against elements, the least", 0.99, True, _least_r2, ""),
    Demand(
        "optimizer's share of an AdaMeZO step, 16 x 32", 0.30, False, _share("16x32", "ours"), "%"
    ),
    Demand("the same, 16 x 128", 0.12, False, _share("16x128", "ours"), "%"),
    Demand(
        "the same with library calls (pure torch), 16 x 32",
        0.80,
        True,
        _share("16x32", "torch"),
        "%",
    ),
    Demand("peak memory of a step over a bare forward's, 16 x 32", 1.02, False, _peak("16x32")),
    Demand("the same, 16 x 128", 1.02, False, _peak("16x128")),
    Demand(
        "a step with exact perturbation over one in place, 16 x 32",
        1.15,
        False,
        _time("step", EXACT, ADAMEZO, "16x32"),
    ),
    Demand("its additional memory over the largest module's weights", 1.0, False, _exact_memory),
]

# AdaMeZO at H = 10 in `exact` directions, against what its paper compares it with.
PAPER = [
    Demand(
        "CPU, 16 x 32: an AdaMeZO step over a MeZO step as released",
        0.60,
        False,
        _time("step", ADAMEZO, RELEASED[MEZO], "16x32"),
    ),
    Demand(
        "CPU, 16 x 32: over an AdaMeZO step as released",
        0.25,
        False,
        _time("step", ADAMEZO, RELEASED[ADAMEZO], "16x32"),
    ),
    Demand(
        "CPU, 16 x 32: over two bare forwards", 1.45, False, _time("step", ADAMEZO, BARE, "16x32")
    ),
    Demand("CPU, 16 x 128: the same", 1.15, False, _time("step", ADAMEZO, BARE, "16x128")),
    Demand(
        "GPU: an AdaMeZO step over a MeZO step as released",
        0.90,
        False,
        _time("paper", ADAMEZO, RELEASED[MEZO]),
    ),
    Demand(
        "GPU: over an AdaMeZO step as released",
        0.60,
        False,
        _time("paper", ADAMEZO, RELEASED[ADAMEZO]),
    ),
    Demand(
        "GPU, 16 x 256: over two bare forwards", 1.20, False, _time("paper", ADAMEZO, BARE, "x256")
    ),
    Demand(
        "GPU: peak memory of an AdaMeZO step over our MeZO step's",
        1.005,
        False,
        _memory("paper", ADAMEZO, MEZO),
    ),
    Demand("GPU: over a bare forward's", 1.01, False, _memory("paper", ADAMEZO, BARE)),
]

DEMANDS = [*KERNELS_AND_STEP, *PAPER]


FILES = (
    "kernels_cpu.csv",
    "step_cpu.csv",
    "paper_gpu.csv",
    "horizon_cpu.csv",
    "horizon_gpu.csv",
    "cuda_budget.csv",
    "triton_budget.csv",
)


def judged(
    rows: Sequence[Row], demands: Sequence[Demand] = DEMANDS
) -> list[tuple[str, str, str, str]]:
    """(name, asked, measured, verdict) of every demand."""
    return [(d.name, *d.judge(rows)) for d in demands]


def load(folder: Path = RESULTS) -> list[Row]:
    """The rows of FILES in `folder`, as far as they have been made."""
    files = [folder / name for name in FILES]
    return [row for file in files if file.exists() for row in read_rows(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    rows = load(parser.parse_args().results)
    if rows:
        print(f"{rows[0].device}; torch {rows[0].torch}; {rows[0].date}; commit {rows[0].commit}")
    for name, asked, measured, verdict in judged(rows):
        print(f"{verdict:>12}  {name}: {measured} ({asked})")


if __name__ == "__main__":
    main()
