"""What does a step cost, and how much of it is the optimizer?

    python -m benchmarks.step                about 15 minutes on two cores
    python -m benchmarks.step --quick        three minutes: one job, three repeats
    python -m benchmarks.step paper_gpu      about 5 minutes on an H100
    python -m benchmarks.step horizon_cpu    minutes; and horizon_gpu, regenerated_cpu

step_cpu is the main job: SmolLM2-135M in float32, 16 sequences of 32 and of 128 tokens. paper_gpu
is a model of OPT-1.3B's shapes with random weights, in bfloat16 and float16, with 16 sequences of
64 and of 256 tokens, as AdaMeZO's paper (arXiv 2605.00650) has the time of a step in its Table 7
and the peak memory in Table 4. Both have two bare forwards; MeZO and AdaMeZO as ours, as pure torch
at its best and as the released codes have them; AdamW by backpropagation. horizon_cpu and
horizon_gpu are AdaMeZO against its horizon, in one job of each. regenerated_cpu is the main job in
batches of four sizes, with each way to perturb weights.

A step is split at the moments when its closure begins and ends. Peak memory is measured in a
process of its own for each variant. Writes benchmarks/results/PLAN.csv.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from adamezo import PerturbedBatch, batched
from adamezo.finetune.measure import PeakMemory
from benchmarks.harness import Marks, gate
from benchmarks.results import RESULTS, Row, on, parser, settings, spread, write
from benchmarks.step_jobs import BARE, OURS, PLANS, Job, Method, Plan, Step

PARTS = ("forwards", "perturbation", "update")
ENOUGH_S = 20.0  # no more steps of a method that has taken so long, if it has made two


@dataclass
class Split:
    """Seconds of a step's parts, by the moments at which its closure begins and ends."""

    method: Method
    step: Step
    losses: Callable[[PerturbedBatch], Tensor]
    device: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PARTS})

    def once(self, warm_up: bool = False) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()  # a step begins when the one before it has ended
        marks = Marks(self.device)

        def timed(batch: PerturbedBatch) -> Tensor:
            marks.add()
            losses = self.losses(batch)
            marks.add()
            return losses

        closure = batched(timed)
        loss = self.step(closure if self.method.one_batch else lambda: closure())
        marks.add()
        gaps = marks.gaps()
        expected = self.method.forwards
        if len(gaps) != 2 * expected + 1 and not warm_up:  # the first batch is compared
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


def runnable(methods: Iterable[Method], device: str, batch: int = 16) -> list[Method]:
    """Those that can run here; of the others it prints why not."""
    able = []
    for method in methods:
        if reason := method.missing(device, batch):
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
    )
    name = (job.benchmark, metric, unit, method.variant, columns, "horizon", method.horizon)
    return Row(*name, **values, **where)


def measure(
    job: Job, methods: Iterable[Method], where: dict[str, Any], repeats: int = 7
) -> list[Row]:
    """Rows for the whole step and each part of each method."""
    model = job.load()
    losses = job.losses(model)
    able = runnable(methods, job.device, job.batch)
    steps = [m.make(model, job.device, job.batch) for m in able]
    splits = [Split(m, step, losses, job.device) for m, step in zip(able, steps, strict=True)]
    weights = [(p, p.data, p.detach().clone()) for p in model.parameters()]
    with torch.no_grad():
        losses(PerturbedBatch(1))
    for done in range(-1, repeats):
        for split in splits:
            if done > 1 and sum(split.total) > ENOUGH_S:
                continue
            split.once(warm_up=done < 0)
            if done < 0:
                split.forget()  # a warm-up
            # The released codes' way moves weights to new addresses, at which ours would have to
            # look anew; and no method shall step from where another one's rounding has led.
            for parameter, data, values in weights:
                parameter.data = data.copy_(values)
                parameter.grad = None
    made = []
    for split in splits:
        for part, seconds in (("step", split.total), *split.seconds.items()):
            made.append(row(job, split.method, "time", "s", where, part=part, **spread(seconds)))
        parts = ", ".join(f"{p} {statistics.median(s):.3g} s" for p, s in split.seconds.items())
        print(f"{job.tokens} {job.type} {split.method}: {parts}", flush=True)
    return made


def peak_here(job: Job, method: Method) -> int | None:
    """The peak of this process over two steps; None where a process cannot reset its peak."""
    model = job.load()
    closure = batched(job.losses(model))
    step = method.make(model, job.device, job.batch)
    # The first forward makes what stays (thread pools, packed buffers): it is in every variant.
    with torch.no_grad():
        closure()
    gc.collect()
    peak = PeakMemory(torch.device(job.device))
    peak.reset()
    for _ in range(2):
        step(closure if method.one_batch else lambda: closure())
    return peak.read()


def measure_peaks(job: Job, methods: Iterable[Method], where: dict[str, Any]) -> list[Row]:
    """Peak memory of each method, that of a bare forward first, each in a new process."""
    made: list[Row] = []
    new = multiprocessing.get_context("spawn")
    for method in [BARE, *runnable(methods, job.device, job.batch)]:
        # Of memory in use: glibc would keep up to hundreds of MiB of what was freed, or not.
        with mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": str(2**20)}):
            with ProcessPoolExecutor(1, new) as process:
                peak = process.submit(peak_here, job, method).result()
        if peak is None:
            print("peak memory: not measured, this system does not let a process reset its peak")
            return []
        made.append(row(job, method, "peak memory", "B", where, median=peak, repeats=2))
        print(f"{job.tokens} {job.type} {method}: peak {peak / 2**20:.0f} MiB", flush=True)
    return made


def run(plan: Plan, where: dict[str, Any], output: Path, *, quick: bool = False) -> list[Row]:
    """All rows of a plan, which are written after each job."""
    made: list[Row] = []
    jobs = plan.jobs[:1] if quick else plan.jobs
    for job in jobs:
        made += measure(job, plan.methods, where, 3 if quick else 7)
        write(output, made)
        gc.collect()  # the model, before the next one is loaded
    for job in jobs:
        if job.type == jobs[0].type:
            made += measure_peaks(job, plan.peaks[:2] if quick else plan.peaks, where)
            write(output, made)
    print(f"{len(made)} rows: {output.name}")
    return made


def main() -> None:
    options = parser(__doc__, "")
    options.add_argument("plan", nargs="?", default="step_cpu", choices=PLANS)
    options.add_argument("--model", help="another of benchmarks.step_jobs.MODELS")
    options.add_argument("--device", choices=("cpu", "cuda"), help="another one, to try it out")
    arguments = options.parse_args()
    if arguments.output == RESULTS:
        arguments.output /= f"{arguments.plan}.csv"
    plan = PLANS[arguments.plan]
    other = {k: v for k in ("model", "device") if (v := getattr(arguments, k))}
    plan = replace(plan, jobs=[replace(job, **other) for job in plan.jobs])
    device = plan.jobs[0].device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"step: torch {torch.__version__} finds no CUDA device; --model OPT-tiny --device cpu "
            "--output FILE tries the plan out without one"
        )
    ours = [m for m in runnable(plan.methods, device) if m.variant in OURS]
    types = dict.fromkeys(getattr(torch, job.type) for job in plan.jobs)
    for backend in sorted({m.backend(device) for m in ours}):
        gate(types, backend=backend, device=device)
        print(f"bits equal the reference's: {backend}", flush=True)
    run(plan, on(device), arguments.output, quick=arguments.quick)


if __name__ == "__main__":
    main()
