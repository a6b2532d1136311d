"""How fast are the kernels, beside pure torch and beside memcpy?

    python -m benchmarks.kernels            about 6 minutes on two cores
    python -m benchmarks.kernels --quick    under a minute; fewer sizes, types and repeats

Writes benchmarks/results/kernels_cpu.csv: the time of a call against the number of elements.
Everything compared is timed in turn in the same run. `benchmarks.gpu_kernels` is the same question
on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from adamezo_kernels import ops
from adamezo_kernels.backends import native
from adamezo_kernels.plan import Plan
from adamezo_kernels.stream import PhiloxState
from benchmarks.harness import Variant, gate, interleave
from benchmarks.library_calls import AsReleased, Fair, LibraryCalls, Plain
from benchmarks.results import Row, conditions, parser, settings, spread, write

TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
LIBRARY: dict[str, type[LibraryCalls]] = {
    "torch": Fair,
    "torch plain": Plain,
    "as released": AsReleased,
}
# On the fastest instruction set, beside "native" on each.
KINDS: dict[str, dict[str, str]] = {
    "native, stochastic": {"rounding": "stochastic"},
    "native, rademacher": {"distribution": "rademacher"},
    "native, rademacher, stochastic": {"distribution": "rademacher", "rounding": "stochastic"},
}
HORIZONS = (1, 5, 10, 20, 50)
SEED = 2026


@dataclass(frozen=True)
class Case:
    """One set of parameters and what is timed there: (variant, isa, threads) of each column."""

    what: str
    type: str
    elements: int
    horizon: int
    columns: tuple[tuple[str, str, int], ...]
    repeats: int = 7


def cases(isas: Sequence[str], threads: int, *, quick: bool) -> Iterator[Case]:
    """The grid. Small sizes in full; 1e7 and 1e8 where a figure is read from them."""
    best = isas[0]
    one = [("torch", "", 1), *(("native", isa, 1) for isa in isas)]
    several = [("torch", "", threads), ("native", best, threads)] if threads > 1 else []
    full = tuple(one + several)
    fastest = tuple(c for c in full if c[0] == "torch" or c[1] == best)
    copies = (("memcpy", "", 1), *([("memcpy", "", threads)] if threads > 1 else []))
    types = ("bfloat16", "float32") if quick else tuple(TYPES)
    sizes = (10**5, 10**6) if quick else (10**4, 10**5, 10**6)
    for name, n in itertools.product(types, sizes):
        yield Case("sample", name, n, 1, full)
        yield Case("perturb", name, n, 1, full + copies)
        for h in (1, 10, 20) if quick else HORIZONS:
            yield Case("update", name, n, h, full)
    if quick:
        return
    # Without the portable kernels, whose figures at 1e6 say it all: they would take minutes.
    large = tuple(c for c in full if c[1] != "portable")
    kinds = tuple((name, "", 1) for name in KINDS)
    others = (("torch plain", "", 1), ("as released", "", 1), *kinds)
    for name, more in {"bfloat16": others, "float16": kinds, "float32": ()}.items():
        n = 10**7
        yield Case("sample", name, n, 1, large)
        yield Case("perturb", name, n, 1, large + more + copies)
        for h in (1, 5, 10, 20, 50):
            if h == 10 or (name, h) == ("bfloat16", 20):
                yield Case("update", name, n, h, large + more)
            elif name == "bfloat16":
                yield Case("update", name, n, h, fastest, 5)
            else:
                yield Case("update", name, n, h, tuple(c for c in fastest if c[0] == "native"))
    for name in ("bfloat16", "float32"):
        yield Case("perturb", name, 10**8, 1, fastest + copies, 3)
        yield Case("update", name, 10**8, 10, fastest, 3)


def coefficients(horizon: int) -> tuple[list[float], list[float]]:
    """Coefficients of z and z^2 as AdaMeZO has them for projected gradients of +-0.5."""
    return (
        [0.3 * 0.7**age * (-1) ** age * 0.5 for age in range(horizon)],
        [0.1 * 0.9**age * 0.25 for age in range(horizon)],
    )


def variants(case: Case, use_isa: Callable[[str], AbstractContextManager[object]]) -> list[Variant]:
    """The columns of a case as things to time, all on the same weights."""
    weights = (0.02 * torch.randn(case.elements)).to(TYPES[case.type])
    states = [PhiloxState(SEED, case.horizon - age) for age in range(case.horizon)]
    seeds = [SEED + age for age in range(case.horizon)]
    first, second = coefficients(case.horizon)
    # Tiny steps: thousands of calls must leave the weights ordinary numbers.
    scale = 1e-9
    update = dict(lr=scale, restore=scale)
    plan = Plan([weights])

    def run_of(name: str) -> Callable[[], object]:
        if name == "memcpy":
            return functools.partial(torch.empty_like(weights).copy_, weights)
        if name in LIBRARY:
            if case.what == "sample":
                return lambda: weights.normal_(generator=torch.Generator().manual_seed(SEED))
            # A clone, as the released way moves its weights to new memory each time.
            calls = LIBRARY[name]([weights.clone()])
            if case.what == "perturb":
                return functools.partial(calls.perturb_, seeds[0], scale)
            return functools.partial(calls.update_, seeds, first, second, **update)
        options: dict[str, Any] = dict(KINDS.get(name, {}), backend="native")
        if case.what == "sample":
            return functools.partial(ops.sample_, weights, states[0], **options)
        if case.what == "perturb":
            return functools.partial(ops.perturb_, plan, states[0], scale, **options)
        return functools.partial(ops.update_, plan, states, first, second, **update, **options)

    return [
        Variant(name, run_of(name), threads, isa, context)
        for name, isa, threads in case.columns
        for context in [functools.partial(use_isa, isa) if isa else nullcontext]
    ]


def rows_of(case: Case, timed: Iterable[Variant], where: dict[str, Any]) -> list[Row]:
    return [
        Row(
            *("kernels", "time", "s", v.name),
            settings(
                what="memcpy" if v.name == "memcpy" else case.what,
                type=case.type,
                horizon=None if v.name == "memcpy" else case.horizon,
                threads=v.threads,
                isa=v.isa,
            ),
            *("elements", case.elements),
            **spread(v.seconds),
            **where,
        )
        for v in timed
    ]


def main() -> None:
    arguments = parser(__doc__, "kernels_cpu.csv").parse_args()
    start = time.perf_counter()
    isas = native.instruction_sets()
    if not isas:
        raise SystemExit(f"nothing to time: {native.availability()[1]}")
    for isa in isas:
        with native.use_isa(isa):
            gate(TYPES.values(), backend="native", label=f"native ({isa})")
    print(f"bits equal the reference's: {', '.join(isas)}", flush=True)
    where = conditions()
    made: list[Row] = []
    for case in cases(isas, torch.get_num_threads(), quick=arguments.quick):
        torch.manual_seed(SEED)
        timed = variants(case, native.use_isa)
        interleave(timed, repeats=min(case.repeats, 5 if arguments.quick else 7))
        made += rows_of(case, timed, where)
        shown = ", ".join(
            f"{v.name}{' ' + v.isa if v.isa else ''} x{v.threads} "
            f"{case.elements / (row.median or 1) / 1e6:.4g} M/s"
            for v, row in zip(timed, made[-len(timed) :], strict=True)
        )
        print(f"{case.what} {case.type} {case.elements:.0e} H={case.horizon}: {shown}", flush=True)
        write(arguments.output, made)
    print(f"{len(made)} rows in {time.perf_counter() - start:.0f} s: {arguments.output.name}")


if __name__ == "__main__":
    main()
