"""What do the GPU kernels cost? Registers and instructions of the compiled code; needs no GPU.

    python -m benchmarks.budget           CUDA's kernels where nvcc is, and Triton's where Triton is
    python -m benchmarks.budget Triton    those of one compiler

All kernels are for bfloat16 weights and an H100 (sm_90). A multiprocessor issues four instructions
a cycle, each for 32 elements, and each of its pipes takes some of them, at a pace of its own. The
busiest of these bounds the kernel's speed (PIPES in benchmarks/sass.py). Rows of
benchmarks/results/budget.csv, all with 0 repeats: registers; bytes spilled; bytes moved a weight;
"instructions a normal", in the loop over directions; "instructions a weight", outside that loop;
and for every pipe, such as "alu", "alu cycles a normal" and "alu cycles a weight". A rule that
keeps buffers has no such loop: its one or two directions are in the latter.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adamezo_kernels.backends import triton as triton_backend
from benchmarks.budget_kernels import DISTRIBUTIONS, SUMS, Budget, Kernel, rule_kernels
from benchmarks.results import Row, conditions, load, parser, write
from benchmarks.sass import (
    cuobjdump,
    instructions,
    loop_cycles,
    loop_of_products,
    nvcc,
    run,
)

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# CUDA --------------------------------------------------------------------------------------------

ARCHITECTURES = ("sm_80", "sm_90")
ROUNDINGS = {False: "Rounding::kNearest", True: "Rounding::kStochastic"}
BODIES = {
    "perturb": "Instance<Perturb<{}, {}>, bfloat16>",
    "update": "Instance<Update<{}, true, {}>, bfloat16>",
}
TILE_BODIES = {"perturb": "TilePerturb<{}>", "update": "TileUpdate<true, {}>"}
RULE_BODIES = {"perturb": "ByRule<{}, {}, false>", "update": "ByRule<{}, {}, true>"}
KEPT_TYPES = {"float32": "kFloat32", "bfloat16": "kBFloat16"}
ELEMENTS_OF_A_THREAD = 16
HORIZON = 10
SIGNS_TOGETHER = 8  # directions
GROUPS = 4  # of a thread's elements, which a rule with buffers takes one after another

# A body that branches on types and rounding, as a launch with these ones executes it.
ASSUMED = """
template <class Body, ElementType kKept>
struct Assumed {
  using Directions = typename Body::Directions;
  static ADAMEZO_HD void run(const DeviceJob& job, const Workspace& space, int64_t worker,
                             int64_t workers) {
    DeviceJob known = job;
    known.type = ElementType::kBFloat16;
    known.buffer_type = kKept;
    known.rounding = Rounding::kStochastic;
    Body::run(known, space, worker, workers);
  }
};
"""


def without_cuda() -> str:
    """Why CUDA's kernels cannot be counted here; empty where they can."""
    if not nvcc():
        return "no nvcc on PATH or in a CUDA toolkit: install one, or set CUDACXX"
    if not cuobjdump():
        return "no cuobjdump in the CUDA toolkit: `pip install triton` brings one, or set CUOBJDUMP"
    return ""


def compiled_by_nvcc(
    architecture: str,
    bodies: Sequence[str],
    kernel: str = "kernel<{}>",
    includes: Sequence[str] = (),
) -> Iterator[tuple[int, int, list]]:
    """(registers, bytes spilled, instructions) of each body, compiled in one file that includes
    these ones besides. There are no instructions where cuobjdump is missing."""
    lines = [f'#include "{name}"' for name in ("cuda/kernels.cuh", *includes)]
    lines += ["namespace adamezo::cuda {", ASSUMED]
    for i, body in enumerate(bodies):
        # A type of its own gives each kernel a name by which it is found in the output.
        lines.append(f"struct Body{i}_ : {body} {{}};")
        instance = kernel.format(f"Body{i}_")
        lines.append(f"template __global__ void {instance}(const __grid_constant__ Parameters);")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernels.cu"), str(Path(folder, "kernels.cubin"))
        source.write_text("\n".join([*lines, "}"]))
        flags = ["-std=c++17", "--fmad=false", f"-arch={architecture}", f"-I{CSRC}"]
        report = run(nvcc(), *flags, "-cubin", "-Xptxas", "-v", "-o", binary, str(source))
        sass = run(cuobjdump(), "-sass", binary) if cuobjdump() else ""
    reports = re.split("Compiling entry function", report)[1:]
    codes = re.split("Function : ", sass)[1:]
    for i in range(len(bodies)):
        (said,) = (r for r in reports if f"Body{i}_" in r.split("\n")[0])
        code = next((c for c in codes if f"Body{i}_" in c.split("\n")[0]), "")
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
        yield number(r"Used (\d+) registers", said), spilled, list(instructions(code))


def accesses(code: list) -> Counter[str]:
    return Counter(i.name for i in code if re.match(r"(LD|ST)G?\.E", i.name))


@functools.cache
def cuda_sums(architecture: str) -> tuple[Budget, ...]:
    """The kernels of perturbations and of updates by sums of directions."""
    bodies = [
        BODIES[k.operation].format(DISTRIBUTIONS[k.distribution], ROUNDINGS[k.stochastic])
        for k in SUMS
    ]
    made = []
    for kernel, (*used, code) in zip(SUMS, compiled_by_nvcc(architecture, bodies), strict=True):
        # A quotient is only tested where csrc/cuda/quotients.cuh takes the other way.
        window, loop, inner = loop_cycles(code, whole_program=False, besides="FCHK")
        if kernel.operation == "perturb":
            direction = loop = 0 * loop  # it has no directions to go over: that looks for a segment
        elif kernel.distribution == "rademacher":
            # The outer loop makes calls, along no more than eight directions at once.
            direction = inner + (loop - inner) * -(-HORIZON // SIGNS_TOGETHER) / HORIZON
        else:
            direction = loop
        counts = (direction / ELEMENTS_OF_A_THREAD, (window - loop) / ELEMENTS_OF_A_THREAD)
        made.append(Budget(kernel, *used, *counts, accesses(code)))
    return tuple(made)


TILES = [Kernel(o, "lowrank", s) for o in TILE_BODIES for s in (False, True)]


@functools.cache
def cuda_tiles(architecture: str) -> tuple[Budget, ...]:
    """The kernels of low-rank directions of matrices. Counted is the loop over terms of rank 1
    alone: what is done once for a tile, or for an element, is spread over many loops."""
    bodies = [TILE_BODIES[k.operation].format(ROUNDINGS[k.stochastic]) for k in TILES]
    compiled = compiled_by_nvcc(architecture, bodies, "low_rank_kernel<{}, bfloat16>")
    return tuple(
        Budget(
            *(kernel, *used),
            of_normal=loop_of_products(code) / ELEMENTS_OF_A_THREAD,
            accesses=accesses(code),
        )
        for kernel, (*used, code) in zip(TILES, compiled, strict=True)
    )


def rule_body(kernel: Kernel) -> str:
    kind, rule = DISTRIBUTIONS[kernel.distribution], kernel.rule.capitalize()
    return RULE_BODIES[kernel.operation].format(kind, rule)


@functools.cache
def cuda_rules(architecture: str) -> tuple[Budget, ...]:
    """The kernels of rules with buffers as they are launched. Their instructions are not counted,
    since types and rounding are branches in them."""
    kernels = rule_kernels(DISTRIBUTIONS, ("",))
    compiled = compiled_by_nvcc(architecture, list(map(rule_body, kernels)))
    return tuple(
        Budget(kernel, *used, accesses=accesses(code))
        for kernel, (*used, code) in zip(kernels, compiled, strict=True)
    )


@functools.cache
def cuda_rules_counted() -> tuple[Budget, ...]:
    """The same for an H100 and exact directions, by the buffers' type."""
    launched = {b.kernel: b for b in cuda_rules("sm_90")}
    kernels = rule_kernels(("exact",), KEPT_TYPES)
    bodies = [
        f"Assumed<{rule_body(kernel)}, ElementType::{KEPT_TYPES.get(kernel.kept, 'kFloat32')}>"
        for kernel in kernels
    ]
    made = []
    for kernel, (*_, code) in zip(kernels, compiled_by_nvcc("sm_90", bodies), strict=True):
        used = launched[replace(kernel, kept="")]
        window, group, _ = loop_cycles(code, whole_program=False)
        count = (window + (GROUPS - 1) * group) / ELEMENTS_OF_A_THREAD
        made.append(Budget(kernel, used.registers, used.spilled_bytes, of_weight=count))
    return tuple(made)


# Triton ------------------------------------------------------------------------------------------

TARGETS = {
    "cuda:80": ("cuda", 80, 32),
    "cuda:90": ("cuda", 90, 32),
    "hip:gfx942": ("hip", "gfx942", 64),
}
# The kernel's arguments; all others are constants.
SIGNATURE = {
    "table": "*i64",
    "words": "*i32",
    **dict.fromkeys(("segments", "horizon"), "i32"),
    **dict.fromkeys(("offset", "first_program"), "i64"),
    **dict.fromkeys(("key_low", "key_high", "scale", "eps"), "i32"),
}


def without_triton() -> str:
    """Why Triton's kernels cannot be compiled or counted here; empty where they can."""
    try:
        triton_backend.kernels()
    except Exception as error:
        return f"no Triton ({type(error).__name__}: {error}): `pip install triton`"
    return "" if cuobjdump() else without_cuda()


@functools.cache
def compiled_by_triton(
    target: str,
    operation: str,
    distribution: str = "exact",
    type: str = "bfloat16",
    second: bool = True,
    stochastic: bool = False,
    rule: str = "moments",
    kept: str = "",
) -> Any:
    """The kernel, compiled for a target of TARGETS as a call would: Triton's CompiledKernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget(*TARGETS[target])
    constants = triton_backend.constants(
        *(operation, distribution, type, kept),
        second=second and operation in ("update", "moment") and rule == "moments",
        stochastic=stochastic,
        rule=rule,
        on=gpu.backend,
    )
    source = ASTSource(
        fn=triton_backend.kernels().run,
        signature=SIGNATURE | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    return triton.compile(source, target=gpu, options=triton_backend.options(gpu.warp_size))


def triton_budget(kernel: Kernel) -> Budget:
    """The counts of one kernel for an H100."""
    compiled = compiled_by_triton(
        *("cuda:90", kernel.operation, kernel.distribution),
        stochastic=kernel.stochastic,
        rule=kernel.rule or "moments",
        kept=kernel.kept,
    )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        usage, sass = (run(cuobjdump(), what, str(binary)) for what in ("-res-usage", "-sass"))
    program, loop, _ = loop_cycles(list(instructions(sass)), whole_program=True)
    # The first direction is in front of the loop over the others. Of kernels without one, the
    # largest loop is the search for the segment, which the usual path goes through once.
    direction = loop * (kernel.what == "update")
    window = triton_backend.window_of(kernel.operation, kernel.rule or "moments")
    elements = window // triton_backend.THREADS
    return Budget(
        *(kernel, number(r"REG:(\d+)", usage), number(r"STACK:(\d+)", usage)),
        *(direction / elements, (program - 2 * direction) / elements),
    )


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"found no {pattern} in the compiler's output: {text[:500]}")
    return int(found.group(1))


# The table ---------------------------------------------------------------------------------------


def budgets(by: str) -> Iterable[Budget]:
    """Those of one compiler, for an H100."""
    if by == "CUDA":
        return (*cuda_sums("sm_90"), *cuda_rules_counted())
    return map(triton_budget, [*SUMS, *rule_kernels(("exact",), ("bfloat16",))])


def compiler(by: str) -> str:
    """A compiler's name and version."""
    if by == "Triton":
        return f"triton {importlib.metadata.version('triton')}"
    version = re.search(r"V([\d.]+)", run(nvcc(), "--version"))
    return f"nvcc {version.group(1) if version else '?'}"


def main() -> None:
    options = parser(__doc__, "budget.csv")
    options.add_argument("by", nargs="*", metavar="COMPILER", help="CUDA, Triton or both")
    arguments = options.parse_args()
    lacks = {"CUDA": without_cuda, "Triton": without_triton}
    made: list[Row] = []
    for by in arguments.by or lacks:
        if lack := lacks[by]():
            print(f"without {by}: {lack}")
            continue
        where = conditions(device="sm_90", clock_hz=None, compiler=compiler(by))
        for b in budgets(by):
            made += b.rows(by, where)
            counts = f"{b.per_normal:.2f} a normal, {b.per_weight:.1f} a weight"
            used = f"{b.registers} registers, {b.spilled_bytes} B spilled"
            print(f"{by} {b.kernel.what}, {b.kernel.variant}: {used}, {counts}", flush=True)
    if not made:
        raise SystemExit("budget: nothing was counted")
    kinds = {row.settings for row in made}
    others = [row for row in load(arguments.output) if row.settings not in kinds]
    write(arguments.output, [*others, *made])
    print(f"{len(made)} rows: {arguments.output.name}")


if __name__ == "__main__":
    main()
