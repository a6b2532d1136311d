"""Which method should one take? All of them with the same forward passes and the same search.

    python -m benchmarks.methods                         the main job's last layer; an hour
    python -m benchmarks.methods --job main              the main job; many hours
    python -m benchmarks.methods --methods MeZO AdaMeZO --modes lora
    python -m benchmarks.methods --directions --modes full lora      other kinds of directions
    python -m benchmarks.methods --costs                 bytes and seconds of a step

A run has a number of forward passes, and not of steps: the step that would need one more is undone.
Each method trains all weights ("full"), LoRA adapters ("lora") and AdaZeta's tensor-train adapters
("tensor-train"), with every lr of a grid by factors of sqrt(10) and three seeds; of the main job,
whose runs are long, lr is searched with the first seed, and the best lr is run with all three. The
seed decides the order of the rows, the directions and the adapters, the same for all methods. The
grid grows on a side until the best lr is inside it. The best has the lowest mean loss on validation
rows; what is reported is on test rows, which choose nothing. lr falls linearly to 0 with the
forward passes. Nothing else is searched: all other options are the classes' defaults but where
ENTRIES has some.

A finished run is some rows at the end of benchmarks/results/methods.csv, its losses against forward
passes, and a run that is there is not made again: stop it, go on, or work on other methods in
another process.

--costs writes benchmarks/results/methods_costs.csv: seconds a step, the same over MeZO's beside it
(where all steps are alike), and the bytes of tensors that the optimizer holds from step to step.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
import torch
from torch import Tensor, nn

import adamezo
from adamezo.finetune import batches
from benchmarks.method_entries import BY_DIRECTIONS, ENTRIES, USUAL, Entry
from benchmarks.results import (
    RESULTS,
    Point,
    Row,
    conditions,
    frame,
    load,
    parser,
    pick,
    run_once,
    settings,
    spread,
    write,
)

if TYPE_CHECKING:
    from benchmarks.method_jobs import Job, Start

BUDGETS = {"layer": 216, "main": 72}
"""Forward passes of a run. 2, 3, 8 and 9 forwards a step, and 3 points, divide both."""
MODES = ("full", "lora", "tensor-train")
SEEDS = (0, 1, 2)
SEARCHING = {"layer": 3, "main": 1}
"""With how many of the seeds lr is searched."""
PLACES = range(-2, 3)  # of the grid, in powers of sqrt(10) around an entry's centre
FARTHEST = 6  # where it stops growing


# A run -------------------------------------------------------------------------------------------


class Spent(Exception):
    """A step would take more forward passes than are left."""


@dataclass
class Counter:
    """A closure that counts what it costs, up to the budget."""

    entry: Entry
    start: Start
    budget: int
    used: int = 0
    optimizer: Any = None
    _rows: Sequence[int] = ()
    _counted: bool = False

    def of(self, rows: Sequence[int]) -> Any:
        """The closure of a step on these rows."""
        self._rows, self._counted = rows, False
        return adamezo.batched(self._losses) if self.entry.in_batches else self

    def _spend(self, cost: int) -> None:
        if self.used + cost > self.budget:
            raise Spent
        self.used += cost

    def _losses(self, batch: adamezo.PerturbedBatch) -> Tensor:
        """All evaluations of a step in one forward. Some steps check them by further ones, which
        are not the method's."""
        if not self._counted:
            self._spend(self.entry.forwards)
            self._counted = True
        return self.start.losses(self._rows, batch)

    def __call__(self) -> Tensor:
        self._spend(3 if self.entry.backward else 1)
        loss = self.start.loss(self._rows)
        if self.entry.backward:
            self.optimizer.zero_grad()
            loss.backward()
        return loss


@functools.cache
def untouched(job: Job) -> tuple[float, float]:
    """Loss and accuracy on the test rows before the first step. They are those of the model without
    adapters in every mode, as adapters add nothing at first, and so for every seed."""
    return job.start("full", 0).score("test")


def train(job: Job, entry: Entry, mode: str, lr: float, seed: int) -> Iterator[Point]:
    """The points of a run. Steps and forward passes are those of finished steps, seconds of steps
    alone; a run whose loss was lost has infinity and nan for losses."""
    start = job.start(mode, seed)
    budget = job.budget
    optimizer = entry.make(job, start, lr, seed)
    closure = Counter(entry, start, budget, optimizer=optimizer)
    scores = [("test", 0, *untouched(job))]
    seconds, steps, forwards = 0.0, 0, 0
    for rows in batches(job.rows, job.batch, budget, seed):
        left = 1.0 if entry.constant else 1 - closure.used / budget
        optimizer.param_groups[0]["lr"] = lr * left
        began = time.perf_counter()
        try:
            optimizer.step(closure.of(rows))
        except Spent:  # and nothing has happened: that is what our optimizers promise
            break
        except FloatingPointError:  # twenty losses in a row were not finite
            break
        seconds += time.perf_counter() - began
        steps, forwards = steps + 1, closure.used
        if forwards >= len(scores) * budget // job.points and len(scores) < job.points:
            scores.append(("test", forwards, *start.score("test")))
    if scores[-1][1] == forwards:  # a last step that did not fit may have come since, and gone
        scores.pop()
    loss, accuracy = start.score("validation")
    validation = ("validation", forwards, loss if math.isfinite(loss) else math.inf, accuracy)
    scores = [validation, *scores, ("test", forwards, *start.score("test"))]
    yield "time", "s", forwards, seconds, steps
    for part, at, loss, accuracy in scores:
        yield f"{part} loss", "1", at, loss, 1
        yield f"{part} accuracy", "1", at, accuracy, 1


# The choice of lr --------------------------------------------------------------------------------


def validated(
    table: pandas.DataFrame, benchmark: str = "methods", **wanted: object
) -> pandas.DataFrame:
    """Validation losses by lr (from the lowest) and seed, of one method, job and mode."""
    found = pick(table, benchmark=benchmark, metric="validation loss", **wanted)
    return found.pivot(index="lr", columns="seed", values="median") if len(found) else found


def chosen_lr(losses: pandas.DataFrame) -> float | None:
    """The lr with the lowest mean validation loss over those seeds that every lr has; None if there
    is no such seed."""
    shared = losses.dropna(axis=1)
    return None if shared.empty else float(shared.mean(axis=1).idxmin())


def of_finalists(losses: pandas.DataFrame) -> float | None:
    """The lr with the lowest mean validation loss of those that have every seed, or None."""
    return chosen_lr(losses.dropna()) if len(losses.dropna()) else None


def ended(losses: pandas.DataFrame, seeds: int, finalists: int = 1) -> bool:
    """Whether a search has ended: as many lrs as there are finalists have all seeds."""
    return int((losses.notna().sum(axis=1) >= seeds).sum()) >= finalists


def at_an_edge(losses: pandas.DataFrame, lr: float | None = None) -> int:
    """-1 if the chosen lr is the lowest that was tried, 1 if the highest, else 0."""
    lr = chosen_lr(losses) if lr is None else lr
    return -1 if lr == losses.index[0] else int(lr == losses.index[-1])


def rate(entry: Entry, job: str, mode: str, place: float) -> float:
    centre = entry.lr.get(f"{job} {mode}", entry.lr[mode])
    return float(f"{centre * 10 ** (place / 2):.3g}")


@dataclass
class Search:
    """The search over lr of some methods, in a file that other searches may share."""

    job: Job
    path: Path
    seeds: Sequence[int] = SEEDS
    searching: int | None = None
    """lr is searched with so many of the seeds, and the best are run with the others too."""
    where: dict[str, Any] = field(default_factory=dict)
    rates: Sequence[float] = ()
    """With these lrs alone, if there are some, and without a search."""
    places: Sequence[float] = ()
    """Where the grid begins, in powers of sqrt(10) around an entry's centre; PLACES if empty."""
    fine: bool = False
    """Whether the lrs halfway to the next ones on both sides of the best are tried too."""
    finalists: int = 1
    """How many of the best lrs are run with all seeds, which then choose one."""
    benchmark: str = "methods"

    def run(self, entry: Entry, mode: str) -> None:
        """Makes the runs that are not there yet."""
        if self.rates:
            self._runs(entry, mode, self.rates, self.seeds)
            return
        places = list(self.places or PLACES)
        while True:
            ordered, side = self._searched(entry, mode, places)
            place = places[-1] + 1 if side > 0 else places[0] - 1
            if side and abs(place) > FARTHEST:
                print(f"{mode}, {entry.name}: the best lr is the last one that is tried")
            if not side or abs(place) > FARTHEST:
                break
            places = sorted([*places, place])
        if self.fine:
            best = next(p for p in places if rate(entry, self.job.name, mode, p) == ordered[0])
            finer = sorted([*places, best - 0.5, best + 0.5])
            ordered, _ = self._searched(entry, mode, finer)
        self._runs(entry, mode, ordered[: self.finalists], self.seeds)

    def _searched(
        self, entry: Entry, mode: str, places: Sequence[float]
    ) -> tuple[list[float], int]:
        """Some lrs, the best first, and whether it is at an edge."""
        seeds = self.seeds[: self.searching]
        rates = [rate(entry, self.job.name, mode, place) for place in places]
        made = self._runs(entry, mode, rates, seeds)
        losses = validated(frame(made), self.benchmark, lr=rates, seed=list(seeds))
        return list(losses.mean(axis=1).sort_values(kind="stable").index), at_an_edge(losses)

    def _runs(
        self, entry: Entry, mode: str, rates: Iterable[float], seeds: Sequence[int]
    ) -> list[Row]:
        """The rows of these runs, whether they were there already or not."""
        job, made = self.job, []
        for lr, seed in itertools.product(rates, seeds):
            chosen = dict(job=job.name, mode=mode, budget=job.budget, lr=lr, seed=seed)
            columns = settings(**chosen, threads=torch.get_num_threads())
            run = Row(self.benchmark, "", "", entry.name, columns, "forwards", **self.where)
            make = functools.partial(train, job, entry, mode, lr, seed)
            made += run_once(self.path, run, make)
        return made


# What a step takes and keeps ----------------------------------------------------------------------

# So small that the weights stay what they are; time does not depend on it.
STILL = 1e-12


def storages() -> dict[int, int]:
    """Bytes by address of the memory of all tensors in this process, but tables of addresses."""
    gc.collect()
    # By exact types: a subclass such as torch.compile's FakeTensor may have no memory to ask for.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    dense = [t for t in tensors if t.layout == torch.strided and not t.is_nested]
    found = [tensor.untyped_storage() for tensor in dense if tensor.is_floating_point()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class Stepper:
    """A method on a model of its own, ready to be timed: its history is full."""

    def __init__(self, job: Job, entry: Entry, mode: str) -> None:
        self.start = job.start(mode, 0)
        before = storages()
        self.optimizer = entry.make(job, self.start, STILL, 0)
        self._counter = Counter(entry, self.start, 2**62, optimizer=self.optimizer)
        for _ in range(self.optimizer.param_groups[0].get("horizon", 1) + 1):
            self.step(range(job.batch))
        self.kept_bytes = sum(size for at, size in storages().items() if at not in before)
        """Of tensors that were not there before the optimizer: its own, and gradients."""

    def step(self, rows: Sequence[int]) -> tuple[float, int]:
        """Seconds and forward passes of a step."""
        before = self._counter.used
        began = time.perf_counter()
        self.optimizer.step(self._counter.of(rows))
        return time.perf_counter() - began, self._counter.used - before


def cost(job: Job, entry: Entry, mode: str, repeats: int, where: dict[str, Any]) -> list[Row]:
    """The rows of a method: its steps and MeZO's in turn, on the same batches."""
    base, other = Stepper(job, ENTRIES[0], mode), Stepper(job, entry, mode)
    pairs = [
        (base.step(rows)[0], *other.step(rows))
        for rows in batches(job.rows, job.batch, repeats, seed=0)
    ]
    weights = sum(p.numel() for p in other.start.weights)
    chosen = dict(job=job.name, mode=mode, forwards=entry.forwards, weights=weights)
    columns = settings(**chosen, threads=torch.get_num_threads())
    measured: dict[tuple[str, str], dict[str, Any]] = {("kept", "B"): {"median": other.kept_bytes}}
    if entry.forwards:
        if any(forwards != entry.forwards for *_, forwards in pairs):
            raise RuntimeError(
                f"{entry.name} took {sorted({f for *_, f in pairs})} forward passes a step, "
                f"expected {entry.forwards}: correct its row of ENTRIES"
            )
        measured["time", "s"] = spread([s for _, s, _ in pairs])
        measured["time over MeZO's", "1"] = spread([s / of_base for of_base, s, _ in pairs])
    return [
        Row("methods costs", metric, unit, entry.name, columns, **values, **where)
        for (metric, unit), values in measured.items()
    ]


def main() -> None:
    names = [entry.name for entry in ENTRIES]
    options = parser(__doc__, "")
    options.add_argument("--job", default="layer", choices=tuple(BUDGETS))
    options.add_argument("--methods", nargs="+", metavar="METHOD", choices=names, default=names)
    options.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options.add_argument("--rates", type=float, nargs="+", default=[], help="no search over lr")
    options.add_argument(
        "--directions", action="store_true", help=f"{', '.join(USUAL)} with directions of all kinds"
    )
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--costs", action="store_true", help="bytes and seconds, and no search")
    options.add_argument("--repeats", type=int, default=21, help="steps timed for --costs")
    arguments = options.parse_args()
    entries = [e for e in ENTRIES if e.name in arguments.methods]
    if arguments.directions:
        entries = [e for (name, _), e in BY_DIRECTIONS.items() if name in arguments.methods]
    if arguments.job == "main":  # whose backward passes take too much time and memory here
        entries = [e for e in entries if not e.backward]
    torch.set_num_threads(arguments.threads)

    from benchmarks.method_jobs import JOBS

    where = conditions()
    job = JOBS[arguments.job](BUDGETS[arguments.job] // (3 if arguments.quick else 1))
    if arguments.output == RESULTS:
        arguments.output /= "methods_costs.csv" if arguments.costs else "methods.csv"
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    search = Search(job, arguments.output, seeds, SEARCHING[arguments.job], where, arguments.rates)
    for mode, entry in itertools.product(arguments.modes, entries):
        if arguments.costs:
            new = cost(job, entry, mode, arguments.repeats, where)
            of = (entry.name, job.name, mode)
            there = load(arguments.output)
            others = [r for r in there if (r.variant, r.columns["job"], r.columns["mode"]) != of]
            write(arguments.output, [*others, *new])
            print(of, ", ".join(f"{r.metric} {r.median:.4g} {r.unit}" for r in new), flush=True)
        else:
            search.run(entry, mode)


if __name__ == "__main__":
    main()
