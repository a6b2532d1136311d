"""How long until a process that was lost is where it was: by a checkpoint, or by the log?

    python -m benchmarks.recovery    some ten minutes

The main job's model and batch, SmolLM2-135M in float32 with 16 x 32 tokens, and AdaMeZO with ten
directions in its history, on one core. "step" is what is taken again where nothing has it. Steps
and replays are in seconds of the processor, as other jobs lengthen those little; files in seconds
of the clock. A checkpoint has the weights and the optimizer; it is written until the disk has it,
and read right after, from the system's cache, as the base weights are. A replay is of STEPS records
onto base weights that are there, which it compares first; in place it repeats the perturbations of
each step for their roundings. Writes benchmarks/results/recovery.csv; `benchmarks.scaling` has the
model that takes numbers from here.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adamezo import AdaMeZO, batched
from adamezo.finetune import checkpoint
from adamezo.runlog import Log, StepLog, optimizer_for, read, replay
from benchmarks.results import Row, conditions, parser, settings, spread, write
from benchmarks.step_jobs import LR, SEED, SHORT, Job

STEPS = (10, 100)
"""How many steps are replayed."""
WAYS = {"in place": "inplace", "out of place": "out_of_place"}


def _seconds(
    repeats: int, do: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Of a call, but for the first one."""
    times = []
    for _ in range(repeats + 1):
        began = clock()
        do()
        times.append(clock() - began)
    return times[1:]


def _optimizer(model: nn.Module, perturbation: str) -> AdaMeZO:
    return AdaMeZO.for_model(model, lr=LR, seed=SEED, perturbation=perturbation)


def _log(model: nn.Module, perturbation: str, steps: int, path: Path) -> AdaMeZO:
    """Logs so many steps, whose losses cost nothing: a replay does not see where they are from."""
    optimizer = _optimizer(model, perturbation)
    with StepLog.create(path, optimizer) as log:
        for step in range(steps):
            optimizer.step(lambda step=step: float(step))
        checkpoint.save(optimizer, log)
    return optimizer


def rows(job: Job, repeats: int, where: dict[str, Any]) -> Iterator[Row]:
    model = job.load()
    columns = settings(type=job.type, tokens=job.tokens)

    def row(metric: str, variant: str, steps: int, seconds: list[float]) -> Row:
        made = Row("recovery", metric, "s", variant, columns, "steps", steps, **spread(seconds),
                   **where)  # fmt: skip
        print(f"{variant}: {metric}, {steps} steps: {made.median:.3g} s", flush=True)
        return made

    for variant, perturbation in WAYS.items():
        optimizer = _optimizer(model, perturbation)
        closure = batched(job.losses(model))
        for _ in range(optimizer.param_groups[0]["horizon"]):  # the history is full
            optimizer.step(lambda: 0.0)

        def step(optimizer: AdaMeZO = optimizer, closure: Any = closure) -> None:
            optimizer.step(closure)

        yield row("step", variant, 1, _seconds(repeats, step, time.process_time))
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        saved = str(Path(folder) / "base.safetensors")
        save_file(base, saved)
        yield row(
            "base weights read", "either", 0, _seconds(repeats, lambda: _filled(model, saved))
        )
        for variant, perturbation in WAYS.items():
            path = Path(folder) / f"{perturbation}.log"
            _filled(model, saved)
            optimizer = _log(model, perturbation, max(STEPS), path)
            log = read(path)
            for steps in STEPS:
                few = max(1, 10 * repeats // steps)
                times = [_replayed(log, steps, model, saved) for _ in range(few)]
                yield row("replayed", variant, steps, times)
        kept = checkpoint.beside(path)
        with StepLog.follow(path, optimizer) as log:
            written = _seconds(repeats, lambda: checkpoint.save(optimizer, log))
        yield row("checkpoint written", "either", 0, written)
        found = _seconds(repeats, lambda: _loaded(kept, optimizer))
        yield row("checkpoint read", "either", 0, found)


def _filled(model: nn.Module, saved: str) -> None:
    """Reads the base weights into a model that is there."""
    tensors = load_file(saved)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[name])


def _loaded(kept: Path, optimizer: AdaMeZO) -> None:
    found = checkpoint.at(kept, optimizer)
    assert found is not None, f"{kept} was written"
    found[1]()


def _replayed(log: Log, steps: int, model: nn.Module, saved: str) -> float:
    """Seconds of a replay onto base weights that are read, with its comparison of them."""
    _filled(model, saved)
    began = time.process_time()
    replay(log, optimizer_for(log.header, dict(model.named_parameters())), until=steps)
    return time.process_time() - began


def main() -> None:
    arguments = parser(__doc__, "recovery.csv").parse_args()
    torch.set_num_threads(1)
    job = Job("recovery", "OPT-tiny", "float32", 8) if arguments.quick else SHORT
    made = list(rows(job, 2 if arguments.quick else 3, conditions()))
    write(arguments.output, made)


if __name__ == "__main__":
    main()
