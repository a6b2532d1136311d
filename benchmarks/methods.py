"""Which method should one take? All of them with the same forward passes and the same search.

    python -m benchmarks.methods                         the main job's last layer; an hour
    python -m benchmarks.methods --job main              the main job; many hours
    python -m benchmarks.methods --methods MeZO AdaMeZO --modes lora --minutes 20
    python -m benchmarks.methods --costs                     bytes and seconds of a step
    python -m benchmarks.plots                               the picture, from the results

A run has a number of forward passes, and not of steps: the step that would need one more is undone.
Each method trains all weights ("full") and LoRA adapters ("lora"), with every lr of a grid by
factors of sqrt(10) and three seeds; of the main job, whose runs are long, lr is searched with the
first seed, and the best lr is run with all three. The seed decides the order of the rows, the
directions and the adapters, the same for all methods. The grid grows on a side until the best lr is
inside it. The best has the lowest mean loss on validation rows; what is reported is on test rows,
which choose nothing. lr falls linearly to 0 with the forward passes. Nothing else is searched: all
other options are the classes' defaults but where ENTRIES has some.

Each finished run is one row at the end of benchmarks/results/methods.csv, and a run that is there
is not made again: stop it, go on, or work on other methods in another process. --costs writes
benchmarks/results/methods_costs.csv.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import functools
import io
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import adamezo
from benchmarks.rows import RESULTS, cells, conditions, read_rows

if TYPE_CHECKING:
    from benchmarks.method_jobs import Job, Start

BUDGETS = {"layer": 216, "main": 72}
"""Forward passes of a run. 2, 3, 8 and 9 forwards a step, and POINTS, divide both."""
POINTS = 3  # where the test rows are scored: thirds of the budget
MODES = ("full", "lora")
SEEDS = (0, 1, 2)
SEARCHING = {"layer": 3, "main": 1}
"""With how many of the seeds lr is searched."""
PLACES = range(-2, 3)  # of the grid, in powers of sqrt(10) around an entry's centre
FARTHEST = 6  # where it stops growing
RUNS, COSTS = RESULTS / "methods.csv", RESULTS / "methods_costs.csv"


def _adazeta(job: Job) -> dict[str, Any]:
    """The published schedule over six epochs, in which it has 1, 1, 2, 5, 9 and 14 directions: 64
    forward passes for each step of an epoch. A run sees too few epochs of the data for it."""
    epochs = 6
    exponent = math.log(20 / 0.85) / math.log(epochs)
    return {"steps_per_epoch": max(1, job.budget // 64), "exponent": exponent}


def _zo_adamu(job: Job) -> dict[str, Any]:
    """The published schedule, of runs of 20,000 steps, over those of a run here."""
    steps = job.budget // 2
    return {"warmup": steps * 1024 // 20_000, "anneal": steps * 16_000 // 20_000}


@dataclass(frozen=True)
class Entry:
    """A method as it is compared."""

    name: str
    lr: dict[str, float]
    """The centre of the grid in each mode, or in a mode of one job."""
    of: str = ""
    """The class in `adamezo`, or with `backward` in torch.optim; if it is not the name."""
    options: Callable[[Job], dict[str, Any]] = lambda job: {}
    """Other than the defaults."""
    forwards: int = 2
    """Forward passes a step, a backward pass counted as two; 0 where they change."""
    backward: bool = False

    def make(self, job: Job, start: Start, lr: float, seed: int) -> Any:
        options = {"lr": lr, **self.options(job)}
        if self.backward:
            return getattr(torch.optim, self.of or self.name)(start.weights, **options)
        made = getattr(adamezo, self.of or self.name)
        return made(start.weights, seed=seed, model=start.module, **options)


def _rates(full: float, lora: float, main_full: float) -> dict[str, float]:
    return {"full": full, "lora": lora, "main full": main_full}


ENTRIES = [
    Entry("MeZO", _rates(1e-3, 1e-2, 1e-4)),
    Entry("MeZO, n = 4", _rates(1e-3, 1e-2, 1e-4), "MeZO", lambda job: {"queries": 4}, 8),
    Entry("AdaZeta", _rates(1e-3, 1e-2, 1e-4), options=_adazeta, forwards=0),
    Entry("momentum", _rates(1e-3, 1e-2, 1e-4), "AdaMeZO", lambda job: {"betas": (0.7, 0.0)}),
    Entry("AdaMeZO", _rates(1e-3, 1e-2, 1e-3)),
    Entry("ScalarAdaMeZO", _rates(1e-3, 1e-2, 1e-3)),
    Entry("MEAZO", _rates(1e-3, 1e-2, 1e-3)),
    Entry("FZOO", _rates(1e-6, 1e-5, 1e-7), forwards=9),
    Entry("HiZOO", _rates(1e-3, 1e-2, 1e-4), forwards=3),
    Entry("HELENE", _rates(1e-3, 1e-2, 1e-4), options=lambda job: {"batch_size": job.batch}),
    Entry("ZOAdaMU", _rates(1e-3, 1e-2, 1e-4), options=_zo_adamu),
    Entry("ZOAdam", _rates(1e-3, 1e-2, 1e-3)),
    Entry(
        "AdamW, by backpropagation", _rates(1e-4, 1e-3, 1e-5), "AdamW", forwards=3, backward=True
    ),
    Entry("SGD, by backpropagation", _rates(1e-2, 1e-1, 1e-3), "SGD", forwards=3, backward=True),
]


@dataclass(frozen=True)
class Run:
    """One run: what was chosen, how it ended on the validation rows, and its way on the test rows.

    `curve_*` are numbers with spaces between: after so many forward passes, the mean loss on the
    test rows and the accuracy. A run whose loss was lost has "inf" and "nan" there.
    """

    job: str
    mode: str
    method: str
    budget: int
    lr: float
    seed: int
    steps: int
    forwards: int
    """Of finished steps."""
    weights: int
    validation_loss: float
    validation_accuracy: float
    curve_forwards: str
    curve_loss: str
    curve_accuracy: str
    seconds: float
    """Of the steps alone."""
    threads: int = 1
    device: str = ""
    torch: str = ""
    adamezo: str = ""
    python: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return self.job, self.mode, self.method, self.budget, self.lr, self.seed

    def curve(self) -> list[tuple[int, float, float]]:
        """(forward passes, loss, accuracy) on the test rows."""
        columns = (self.curve_forwards, self.curve_loss, self.curve_accuracy)
        made = zip(*(text.split() for text in columns), strict=True)
        return [(int(f), float(loss), float(accuracy)) for f, loss, accuracy in made]

    @property
    def end(self) -> tuple[float, float]:
        """Loss and accuracy on the test rows."""
        return self.curve()[-1][1:]


# A run -------------------------------------------------------------------------------------------


class Spent(Exception):
    """A step would take more forward passes than are left."""


@dataclass
class Counter:
    """A closure that counts what it costs, up to the budget."""

    entry: Entry
    start: Start
    budget: int
    rows: Sequence[int] = ()
    used: int = 0
    optimizer: Any = None

    def __call__(self) -> Tensor:
        cost = 3 if self.entry.backward else 1
        if self.used + cost > self.budget:
            raise Spent
        self.used += cost
        loss = self.start.loss(self.rows)
        if self.entry.backward:
            self.optimizer.zero_grad()
            loss.backward()
        return loss


@functools.cache
def untouched(job: Job) -> tuple[float, float]:
    """Loss and accuracy on the test rows before the first step. They are those of the model without
    adapters in every mode, as adapters add nothing at first, and so for every seed."""
    return job.start("full", 0).score("test")


def train(job: Job, entry: Entry, mode: str, lr: float, seed: int) -> dict[str, Any]:
    """The columns of a Run that it measures."""
    from adamezo.finetune import batches

    start = job.start(mode, seed)
    budget = job.budget
    optimizer = entry.make(job, start, lr, seed)
    closure = Counter(entry, start, budget, optimizer=optimizer)
    curve = [(0, *untouched(job))]
    seconds, steps, forwards = 0.0, 0, 0
    for rows in batches(job.rows, job.batch, budget, seed):
        optimizer.param_groups[0]["lr"] = lr * (1 - closure.used / budget)
        closure.rows = rows
        began = time.perf_counter()
        try:
            optimizer.step(closure)
        except Spent:  # and nothing has happened: that is what our optimizers promise
            break
        except FloatingPointError:  # twenty losses in a row were not finite
            break
        seconds += time.perf_counter() - began
        steps, forwards = steps + 1, closure.used
        if forwards >= len(curve) * budget // POINTS and len(curve) < POINTS:
            curve.append((forwards, *start.score("test")))
    curve.append((forwards, *start.score("test")))
    loss, accuracy = start.score("validation")
    columns = zip(*curve, strict=True)
    return dict(
        steps=steps,
        forwards=forwards,
        weights=sum(p.numel() for p in start.weights),
        validation_loss=loss if math.isfinite(loss) else math.inf,
        validation_accuracy=accuracy,
        seconds=seconds,
        **{
            f"curve_{name}": " ".join(f"{value:.6g}" for value in column)
            for name, column in zip(("forwards", "loss", "accuracy"), columns, strict=True)
        },
    )


# Results -----------------------------------------------------------------------------------------


def append(path: Path, run: Run) -> None:
    """Adds a row to a file that other processes may be adding to, unless it is there by now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rows = [] if path.stat().st_size == 0 else read_rows(path, Run)
        if any(other.key == run.key for other in rows):
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if path.stat().st_size == 0:
            writer.writerow(f.name for f in fields(Run))
        writer.writerow(cells(run))
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Run]:
    """The runs of a file; none if it is not there."""
    return read_rows(path, Run) if path.exists() and path.stat().st_size else []


def found(runs: Iterable[Run], job: str, mode: str, method: str, budget: int) -> list[Run]:
    wanted = job, mode, method, budget
    return [r for r in runs if (r.job, r.mode, r.method, r.budget) == wanted]


def by_lr(runs: Iterable[Run]) -> dict[float, list[Run]]:
    """The runs of one method by lr, from the lowest."""
    runs = list(runs)
    return {lr: [r for r in runs if r.lr == lr] for lr in sorted({r.lr for r in runs})}


def chosen_lr(runs: Iterable[Run]) -> float | None:
    """Of the runs of one method, the lr with the lowest mean validation loss over those seeds that
    every lr has; None if there is no such seed."""
    rates = by_lr(runs)
    seeds = set.intersection(*({r.seed for r in some} for some in rates.values())) if rates else ()
    if not seeds:
        return None
    losses = {
        lr: statistics.fmean(r.validation_loss for r in some if r.seed in seeds)
        for lr, some in rates.items()
    }
    return min(losses, key=losses.__getitem__)


def best(runs: Iterable[Run]) -> list[Run]:
    """The runs of one method at its chosen lr, with all seeds that this one has."""
    runs = list(runs)
    lr = chosen_lr(runs)
    return [r for r in runs if r.lr == lr]


def at_an_edge(runs: Iterable[Run]) -> int:
    """-1 if the chosen lr is the lowest that was tried, 1 if the highest, else 0."""
    runs = list(runs)
    lr, rates = chosen_lr(runs), list(by_lr(runs))
    if lr == rates[0]:
        return -1
    return 1 if lr == rates[-1] else 0


# The search --------------------------------------------------------------------------------------


def rate(entry: Entry, job: str, mode: str, place: int) -> float:
    centre = entry.lr.get(f"{job} {mode}", entry.lr[mode])
    return float(f"{centre * 10 ** (place / 2):.3g}")


@dataclass
class Search:
    """The search over lr of some methods, in a file that other searches may share."""

    job: Job
    path: Path
    seeds: Sequence[int] = SEEDS
    lrs: Sequence[float] | None = None
    """Instead of a grid that grows."""
    searching: int | None = None
    """lr is searched with so many of the seeds, and the chosen one is run with the others too."""
    deadline: float = math.inf
    where: dict[str, Any] = field(default_factory=dict)

    def run(self, entry: Entry, mode: str) -> bool:
        """Makes the runs that are not there yet; False if time is up before the last of them."""
        if self.lrs is not None:
            return self._all(entry, mode, self.lrs, self.seeds)
        seeds = self.seeds[: self.searching]
        places = list(PLACES)
        while True:
            rates = [rate(entry, self.job.name, mode, place) for place in places]
            if not self._all(entry, mode, rates, seeds):
                return False
            some = found(read(self.path), self.job.name, mode, entry.name, self.job.budget)
            some = [r for r in some if r.lr in rates and r.seed in seeds]
            lr, side = chosen_lr(some), at_an_edge(some)
            assert lr is not None
            if side == 0:
                break
            place = places[-1] + 1 if side > 0 else places[0] - 1
            if abs(place) > FARTHEST:
                print(
                    f"{mode}, {entry.name}: the best lr is the last one that is tried", flush=True
                )
                break
            places = sorted([*places, place])
        return self._all(entry, mode, [lr], self.seeds)

    def _all(self, entry: Entry, mode: str, rates: Iterable[float], seeds: Sequence[int]) -> bool:
        for lr in rates:
            for seed in seeds:
                chosen: dict[str, Any] = dict(
                    job=self.job.name,
                    mode=mode,
                    method=entry.name,
                    budget=self.job.budget,
                    lr=lr,
                    seed=seed,
                )
                if any(r.key == tuple(chosen.values()) for r in read(self.path)):
                    continue
                if time.monotonic() > self.deadline:
                    return False
                began = time.perf_counter()
                made = Run(**chosen, **train(self.job, entry, mode, lr, seed), **self.where)
                append(self.path, made)
                print(
                    f"{mode}, {entry.name}, lr {lr:g}, seed {seed}: validation loss "
                    f"{made.validation_loss:.4f}, test {made.end[0]:.4f}, {made.end[1]:.3f}; "
                    f"{time.perf_counter() - began:.1f} s",
                    flush=True,
                )
        return True


def columns_of(kind: type, where: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in where.items() if name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [entry.name for entry in ENTRIES]
    parser.add_argument("--job", default="layer", choices=tuple(BUDGETS))
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=", ".join(names))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=list(SEEDS),
        help="of the main job, the first searches lr",
    )
    parser.add_argument("--lrs", type=float, nargs="+", help="instead of a grid that grows")
    parser.add_argument("--forwards", type=int, help=f"of a run; by job, {BUDGETS}")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--costs", action="store_true", help="bytes and seconds, and no search")
    parser.add_argument("--repeats", type=int, default=21, help="steps timed for --costs")
    parser.add_argument("--output", type=Path, help="another CSV")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    unknown = set(arguments.methods or names) - set(names)
    if unknown:
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(names)}")
    entries = [e for e in ENTRIES if e.name in (arguments.methods or names)]
    if arguments.job == "main":  # whose backward passes take too much time and memory here
        entries = [e for e in entries if not e.backward]
    torch.set_num_threads(arguments.threads)

    from benchmarks import method_costs
    from benchmarks.method_jobs import JOBS

    where = conditions() | {"threads": arguments.threads}
    job = JOBS[arguments.job](arguments.forwards or BUDGETS[arguments.job])
    if arguments.costs:
        output = arguments.output or COSTS
        method_costs.measure(job, entries, arguments.modes, arguments.repeats, where, output)
        return
    search = Search(
        job,
        arguments.output or RUNS,
        arguments.seeds,
        arguments.lrs,
        SEARCHING[arguments.job],
        deadline,
        columns_of(Run, where),
    )
    for mode in arguments.modes:
        for entry in entries:
            if not search.run(entry, mode):
                print("time is up; the same command goes on from here", flush=True)
                return


if __name__ == "__main__":
    main()
