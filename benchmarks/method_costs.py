"""What a step of each method takes and keeps: `python -m benchmarks.methods --costs`.

Rows of seconds a step, of the same over MeZO's beside it (without timings where steps differ from
each other), of the bytes of tensors that the optimizer holds from step to step, the weights' own
left out, and of a group's plain numbers, 8 bytes for each.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamezo.finetune import batches
from benchmarks.harness import gate
from benchmarks.methods import ENTRIES, Counter, Entry
from benchmarks.results import Row, load, settings, spread, write

if TYPE_CHECKING:
    from benchmarks.method_jobs import Job

# So small that the weights stay what they are; time does not depend on it.
STILL = 1e-12


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


def cost(
    job: Job, entry: Entry, mode: str, repeats: int, where: dict[str, Any], threads: int
) -> list[Row]:
    """The rows of a method: its steps and MeZO's in turn, on the same batches."""
    base, other = Stepper(job, ENTRIES[0], mode), Stepper(job, entry, mode)
    pairs = [
        (base.step(rows)[0], *other.step(rows))
        for rows in batches(job.rows, job.batch, repeats, seed=0)
    ]
    weights = sum(p.numel() for p in other.start.weights)
    columns = settings(
        job=job.name, mode=mode, forwards=entry.forwards, weights=weights, threads=threads
    )

    def row(metric: str, unit: str, **values: Any) -> Row:
        return Row("methods costs", metric, unit, entry.name, columns, **values, **where)

    rows = [
        row("kept", "B", median=kept_bytes(other.optimizer)),
        row("history", "B", median=history_bytes(other.optimizer)),
    ]
    if not entry.forwards:
        return rows
    if any(forwards != entry.forwards for *_, forwards in pairs):
        raise RuntimeError(
            f"{entry.name} took {sorted({f for *_, f in pairs})} forward passes a step, expected "
            f"{entry.forwards}: correct its row of ENTRIES"
        )
    rows.append(row("time", "s", **spread([s for _, s, _ in pairs])))
    over = spread([s / of_base for of_base, s, _ in pairs])
    return [*rows, row("time over MeZO's", "1", **over)]


def measure(
    job: Job,
    entries: Iterable[Entry],
    mode: str,
    repeats: int,
    where: dict[str, Any],
    threads: int,
    path: Path,
) -> None:
    """Measures the entries in a mode, and writes them in the place of their earlier rows."""
    gate([torch.float32], backend="native")
    for entry in entries:
        new = cost(job, entry, mode, repeats, where, threads)
        key = (entry.name, settings(job=job.name, mode=mode) + ";")
        others = [r for r in load(path) if (r.variant, r.settings[: len(key[1])]) != key]
        write(path, [*others, *new])
        shown = ", ".join(f"{r.metric} {r.median:.4g} {r.unit}" for r in new)
        print(f"{mode}, {entry.name}: {shown}", flush=True)
