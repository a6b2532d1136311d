"""How near is :func:`adamezo.find_lr` to the best lr of a search?

    python -m benchmarks.find_lr    minutes

On the jobs, modes and methods whose lr was searched by benchmarks/methods.py or
benchmarks/evidence.py. Four batches, one direction each. Writes
benchmarks/results/find_lr.csv; the table of docs/find_lr.md has the searches' best beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import adamezo
from benchmarks.evidence import EVERY, JOBS
from benchmarks.method_jobs import Job, Main
from benchmarks.results import Point, Row, conditions, parser, run_once, settings

BATCHES = 4


class Case(NamedTuple):
    """A search that there is."""

    benchmark: str
    job: str
    mode: str
    method: str
    budget: int
    """Forward passes of the search's runs."""
    seen: bool = True
    """Whether the share of find_lr was chosen with this in sight: if not, it is a test of it."""


def _cases(benchmark: str, job: str, budget: int, methods: tuple[str, ...]) -> Iterator[Case]:
    for mode in ("full", "lora"):
        for method in methods:
            yield Case(benchmark, job, mode, method, budget)
    if benchmark == "methods":
        yield Case(benchmark, job, "tensor-train", "AdaMeZO", budget)


SHORT = ("AdaMeZO", "ScalarAdaMeZO", "MEAZO", "FZOO")
LATER = [("full", method) for method in ("ScalarAdaMeZO", "MEAZO", "GRZO")]
"""Of the layer: searches that were made after the share was chosen."""
FZOO = "FZOO, zo_eps = 0.001"
OF_FZOO = [
    ("layer", "full", True),
    ("layer", "lora", True),
    ("layer", "tensor-train", False),
    ("reviews", "lora", False),
    ("tweets", "lora", False),
    ("reviews", "full", False),
    ("4 layers", "full", False),
    ("text", "lora", False),
]
"""With the recipes' zo_eps: job, mode, and whether the share was chosen with the job and the mode
in sight."""
CASES = [
    *_cases("methods", "layer", 216, (*SHORT, "GRZO")),
    *_cases("methods", "main", 72, SHORT),
    *(
        case._replace(seen=(case.mode, case.method) not in LATER)
        for case in _cases("evidence", "layer", 2000, (*SHORT, "GRZO"))
    ),
    Case("evidence", "tweets", "lora", "AdaMeZO", 2000),
    *(
        Case("evidence", "layer", "lora", method, 10_000, seen=False)
        for method in ("AdaMeZO", "FZOO")
    ),
    *(
        Case("evidence", "reviews", "lora", method, 2000, seen=False)
        for method in ("AdaMeZO", "FZOO")
    ),
    *(Case("evidence", job, mode, FZOO, 2000, seen) for job, mode, seen in OF_FZOO),
]


@functools.cache
def job_of(name: str) -> Job:
    return {**JOBS, "main": Main}[name](2000)  # a budget, on which nothing here depends


def found(case: Case) -> Iterator[Point]:
    """The points of a case: the lr and what it took."""
    job = job_of(case.job)
    start, entry = job.start(case.mode, 0), EVERY[case.method]
    optimizer = entry.make(job, start, 1.0, 0)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(job.rows, generator=generator).tolist()
    batches = [order[i * job.batch : (i + 1) * job.batch] for i in range(BATCHES)]

    def closure(rows: list[int]) -> Callable[[], object]:
        if entry.in_batches:
            return adamezo.batched(functools.partial(start.losses, rows))
        return functools.partial(start.loss, rows)

    made = adamezo.find_lr(optimizer, [closure(rows) for rows in batches])
    yield "lr", "1", made.forwards, made.lr, 1
    yield "radius", "1", made.forwards, made.radius, 1


def main() -> None:
    arguments = parser(__doc__, "find_lr.csv").parse_args()
    torch.set_num_threads(1)
    where = conditions()
    for case in CASES:
        columns = settings(job=case.job, mode=case.mode, threads=1)
        row = Row("find lr", "", "", case.method, columns, "forwards", **where)
        run_once(arguments.output, row, functools.partial(found, case))


if __name__ == "__main__":
    main()
