"""What was asked of the speed, beside what was measured. It is no test: a busy or a different
machine gives other numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas

from benchmarks.render.kernels import lines
from benchmarks.render.steps import of, split
from benchmarks.render.style import fit, markdown
from benchmarks.results import only, pick
from benchmarks.step_jobs import ADAMEZO, BARE, EXACT, MEZO, RELEASED, TORCH, Method


class Demand(NamedTuple):
    """Something asked for: at least `asked` if `at_least`, else at most."""

    name: str
    asked: float
    at_least: bool
    measure: Callable[[pandas.DataFrame], float]
    unit: str = "x"

    def judge(self, rows: pandas.DataFrame) -> tuple[str, str, str, str]:
        """(name, asked, measured, verdict) as text; what has no rows was not measured."""
        asked = f"{'at least' if self.at_least else 'at most'} {self._text(self.asked)}"
        try:
            measured = self.measure(rows)
        except LookupError:
            return self.name, asked, "not measured", "not measured"
        met = measured >= self.asked if self.at_least else measured <= self.asked
        return self.name, asked, self._text(measured), "met" if met else "NOT MET"

    def _text(self, value: float) -> str:
        return f"{value:.1%}" if self.unit == "%" else f"{value:.5g}{self.unit}"


def quotient(one: dict[str, Any], other: dict[str, Any], rows: pandas.DataFrame) -> float:
    """The medians of one over those of the other for the same job, of all jobs the most."""
    job = ["type", "tokens"]
    known = rows.dropna(subset="median")
    pairs = pick(known, **one).merge(pick(known, **other), on=job)
    if pairs.empty:
        raise LookupError(f"no rows of {one} and {other} for one job")
    return float((pairs["median_x"] / pairs["median_y"]).max())


def kernel(variant: str, what: str, horizon: int, **more: Any) -> dict[str, Any]:
    kind = dict(benchmark="kernels", what=what, horizon=horizon, type="bfloat16", threads=1)
    return {**kind, "elements": 1e7, "variant": variant, **more}


def step(benchmark: str, method: Method, **more: Any) -> dict[str, Any]:
    return dict(benchmark=benchmark, metric="time", part="step", **of(method), **more)


def peak(benchmark: str, method: Method, **more: Any) -> dict[str, Any]:
    return dict(benchmark=benchmark, metric="peak memory", **of(method), **more)


def share(tokens: str, method: Method, rows: pandas.DataFrame) -> float:
    found = pick(split(rows, "step"), tokens=tokens, **of(method))
    if found.empty:
        raise LookupError(f"no step of {method}")
    return float(found.share.iloc[0])


def least_r2(rows: pandas.DataFrame) -> float:
    found = [fit(at.index, at)[2] for line, _, at in lines(rows) if line != "torch"]
    if not found:
        raise LookupError("no line with three points")
    return min(found)


def exact_memory(rows: pandas.DataFrame) -> float:
    """What exact perturbation takes more than in-place, over the largest module's weights."""
    size = only(rows, benchmark="step", metric="largest module", tokens="16x32")
    exact, in_place = (only(rows, **peak("step", m, tokens="16x32")) for m in (EXACT, ADAMEZO))
    return (exact - in_place) / size


def over_torch(reference: str, label: str) -> list[Demand]:
    asked = [
        ("update bfloat16 H = 10, AVX-512", 10, ("update", 10), {}, "avx512"),
        ("update bfloat16 H = 20, AVX-512", 9, ("update", 20), {}, "avx512"),
        ("perturb bfloat16, AVX-512", 6, ("perturb", 1), {}, "avx512"),
        ("update bfloat16 H = 10, AVX2", 6, ("update", 10), {}, "avx2"),
    ]
    if reference == "torch":  # float32 has only one way to write it
        kind = {"type": "float32"}
        asked.append(("perturb float32, AVX-512", 5, ("perturb", 1), kind, "avx512"))
    made = []
    for name, least, case, kind, isa in asked:
        ours = kernel("native", *case, **kind, isa=isa)
        measure = partial(quotient, kernel(reference, *case, **kind), ours)
        made.append(Demand(f"{name}, one thread, over {label}", least, True, measure))
    return made


BEST = dict(isa="avx512", elements=1e8)
KERNELS_AND_STEP = [
    *over_torch("torch plain", "torch as one writes it"),
    *over_torch("torch", "torch at its fastest"),
    Demand(
        *("two threads over one, update bfloat16 H = 10", 1.85, True),
        partial(
            quotient,
            kernel("native", "update", 10, **BEST),
            kernel("native", "update", 10, **BEST) | {"threads": 2},
        ),
    ),
    Demand("R^2 of time against H and against elements, the least", 0.99, True, least_r2, ""),
    Demand(
        *("optimizer's share of an AdaMeZO step, 16 x 32", 0.30, False),
        *(partial(share, "16x32", ADAMEZO), "%"),
    ),
    Demand("the same, 16 x 128", 0.12, False, partial(share, "16x128", ADAMEZO), "%"),
    Demand(
        *("the same with library calls (pure torch), 16 x 32", 0.80, True),
        *(partial(share, "16x32", TORCH[ADAMEZO]), "%"),
    ),
    *(
        Demand(
            *(name, 1.02, False),
            partial(quotient, peak("step", ADAMEZO, tokens=tokens), peak("step", BARE)),
        )
        for name, tokens in (
            ("peak memory of a step over a bare forward's, 16 x 32", "16x32"),
            ("the same, 16 x 128", "16x128"),
        )
    ),
    Demand(
        *("a step with exact perturbation over one in place, 16 x 32", 1.15, False),
        partial(quotient, step("step", EXACT, tokens="16x32"), step("step", ADAMEZO)),
    ),
    Demand("its additional memory over the largest module's weights", 1.0, False, exact_memory),
]


def time_over(name: str, most: float, benchmark: str, other: Method, **job: Any) -> Demand:
    """Of an AdaMeZO step at H = 10 in `exact` directions."""
    measure = partial(quotient, step(benchmark, ADAMEZO, **job), step(benchmark, other))
    return Demand(name, most, False, measure)


def memory_over(name: str, most: float, other: Method) -> Demand:
    measure = partial(quotient, peak("paper", ADAMEZO), peak("paper", other))
    return Demand(name, most, False, measure)


PAPER = [
    time_over(
        "CPU, 16 x 32: an AdaMeZO step over a MeZO step as released",
        *(0.60, "step", RELEASED[MEZO]),
        tokens="16x32",
    ),
    time_over(
        "CPU, 16 x 32: over an AdaMeZO step as released",
        *(0.25, "step", RELEASED[ADAMEZO]),
        tokens="16x32",
    ),
    time_over("CPU, 16 x 32: over two bare forwards", 1.45, "step", BARE, tokens="16x32"),
    time_over("CPU, 16 x 128: the same", 1.15, "step", BARE, tokens="16x128"),
    time_over("GPU: an AdaMeZO step over a MeZO step as released", 0.90, "paper", RELEASED[MEZO]),
    time_over("GPU: over an AdaMeZO step as released", 0.60, "paper", RELEASED[ADAMEZO]),
    time_over("GPU, 16 x 256: over two bare forwards", 1.20, "paper", BARE, tokens="16x256"),
    memory_over("GPU: peak memory of an AdaMeZO step over our MeZO step's", 1.005, MEZO),
    memory_over("GPU: over a bare forward's", 1.01, BARE),
]


def table(rows: pandas.DataFrame, demands: Sequence[Demand]) -> str:
    judged = [demand.judge(rows) for demand in demands]
    return markdown(("asked for", "bound", "measured", "verdict"), judged)
