"""How fast are the kernels, beside pure torch and beside a copy?

    python -m benchmarks.kernels                  about 6 minutes on two cores
    python -m benchmarks.kernels --device cuda    minutes; CUDA's and Triton's kernels on a GPU
    python -m benchmarks.kernels --only low_rank  a minute; low-rank directions beside the others
    python -m benchmarks.kernels --only normals   seconds; directions beside oneMKL's normals
    python -m benchmarks.kernels --quick          under a minute; fewer sizes, types and repeats

Writes benchmarks/results/kernels_cpu.csv, kernels_gpu.csv, kernels_low_rank.csv or
kernels_normals.csv: the time of a call against the number of elements. Everything compared is
timed in turn in the same run, after its bits have been compared with the reference's. On a GPU our
kernels are replayed from a CUDA graph, so that no Python is timed, and the clock is measured after
each case.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adamezo_kernels import RULES, ops
from adamezo_kernels.backends import BACKENDS, native
from adamezo_kernels.plan import Plan
from adamezo_kernels.stream import PhiloxState
from adamezo_kernels.terms import Terms
from benchmarks import mkl
from benchmarks.harness import RULE_NUMBERS, Variant, gate, interleave, replayed, rule_terms
from benchmarks.library_calls import AsReleased, Fair, LibraryCalls, Update, coefficients
from benchmarks.results import RESULTS, Row, gpu_clock, on, parser, settings, spread, write

TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
LIBRARY: dict[str, type[LibraryCalls]] = {"torch": Fair, "as released": AsReleased}
HORIZONS = (1, 5, 10, 20, 50)
SEED = 2026
# A step so small that thousands of calls leave the weights ordinary numbers.
TINY = 1e-9
ROW = 4096
LOW_RANK_SIZE = 2048 * ROW


@dataclass(frozen=True)
class Column:
    """Something that is timed in a case. `options` are those of a call of one of our kernels, and
    "kept" for the type of a rule's buffers."""

    name: str
    isa: str = ""
    threads: int = 1
    options: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Case:
    """One operation on one set of weights, and the columns that are compared there.

    `what` is "sample", "perturb", "update" by sums of directions, or "update RULE".
    """

    what: str
    type: str
    elements: int
    horizon: int
    columns: tuple[Column, ...]
    repeats: int = 7
    benchmark: str = "kernels"


def cpu_cases(isas: Sequence[str], threads: int, *, quick: bool) -> Iterator[Case]:
    """The smaller sizes with every instruction set, the fastest first; at 1e7, where figures are
    read, without the portable kernels, which would take minutes, but with other kinds of kernels
    and of library calls."""

    def ours(isa: str, threads: int = 1, name: str = "native", **kind: str) -> Column:
        return Column(name, isa, threads, kind | {"backend": "native"})

    stochastic, signs = {"rounding": "stochastic"}, {"distribution": "rademacher"}
    kinds = [
        ours("", name="native, stochastic", **stochastic),
        ours("", name="native, rademacher", **signs),
        ours("", name="native, rademacher, stochastic", **stochastic, **signs),
    ]
    counts = sorted({1, threads})
    types = ("bfloat16", "float32") if quick else tuple(TYPES)
    sizes = (10**5, 10**6) if quick else tuple(10**n for n in range(4, 9))
    for kind, n in itertools.product(types, sizes):
        able = isas if n < 10**7 else [isa for isa in isas if isa != "portable"]
        columns = [Column("torch", "", count) for count in counts]
        columns += [*map(ours, able[: 1 if n > 10**7 else None])]
        columns += [ours(isas[0], count) for count in counts[1:]]
        if n == 10**7 and kind != "float32":
            columns += [*kinds, Column("as released")]
        repeats = 7 if n <= 10**7 else 3
        yield Case("sample", kind, n, 1, tuple(c for c in columns if "native," not in c.name))
        copies = [Column("memcpy", "", count) for count in counts]
        yield Case("perturb", kind, n, 1, (*columns, *copies), repeats)
        for h in HORIZONS if n <= 10**7 else (10,):
            yield Case("update", kind, n, h, tuple(columns), repeats)


def low_rank_cases(*, quick: bool) -> Iterator[Case]:
    """Matrices of rows of 4096 elements, on one thread."""
    kinds = ("exact", "rademacher", "lowrank", "lowrank:4")
    columns = tuple(
        Column(f"native, {kind}", options={"backend": "native", "distribution": kind})
        for kind in kinds
    )
    for kind in ("float32",) if quick else ("float32", "bfloat16"):
        cases = [("perturb", 1), *(("update", h) for h in ((1, 10) if quick else (1, 10, 20, 50)))]
        for what, horizon in cases:
            yield Case(
                what, kind, LOW_RANK_SIZE, horizon, (*columns, Column("memcpy")),
                benchmark="low_rank",
            )  # fmt: skip


def normal_cases(isas: Sequence[str]) -> Iterator[Case]:
    """Normals alone, on one thread, beside torch's and those of oneMKL where that is installed."""
    ours = [Column("native", isa, options={"backend": "native"}) for isa in isas]
    theirs = [Column(f"MKL, {name}") for name in mkl.GENERATORS if mkl.library()]
    for n in (10**6, 10**7):
        yield Case(
            "sample", "float32", n, 1, (*ours, Column("torch"), *theirs), 15, benchmark="normals"
        )


def gpu_cases(backends: Sequence[str], *, quick: bool) -> Iterator[Case]:
    """All kinds of directions and roundings of each backend, and updates by rules with buffers."""
    sizes = [10**n for n in ((7, 8) if quick else (6, 7, 8, 9))]
    columns = [
        Column(
            f"{kind}, {rounding}" + ", Triton" * (backend == "triton"),
            options=dict(distribution=kind, rounding=rounding, backend=backend),
        )
        for backend in backends
        for kind in BACKENDS[backend].DISTRIBUTIONS
        for rounding in ("nearest", "stochastic")
    ]
    library = [Column("torch"), Column("memcpy")]
    operations = [("perturb", 1), *(("update", h) for h in ((1, 10) if quick else HORIZONS))]
    for kind, n in itertools.product(["bfloat16"] if quick else TYPES, sizes):
        nearest = [c for c in columns if c.options["rounding"] == "nearest"]
        able = tuple((nearest if kind == "float32" else columns) + library)
        for what, horizon in operations:
            yield Case(what, kind, n, horizon, able, 15)
    kept = tuple(
        Column(f"{c.name}, {kept} numbers", options=c.options | {"kept": kept})
        for kept in ("float32", "bfloat16")
        for c in columns
        if c.options["rounding"] == "stochastic"
    )
    for rule, n in itertools.product(RULE_NUMBERS, sizes):
        yield Case(f"update {rule}", "bfloat16", n, RULES[rule].directions, kept, 15)


def call_of(
    case: Case, column: Column, weights: Tensor, buffers: Callable[[str], list[Tensor]]
) -> Callable[[], object]:
    """The call of a column on these weights; `buffers` are those of a type."""
    horizon, (what, _, rule) = case.horizon, case.what.partition(" ")
    first, second = coefficients([0.5 * (-1) ** age for age in range(horizon)], (0.7, 0.9))
    if column.name == "memcpy":
        return functools.partial(torch.empty_like(weights).copy_, weights)
    if column.name.startswith("MKL"):
        return mkl.normals(weights, column.name.removeprefix("MKL, "))
    if column.name in LIBRARY:
        if what == "sample":
            return lambda: weights.normal_(generator=torch.Generator().manual_seed(SEED))
        # A clone, as the released way moves its weights to new memory each time.
        calls = LIBRARY[column.name]([weights.clone()])
        if what == "perturb":
            return functools.partial(calls.perturb_, SEED, TINY)
        seeds = [SEED + age for age in range(horizon)]
        return functools.partial(calls.update_, Update(seeds, first, second, TINY, restore=TINY))
    options: dict[str, Any] = dict(column.options)
    kept = options.pop("kept", "")
    states = [PhiloxState(SEED, horizon - age) for age in range(horizon)]
    plan = Plan([weights])
    if what == "sample":
        return functools.partial(ops.sample_, weights, states[0], **options)
    if rule:
        plan, terms = plan.with_buffers([buffers(kept)]), rule_terms(rule, TINY)
    elif what == "perturb":
        terms = Terms.of(states)
    else:
        terms = Terms.of(states, first, second, minus_lr=-TINY)
    if weights.is_cuda:  # a graph reads them there
        terms = Terms(
            terms.key,
            horizon=terms.horizon,
            with_second=terms.with_second,
            rule=terms.rule,
            words=terms.words.to(weights.device),
        )
    if what == "perturb":
        call = functools.partial(ops.perturb_, plan, terms, TINY, **options)
    else:
        call = functools.partial(ops.update_terms_, plan, terms, eps=1e-8, restore=TINY, **options)
    return replayed(call) if weights.is_cuda else call


def variants(case: Case, device: str = "cpu") -> list[Variant]:
    """The columns of a case as things to time, all on the same weights."""
    weights = torch.randn(case.elements, device=device).mul_(0.02).to(TYPES[case.type])
    if case.elements % ROW == 0:
        weights = weights.view(-1, ROW)

    @functools.cache  # shared, as all of them would not fit into a GPU's memory
    def buffers(kind: str) -> list[Tensor]:
        count = RULES[case.what.split()[1]].buffers
        return [torch.ones_like(weights, dtype=TYPES[kind]) for _ in range(count)]

    return [
        Variant(c.name, call_of(case, c, weights, buffers), c.threads, c.isa, context, device)
        for c in case.columns
        for context in [functools.partial(native.use_isa, c.isa) if c.isa else nullcontext]
    ]


def rows_of(case: Case, timed: Iterable[Variant], where: dict[str, Any]) -> Iterator[Row]:
    for v in timed:
        copy, gpu = v.name == "memcpy", v.device == "cuda"
        beside = copy and case.benchmark == "low_rank"  # a copy is timed beside each case
        columns = settings(
            what=f"memcpy beside {case.what}" if beside else "memcpy" if copy else case.what,
            type=case.type,
            horizon=None if copy and not beside else case.horizon,
            threads=None if gpu else v.threads,
            isa=v.isa,
        )
        key = ("gpu_kernels" if gpu else case.benchmark, "time", "s", v.name, columns, "elements")
        yield Row(*key, case.elements, **spread(v.seconds), **where)


def main() -> None:
    options = parser(__doc__, "")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--only", choices=("low_rank", "normals"), help="on a CPU")
    arguments = options.parse_args()
    device, quick, output = arguments.device, arguments.quick, arguments.output
    if arguments.only and device != "cpu":
        raise SystemExit(f"kernels: --only {arguments.only} is for a CPU, got --device {device}")
    if output == RESULTS:
        output /= f"kernels_{arguments.only or {'cpu': 'cpu', 'cuda': 'gpu'}[device]}.csv"
    start = time.perf_counter()
    backends = [
        name
        for name in ("native", "cuda", "triton")
        if BACKENDS[name].availability()[0] and BACKENDS[name].supports(torch.device(device))
    ]
    if not backends:
        raise SystemExit(f"kernels: no compiled backend runs on {device}")
    isas = native.instruction_sets()
    for backend in backends:
        for isa in isas if backend == "native" else ("",):
            with native.use_isa(isa) if isa else nullcontext():
                gate(TYPES.values(), backend=backend, device=device, label=f"{backend} {isa}")
            print(f"bits equal the reference's: {backend} {isa}", flush=True)
    if arguments.only == "low_rank":
        cases = low_rank_cases(quick=quick)
    elif arguments.only == "normals":
        cases = normal_cases(isas)
    elif device == "cpu":
        cases = cpu_cases(isas, torch.get_num_threads(), quick=quick)
    else:
        cases = gpu_cases(backends, quick=quick)
    where = on(device)
    made: list[Row] = []
    for case in cases:
        torch.manual_seed(SEED)
        timed = variants(case, device)
        interleave(timed, repeats=min(case.repeats, 5) if quick else case.repeats)
        if device == "cuda":
            where["clock_hz"] = gpu_clock()
        new = list(rows_of(case, timed, where))
        made += new
        shown = ", ".join(
            f"{v.name}{' ' + v.isa if v.isa else ''} x{v.threads} "
            f"{case.elements / (row.median or 1) / 1e6:.4g} M/s"
            for v, row in zip(timed, new, strict=True)
        )
        print(f"{case.what} {case.type} {case.elements:.0e} H={case.horizon}: {shown}", flush=True)
        write(output, made)
    print(f"{len(made)} rows in {time.perf_counter() - start:.0f} s: {output.name}")


if __name__ == "__main__":
    main()
