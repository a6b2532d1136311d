"""The Triton kernel, compiled ahead of time for an A100, an H100 and an MI300; needs no GPU."""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx

from adamezo_kernels import RULES
from adamezo_kernels.backends import triton as backend
from benchmarks import budget_cuda
from benchmarks.budget_code import Budget, Instruction, cuobjdump, instructions, run

TARGETS = {
    "cuda:80": ("cuda", 80, 32),
    "cuda:90": ("cuda", 90, 32),
    "hip:gfx942": ("hip", "gfx942", 64),
}
# Of the kernel's arguments; the rest are constants.
SIGNATURE = {
    "table": "*i64",
    "words": "*i32",
    **dict.fromkeys(("segments", "horizon"), "i32"),
    **dict.fromkeys(("offset", "first_program"), "i64"),
    **dict.fromkeys(("key_low", "key_high", "scale", "eps"), "i32"),
}


def missing() -> str:
    """What is not here of what this needs; empty where all is."""
    try:
        backend.kernels()
    except Exception as error:
        return f"no Triton ({type(error).__name__}: {error}): `pip install triton`"
    return "" if cuobjdump() else budget_cuda.missing()


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
    constants = {
        "OPERATION": operation,
        "DISTRIBUTION": distribution,
        "TYPE": type,
        "SECOND": second and operation in ("update", "moment") and rule == "moments",
        "STOCHASTIC": stochastic,
        "RULE": rule,
        "KEPT": kept,
        "WINDOW": backend.window_of(operation, rule),
        "ON": gpu.backend,
    }
    source = ASTSource(
        fn=backend.kernels().run,
        signature=SIGNATURE | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    return triton.compile(source, target=gpu, options=backend.options(gpu.warp_size))


def count(
    target: str,
    operation: str,
    distribution: str,
    stochastic: bool = False,
    rule: str = "moments",
) -> Budget:
    """Of one kernel for bfloat16 weights and buffers. On AMD a warp is a wave."""
    kept = "bfloat16" if RULES[rule].buffers else ""
    kernel = compiled(target, operation, distribution, stochastic=stochastic, rule=rule, kept=kept)
    if target.startswith("hip"):
        text = kernel.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spilled = 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text)
        code: Sequence[Instruction] = amd_instructions(text)
    else:
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder, "kernel.cubin")
            binary.write_bytes(kernel.asm["cubin"])
            usage, sass = (run(cuobjdump() or "", f, str(binary)) for f in ("-res-usage", "-sass"))
        registers, spilled = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
        code = list(instructions(sass))
    direction, window = on_the_usual_way(code)
    # The loop is over the directions after the first, which is in the window.
    once = Counter({p: window[p] - direction[p] for p in {*window, *direction}})
    moments = rule == "moments"
    written = 2 if operation == "update" else 1  # what is kept is read, and in an update written
    return Budget(
        *("Triton", target.replace("cuda:", "sm_").replace("hip:", "")),
        operation if moments else f"{operation} {rule}",
        *(distribution, stochastic, registers, spilled, direction, once),
        elements=backend.window_of(operation, rule) // backend.THREADS,
        kept=kept,
        directions=0 if moments else RULES[rule].directions,
        bytes_moved=2 * 2 + RULES[rule].buffers * 2 * written,
    )


def budgets() -> Iterator[Budget]:
    """Of every kernel that a call can ask for with bfloat16 weights."""
    for target in TARGETS:
        for operation in ("perturb", "update"):
            for distribution in distributions(target):
                for stochastic in (False, True):
                    yield count(target, operation, distribution, stochastic)
    for target in TARGETS:
        for rule in [rule for rule in RULES if rule != "moments"]:
            for operation in ("perturb", "update"):
                if RULES[rule].bends if operation == "perturb" else RULES[rule].updates:
                    yield count(target, operation, "exact", True, rule)


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
    r"CALL|(LDG|STG)\.E\.U16|F2I\.FTZ\.U32|F2I\.U64"  # as in budget_cuda
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
    jumps = {
        n: at[i.target or 0]
        for n, i in enumerate(code)
        if i.target in branches and i.name.startswith(("BRA", "CALL", "s_cbranch", "s_branch"))
    }
    ends = {n for n, i in enumerate(code) if i.name in ("EXIT", "s_endpgm")} | {len(code) - 1}
    starts = {0, *jumps.values(), *(n + 1 for n in [*jumps, *ends])}
    blocks = {a: range(a, b) for a, b in pairwise(sorted({*starts, len(code)}))}
    flow = networkx.DiGraph()
    flow.add_nodes_from(blocks)
    for a, block in blocks.items():
        last = block[-1]
        if last in jumps:
            flow.add_edge(a, jumps[last])
        # Whether NVIDIA's have a condition is not kept; taking that for granted adds ways that lead
        # through seldom blocks only.
        if last + 1 in blocks and code[last].name not in ("s_branch", "s_endpgm"):
            flow.add_edge(a, last + 1)
    seldom = {
        a for a, b in blocks.items() if any(SELDOM.match(code[n].name) for n in b if n not in jumps)
    }
    flow = flow.subgraph(set(flow) - seldom)
    exits = {a for a in flow if blocks[a][-1] in ends}
    before = exits.union(*(networkx.ancestors(flow, a) for a in exits))
    flow = flow.subgraph(before & ({0} | networkx.descendants(flow, 0) if 0 in flow else set()))

    executed = {n for a in flow for n in blocks[a]}
    loops = [
        {n for a in part for n in blocks[a]}
        for part in networkx.strongly_connected_components(flow)
        if len(part) > 1 or flow.has_edge(*part, *part)
    ]
    loop = max(loops, key=len, default=set())
    if len(loop) < LEAST_OF_A_DIRECTION:
        loop = set()
    return (
        Counter(code[n].pipe for n in loop),
        Counter(code[n].pipe for n in executed - loop),
    )
