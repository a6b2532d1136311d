"""Which method should one take? All of them with the same forward passes and the same search.

    python -m benchmarks.methods                         the main job's last layer; an hour
    python -m benchmarks.methods --job main              the main job; many hours
    python -m benchmarks.methods --methods MeZO AdaMeZO --modes lora --minutes 20
    python -m benchmarks.methods --costs                 bytes and seconds of a step

A run has a number of forward passes, and not of steps: the step that would need one more is undone.
Each method trains all weights ("full") and LoRA adapters ("lora"), with every lr of a grid by
factors of sqrt(10) and three seeds; of the main job, whose runs are long, lr is searched with the
first seed, and the best lr is run with all three. The seed decides the order of the rows, the
directions and the adapters, the same for all methods. The grid grows on a side until the best lr is
inside it. The best has the lowest mean loss on validation rows; what is reported is on test rows,
which choose nothing. lr falls linearly to 0 with the forward passes. Nothing else is searched: all
other options are the classes' defaults but where ENTRIES has some.

A finished run is some rows at the end of benchmarks/results/methods.csv, its losses against forward
passes, and a run that is there is not made again: stop it, go on, or work on other methods in
another process. --costs writes benchmarks/results/methods_costs.csv.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas
import torch
from torch import Tensor

import adamezo
from benchmarks.results import RESULTS, Row, append, conditions, parser, pick, read, settings

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
    exponent = math.log(20 / 0.85) / math.log(6)
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


# A run -------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """How a run went. Steps and forward passes are those of finished steps, seconds of steps alone;
    a run whose loss was lost has infinity and nan for losses."""

    steps: int
    forwards: int
    weights: int
    seconds: float
    validation: tuple[float, float]
    """Loss and accuracy."""
    curve: list[tuple[int, float, float]]
    """(forward passes, loss, accuracy) on the test rows."""


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


def train(job: Job, entry: Entry, mode: str, lr: float, seed: int) -> Trained:
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
    if curve[-1][0] == forwards:  # a last step that did not fit may have come since, and gone
        curve.pop()
    curve.append((forwards, *start.score("test")))
    loss, accuracy = start.score("validation")
    validation = (loss if math.isfinite(loss) else math.inf, accuracy)
    weights = sum(p.numel() for p in start.weights)
    return Trained(steps, forwards, weights, seconds, validation, curve)


def rows_of(
    name: str, made: Trained, where: dict[str, Any], threads: int, **chosen: object
) -> list[Row]:
    """A run as rows; the time is that of all its steps, of which `repeats` says how many."""
    columns = settings(**chosen, weights=made.weights, threads=threads)

    def row(metric: str, unit: str, forwards: int, value: float, repeats: int = 1) -> Row:
        key = ("methods", metric, unit, name, columns, "forwards", forwards)
        return Row(*key, median=value, repeats=repeats, **where)

    rows = [row("time", "s", made.forwards, made.seconds, made.steps)]
    for part, points in (("validation", [(made.forwards, *made.validation)]), ("test", made.curve)):
        for forwards, loss, accuracy in points:
            rows.append(row(f"{part} loss", "1", forwards, loss))
            rows.append(row(f"{part} accuracy", "1", forwards, accuracy))
    return rows


# The choice of lr --------------------------------------------------------------------------------


def validated(table: pandas.DataFrame, **wanted: object) -> pandas.DataFrame:
    """Validation losses by lr (from the lowest) and seed, of one method, job and mode."""
    found = pick(table, benchmark="methods", metric="validation loss", **wanted)
    return found.pivot(index="lr", columns="seed", values="median") if len(found) else found


def chosen_lr(losses: pandas.DataFrame) -> float | None:
    """The lr with the lowest mean validation loss over those seeds that every lr has; None if there
    is no such seed."""
    shared = losses.dropna(axis=1)
    return None if shared.empty else float(shared.mean(axis=1).idxmin())


def at_an_edge(losses: pandas.DataFrame) -> int:
    """-1 if the chosen lr is the lowest that was tried, 1 if the highest, else 0."""
    lr = chosen_lr(losses)
    return -1 if lr == losses.index[0] else int(lr == losses.index[-1])


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
    threads: int = 1
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
            losses = validated(self._there(entry, mode), lr=rates, seed=list(seeds))
            lr, side = chosen_lr(losses), at_an_edge(losses)
            assert lr is not None
            place = places[-1] + 1 if side > 0 else places[0] - 1
            if side and abs(place) > FARTHEST:
                print(f"{mode}, {entry.name}: the best lr is the last one that is tried")
            if not side or abs(place) > FARTHEST:
                return self._all(entry, mode, [lr], self.seeds)
            places = sorted([*places, place])

    def _there(self, entry: Entry, mode: str) -> pandas.DataFrame:
        chosen = dict(job=self.job.name, mode=mode, budget=self.job.budget)
        return pick(read(self.path), variant=entry.name, **chosen)

    def _all(self, entry: Entry, mode: str, rates: Iterable[float], seeds: Sequence[int]) -> bool:
        for lr, seed in [(lr, seed) for lr in rates for seed in seeds]:
            if len(pick(self._there(entry, mode), lr=lr, seed=seed)):
                continue
            if time.monotonic() > self.deadline:
                return False
            began = time.perf_counter()
            made = train(self.job, entry, mode, lr, seed)
            chosen = dict(job=self.job.name, mode=mode, budget=self.job.budget, lr=lr, seed=seed)
            append(self.path, rows_of(entry.name, made, self.where, self.threads, **chosen))
            print(
                f"{mode}, {entry.name}, lr {lr:g}, seed {seed}: validation loss "
                f"{made.validation[0]:.4f}, test {made.curve[-1][1]:.4f}, "
                f"{made.curve[-1][2]:.3f}; {time.perf_counter() - began:.1f} s",
                flush=True,
            )
        return True


def main() -> None:
    names = [entry.name for entry in ENTRIES]
    options = parser(__doc__, "")
    options.add_argument("--job", default="layer", choices=tuple(BUDGETS))
    options.add_argument("--methods", nargs="+", metavar="METHOD", choices=names, default=names)
    options.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options.add_argument("--lrs", type=float, nargs="+", help="instead of a grid that grows")
    options.add_argument("--forwards", type=int, help=f"of a run; by job, {BUDGETS}")
    options.add_argument("--minutes", type=float, default=math.inf, help="begin no run after them")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--costs", action="store_true", help="bytes and seconds, and no search")
    options.add_argument("--repeats", type=int, default=21, help="steps timed for --costs")
    arguments = options.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    entries = [e for e in ENTRIES if e.name in arguments.methods]
    if arguments.job == "main":  # whose backward passes take too much time and memory here
        entries = [e for e in entries if not e.backward]
    torch.set_num_threads(arguments.threads)
    output = arguments.output if arguments.output != RESULTS else None

    from benchmarks import method_costs
    from benchmarks.method_jobs import JOBS

    where, threads = conditions(), arguments.threads
    job = JOBS[arguments.job](arguments.forwards or BUDGETS[arguments.job])
    if arguments.costs:
        repeats = 3 if arguments.quick else arguments.repeats
        for mode in arguments.modes:
            method_costs.measure(job, entries, mode, repeats, where, threads, output or COSTS)
        return
    seeds, lrs, searching = arguments.seeds, arguments.lrs, SEARCHING[arguments.job]
    if arguments.quick:
        seeds, lrs = seeds[:1], lrs or [1e-3]
    search = Search(job, output or RUNS, seeds, lrs, searching, deadline, threads, where)
    for mode in arguments.modes:
        for entry in entries:
            if not search.run(entry, mode):
                print("time is up; the same command goes on from here", flush=True)
                return


if __name__ == "__main__":
    main()
