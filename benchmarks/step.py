"""What does a step cost, and how much of it is the optimizer?

    python -m benchmarks.step            about 15 minutes on two cores
    python -m benchmarks.step --quick    three minutes: fewer variants and repeats

The main job: SmolLM2-135M in float32 with 16 sequences of 32 and of 128 tokens. Two bare forwards;
MeZO and AdaMeZO as ours, as pure torch at its best and as the released codes have them; a method
that stores a Hessian; AdamW by backpropagation. A step is split at the moments when its closure
begins and ends. Peak memory is measured in a process of its own for each variant. Writes
benchmarks/results/step_cpu.csv.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamezo.measure import PeakMemory
from benchmarks.harness import Marks, gate
from benchmarks.results import Row, conditions, parser, settings, spread, write
from benchmarks.step_jobs import (
    ADAMEZO,
    ADAMEZO_20,
    ADAMW,
    BARE,
    EXACT,
    FORWARDS,
    HIZOO,
    MEZO,
    OURS,
    RELEASED,
    TORCH,
    Closure,
    Job,
    Method,
    Step,
)

PARTS = ("forwards", "perturbation", "update")
SHORT, LONG = (Job("step", "SmolLM2-135M", "float32", length) for length in (32, 128))


# Time --------------------------------------------------------------------------------------------


@dataclass
class Split:
    """Seconds of a step's parts, by the moments at which its closure begins and ends."""

    method: Method
    step: Step | None
    closure: Closure
    device: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PARTS})

    def once(self) -> None:
        if self.step is None:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()  # a step begins when the one before it has ended
        marks = Marks(self.device)

        def timed() -> Tensor:
            marks.add()
            loss = self.closure()
            marks.add()
            return loss

        try:
            loss = self.step(timed)
        except torch.OutOfMemoryError:
            print(f"{self.method}: does not fit into memory", flush=True)
            self.step = None
            self.forget()
        if self.step is None:  # now that the error holds on to nothing
            gc.collect()
            torch.cuda.empty_cache()
            return
        marks.add()
        gaps = marks.gaps()
        expected = FORWARDS[self.method.method]
        if len(gaps) != 2 * expected + 1:
            raise RuntimeError(
                f"{self.method}: a step evaluated its closure {len(gaps) // 2} times, expected "
                f"{expected}"
            )
        if not math.isfinite(float(loss)):  # type: ignore[arg-type]
            raise RuntimeError(f"{self.method}: the loss is {loss}, so its step was not a step")
        self.seconds["perturbation"].append(sum(gaps[:-1:2]))
        self.seconds["forwards"].append(sum(gaps[1::2]))
        self.seconds["update"].append(gaps[-1])

    def forget(self) -> None:
        self.seconds = {part: [] for part in PARTS}

    @property
    def total(self) -> list[float]:
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]


def runnable(methods: Iterable[Method], device: str) -> list[Method]:
    """Those that can run here; of the others it prints why not."""
    able = []
    for method in methods:
        if reason := method.missing(device):
            print(f"left out: {method}, because {reason}", flush=True)
        else:
            able.append(method)
    return able


def row(
    job: Job, method: Method, metric: str, unit: str, where: dict[str, Any], **values: Any
) -> Row:
    """A row of a job and a method; `part` of a step is one of its settings."""
    columns = settings(
        method=method.method,
        part=values.pop("part", ""),
        type=job.type,
        tokens=job.tokens,
        threads=torch.get_num_threads() if job.device == "cpu" else 1,
        weights=values.pop("weights", ""),
    )
    name = (job.benchmark, metric, unit, method.variant, columns, "horizon", method.horizon)
    return Row(*name, **values, **where)


def measure(job: Job, methods: Mapping[Method, int], where: dict[str, Any]) -> list[Row]:
    """Rows for the whole step and each part; `methods` gives each method's number of repeats. The
    last row is the size of the model's largest module.

    A method that did not fit into memory has rows without a time.
    """
    model = job.load()
    closure = job.closure(model)
    able = runnable(methods, job.device)
    splits = [Split(m, m.make(model, job.device), closure, job.device) for m in able]
    weights = [(p, p.data, p.detach().clone()) for p in model.parameters()]
    with torch.no_grad():
        closure()
    for done in range(max(methods.values())):
        for split in splits:
            if done >= methods[split.method]:
                continue
            # The first step of each is its warm-up, except where one costs many seconds: the
            # methods take turns, so the model and the allocator are warm by then.
            if done == 0 and (job.device == "cuda" or split.method.variant in (*OURS, "forward")):
                split.once()
                split.forget()
            split.once()
            # The released codes' way moves weights to new addresses, at which ours would have to
            # look anew; and no method shall step from where another one's rounding has led.
            for parameter, data, values in weights:
                parameter.data = data.copy_(values)
                parameter.grad = None
        if done == 0:
            left = sum(sum(s.total) * (methods[s.method] - 1) for s in splits if s.step)
            print(f"{job.tokens} {job.type}: {left:.0f} s after the first round", flush=True)
    elements = sum(p.numel() for p in model.parameters())
    made = []
    for split in splits:
        for part, seconds in (("step", split.total), *split.seconds.items()):
            columns = dict(part=part, weights=elements, **spread(seconds))
            made.append(row(job, split.method, "time", "s", where, **columns))
        if split.total:
            parts = ", ".join(f"{p} {statistics.median(s):.3g} s" for p, s in split.seconds.items())
            print(f"{job.tokens} {job.type} {split.method}: {parts}", flush=True)
    size = largest_module(model)
    made.append(row(job, Method("weights", ""), "largest module", "B", where, median=size))
    return made


def largest_module(model: nn.Module) -> int:
    """Bytes of the trainable weights of the module that has the most of its own."""
    return max(
        sum(p.numel() * p.element_size() for p in module.parameters(False) if p.requires_grad)
        for module in model.modules()
    )


# Memory ------------------------------------------------------------------------------------------

TOO_MUCH = "out of memory"


def peak_here(job: Job, method: Method) -> int | str | None:
    """The peak of this process over two steps; None where it cannot be measured."""
    model = job.load()
    closure = job.closure(model)
    step = method.make(model, job.device)
    # The first forward makes what stays (thread pools, packed buffers): it is in every variant.
    with torch.no_grad():
        closure()
    gc.collect()
    peak = PeakMemory(torch.device(job.device))
    peak.reset()
    try:
        for _ in range(2):
            step(closure)
    except torch.OutOfMemoryError:
        return TOO_MUCH
    return peak.read()


def measure_peaks(job: Job, methods: Iterable[Method], where: dict[str, Any]) -> list[Row]:
    """Peak memory of each method, that of a bare forward first, each in a new process."""
    made: list[Row] = []
    for method in [BARE, *runnable(methods, job.device)]:
        wanted = json.dumps({"job": asdict(job), "method": asdict(method)})
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.step", "--peak", wanted],
            # Of memory in use: glibc would keep up to hundreds of MiB of what was freed, or not.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"peak of {wanted} failed: {done.stderr.strip()[-2000:]}")
        peak = json.loads(done.stdout.splitlines()[-1])
        if peak is None:
            print("peak memory: not measured, this system does not let a process reset its peak")
            return []
        measured = {} if peak == TOO_MUCH else dict(median=peak, repeats=2)
        made.append(row(job, method, "peak memory", "B", where, **measured))
        text = f"peak {peak / 2**20:.0f} MiB" if measured else TOO_MUCH
        print(f"{job.tokens} {job.type} {method}: {text}", flush=True)
    return made


# The main job ------------------------------------------------------------------------------------


def plan(job: Job, quick: bool) -> dict[Method, int]:
    """How often each method steps: fewer times where a step takes many seconds."""
    ours = (3 if quick else 7) if job == SHORT else (2 if quick else 4)
    counts = dict.fromkeys([BARE, MEZO, ADAMEZO, EXACT], ours)
    if quick:
        return counts | ({RELEASED[MEZO]: 1, RELEASED[ADAMEZO]: 1} if job == SHORT else {})
    counts[ADAMEZO_20] = 5 if job == SHORT else 3
    slow = [RELEASED[MEZO], RELEASED[ADAMEZO], TORCH[MEZO], TORCH[ADAMEZO], ADAMW]
    return counts | (dict.fromkeys([*slow, HIZOO], 3) if job == SHORT else dict.fromkeys(slow, 2))


def peaks(job: Job, quick: bool) -> list[Method]:
    """Whose peak memory is measured."""
    if quick:
        return [ADAMEZO, EXACT] if job == SHORT else []
    few = [ADAMEZO, RELEASED[MEZO], RELEASED[ADAMEZO]]
    return [MEZO, EXACT, *few, HIZOO, ADAMW] if job == SHORT else few[:1]


def run(
    jobs: Iterable[Job],
    plan: Callable[[Job, bool], Mapping[Method, int]],
    peaks: Callable[[Job, bool], list[Method]],
    where: dict[str, Any],
    output: Path,
    quick: bool,
) -> list[Row]:
    """Times all jobs, then measures their memory, and writes what there is after each."""
    jobs, start = list(jobs), time.perf_counter()
    made: list[Row] = []
    for job in jobs:
        made += measure(job, plan(job, quick), where)
        write(output, made)
        gc.collect()  # the model, before the next one is loaded
    for job in jobs:
        if methods := peaks(job, quick):
            made += measure_peaks(job, methods, where)
            write(output, made)
    print(f"{len(made)} rows in {time.perf_counter() - start:.0f} s: {output.name}")
    return made


def main() -> None:
    options = parser(__doc__, "step_cpu.csv")
    options.add_argument("--peak", metavar="JSON", help=argparse.SUPPRESS)
    options.add_argument("--model", default=SHORT.model, help="one of benchmarks.step_jobs.MODELS")
    arguments = options.parse_args()
    if arguments.peak:
        wanted = json.loads(arguments.peak)
        print(json.dumps(peak_here(Job(**wanted["job"]), Method(**wanted["method"]))))
        return
    gate([torch.float32], backend="native")
    jobs = [Job(j.benchmark, arguments.model, j.type, j.length) for j in (SHORT, LONG)]
    run(jobs, plan, peaks, conditions(), arguments.output, arguments.quick)


if __name__ == "__main__":
    main()
