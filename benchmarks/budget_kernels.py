"""The GPU kernels that benchmarks/budget.py counts, and their counts as rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy

import adamezo_kernels
from benchmarks.results import Row, settings
from benchmarks.sass import PIPES

RULES = {name: rule for name, rule in adamezo_kernels.RULES.items() if name != "moments"}


@dataclass(frozen=True)
class Kernel:
    """A kernel for bfloat16 weights."""

    operation: str
    distribution: str = "exact"
    stochastic: bool = True
    rule: str = ""
    """Empty for sums of directions."""
    kept: str = ""
    """The type of a rule's buffers."""

    @property
    def what(self) -> str:
        return f"{self.operation} {self.rule}".strip()

    @property
    def variant(self) -> str:
        kind = self.distribution + ", stochastic" * self.stochastic
        return f"{kind}, {self.kept} numbers" if self.kept else kind

    @property
    def bytes_moved(self) -> int:
        """Of a weight and its buffers: read, and what an update changes also written."""
        if self.operation == "product":
            return 2
        buffers = RULES[self.rule].buffers if self.rule else 0
        times = 2 if self.operation == "update" else 1
        return 4 + times * buffers * {"float32": 4, "bfloat16": 2, "": 0}[self.kept]


def rule_kernels(distributions: Iterable[str], types: Iterable[str]) -> list[Kernel]:
    """Those of every rule; with `types` for buffers, where it has some."""
    return [
        Kernel(operation, distribution, True, name, kept)
        for operation in ("perturb", "update")
        for name, rule in RULES.items()
        if (rule.has_direction if operation == "perturb" else rule.updates)
        for distribution in distributions
        for kept in (types if rule.buffers else ("",))
    ]


DISTRIBUTIONS = {"exact": "Exact", "fast": "Fast", "rademacher": "Rademacher"}
SUMS = [
    Kernel(operation, distribution, stochastic)
    for operation in ("perturb", "update")
    for distribution in DISTRIBUTIONS
    for stochastic in (False, True)
]


@dataclass(frozen=True)
class Budget:
    """The counts of one kernel, for one element each."""

    kernel: Kernel
    registers: int
    spilled_bytes: int
    of_normal: numpy.ndarray = field(default_factory=lambda: numpy.zeros(len(PIPES)))
    of_weight: numpy.ndarray = field(default_factory=lambda: numpy.zeros(len(PIPES)))
    """The cycles of each of PIPES."""
    accesses: Counter[str] | None = None
    """Loads and stores in CUDA's code by their width, such as LDG.E.128."""

    @property
    def per_normal(self) -> float:
        return float(self.of_normal[0])

    @property
    def per_weight(self) -> float:
        return float(self.of_weight[0])

    def rows(self, by: str, where: dict[str, Any]) -> Iterator[Row]:
        columns = settings(what=self.kernel.what, by=by, type="bfloat16", target="sm_90")
        for metric, unit, value in (
            ("registers", "1", self.registers),
            ("spilled", "B", self.spilled_bytes),
            ("bytes moved a weight", "B", self.kernel.bytes_moved),
            ("instructions a normal", "1", self.per_normal),
            ("instructions a weight", "1", self.per_weight),
            *(
                (f"{pipe} cycles a {of}", "1", float(cycles[i]))
                for of, cycles in (("normal", self.of_normal), ("weight", self.of_weight))
                for i, pipe in enumerate(PIPES)
                if pipe != "issue"
            ),
        ):
            name = ("budget", metric, unit, self.kernel.variant, columns)
            yield Row(*name, median=value, **where)
