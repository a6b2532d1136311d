"""What do ranks cost: the exchange of a step, a whole step, and a rank that catches up?

    python -m benchmarks.scaling    a minute

On this machine, over Gloo and the loopback interface, with 1, 2 and 4 processes of one thread.
"exchange" is what a step does for the losses of all ranks; "step" is one of AdaMeZO on ELEMENTS
weights with a closure that returns a constant. A rank that is replaced gets the weights by a replay
of the log, or by a broadcast from another rank: seconds of each. Writes
benchmarks/results/scaling.csv; docs/scaling.md has the model that goes beyond this machine
(:func:`predicted`).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed, multiprocessing, nn

from adamezo import AdaMeZO
from adamezo.distributed import connect
from adamezo.runlog import StepLog, optimizer_for, read, replay
from benchmarks.results import Row, conditions, parser, settings, spread, write

WORLDS = (1, 2, 4)
ELEMENTS = 2**20
CATCH_UP = 2**24
"""Weights of the model whose rank is replaced: 64 MiB in float32."""
LOGGED = 10
"""Steps that it has missed."""

Found = dict[str, list[float]]


def _timed(repeats: int, do: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        do()
        times.append(time.perf_counter() - began)
    return times[3:]


def _optimizer(elements: int) -> tuple[nn.Parameter, AdaMeZO]:
    weight = nn.Parameter(torch.zeros(elements))
    return weight, AdaMeZO([weight], lr=1e-9, seed=1)


def steps(repeats: int, elements: int = ELEMENTS) -> Found:
    """Seconds of a step and of its exchange, on a rank."""
    _, optimizer = _optimizer(elements)
    ranks = connect(optimizer, check_every=0)
    exchange: list[float] = []
    whole = ranks.losses

    def timed(*arguments: Any) -> list[float]:
        began = time.perf_counter()
        losses = whole(*arguments)
        exchange.append(time.perf_counter() - began)
        return losses

    ranks.losses = timed  # type: ignore[method-assign]
    step = _timed(repeats, lambda: optimizer.step(lambda: 1.0))
    return {"step": step, "exchange": exchange[3:]}


def broadcast(repeats: int) -> Found:
    """Seconds in which a rank gets all weights from another."""
    weight, _ = _optimizer(CATCH_UP)

    def copy() -> None:
        distributed.broadcast(weight.data, 0)
        distributed.barrier()

    return {"copied from a rank": _timed(repeats, copy)}


def replayed(repeats: int) -> Found:
    """Seconds in which a rank replays LOGGED steps on the base weights."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        _, optimizer = _optimizer(CATCH_UP)
        with StepLog.create(Path(folder) / "log", optimizer):
            for step in range(LOGGED):
                optimizer.step(lambda step=step: float(step))
        log = read(Path(folder) / "log")
        for _ in range(repeats):
            base = {log.header.manifest[0].name: torch.zeros(CATCH_UP)}
            again = optimizer_for(log.header, base)
            marks: list[float] = []

            def progress(records: Any, marks: list[float] = marks) -> Iterator[Any]:
                marks.append(time.perf_counter())
                yield from records
                marks.append(time.perf_counter())

            replay(log, again, progress=progress)
            times.append((marks[1] - marks[0]) / LOGGED)
    return {"replay of a step": times}


def _rank(rank: int, world: int, store: str, job: Callable[[int], Found], repeats: int,
          results: Any) -> None:  # fmt: skip
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, world), rank=rank, world_size=world,
        timeout=timedelta(minutes=5),
    )  # fmt: skip
    found = job(repeats)
    distributed.destroy_process_group()
    if rank == 0:
        results.put(found)


def on_ranks(world: int, job: Callable[[int], Found], repeats: int) -> Found:
    """What a job finds on the first of so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        results = multiprocessing.get_context("spawn").SimpleQueue()
        arguments = (world, str(Path(folder) / "store"), job, repeats, results)
        multiprocessing.spawn(_rank, arguments, nprocs=world)
        return results.get()


class Cluster(NamedTuple):
    """The assumptions of the model; seconds, bytes, and numbers without a unit."""

    step: float = 1.0
    """Of one worker alone: its forwards, perturbations and update."""
    jitter: float = 0.02
    """The standard deviation of a worker's time of a step, over its mean."""
    latency: float = 20e-6
    """Of one message between two machines of a data centre, with its software."""
    bandwidth: float = 1.25e9
    """Bytes a second of a worker's link: 10 Gbit/s."""
    row: int = 64
    """Bytes that a worker gives in a step (AdaMeZO and MeZO with one direction)."""
    weights: float = 14e9
    """Bytes of the model: seven billion weights of 16 bits."""
    between_failures: float = 3600.0
    """Seconds of a job, of any size, from one failure to the next."""
    restart: float = 60.0
    """Seconds until all processes run again and have read the base weights."""
    checkpoint_every: float = 600.0
    """Seconds from one checkpoint to the next."""
    checkpoint: float = 11.2
    """Seconds that a checkpoint stops the job: the weights over one link."""
    replay: float = 0.34
    """Seconds of a replayed step over those of a step (results/recovery.csv, 100 in place)."""


def predicted(workers: int, of: Cluster) -> dict[str, float]:
    """A step of so many workers, each with a batch of its own of the same size; and the share of
    its time in which a job makes progress, by the way in which it recovers.

    The slowest of N normal times is about ``sqrt(2 ln N)`` deviations above the mean. The exchange
    is a ring of N - 1 messages, before each of which Gloo's receiver says that it is ready, so that
    it takes two (benchmarks/network.py); or a tree of ``2 log2 N``.
    """
    stragglers = of.step * of.jitter * math.sqrt(2 * math.log(workers)) if workers > 1 else 0.0
    received = workers * of.row / of.bandwidth if workers > 1 else 0.0
    ring = 2 * (workers - 1) * of.latency + received
    tree = 2 * math.ceil(math.log2(workers)) * of.latency + received if workers > 1 else 0.0
    every = of.between_failures
    by_log = of.restart + of.replay * of.checkpoint_every / 2
    by_checkpoint = of.restart + of.checkpoint_every / 2
    writing = of.checkpoint / of.checkpoint_every
    return {
        "step": of.step + stragglers + ring,
        "stragglers": stragglers,
        "exchange, ring": ring,
        "exchange, tree": tree,
        "progress, log": 1 / (1 + writing + by_log / every),
        "progress, checkpoints": 1 / (1 + writing + by_checkpoint / every),
    }


def rows(repeats: int, where: dict[str, Any]) -> Iterator[Row]:
    few = max(2, repeats // 20)
    jobs = [("steps", world, steps, repeats, ELEMENTS) for world in WORLDS]
    jobs += [("catching up", 2, broadcast, few, CATCH_UP)]
    jobs += [("catching up", 1, replayed, few, CATCH_UP)]
    for variant, world, job, times, elements in jobs:
        for metric, seconds in on_ranks(world, job, times).items():
            columns = settings(elements=elements)
            name = ("scaling", metric, "s", variant, columns, "ranks", world)
            row = Row(*name, **spread(seconds), **where)
            print(f"{world} ranks: {metric}: {1e6 * (row.median or 0):.0f} us", flush=True)
            yield row


def main() -> None:
    arguments = parser(__doc__, "scaling.csv").parse_args()
    torch.set_num_threads(1)
    write(arguments.output, rows(20 if arguments.quick else 200, conditions()))


if __name__ == "__main__":
    main()
