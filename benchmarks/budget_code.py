"""Compiled GPU code as a list of instructions, and what a count of them predicts for an H100."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results import Row, settings

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

    by: str
    """The compiler: "CUDA" or "Triton"."""
    target: str
    operation: str
    distribution: str
    stochastic: bool
    registers: int
    spilled_bytes: int
    direction: Counter[str]
    """By pipe, for each direction of a thread's elements; empty for a perturbation."""
    once: Counter[str]
    """By pipe, for a thread's elements without their directions, on the way where all of them are
    whole chunks and no quotient or root needs the slow path."""
    elements: int = 16
    """Of a thread."""
    kept: str = ""
    """The type of what a rule keeps for each weight."""
    directions: int = 0
    """How many a rule has, whose instructions are in `once` then."""
    bytes_moved: int = 2 * 2
    """Of a weight: it, and what is kept for it, read and written."""
    accesses: Counter[str] = field(default_factory=Counter)
    """Loads and stores in the code by their width, such as LDG.E.128."""

    @property
    def variant(self) -> str:
        kind = self.distribution + ", stochastic" * self.stochastic
        return f"{kind}, {self.kept} numbers" if self.kept else kind

    @property
    def per_normal(self) -> float:
        """Instructions for a direction; where a rule decides how many there are, all over those."""
        return (self.per_weight / self.directions if self.directions else 0.0) or (
            self.direction.total() / self.elements
        )

    @property
    def per_weight(self) -> float:
        """Instructions of what is done once for each weight."""
        return self.once.total() / self.elements

    @property
    def horizons(self) -> tuple[int, ...]:
        """That a prediction is made for."""
        return (1, 10, 20) if self.operation == "update" else (max(self.directions, 1),)

    def seconds(self, horizon: int, elements: int = WEIGHTS) -> float:
        """The prediction for an H100: the slowest of issue, special functions and memory."""
        directions = 0 if self.directions else horizon

        def both(count: Any) -> float:
            return directions * count(self.direction) + count(self.once)

        special = SPECIAL_FUNCTION_CYCLES * both(lambda c: c["special"])
        warps = elements / (self.elements * LANES)
        slots = max(both(Counter.total), special)
        cycles = slots * warps / (MULTIPROCESSORS * SCHEDULERS)
        return max(cycles / CLOCK_HZ, self.bytes_moved * elements / BYTES_PER_S)

    def rows(self, where: dict[str, Any]) -> Iterator[Row]:
        """Counts, and the times that they predict where the target is an H100."""
        predicted = self.target == "sm_90"
        if predicted:
            device = f"predicted: {MULTIPROCESSORS} multiprocessors"
            where = where | dict(device=device, clock_hz=CLOCK_HZ, clock_source="assumed")
        names = dict(what=self.operation, by=self.by, type="bfloat16", target=self.target)
        columns = settings(**names, weights=WEIGHTS)
        counts = [("registers", "1", self.registers), ("spilled", "B", self.spilled_bytes)]
        if self.per_normal:
            counts.append(("instructions a normal", "1", self.per_normal))
        if predicted:
            counts.append(("bytes moved a weight", "B", self.bytes_moved))
        for metric, unit, value in counts:
            yield Row("budget", metric, unit, self.variant, columns, median=value, **where)
        for h in self.horizons:
            seconds = self.seconds(h) if predicted else None
            name = ("budget", "time", "s", self.variant, columns, "horizon", h)
            yield Row(*name, median=seconds, **where)


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


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stdout}")
    return done.stdout


def instructions(sass: str) -> Iterator[Instruction]:
    for address, predicate, name, operands in re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass
    ):
        yield Instruction(int(address, 16), name, operands, bool(predicate))
