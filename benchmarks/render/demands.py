"""What was asked of the speed, beside what was measured. It is no test: a busy or a different
machine gives other numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas

from benchmarks.render.kernels import lines
from benchmarks.render.steps import of, split
from benchmarks.render.style import fit, markdown
from benchmarks.results import only, pick
from benchmarks.step_jobs import ADAMEZO, BARE, EXACT, MEZO, RELEASED, TORCH, Method

Measure = Callable[[pandas.DataFrame], float]


@dataclass(frozen=True)
class Demand:
    """Something asked for: at most `asked`, or at least if `at_least`."""

    name: str
    asked: float
    measure: Measure
    unit: str = "x"
    at_least: bool = False

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


def table(rows: pandas.DataFrame, demands: Sequence[Demand]) -> str:
    judged = [demand.judge(rows) for demand in demands]
    return markdown(("asked for", "bound", "measured", "verdict"), judged)


def quotient(one: dict[str, Any], other: dict[str, Any]) -> Measure:
    """The medians of one over those of the other for the same job, of all jobs the most."""

    def measure(rows: pandas.DataFrame) -> float:
        known = rows.dropna(subset="median")
        pairs = pick(known, **one).merge(pick(known, **other), on=["type", "tokens"])
        if pairs.empty:
            raise LookupError(f"no rows of {one} and {other} for one job")
        return float((pairs["median_x"] / pairs["median_y"]).max())

    return measure


def kernel(variant: str, what: str, horizon: int, **more: Any) -> dict[str, Any]:
    kind = dict(benchmark="kernels", what=what, horizon=horizon, type="bfloat16", threads=1)
    return {**kind, "elements": 1e7, "variant": variant, **more}


def peak(benchmark: str, method: Method, **more: Any) -> dict[str, Any]:
    return dict(benchmark=benchmark, metric="peak memory", **of(method), **more)


def time(benchmark: str, other: Method, one: Method = ADAMEZO, **job: Any) -> Measure:
    """Of a step, over another method's."""
    ours, others = (
        dict(benchmark=benchmark, metric="time", part="step", **of(m)) for m in (one, other)
    )
    return quotient(ours | job, others)


def memory(benchmark: str, other: Method, **job: Any) -> Measure:
    return quotient(peak(benchmark, ADAMEZO, **job), peak(benchmark, other))


def share(tokens: str, method: Method = ADAMEZO) -> Measure:
    def measure(rows: pandas.DataFrame) -> float:
        found = split(rows, "step")
        return only(found.assign(median=found.get("share")), tokens=tokens, **of(method))

    return measure


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


def over_torch(reference: str, label: str) -> Iterator[Demand]:
    for what, horizon, kind, isa, least in (
        ("update", 10, "bfloat16", "AVX-512", 10),
        ("update", 20, "bfloat16", "AVX-512", 9),
        ("perturb", 1, "bfloat16", "AVX-512", 6),
        ("update", 10, "bfloat16", "AVX2", 6),
        ("perturb", 1, "float32", "AVX-512", 5),
    ):
        if kind != "float32" or reference == "torch":  # which has only one way to write it
            ours = kernel("native", what, horizon, type=kind, isa=isa.lower().replace("-", ""))
            measure = quotient(kernel(reference, what, horizon, type=kind), ours)
            name = f"{what} {kind}{f' H = {horizon}' if what == 'update' else ''}, {isa}"
            yield Demand(f"{name}, one thread, over {label}", least, measure, at_least=True)


BEST = kernel("native", "update", 10, isa="avx512", elements=1e8)
THREADS = quotient(BEST, BEST | {"threads": 2})
SHORT, LONG = {"tokens": "16x32"}, {"tokens": "16x128"}
LIBRARY = share("16x32", TORCH[ADAMEZO])
IN_PLACE = time("step", ADAMEZO, EXACT, **SHORT)
KERNELS_AND_STEP = [
    *over_torch("torch plain", "torch as one writes it"),
    *over_torch("torch", "torch at its fastest"),
    Demand("two threads over one, update bfloat16 H = 10", 1.85, THREADS, at_least=True),
    Demand("R^2 of time against H and against elements, the least", 0.99, least_r2, "", True),
    Demand("optimizer's share of an AdaMeZO step, 16 x 32", 0.30, share("16x32"), "%"),
    Demand("the same, 16 x 128", 0.12, share("16x128"), "%"),
    Demand("the same with library calls (pure torch), 16 x 32", 0.80, LIBRARY, "%", True),
    Demand(
        "peak memory of a step over a bare forward's, 16 x 32", 1.02, memory("step", BARE, **SHORT)
    ),
    Demand("the same, 16 x 128", 1.02, memory("step", BARE, **LONG)),
    Demand("a step with exact perturbation over one in place, 16 x 32", 1.15, IN_PLACE),
    Demand("its additional memory over the largest module's weights", 1.0, exact_memory),
]

FIRST, SECOND = (time("step", RELEASED[method], **SHORT) for method in (MEZO, ADAMEZO))
THIRD, FOURTH = (time("paper", RELEASED[method]) for method in (MEZO, ADAMEZO))
LONGEST = time("paper", BARE, tokens="16x256")
PAPER = [
    Demand("CPU, 16 x 32: an AdaMeZO step over a MeZO step as released", 0.60, FIRST),
    Demand("CPU, 16 x 32: over an AdaMeZO step as released", 0.25, SECOND),
    Demand("CPU, 16 x 32: over two bare forwards", 1.45, time("step", BARE, **SHORT)),
    Demand("CPU, 16 x 128: the same", 1.15, time("step", BARE, **LONG)),
    Demand("GPU: an AdaMeZO step over a MeZO step as released", 0.90, THIRD),
    Demand("GPU: over an AdaMeZO step as released", 0.60, FOURTH),
    Demand("GPU, 16 x 256: over two bare forwards", 1.20, LONGEST),
    Demand(
        "GPU: peak memory of an AdaMeZO step over our MeZO step's", 1.005, memory("paper", MEZO)
    ),
    Demand("GPU: over a bare forward's", 1.01, memory("paper", BARE)),
]
