"""NVIDIA's compiled code (SASS) as a list of instructions, and how many of them a loop executes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import networkx


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str
    conditional: bool

    @property
    def target(self) -> int | None:
        """The address that a branch or a call goes to."""
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found.group(1), 16) if found and self.name.startswith(("BRA", "CALL")) else None


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions in the output of `cuobjdump -sass`."""
    for address, predicate, name, operands in re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", text
    ):
        yield Instruction(int(address, 16), name, operands, bool(predicate))


# A basic block with one of these is off the usual path: it reads or writes single elements (a chunk
# that is not whole), divides integers (rows of a segment), or calls the slow path of a quotient or
# a root.
RARE = re.compile(r"CALL|(LDG?|STG?)\.(E\.)?U16|F2I\.(FTZ\.U32|U64)|I2F\.U64")


# The same in a program that does a tile: it divides once for the tile, and its only single elements
# of four bytes are the numbers of a call.
RARE_IN_TILES = re.compile(r"CALL|(LDG?|STG?)\.(E\.)?U16")


def loop_sizes(code: Sequence[Instruction], *, whole_program: bool) -> tuple[int, int]:
    """How many instructions the usual path through a window has, and how many of these are in the
    innermost loop, which goes over the directions or over groups of elements.

    The loop over windows is the largest loop of a CUDA kernel. A Triton program has one window, so
    `whole_program` counts from its start to its exit.
    """
    window, inner, *_ = nested_loops(code, whole_program=whole_program)
    return window, inner


def nested_loops(
    code: Sequence[Instruction], *, whole_program: bool, tiles: bool = False
) -> list[int]:
    """The same, and how many are in the largest loop within that one, and in the one within it."""
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
        if _is_rare(code[start : last if last in jumps else end], code[last], tiles):
            continue
        # In windows what is stored is z_0, once.
        blocks[start] = [i for i in code[start:end] if tiles or i.name != "STS"]
        if last in jumps:
            flow.add_edge(start, jumps[last])
        elif last in exits and whole_program:
            flow.add_edge(start, 0)
        if code[last].conditional or (last not in jumps and last not in exits):
            flow.add_edge(start, end)
    flow = networkx.DiGraph(flow.subgraph(blocks))

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
    return [size(loop) for loop in loops]


def loop_of_products(code: Sequence[Instruction]) -> int:
    """How many instructions the smallest loop has that multiplies sixteen numbers and makes none:
    that over the terms of low-rank directions. Stores of the first direction are not counted."""
    at = {instruction.address: n for n, instruction in enumerate(code)}
    sizes = []
    for n, i in enumerate(code):
        if i.name.startswith("BRA") and i.target in at and at[i.target] <= n:
            names = [j.name for j in code[at[i.target] : n + 1]]
            if sum(name == "FMUL" for name in names) >= 16 and not any(
                name.startswith("IMAD.WIDE.U32") for name in names
            ):
                sizes.append(sum(name != "STS" for name in names))
    return min(sizes, default=0)


def _is_rare(block: Sequence[Instruction], leaves: Instruction, tiles: bool) -> bool:
    """Whether a block is off the usual path; `leaves` is its last instruction."""
    if tiles:
        return any(RARE_IN_TILES.match(i.name) for i in block)
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
