"""NVIDIA's compiled code (SASS) as a list of instructions, and what those of a loop cost."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import networkx
import numpy


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str
    conditional: bool

    @property
    def target(self) -> int | None:
        """The address that a branch or a call goes to. BRA.DIV is for warps that diverged before
        they meet, which ours do not."""
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        goes = self.name.startswith(("BRA", "CALL")) and not self.name.startswith("BRA.DIV")
        return int(found.group(1), 16) if found and goes else None


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions in the output of `cuobjdump -sass`."""
    for address, predicate, name, operands in re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", text
    ):
        yield Instruction(int(address, 16), name, operands, bool(predicate))


PIPES = ("issue", "multiplier", "fma", "alu", "special", "access")
"""What instructions take time of, in one of the four parts of a multiprocessor: its scheduler, and
what computes or reads and writes memory. The multiplier of integers is one half of the fma pipe,
and multiplies floats too."""

# Cycles of an H100 for a warp of 32, by the throughputs in NVIDIA's programming guide: a
# multiprocessor gives 128 results of float32 a cycle, 64 of other arithmetic, 32 of memory and 16
# of special functions. A wide multiplication has 64 bits of result and so takes twice as long as
# another one. ptxas agrees in the stalls that it writes into the code: 4 cycles from one wide
# multiplication or access to the next, 2 between other integer operations, and 1 between float32.
_CYCLES = (
    (r"IMAD\.(WIDE|HI)", dict(multiplier=4, fma=2)),
    (r"IMAD", dict(multiplier=2, fma=1)),
    (r"F(FMA|MUL|ADD)|HFMA2", dict(fma=1)),
    (r"MUFU|[IF]2[IF]\b", dict(special=8)),
    (r"LD[GSC]?\b|ST[GS]?\b|ATOM|RED|SHFL", dict(access=4)),
    # Jumps, barriers, and what a warp computes once for all its threads: only issued.
    (r"U[A-Z]|R2UR|S2U?R|BRA|BS|BAR|CALL|RET|EXIT|WARP|NOP|DEPBAR|YIELD", {}),
    (r"", dict(alu=2)),
)


def cycles(code: Iterable[Instruction]) -> numpy.ndarray:
    """Cycles of each of PIPES that the instructions take for a warp: those of the busiest one are
    the least that they take together. Those of "issue" are the number of instructions."""
    total = numpy.zeros(len(PIPES))
    for instruction in code:
        of = next(pipes for pattern, pipes in _CYCLES if re.match(pattern, instruction.name))
        total += [{"issue": 1, **of}.get(pipe, 0) for pipe in PIPES]
    return total


# A basic block with one of these is off the usual path: it reads or writes single elements (a chunk
# that is not whole), divides integers (rows of a segment), or calls the slow path of a quotient or
# a root.
RARE = re.compile(r"CALL|(LDG?|STG?)\.(E\.)?U16|F2I\.(FTZ\.U32|U64)|I2F\.U64")


# The same in a program that does a tile: it divides once for the tile, and its only single elements
# of four bytes are the numbers of a call.
RARE_IN_TILES = re.compile(r"CALL|(LDG?|STG?)\.(E\.)?U16")


def loop_cycles(
    code: Sequence[Instruction], *, whole_program: bool, besides: str = ""
) -> list[numpy.ndarray]:
    """The cycles of the usual path through a window; those of the largest loop in it, which goes
    over the directions or over groups of elements; and those of the largest loop in that one.

    The loop over windows is the largest loop of a CUDA kernel. A Triton program has one window, so
    `whole_program` counts from its start to its exit. Blocks with an instruction of the name
    `besides` are off the usual path too.
    """
    return nested_loops(code, whole_program=whole_program, besides=besides)[:3]


def nested_loops(
    code: Sequence[Instruction], *, whole_program: bool, tiles: bool = False, besides: str = ""
) -> list[numpy.ndarray]:
    """The same, and those of the largest loop within that one too."""
    at = {instruction.address: n for n, instruction in enumerate(code)}
    branch_targets = {i.target for i in code if i.name.startswith("BRA")}
    # ptxas may leave a loop by a call to a place where branches go too.
    jumps = {n: at[i.target] for n, i in enumerate(code) if i.target and i.target in branch_targets}
    exits = {n for n, i in enumerate(code) if i.name == "EXIT"}
    starts = {0, len(code), *jumps.values(), *(n + 1 for n in [*jumps, *exits])}
    blocks = {}
    flow = networkx.DiGraph()
    for start, end in pairwise(sorted(starts)):
        last = end - 1
        if not _is_rare(code[start : last if last in jumps else end], code[last], tiles, besides):
            # In windows what is stored is z_0, once.
            blocks[start] = [i for i in code[start:end] if tiles or i.name != "STS"]
        if last in jumps:
            flow.add_edge(start, jumps[last])
        elif last in exits and whole_program:
            flow.add_edge(start, 0)
        if code[last].conditional or (last not in jumps and last not in exits):
            flow.add_edge(start, end)
    # Code behind the exit is only for warps that have diverged.
    flow = networkx.DiGraph(flow.subgraph(blocks.keys() & {0, *networkx.descendants(flow, 0)}))

    def largest_loop(graph: networkx.DiGraph) -> set[int]:
        parts = networkx.strongly_connected_components(graph)
        loops = [p for p in parts if len(p) > 1 or graph.has_edge(*p, *p)]
        return max(loops, key=size, default=set())

    def size(loop: set[int]) -> int:
        return sum(len(blocks[start]) for start in loop)

    loops, outside = [largest_loop(flow)], flow
    for _ in range(3):
        loop = loops[-1]
        heads = {b for b in loop if b == 0 or any(a not in loop for a in outside.predecessors(b))}
        outside = networkx.DiGraph(outside.subgraph(loop))
        outside.remove_edges_from(list(outside.in_edges(heads)))
        loops.append(largest_loop(outside))
    return [cycles(i for start in loop for i in blocks[start]) for loop in loops]


def loop_of_products(code: Sequence[Instruction]) -> numpy.ndarray:
    """The cycles of the smallest loop that multiplies sixteen numbers and makes none:
    that over the terms of low-rank directions. Stores of the first direction are not counted."""
    at = {instruction.address: n for n, instruction in enumerate(code)}
    loops = []
    for n, i in enumerate(code):
        if i.name.startswith("BRA") and i.target in at and at[i.target] <= n:
            loop = code[at[i.target] : n + 1]
            names = [j.name for j in loop]
            if sum(name == "FMUL" for name in names) >= 16 and not any(
                name.startswith("IMAD.WIDE.U32") for name in names
            ):
                loops.append([j for j in loop if j.name != "STS"])
    return cycles(min(loops, key=len, default=()))


def _is_rare(block: Sequence[Instruction], leaves: Instruction, tiles: bool, besides: str) -> bool:
    """Whether a block is off the usual path; `leaves` is its last instruction."""
    if tiles:
        return any(RARE_IN_TILES.match(i.name) for i in block)
    if any(i.name == besides for i in block):
        return True
    # Single float32 elements are read and written under a condition or in a block of their own.
    single = [i for i in block if i.name in ("LDG.E", "STG.E")]
    own_block = leaves.name == "BRA" and not leaves.conditional
    return (
        any(RARE.match(i.name) for i in block)
        or any(i.conditional for i in single)
        or bool(single and own_block)
    )


def _found(name: str, *folders: str) -> str:
    """The path of a tool on PATH, in a CUDA toolkit or in one of these folders; or nothing."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = os.pathsep.join([os.environ.get("PATH", ""), f"{toolkit}/bin", *folders])
    return shutil.which(name, path=places) or ""


def nvcc() -> str:
    return os.environ.get("CUDACXX") or _found("nvcc")


def cuobjdump() -> str:
    triton = importlib.util.find_spec(
        "triton"
    )  # which brings one; not imported, as files are enough
    folders = (triton.submodule_search_locations or []) if triton else []
    return _found("cuobjdump", *(f"{folder}/backends/nvidia/bin" for folder in folders))


def run(*command: str) -> str:
    """What a command prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stdout}")
    return done.stdout
