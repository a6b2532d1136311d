"""The CUDA kernels, compiled by nvcc and counted in the disassembly; needs no GPU."""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.budget_code import Budget, Instruction, cuobjdump, instructions, nvcc, run

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = ("sm_80", "sm_90")
DISTRIBUTIONS = {"exact": "Exact", "fast": "Fast", "rademacher": "Rademacher"}
ROUNDINGS = {False: "Rounding::kNearest", True: "Rounding::kStochastic"}
OPERATIONS = {"perturb": "Perturb<{}, {}>", "update": "Update<{}, true, {}>"}
ELEMENTS_PER_THREAD = 16
QUAD = 4  # elements that a rule with numbers of its own takes at once
RULES = {"adam": (1, 2), "hizoo": (1, 1), "helene": (1, 2), "adamu": (2, 1), "blend": (2, 0)}
"""(directions, numbers kept for each weight) of those in csrc/adamezo/buffered.h"""
BENT = ("hizoo", "adamu", "blend")
KEPT_TYPES = {"float32": ("kFloat32", 4), "bfloat16": ("kBFloat16", 2)}


def missing() -> str:
    """What is not here of what this needs; empty where all is."""
    if nvcc() is None:
        return "no nvcc on PATH or in a CUDA toolkit: install one, or set CUDACXX"
    if cuobjdump() is None:
        return "no cuobjdump in the CUDA toolkit: `pip install triton` brings one, or set CUOBJDUMP"
    return ""


@functools.cache
def budgets(architecture: str) -> tuple[Budget, ...]:
    """Of every kernel of OPERATIONS, DISTRIBUTIONS and ROUNDINGS, counted where cuobjdump is."""
    bodies = {
        (operation, distribution, rounding): f"Instance<{body.format(name, mode)}, bfloat16>"
        for operation, body in OPERATIONS.items()
        for distribution, name in DISTRIBUTIONS.items()
        for rounding, mode in ROUNDINGS.items()
    }
    return tuple(
        Budget("CUDA", architecture, *key, registers, spilled, *count(code), accesses=wide(code))
        for key, registers, spilled, code in compiled(architecture, bodies)
    )


def wide(code: Sequence[Instruction]) -> Counter[str]:
    """Loads and stores by their width."""
    return Counter(i.name for i in code if re.match(r"(LD|ST)G?\.E", i.name))


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


def rule_bodies() -> dict[str, tuple[str, str]]:
    """Of an operation: the rule's name, and its body of buffered.cuh with a place for the
    distribution."""
    bent = {f"perturb {r}": (r, f"BentPerturb<{{}}, {r.capitalize()}>") for r in BENT}
    updates = [r for r in RULES if r != "blend"]  # which only displaces
    return bent | {f"update {r}": (r, f"BufferedUpdate<{{}}, {r.capitalize()}>") for r in updates}


@functools.cache
def rule_kernels(architecture: str) -> tuple[Budget, ...]:
    """The kernels of rules that keep numbers for each weight, as they are launched; not counted, as
    types and rounding are branches in them."""
    bodies = {
        (operation, distribution): body.format(name)
        for operation, (_, body) in rule_bodies().items()
        for distribution, name in DISTRIBUTIONS.items()
    }
    none = Counter[str]()
    return tuple(
        Budget("CUDA", architecture, *key, True, *found, none, none, accesses=wide(code))
        for key, *found, code in compiled(architecture, bodies)
    )


@functools.cache
def rule_budgets(architecture: str) -> tuple[Budget, ...]:
    """Of the same along exact directions, for bfloat16 weights that are rounded stochastically."""
    bodies = {
        (operation, kept): f"Assumed<{body.format('Exact')}, ElementType::{name}>"
        for operation, (rule, body) in rule_bodies().items()
        for kept, (name, _) in KEPT_TYPES.items()
        if RULES[rule][1] or kept == "float32"
    }
    launched = {(k.operation, k.distribution): k for k in rule_kernels(architecture)}
    made = []
    for (operation, kept), _, _, code in compiled(architecture, bodies):
        quad, window = count(code)
        each = {pipe: ELEMENTS_PER_THREAD // QUAD * n for pipe, n in quad.items()}
        directions, buffers = RULES[rule_bodies()[operation][0]]
        times = 2 if operation.startswith("update") else 1  # read, and in an update written
        kernel = launched[operation, "exact"]
        made.append(
            Budget(
                *("CUDA", architecture, operation, "exact", True),
                *(kernel.registers, kernel.spilled_bytes, Counter(), window + Counter(each)),
                kept=kept if buffers else "",
                directions=directions,
                bytes_moved=2 * 2 + times * buffers * KEPT_TYPES[kept][1],
            )
        )
    return tuple(made)


def compiled(
    architecture: str, bodies: dict[tuple, str]
) -> Iterator[tuple[tuple, int, int, list[Instruction]]]:
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


def count(code: Sequence[Instruction]) -> tuple[Counter[str], Counter[str]]:
    """(for each direction, once for each window), by pipe; of no code, nothing.

    The loops are known by their wide multiplies: Philox makes sixteen a call. The innermost loop
    with most of them is that over directions, and the smallest around it that over windows;
    a kernel with one direction has only the latter.
    """
    if not code:
        return Counter(), Counter()
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
    inside, usual = set(direction), usual_way(code, window)
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
