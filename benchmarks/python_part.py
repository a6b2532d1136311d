"""How much of a step is Python's part, and how much is the compiled code?

    python -m benchmarks.python_part    seconds

Whole steps of AdaMeZO on a model of one small weight and of 400, on one thread. Python's part is
what remains without the calls of the compiled module and without the closure, which returns a
constant. In one variant it calls each module before, as out of place a module's call is what
perturbs weights. Writes benchmarks/results/python_part.csv.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from adamezo import AdaMeZO
from adamezo_kernels.backends import native
from benchmarks.results import Row, conditions, parser, settings, spread, write

ELEMENTS = 64  # of each weight, so that the kernels' own work is small
WARM_UP = 20  # steps, by which the history is full, and what is made once is made
PYTHONS_PART = "Python's part (target: 60 us with 1 weight, 1.5 ms with 400)"


VARIANTS = {
    "in place": "inplace",
    "out of place": "out_of_place",
    "out of place, modules called": "out_of_place",
}


class Modules(nn.ModuleList):
    def forward(self) -> None:
        for module in self:
            module()


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ELEMENTS))

    def forward(self) -> Tensor:
        return self.weight


def measure(weights: int, variant: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, and of its parts."""
    model, other = (Modules(Weight() for _ in range(weights)) for _ in range(2))
    options: dict[str, Any] = dict(model=model, perturbation=VARIANTS[variant])
    optimizer = AdaMeZO(model.parameters(), lr=1e-9, **options)
    loss, run, compiled = torch.tensor(1.0), native.compiled.run, 0.0

    def closure(model: nn.Module = model) -> Tensor:
        if "called" in variant:
            model()
        return loss

    def timed(*arguments: Any) -> None:
        nonlocal compiled
        began = time.perf_counter()
        run(*arguments)
        compiled += time.perf_counter() - began

    found: dict[str, list[float]] = {"step": [], "compiled code": [], PYTHONS_PART: []}
    with mock.patch.object(native.compiled, "run", timed):
        for step in range(WARM_UP + repeats):
            compiled, began = 0.0, time.perf_counter()
            optimizer.step(closure)
            ended = time.perf_counter()
            closure(other), closure(other)  # without an optimizer's hooks
            whole, bare = ended - began, time.perf_counter() - ended
            parts = (whole, compiled, whole - bare - compiled)
            for name, seconds in zip(found, parts, strict=True):
                found[name] += [seconds] if step >= WARM_UP else []
    return found


def rows(repeats: int, where: dict[str, Any]) -> Iterator[Row]:
    for weights, variant in itertools.product((1, 400), VARIANTS):
        columns = settings(elements=ELEMENTS, threads=torch.get_num_threads())
        for metric, seconds in measure(weights, variant, repeats).items():
            name = ("python part", metric, "s", variant, columns, "weights", weights)
            row = Row(*name, **spread(seconds), **where)
            spreads = ", ".join(f"{1e6 * (q or 0):.1f}" for q in (row.p20, row.median, row.p80))
            print(f"{weights} weights, {variant}: {metric}: {spreads} us", flush=True)
            yield row


def main() -> None:
    arguments = parser(__doc__, "python_part.csv").parse_args()
    torch.set_num_threads(1)
    write(arguments.output, rows(20 if arguments.quick else 1000, conditions()))


if __name__ == "__main__":
    main()
