"""What do the GPU kernels cost? Counted in the compiled code; needs no GPU.

    python -m benchmarks.budget           CUDA's, where nvcc is, and Triton's, where Triton is
    python -m benchmarks.budget Triton    one of them

CUDA's kernels are compiled for sm_80 and sm_90, Triton's for an MI300 too, and disassembled with
cuobjdump (of the CUDA toolkit, or of an installed Triton, which brings one). A multiprocessor
issues four instructions a cycle, each for 32 elements, so their number bounds what it can do.
Writes benchmarks/results/budget.csv: counts, and for the H100 predicted times, with 0 repeats and
an assumed clock.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator

from benchmarks import budget_cuda, budget_triton
from benchmarks.budget_code import Budget, nvcc, run
from benchmarks.results import conditions, load, parser, write


def compiler(by: str) -> str:
    """A compiler's name and version."""
    if by == "Triton":
        return f"triton {importlib.metadata.version('triton')}"
    version = re.search(r"V([\d.]+)", run(nvcc() or "", "--version"))
    return f"nvcc {version.group(1) if version else '?'}"


def budgets(by: str) -> Iterator[Budget]:
    if by == "Triton":
        yield from budget_triton.budgets()
        return
    for of in (budget_cuda.budgets, budget_cuda.rule_budgets):
        for architecture in budget_cuda.ARCHITECTURES:
            yield from of(architecture)


def main() -> None:
    options = parser(__doc__, "budget.csv")
    options.add_argument("by", nargs="*", metavar="COMPILER", help="CUDA, Triton or both")
    arguments = options.parse_args()
    lacks = {"CUDA": budget_cuda.missing, "Triton": budget_triton.missing}
    made = []
    for by in arguments.by or lacks:
        if lack := lacks[by]():
            print(f"without {by}: {lack}")
            continue
        where = conditions(clock_hz=None, clock_source="", compiler=compiler(by))
        for b in budgets(by):
            # The table has CUDA's for the H100 alone; the others are held by tests.
            if by == "Triton" or b.target == "sm_90":
                made += b.rows(where | {"device": b.target})
            pipes = ", ".join(f"{pipe} {n / b.elements:.2f}" for pipe, n in b.direction.items())
            times = ", ".join(f"H={h} {1e3 * b.seconds(h):.1f} ms" for h in b.horizons)
            print(
                f"{by} {b.target} {b.operation}, {b.variant}: {b.registers} registers, "
                f"{b.spilled_bytes} B spilled; {b.per_normal:.2f} a normal ({pipes}), "
                f"{b.per_weight:.1f} once" + f"; an H100 at best {times}" * (b.target == "sm_90"),
                flush=True,
            )
    if not made:
        raise SystemExit("budget: nothing was counted")
    kinds = {row.settings for row in made}
    others = [row for row in load(arguments.output) if row.settings not in kinds]
    write(arguments.output, [*others, *made])
    print(f"{len(made)} rows: {arguments.output.name}")


if __name__ == "__main__":
    main()
