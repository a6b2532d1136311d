"""What a step of each method takes and keeps: `python -m benchmarks.methods --costs`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gate import gate
from benchmarks.methods import ENTRIES, Counter, Entry, columns_of
from benchmarks.rows import quantile, read_rows, write_rows

if TYPE_CHECKING:
    from benchmarks.method_jobs import Job


@dataclass(frozen=True)
class Cost:
    """What a step of a method takes and keeps. `ratio` is the median of its seconds over MeZO's
    beside it; without timings where steps differ from each other."""

    job: str
    mode: str
    method: str
    weights: int
    forwards: int
    kept_bytes: int
    """Of tensors that the optimizer holds from step to step, the weights' own left out."""
    history_bytes: int
    """Of a group's plain numbers, 8 for each."""
    median_s: float | None = None
    q20_s: float | None = None
    q80_s: float | None = None
    ratio: float | None = None
    ratio_q20: float | None = None
    ratio_q80: float | None = None
    repeats: int = 0
    threads: int = 1
    device: str = ""
    clock_hz: float | None = None
    torch: str = ""
    adamezo: str = ""
    python: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""


def kept_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors within reach of an optimizer, gradients too, but for the weights."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    grads = {id(p.grad): p.grad for p in weights if p.grad is not None}
    memory = {p.untyped_storage().data_ptr() for p in weights}
    tensors = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*_tensors(vars(optimizer), set()), *grads.values()]
    }
    return sum(size for at, size in tensors.items() if at not in memory)


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from _tensors(value, seen)
    elif type(thing).__module__.startswith("adamezo"):
        slots = [getattr(thing, name, None) for name in getattr(thing, "__slots__", ())]
        yield from _tensors([*vars(thing).values(), *slots], seen)


def history_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the plain numbers that the group with the most of them keeps."""

    def count(group: dict[str, Any]) -> int:
        kept = [group[name] for name in getattr(optimizer, "history", ())]
        return sum(len(k) if isinstance(k, (list, tuple)) else 1 for k in kept)

    return 8 * max(count(group) for group in optimizer.param_groups)


# So small that the weights stay what they are; time does not depend on it.
STILL = 1e-12


class Stepper:
    """A method on a model of its own, ready to be timed: its history is full."""

    def __init__(self, job: Job, entry: Entry, mode: str) -> None:
        self.start = job.start(mode, 0)
        self.optimizer = entry.make(job, self.start, STILL, 0)
        self._counter = Counter(entry, self.start, 2**62, optimizer=self.optimizer)
        for _ in range(self.optimizer.param_groups[0].get("horizon", 1) + 1):
            self.step(range(job.batch))

    def step(self, rows: Sequence[int]) -> tuple[float, int]:
        """Seconds and forward passes of a step."""
        before, self._counter.rows = self._counter.used, rows
        began = time.perf_counter()
        self.optimizer.step(self._counter)
        return time.perf_counter() - began, self._counter.used - before


def cost(job: Job, entry: Entry, mode: str, repeats: int) -> dict[str, Any]:
    """The columns of a Cost that are measured: steps of the method and of MeZO in turn, on the same
    batches."""
    from adamezo.finetune import batches

    base, other = Stepper(job, ENTRIES[0], mode), Stepper(job, entry, mode)
    pairs = [
        (base.step(rows)[0], *other.step(rows))
        for rows in batches(job.rows, job.batch, repeats, seed=0)
    ]
    columns: dict[str, Any] = dict(
        weights=sum(p.numel() for p in other.start.weights),
        forwards=entry.forwards,
        kept_bytes=kept_bytes(other.optimizer),
        history_bytes=history_bytes(other.optimizer),
    )
    if not entry.forwards:
        return columns
    if any(forwards != entry.forwards for *_, forwards in pairs):
        raise RuntimeError(
            f"{entry.name} took {sorted({f for *_, f in pairs})} forward passes a step, expected "
            f"{entry.forwards}: correct its row of ENTRIES"
        )
    seconds = [s for _, s, _ in pairs]
    ratios = [s / of_base for of_base, s, _ in pairs]
    for name, values in (("{}_s", seconds), ("ratio_{}", ratios)):
        for at, q in (("q20", 0.2), ("q80", 0.8)):
            columns[name.format(at)] = quantile(values, q)
    return columns | dict(
        median_s=quantile(seconds, 0.5), ratio=quantile(ratios, 0.5), repeats=len(pairs)
    )


def read_costs(path: Path) -> list[Cost]:
    """The costs of a file; none if it is not there."""
    return read_rows(path, Cost) if path.exists() else []


def measure(
    job: Job,
    entries: Iterable[Entry],
    modes: Sequence[str],
    repeats: int,
    where: dict[str, Any],
    path: Path,
) -> None:
    """Measures the entries in each mode, and writes them in the place of their earlier rows."""
    gate([torch.float32], backend="native")
    made = read_costs(path)
    for mode in modes:
        for entry in entries:
            row = Cost(
                job.name,
                mode,
                entry.name,
                **cost(job, entry, mode, repeats),
                **columns_of(Cost, where),
            )
            made = [
                r for r in made if (r.job, r.mode, r.method) != (job.name, mode, entry.name)
            ] + [row]
            write_rows(path, made, Cost)
            over = f", {row.ratio:.2f}x MeZO's step" if row.ratio else ""
            print(
                f"{mode}, {entry.name}: {row.forwards} forwards, "
                f"{row.kept_bytes / row.weights:.2f} bytes a weight, {row.history_bytes} a group"
                f"{over}",
                flush=True,
            )
