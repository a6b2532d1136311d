"""What does the Triton kernel cost? Counted in the compiled code; needs Triton and no GPU.

    python -m benchmarks.triton_budget

Compiles it ahead of time for an A100, an H100 and an MI300, and counts instructions as
benchmarks/cuda_budget.py does: those issued for each direction of an element, and those issued once
for an element, on the way of whole, aligned windows. Writes benchmarks/results/triton_budget.csv:
rows with 0 repeats, and a predicted time for the H100 alone, from the model of cuda_budget.
"""

from __future__ import annotations

import argparse
import functools
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamezo_kernels import RULES
from adamezo_kernels.backends import triton as backend
from benchmarks import cuda_budget
from benchmarks.cuda_budget import Instruction

TARGETS = {
    "cuda:80": ("cuda", 80, 32),
    "cuda:90": ("cuda", 90, 32),
    "hip:gfx942": ("hip", "gfx942", 64),
}
# Of the kernel's arguments; the rest are constants.
SIGNATURE = {
    "table": "*i64",
    "words": "*i32",
    "segments": "i32",
    "horizon": "i32",
    "offset": "i64",
    "first_program": "i64",
    "key_low": "i32",
    "key_high": "i32",
    "scale": "i32",
    "eps": "i32",
}


def missing() -> str:
    """What is not here of what this needs; empty where all is."""
    try:
        backend.kernels()
    except Exception as error:
        return f"no Triton ({type(error).__name__}: {error}): `pip install triton`"
    return "" if cuda_budget.cuobjdump() else cuda_budget.missing()


def distributions(target: str) -> tuple[str, ...]:
    """The kinds of directions that the kernel has on a target."""
    return ("exact", "rademacher") if target.startswith("hip") else ("exact", "fast", "rademacher")


@functools.cache
def compiled(
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
    constants = backend.constants(
        operation,
        distribution,
        type,
        kept,
        second=second and operation in ("update", "moment") and rule == "moments",
        stochastic=stochastic,
        rule=rule,
        on=gpu.backend,
    )
    source = ASTSource(
        fn=backend.kernels().run,
        signature=SIGNATURE | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    return triton.compile(source, target=gpu, options=backend.options(gpu.warp_size))


@dataclass(frozen=True)
class Count:
    """Of one kernel for bfloat16 weights and buffers: instructions issued for a warp (AMD: a
    wave)."""

    target: str
    operation: str
    distribution: str
    stochastic: bool
    registers: int
    spilled_bytes: int
    direction: Counter[str]
    """By pipe, for each direction after the first of a thread's elements; empty for perturb, and
    where a rule decides how many there are."""
    window: Counter[str]
    """By pipe, once for a thread's elements, the first direction included."""
    rule: str = "moments"

    @property
    def elements(self) -> int:
        """Of a thread."""
        return backend.window_of(self.operation, self.rule) // backend.THREADS

    @property
    def per_normal(self) -> float:
        """Where a rule decides how many there are: all instructions, over those."""
        if self.rule != "moments":
            return self.window.total() / self.elements / RULES[self.rule].directions
        return self.direction.total() / self.elements

    @property
    def once(self) -> float:
        """For an element, less its first direction."""
        return (self.window.total() - self.direction.total()) / self.elements

    @property
    def variant(self) -> str:
        kind = self.distribution + (", stochastic" if self.stochastic else "")
        return kind + (", bfloat16 numbers" if RULES[self.rule].buffers else "")

    @property
    def what(self) -> str:
        return self.operation if self.rule == "moments" else f"{self.operation} {self.rule}"

    @property
    def horizons(self) -> Sequence[int]:
        """That a prediction is made for."""
        if self.rule != "moments":
            return (RULES[self.rule].directions,)
        return (1, 10, 20) if self.operation == "update" else (1,)

    @property
    def bytes(self) -> int:
        """That a weight moves: its own, and those of what is kept for it."""
        return 2 * 2 + RULES[self.rule].buffers * (2 * 2 if self.operation == "update" else 2)

    def seconds(self, horizon: int, elements: int = cuda_budget.WEIGHTS) -> float:
        """The prediction of cuda_budget for an H100."""
        counts = [self.direction] * (horizon - 1) + [self.window]
        slots = sum(c.total() for c in counts)
        special = cuda_budget.SPECIAL_FUNCTION_CYCLES * sum(c["special"] for c in counts)
        warps = elements / (self.elements * cuda_budget.LANES)
        schedulers = cuda_budget.MULTIPROCESSORS * cuda_budget.SCHEDULERS
        cycles = max(slots, special) * warps / schedulers
        return max(cycles / cuda_budget.CLOCK_HZ, self.bytes * elements / cuda_budget.BYTES_PER_S)


def count(
    target: str,
    operation: str,
    distribution: str,
    stochastic: bool = False,
    rule: str = "moments",
) -> Count:
    kept = "bfloat16" if RULES[rule].buffers else ""
    kernel = compiled(target, operation, distribution, stochastic=stochastic, rule=rule, kept=kept)
    if target.startswith("hip"):
        text = kernel.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spilled = 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text)
        code = list(amd_instructions(text))
    else:
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder, "kernel.cubin")
            binary.write_bytes(kernel.asm["cubin"])
            dumper = cuda_budget.cuobjdump() or ""
            usage = cuda_budget.run(dumper, "-res-usage", str(binary))
            code = list(cuda_budget.instructions(cuda_budget.run(dumper, "-sass", str(binary))))
        registers, spilled = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    direction, window = on_the_usual_way(code)
    made = (registers, spilled, direction, window)
    return Count(target, operation, distribution, stochastic, *made, rule)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"found no {pattern} in the compiler's output")
    return int(found.group(1))


class AmdInstruction(Instruction):
    """A line of amdgcn text, its place in the text as address, its label's place as target."""

    @property
    def pipe(self) -> str:
        starts = {"s_cbranch": "control", "s_branch": "control", "s_": "scalar", "v_": "vector"}
        return next((p for start, p in starts.items() if self.name.startswith(start)), "memory")

    @property
    def target(self) -> int | None:
        return int(self.operands) if self.pipe == "control" else None


def amd_instructions(text: str) -> list[AmdInstruction]:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.split(".Lfunc_end0")[0].splitlines():
        if found := re.match(r"(\.LBB\w+):", line):
            labels[found.group(1)] = len(lines)
        elif found := re.match(r"\t([a-z]\w+)\s*([^;]*)", line):
            lines.append((found.group(1), found.group(2).strip()))
    return [
        AmdInstruction(
            n,
            name,
            str(labels[operands]) if name.startswith(("s_cbranch", "s_branch")) else operands,
        )
        for n, (name, operands) in enumerate(lines)
    ]


SELDOM = re.compile(
    r"CALL|(LDG|STG)\.E\.U16|F2I\.FTZ\.U32|F2I\.U64"  # as in cuda_budget
    r"|(buffer|global|flat)_(load|store)_(u?short|d16|b16)|v_rcp_iflag|v_cvt_u32_f32"
)


# The loop that searches the table of segments has fewer instructions, that over directions more.
LEAST_OF_A_DIRECTION = 40


def on_the_usual_way(code: Sequence[Instruction]) -> tuple[Counter[str], Counter[str]]:
    """(for each direction after the first, once for each window), by pipe.

    The usual way is what remains without the basic blocks that read or write single elements,
    divide integers (rows of a segment) or call (the slow paths of a quotient and a root), and
    without those that only lead to or come from them. The loop over directions is the one with
    most instructions.
    """
    at = {instruction.address: n for n, instruction in enumerate(code)}
    branches = {i.target for i in code if i.name.startswith(("BRA", "s_cbranch", "s_branch"))}
    # A call to where branches go too is one itself: so ptxas may leave a loop.
    jumps = [
        n
        for n, i in enumerate(code)
        if i.target in branches and i.name.startswith(("BRA", "CALL", "s_cbranch", "s_branch"))
    ]
    ends = {n for n, i in enumerate(code) if i.name in ("EXIT", "s_endpgm")}
    starts = {0} | {n + 1 for n in [*jumps, *ends]} | {at[code[n].target or 0] for n in jumps}
    edges = [*sorted(starts - {len(code)}), len(code)]
    blocks = {a: range(a, b) for a, b in zip(edges, edges[1:], strict=False)}
    following: dict[int, set[int]] = {}
    for a, block in blocks.items():
        last = code[block[-1]]
        following[a] = set()
        if block[-1] in jumps:
            following[a].add(at[last.target or 0])
        if block[-1] + 1 in blocks and not _always_leaves(last):
            following[a].add(block[-1] + 1)
    usual = {
        a
        for a, b in blocks.items()
        if not any(SELDOM.match(code[n].name) for n in b if n not in jumps)
    }
    ways_in = _reached({0}, following, usual)
    leading = {a: {b for b in blocks if a in following[b]} for a in blocks}
    exits = {a for a in usual if blocks[a][-1] in ends or blocks[a].stop == len(code)}
    usual = ways_in & _reached(exits, leading, usual)

    loops = []
    for a in usual:
        for b in following[a]:
            body = _reached({b}, following, usual) & _reached({a}, leading, usual)
            loops.append({n for c in body for n in blocks[c]})
    loop = max(loops, key=len, default=set())
    executed = {n for a in usual for n in blocks[a]}
    if len(loop & executed) < LEAST_OF_A_DIRECTION:
        loop = set()
    return (
        Counter(code[n].pipe for n in executed & loop),
        Counter(code[n].pipe for n in executed - loop),
    )


def _always_leaves(instruction: Instruction) -> bool:
    # Whether NVIDIA's have a condition is not kept; taking that for granted adds ways that lead
    # through seldom blocks only.
    return instruction.name in ("s_branch", "s_endpgm")


def _reached(start: set[int], following: dict[int, set[int]], inside: set[int]) -> set[int]:
    found, left = set(), [a for a in start if a in inside]
    while left:
        a = left.pop()
        if a not in found:
            found.add(a)
            left += [b for b in following[a] if b in inside]
    return found


def rows(found: Sequence[Count]) -> list:
    import triton

    from benchmarks.rows import Row, conditions

    made = []
    for c in found:
        where = conditions() | {
            "device": c.target,
            "clock_hz": None,
            "clock_source": "",
            "compiler": (
                f"triton {triton.__version__}: {c.registers} registers, "
                f"{c.spilled_bytes} bytes spilled"
            ),
        }
        predicted = c.target == "cuda:90"
        if predicted:
            where |= {
                "device": f"predicted: {cuda_budget.MULTIPROCESSORS} multiprocessors",
                "clock_hz": cuda_budget.CLOCK_HZ,
                "clock_source": "assumed",
            }
        for horizon in c.horizons:
            seconds = c.seconds(horizon) if predicted else None
            weights = cuda_budget.WEIGHTS
            made.append(
                Row(
                    benchmark="triton_budget",
                    what=c.what,
                    variant=c.variant,
                    type="bfloat16",
                    elements=weights,
                    horizon=horizon,
                    isa=c.target.replace("cuda:", "sm_").replace("hip:", ""),
                    median_s=seconds,
                    elements_per_s=weights / seconds if seconds else None,
                    normals_per_s=weights * horizon / seconds if seconds else None,
                    bytes_per_s=c.bytes * weights / seconds if seconds else None,
                    cycles_per_normal=c.per_normal or None,
                    **where,
                )
            )
    return made


def main() -> None:
    from benchmarks.rows import RESULTS, write_rows

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "triton_budget.csv")
    arguments = parser.parse_args()
    if lack := missing():
        raise SystemExit(f"triton_budget: {lack}")
    found = [
        count(target, operation, distribution, stochastic)
        for target in TARGETS
        for operation in ("perturb", "update")
        for distribution in distributions(target)
        for stochastic in (False, True)
    ]
    found += [
        count(target, operation, "exact", True, rule)
        for target in TARGETS
        for rule in RULES
        if rule != "moments"
        for operation in ("perturb", "update")
        if (RULES[rule].bends if operation == "perturb" else RULES[rule].updates)
    ]
    print("bfloat16 weights; instructions issued for each normal, and once for each weight")
    for c in found:
        by_pipe = ", ".join(f"{pipe} {n / c.elements:.2f}" for pipe, n in c.direction.most_common())
        times = ", ".join(f"H={h} {1e3 * c.seconds(h):.1f} ms" for h in c.horizons)
        print(
            f"{c.target:<11} {c.what:<15}{c.variant:<35} {c.registers} registers, "
            f"{c.spilled_bytes} B spilled; {c.per_normal:.2f} a normal ({by_pipe}); "
            f"{c.once:.1f} once" + (f"; an H100 at best {times}" if c.target == "cuda:90" else "")
        )
    made = rows(found)
    write_rows(arguments.output, made)
    print(f"{len(made)} rows: {arguments.output.name}")


if __name__ == "__main__":
    main()
