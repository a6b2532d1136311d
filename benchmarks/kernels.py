"""How fast are the kernels, beside pure torch and beside memcpy?

    python -m benchmarks.kernels            about 6 minutes on two cores
    python -m benchmarks.kernels --quick    under a minute; fewer sizes, types and repeats

Writes benchmarks/results/kernels_cpu.csv and draws its plots from it. Everything compared is timed
in turn in the same run; see benchmarks/rows.py.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from adamezo_kernels import ops
from adamezo_kernels.plan import Plan
from adamezo_kernels.stream import PhiloxState
from benchmarks.gate import gate
from benchmarks.library_calls import AsReleased, Fair, Plain
from benchmarks.rows import RESULTS, Row, Variant, conditions, interleave, timing, write_rows

TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
LIBRARY: dict[str, type[Fair | Plain | AsReleased]] = {
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
    native = tuple(c for c in fastest if c[0] == "native")
    # Without the portable kernels, whose figures at 1e6 say it all: they would take minutes.
    large = tuple(c for c in full if c[1] != "portable")
    others = (*large, ("torch plain", "", 1), ("as released", "", 1))
    kinds = tuple((name, "", 1) for name in KINDS)
    copies = (("memcpy", "", 1), *([("memcpy", "", threads)] if threads > 1 else []))

    if quick:
        for name in ("bfloat16", "float32"):
            for n in (100_000, 1_000_000):
                yield Case("sample", name, n, 1, full, 5)
                yield Case("perturb", name, n, 1, full + copies, 5)
                for h in (1, 10, 20):
                    yield Case("update", name, n, h, full, 5)
        return
    for name, n in itertools.product(TYPES, (10_000, 100_000, 1_000_000)):
        yield Case("sample", name, n, 1, full)
        yield Case("perturb", name, n, 1, full + copies)
        for h in HORIZONS:
            yield Case("update", name, n, h, full)
    for name in TYPES:
        n = 10_000_000
        columns = {"bfloat16": others + kinds, "float16": large + kinds, "float32": large}[name]
        yield Case("sample", name, n, 1, large)
        yield Case("perturb", name, n, 1, columns + copies)
        yield Case("update", name, n, 10, columns)
        if name == "bfloat16":
            yield Case("update", name, n, 20, columns)
            for h in (1, 5, 50):
                yield Case("update", name, n, h, fastest, 5)
        else:
            for h in (1, 5, 20, 50):
                yield Case("update", name, n, h, native)
    for name in ("bfloat16", "float32"):
        n = 100_000_000
        yield Case("perturb", name, n, 1, fastest + copies, 3)
        yield Case("update", name, n, 10, fastest, 3)


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
    lr = scale = 1e-9
    plan = Plan([weights])
    made = []
    for name, isa, threads in case.columns:
        library = LIBRARY.get(name)
        run: Callable[[], object]
        if name == "memcpy":
            run = functools.partial(torch.empty_like(weights).copy_, weights)
        elif library is not None:
            # A clone, as the released way moves its weights to new memory each time.
            operations = library([weights.clone()])
            if case.what == "sample":
                run = functools.partial(_normal, weights)
            elif case.what == "perturb":
                run = functools.partial(operations.perturb_, seeds[0], scale)
            else:
                run = functools.partial(
                    operations.update_, seeds, first, second, lr=lr, restore=scale
                )
        elif case.what == "sample":
            run = functools.partial(ops.sample_, weights, states[0], backend="native")
        elif case.what == "perturb":
            run = functools.partial(
                ops.perturb_, plan, states[0], scale, backend="native", **KINDS.get(name, {})
            )
        else:
            run = functools.partial(
                ops.update_,
                plan,
                states,
                first,
                second,
                lr=lr,
                restore=scale,
                backend="native",
                **KINDS.get(name, {}),
            )
        context = functools.partial(use_isa, isa) if isa else nullcontext
        made.append(Variant(name, run, threads, isa, context))
    return made


def _normal(out: torch.Tensor) -> None:
    out.normal_(generator=torch.Generator().manual_seed(SEED))


def rows_of(case: Case, timed: Sequence[Variant], where: dict[str, object]) -> list[Row]:
    """Rows with their ratios and rates."""
    size = TYPES[case.type].itemsize
    clock = where["clock_hz"]
    torch_seconds = {v.threads: timing(v.seconds)["median_s"] for v in timed if v.name == "torch"}
    made = []
    for v in timed:
        columns = timing(v.seconds)
        median = columns["median_s"]
        what = "memcpy" if v.name == "memcpy" else case.what
        normals = 0 if what == "memcpy" else case.elements * case.horizon
        reference = torch_seconds.get(v.threads) if normals else None
        passes = 1 if what == "sample" else 2  # one read and one write of every weight
        made.append(
            Row(
                benchmark="kernels",
                what=what,
                variant=v.name,
                type=case.type,
                elements=case.elements,
                horizon=case.horizon if normals else 0,
                threads=v.threads,
                isa=v.isa,
                reference="torch" if reference else "",
                ratio=reference / median if reference else None,
                elements_per_s=case.elements / median,
                normals_per_s=normals / median if normals else None,
                bytes_per_s=passes * size * case.elements / median,
                cycles_per_normal=(
                    clock * median / normals
                    if normals and isinstance(clock, float) and v.threads == 1
                    else None
                ),
                **columns,  # type: ignore[arg-type]
                **where,  # type: ignore[arg-type]
            )
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute, for a first look")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels_cpu.csv")
    parser.add_argument("--no-plots", action="store_true", help="write the CSV alone")
    arguments = parser.parse_args()

    from adamezo_kernels.backends import native

    start = time.perf_counter()
    threads = torch.get_num_threads()
    isas = native.instruction_sets()
    if not isas:
        raise SystemExit(f"nothing to time: {native.availability()[1]}")
    for isa in isas:
        with native.use_isa(isa):
            gate(TYPES.values(), backend="native", label=f"native ({isa})")
    print(f"bits equal the reference's: {', '.join(isas)}", flush=True)

    where = conditions()
    made: list[Row] = []
    for case in cases(isas, threads, quick=arguments.quick):
        torch.manual_seed(SEED)
        timed = variants(case, native.use_isa)
        interleave(timed, repeats=case.repeats)
        made += rows_of(case, timed, where)
        shown = ", ".join(
            f"{r.variant}{' ' + r.isa if r.isa else ''} x{r.threads} "
            f"{(r.elements_per_s or 0) / 1e6:.4g} M/s"
            for r in made[-len(timed) :]
        )
        print(f"{case.what} {case.type} {case.elements:.0e} H={case.horizon}: {shown}", flush=True)
        write_rows(arguments.output, made)
    print(f"{len(made)} rows in {time.perf_counter() - start:.0f} s: {arguments.output.name}")
    if not arguments.no_plots:
        from benchmarks.plots import plot_kernels

        plot_kernels(arguments.output)


if __name__ == "__main__":
    main()
