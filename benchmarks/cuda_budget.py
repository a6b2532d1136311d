"""What do the CUDA kernels cost? Counted in the compiled code; needs nvcc and no GPU.

    python -m benchmarks.cuda_budget

Compiles the kernels for sm_80 and sm_90, disassembles them with cuobjdump (of the CUDA toolkit, or
of an installed Triton, which brings one) and counts instructions: a multiprocessor issues four
a cycle, each for 32 elements, so they bound what it can do. Writes
benchmarks/results/cuda_budget.csv, of predictions: rows with 0 repeats and an assumed clock.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import adamezo_kernels

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = ("sm_80", "sm_90")
DISTRIBUTIONS = {"exact": "Exact", "fast": "Fast", "rademacher": "Rademacher"}
ROUNDINGS = {"nearest": "Rounding::kNearest", "stochastic": "Rounding::kStochastic"}
OPERATIONS = {"perturb": "Perturb<{}, {}>", "update": "Update<{}, true, {}>"}
ELEMENTS_PER_THREAD = 16
QUAD = 4  # elements that a rule with numbers of its own takes at once
RULES = {name: rule for name, rule in adamezo_kernels.RULES.items() if name != "moments"}
KEPT_TYPES = {"float32": ("kFloat32", 4), "bfloat16": ("kBFloat16", 2)}

# An H100: what a prediction assumes. Each multiprocessor has four schedulers; a scheduler issues
# one instruction for 32 lanes a cycle, and its special-function unit takes eight cycles for one.
MULTIPROCESSORS, SCHEDULERS, LANES, CLOCK_HZ = 132, 4, 32, 1.7e9
SPECIAL_FUNCTION_CYCLES = 8
BYTES_PER_S = 3.0e12  # that a copy reaches, read and written
WEIGHTS = 1_300_000_000

PIPES = {
    "fma": ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2"),
    "special": ("MUFU", "I2F", "F2I", "F2F"),
    "memory": ("LD", "ST", "ATOM", "RED"),
    "control": ("BRA", "BSSY", "BSYNC", "CALL", "RET", "EXIT", "WARPSYNC", "NOP", "BAR"),
    "uniform": ("U", "R2U", "S2U"),
}  # everything else is integer and logic: "alu"


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str
    conditional: bool = False

    @property
    def pipe(self) -> str:
        if self.name.startswith(("I2FP", "F2FP")):
            return "alu"
        return next((p for p, starts in PIPES.items() if self.name.startswith(starts)), "alu")

    @property
    def target(self) -> int | None:
        """Where a branch goes, or where the threads of a divergent stretch meet again."""
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        jumps = self.name.startswith(("BRA", "BSSY", "CALL"))
        return int(found.group(1), 16) if jumps and found else None


@dataclass(frozen=True)
class Budget:
    """Of one kernel for bfloat16 weights. Counts are of instructions that a warp issues."""

    architecture: str
    operation: str
    distribution: str
    rounding: str
    registers: int
    spilled_bytes: int
    direction: Counter[str]
    """By pipe, for each direction of a thread's sixteen elements; empty for perturb."""
    window: Counter[str]
    """By pipe, once for a thread's sixteen elements, on the way where all of them are whole chunks
    and no quotient or root needs the slow path."""
    wide_accesses: Counter[str]
    """Loads (LDG) and stores (STG) of sixteen bytes in the code."""
    kept: str = ""
    """The type of what a rule keeps. Its directions are in `window` then."""
    directions: int = 0
    """How many a rule has."""
    bytes_moved: int = 2 * 2
    """Of a weight: it, and what is kept for it, read and written."""

    @property
    def variant(self) -> str:
        nearest = self.rounding == "nearest"
        kind = self.distribution if nearest else f"{self.distribution}, {self.rounding}"
        return f"{kind}, {self.kept} numbers" if self.kept else kind

    @property
    def slots_per_normal(self) -> float:
        """Of a direction, without what is done once."""
        return self.direction.total() / ELEMENTS_PER_THREAD

    @property
    def slots_once(self) -> float:
        """Of what is done once for each weight."""
        return self.window.total() / ELEMENTS_PER_THREAD

    def seconds(self, horizon: int, elements: int = WEIGHTS) -> float:
        """The prediction for an H100: the slowest of issue, special functions and memory."""
        counts = [self.direction] * horizon + [self.window]
        slots = sum(c.total() for c in counts)
        special = SPECIAL_FUNCTION_CYCLES * sum(c["special"] for c in counts)
        warps = elements / (ELEMENTS_PER_THREAD * LANES)
        cycles = max(slots, special) * warps / (MULTIPROCESSORS * SCHEDULERS)
        return max(cycles / CLOCK_HZ, self.bytes_moved * elements / BYTES_PER_S)


def nvcc() -> str | None:
    roots = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    places = [f"{root}/bin" for root in [*roots, "/usr/local/cuda", "/opt/cuda"]]
    return (
        os.environ.get("CUDACXX")
        or shutil.which("nvcc")
        or shutil.which("nvcc", path=os.pathsep.join(places))
    )


def cuobjdump() -> str | None:
    compiler = nvcc()
    places = [str(Path(compiler).resolve().parent)] if compiler else []
    places += ["/usr/local/cuda/bin", "/opt/cuda/bin"]
    triton = importlib.util.find_spec("triton")  # not imported: its files are enough
    for folder in (triton.submodule_search_locations or ()) if triton else ():
        places.append(f"{folder}/backends/nvidia/bin")
    return (
        os.environ.get("CUOBJDUMP")
        or shutil.which("cuobjdump")
        or shutil.which("cuobjdump", path=os.pathsep.join(places))
    )


def missing() -> str:
    """What is not here of what this needs; empty where all is."""
    if nvcc() is None:
        return "no nvcc on PATH or in a CUDA toolkit: install one, or set CUDACXX"
    if cuobjdump() is None:
        return "no cuobjdump in the CUDA toolkit: `pip install triton` brings one, or set CUOBJDUMP"
    return ""


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stdout}")
    return done.stdout


@functools.cache
def budgets(architecture: str) -> tuple[Budget, ...]:
    """Compiles every kernel of OPERATIONS, DISTRIBUTIONS and ROUNDINGS, and counts where cuobjdump
    is."""
    kernels = {
        (operation, distribution, rounding): f"Instance<{body.format(name, mode)}, bfloat16>"
        for operation, body in OPERATIONS.items()
        for distribution, name in DISTRIBUTIONS.items()
        for rounding, mode in ROUNDINGS.items()
    }
    compiler, dumper = nvcc(), cuobjdump()
    if compiler is None:
        raise RuntimeError(missing())
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, body in kernels.items():
            source, binary = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
            source.write_text(
                '#include "cuda/kernels.cuh"\nnamespace adamezo::cuda {\n'
                f"template __global__ void kernel<{body}>(const __grid_constant__ DeviceJob);\n}}\n"
            )
            flags = ["-std=c++17", "--fmad=false", f"-arch={architecture}", f"-I{CSRC}"]
            report = run(
                compiler, *flags, "-cubin", "-Xptxas", "-v", "-o", str(binary), str(source)
            )
            registers = re.search(r"Used (\d+) registers", report)
            assert registers, report
            direction, window, wide = Counter[str](), Counter[str](), Counter[str]()
            if dumper:
                code = list(instructions(run(dumper, "-sass", str(binary))))
                direction, window = count(code)
                wide.update(i.name[:3] for i in code if re.fullmatch(r"(LD|ST)G\.E\.128", i.name))
            found.append(
                Budget(
                    architecture,
                    *kind,
                    int(registers.group(1)),
                    sum(map(int, re.findall(r"(\d+) bytes spill", report))),
                    direction,
                    window,
                    wide,
                )
            )
    return tuple(found)


# What a launch with these types and this rounding does of a body that branches on them.
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


@dataclass(frozen=True)
class RuleKernel:
    """A kernel of a rule with numbers of its own, as it is launched."""

    architecture: str
    operation: str
    distribution: str
    registers: int
    spilled_bytes: int
    accesses: Counter[str]
    """Loads and stores by their width, such as LDG.E.128."""


def rule_bodies() -> dict[str, tuple[str, str]]:
    """Of an operation: the rule's name, and its body of buffered.cuh with a place for the
    distribution."""
    bodies = {}
    for operation, updates in (("perturb", "false"), ("update", "true")):
        for name, rule in RULES.items():
            if rule.bends if operation == "perturb" else rule.updates:
                body = f"ByRule<{{}}, {name.capitalize()}, {updates}>"
                bodies[f"{operation} {name}"] = (name, body)
    return bodies


@functools.cache
def rule_kernels(architecture: str) -> tuple[RuleKernel, ...]:
    """Compiles those that keep numbers for each weight."""
    bodies = {
        (operation, distribution): body.format(name)
        for operation, (_, body) in rule_bodies().items()
        for distribution, name in DISTRIBUTIONS.items()
    }
    return tuple(
        RuleKernel(
            architecture,
            *kind,
            registers,
            spilled,
            Counter(i.name for i in code if re.match(r"(LD|ST)G?\.E", i.name)),
        )
        for kind, registers, spilled, code in compiled(architecture, bodies)
    )


@functools.cache
def rule_budgets(architecture: str) -> tuple[Budget, ...]:
    """Of the same along exact directions, for bfloat16 weights that are rounded stochastically."""
    bodies = {
        (operation, kept): f"Assumed<{body.format('Exact')}, ElementType::{name}>"
        for operation, (rule, body) in rule_bodies().items()
        for kept, (name, _) in KEPT_TYPES.items()
        if RULES[rule].buffers or kept == "float32"
    }
    launched = {(k.operation, k.distribution): k for k in rule_kernels(architecture)}
    made = []
    for (operation, kept), _, _, code in compiled(architecture, bodies):
        quad, window = count(code)
        each = {pipe: ELEMENTS_PER_THREAD // QUAD * n for pipe, n in quad.items()}
        rule, _ = rule_bodies()[operation]
        directions, buffers = RULES[rule].directions, RULES[rule].buffers
        times = 2 if operation.startswith("update") else 1  # read, and in an update written
        kernel = launched[operation, "exact"]
        made.append(
            Budget(
                architecture,
                operation,
                "exact",
                "stochastic",
                kernel.registers,
                kernel.spilled_bytes,
                Counter(),
                window + Counter(each),
                Counter(i.name[:3] for i in code if re.fullmatch(r"(LD|ST)G\.E\.128", i.name)),
                kept if buffers else "",
                directions,
                2 * 2 + times * buffers * KEPT_TYPES[kept][1],
            )
        )
    return tuple(made)


def compiled(
    architecture: str, bodies: dict[tuple[str, str], str]
) -> Iterator[tuple[tuple[str, str], int, int, list[Instruction]]]:
    """(its key, registers, bytes spilled, code where cuobjdump is) of each body, all out of one
    file: an explicit instance in a namespace of its own for each, so that its name is known."""
    compiler, dumper = nvcc(), cuobjdump()
    if compiler is None:
        raise RuntimeError(missing())
    lines = ['#include "cuda/kernels.cuh"', "namespace adamezo::cuda {", ASSUMED]
    for i, body in enumerate(bodies.values()):
        # A type of its own gives the kernel a name that says which one it is.
        lines.append(f"struct Body{i}_ : {body} {{}};")
        lines.append(
            f"template __global__ void kernel<Body{i}_>(const __grid_constant__ DeviceJob);"
        )
    lines.append("}")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        source.write_text("\n".join(lines))
        flags = ["-std=c++17", "--fmad=false", f"-arch={architecture}", f"-I{CSRC}"]
        report = run(compiler, *flags, "-cubin", "-Xptxas", "-v", "-o", str(binary), str(source))
        sass = run(dumper, "-sass", str(binary)) if dumper else ""
    of_kernels = re.split(r"Compiling entry function", report)[1:]
    codes = re.split(r"Function : ", sass)[1:]
    for i, key in enumerate(bodies):
        (said,) = (r for r in of_kernels if f"Body{i}_" in r.split("\n")[0])
        registers = re.search(r"Used (\d+) registers", said)
        assert registers, said
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
        code = next((c for c in codes if f"Body{i}_" in c.split("\n")[0]), "")
        yield key, int(registers.group(1)), spilled, list(instructions(code))


def instructions(sass: str) -> Iterator[Instruction]:
    for address, predicate, name, operands in re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass
    ):
        yield Instruction(int(address, 16), name, operands, bool(predicate))


def count(code: Sequence[Instruction]) -> tuple[Counter[str], Counter[str]]:
    """(for each direction, once for each window), by pipe.

    The loops are known by their wide multiplies: Philox makes sixteen a call. The innermost loop
    with most of them is that over directions, and the smallest around it that over windows;
    a kernel with one direction has only the latter.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    loops = [
        range(at[i.target], n + 1)
        for n, i in enumerate(code)
        if i.name.startswith("BRA") and i.target is not None and at.get(i.target, n + 1) < n
    ]

    def multiplies(loop: range) -> int:
        return sum(code[n].name.startswith("IMAD.WIDE.U32") for n in loop)

    with_philox = sorted((x for x in loops if multiplies(x) >= 16), key=len)
    if not with_philox:
        raise RuntimeError("found no loop with Philox rounds in the disassembly")
    window = with_philox[-1]
    direction = with_philox[0] if len(with_philox) > 1 else range(0)
    inside = set(direction)
    usual = usual_way(code, window)
    return (
        Counter(code[n].pipe for n in direction if n in usual),
        Counter(code[n].pipe for n in window if n in usual and n not in inside),
    )


def usual_way(code: Sequence[Instruction], loop: range) -> set[int]:
    """The instructions of a loop without the basic blocks that are seldom entered.

    Those read or write single elements (a chunk or a quad that is not whole), divide integers (rows
    of a segment) or call (the slow paths of a quotient and a root). Nor with the stores of z_0,
    which are made once a window.
    """
    targets = {i.target for i in code if i.target is not None}
    usual: set[int] = set()
    block: list[int] = []

    addresses = {code[n].address for n in loop}

    def is_seldom(instruction: Instruction) -> bool:
        if instruction.name.startswith("CALL"):  # also how a compiler may leave the inner loop
            return instruction.target not in addresses
        divides = instruction.name.startswith(("I2F.U64", "F2I.U64", "F2I.FTZ.U32"))
        return divides or bool(re.match(r"(LDG?|STG?)\.(E\.)?U16", instruction.name))

    def close() -> None:
        seldom = any(is_seldom(code[n]) for n in block)
        # Single elements of float32 are read and written where they are in the run.
        single = [code[n] for n in block if code[n].name in ("LDG.E", "STG.E")]
        leaves = bool(block) and code[block[-1]].name == "BRA" and not code[block[-1]].conditional
        seldom |= any(i.conditional for i in single) or bool(single and leaves)
        if not seldom:
            stores = [n for n in block if code[n].name == "STS"]
            z0 = set(stores) if len(stores) >= ELEMENTS_PER_THREAD else set()
            usual.update(n for n in block if n not in z0)
        block.clear()

    for n in loop:
        if code[n].address in targets:
            close()
        block.append(n)
        if code[n].name.startswith("BRA"):
            close()
    close()
    return usual


def rows(found: Sequence[Budget], horizons: Sequence[int] = (1, 10, 20)) -> list:
    from benchmarks.rows import Row, conditions

    version = re.search(r"V([\d.]+)", run(nvcc() or "", "--version"))
    where = conditions() | {
        "device": f"predicted: {MULTIPROCESSORS} multiprocessors",
        "clock_hz": CLOCK_HZ,
        "clock_source": "assumed",
    }
    made = []
    for budget in found:
        where["compiler"] = (
            f"nvcc {version.group(1) if version else '?'}: {budget.registers} registers, "
            f"{budget.spilled_bytes} bytes spilled"
        )
        some = horizons if budget.operation == "update" else (max(budget.directions, 1),)
        for horizon in some:
            seconds = budget.seconds(horizon)
            made.append(
                Row(
                    benchmark="cuda_budget",
                    what=budget.operation,
                    variant=budget.variant,
                    type="bfloat16",
                    elements=WEIGHTS,
                    horizon=horizon,
                    isa=budget.architecture,
                    median_s=seconds,
                    elements_per_s=WEIGHTS / seconds,
                    normals_per_s=WEIGHTS * horizon / seconds,
                    bytes_per_s=budget.bytes_moved * WEIGHTS / seconds,
                    cycles_per_normal=(
                        budget.slots_once / budget.directions
                        if budget.directions
                        else budget.slots_per_normal or None
                    ),
                    **where,
                )
            )
    return made


def main() -> None:
    from benchmarks.rows import RESULTS, write_rows

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "cuda_budget.csv")
    arguments = parser.parse_args()
    if lack := missing():
        raise SystemExit(f"cuda_budget: {lack}")
    found = [budget for architecture in ARCHITECTURES for budget in budgets(architecture)]
    print("bfloat16 weights; instructions issued for each normal, and once for each weight")
    for b in found:
        by_pipe = ", ".join(
            f"{pipe} {n / ELEMENTS_PER_THREAD:.2f}" for pipe, n in b.direction.most_common()
        )
        both = f", {b.slots_per_normal + b.slots_once / 10:.2f} a normal at H = 10"
        times = ", ".join(
            f"H={h} {1e3 * b.seconds(h):.1f} ms" for h in ((1, 10, 20) if b.direction else (1,))
        )
        print(
            f"{b.architecture} {b.operation:<8}{b.variant:<23} {b.registers} registers, "
            f"{b.spilled_bytes} B spilled; {b.slots_per_normal:.2f} a normal ({by_pipe}); "
            f"{b.slots_once:.1f} once{both if b.direction else ''}"
            + (f"; an H100 at best {times}" if b.architecture == "sm_90" else "")
        )
    kept = [budget for architecture in ARCHITECTURES for budget in rule_budgets(architecture)]
    print("rules that keep numbers for each weight; instructions issued for each weight")
    for b in kept:
        by_pipe = ", ".join(
            f"{pipe} {n / ELEMENTS_PER_THREAD:.2f}" for pipe, n in b.window.most_common()
        )
        print(
            f"{b.architecture} {b.operation:<15}{b.variant:<36} {b.registers} registers, "
            f"{b.spilled_bytes} B spilled; {b.slots_once:.1f} ({by_pipe}); {b.bytes_moved} B"
            + (
                f"; an H100 at best {1e3 * b.seconds(0):.1f} ms"
                if b.architecture == "sm_90"
                else ""
            )
        )
    made = rows([b for b in (*found, *kept) if b.architecture == "sm_90"])
    write_rows(arguments.output, made)
    print(f"{len(made)} predictions for 1.3e9 weights: {arguments.output.name}")


if __name__ == "__main__":
    main()
