"""What do AdaMeZO's moments cost on a GPU, beside what its paper measured with library calls?

    python -m benchmarks.paper            about 5 minutes on an H100
    python -m benchmarks.paper --quick    about 2 minutes: bfloat16 at one length, 3 repeats

The paper (arXiv 2605.00650) has the time of a step in its Table 7 and the peak memory in Table 4.
Here both are measured on a model of OPT-1.3B's shapes with random weights, in bfloat16 and float16,
with 16 sequences of 64 and of 256 tokens; `benchmarks.step` has the same for the CPU's main job.
Needs a CUDA device. Writes benchmarks/results/paper_gpu.csv and draws paper.png.

    python -m benchmarks.paper --model OPT-tiny --device cpu --output tiny.csv

runs all of it on a toy model without a GPU: only the device differs.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from adamezo_kernels import PhiloxState, Plan, perturb_, update_
from benchmarks.gate import GateError
from benchmarks.library_calls import coefficients
from benchmarks.rows import RESULTS, conditions
from benchmarks.step import (
    ADAMEZO,
    ADAMEZO_20,
    ADAMW,
    BARE,
    EXACT,
    HIZOO,
    MEZO,
    RELEASED,
    SEED,
    TORCH,
    Job,
    Method,
    run,
)

# Seconds a step and peak megabytes, as the paper's Tables 7 and 4 give them.
PUBLISHED = {"MeZO": (0.21, 5016), "AdaMeZO": (0.31, 5410)}

TYPES = ("bfloat16", "float16")
LENGTHS = (64, 256)
FAST, FAST_20, TRITON, TRITON_20 = (
    Method(variant, "AdaMeZO", horizon)
    for variant in ("ours, fast directions", "ours, Triton")
    for horizon in (10, 20)
)
METHODS = [
    BARE,
    MEZO,
    *(ADAMEZO, ADAMEZO_20, FAST, FAST_20, TRITON, TRITON_20),
    EXACT,
    *(RELEASED[m] for m in (MEZO, ADAMEZO, ADAMEZO_20)),
    *(TORCH[m] for m in (MEZO, ADAMEZO)),
    HIZOO,
    ADAMW,
]
# Whose memory is measured: at both lengths, and at the longer one.
JUDGED = [MEZO, ADAMEZO]
OTHERS = [ADAMEZO_20, TRITON, EXACT, RELEASED[MEZO], RELEASED[ADAMEZO], HIZOO, ADAMW]

# What a step and a process are expected to take, before either has run.
STEP_S, PROCESS_S = 0.2, 12.0


def jobs(model: str, device: str, quick: bool) -> list[Job]:
    cases = [("bfloat16", LENGTHS[-1])] if quick else itertools.product(TYPES, LENGTHS)
    return [Job("paper", model, kind, length, device=device) for kind, length in cases]


def plan(job: Job, quick: bool) -> dict[Method, int]:
    return dict.fromkeys(METHODS, 3 if quick else 7)


def peaks(job: Job, quick: bool) -> list[Method]:
    """Memory does not depend on which 16 bits a weight is in, and each of these is a process."""
    if job.type != TYPES[0]:
        return []
    return JUDGED + (OTHERS if job.length == LENGTHS[-1] and not quick else [])


def check_bits(device: str, backends: Iterable[str], types: Iterable[str] = TYPES) -> None:
    """Raises GateError where a backend's bits on this device are not the reference's on the CPU."""
    horizon = 10
    states = [PhiloxState(SEED, horizon - age) for age in range(horizon)]
    first, second = coefficients([(-1) ** age * 5.0 for age in range(horizon)], (0.7, 0.9))

    def results(name: str, dtype: torch.dtype, at: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        weights = [0.02 * torch.randn(n, generator=generator) for n in (4099, 1, 37)]
        plan = Plan([w.to(at, dtype) for w in weights])
        perturb_(plan, states[0], 1e-3, backend=name)
        update_(
            plan,
            states,
            first,
            second,
            lr=1e-2,
            restore=-1e-3,
            rounding="stochastic",
            backend=name,
        )
        return [segment.tensor.cpu() for segment in plan]

    for name, kind in itertools.product(backends, types):
        dtype = getattr(torch, kind)
        pairs = zip(results(name, dtype, device), results("reference", dtype, "cpu"), strict=True)
        wrong = sum(int((got != expected).sum()) for got, expected in pairs)
        if wrong:
            raise GateError(
                f"backend {name} in {kind} on {device}: {wrong} weights differ from the "
                "reference's bits, expected none. No speed is measured: run `make gpu-check` first"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 minutes, for a first look")
    parser.add_argument("--model", default="OPT-1.3B", help="one of benchmarks.step.MODELS")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, default=RESULTS / "paper_gpu.csv")
    parser.add_argument("--no-plots", action="store_true", help="write the CSV alone")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"paper: torch {torch.__version__} finds no CUDA device; --model OPT-tiny --device cpu "
            "--output FILE tries it out without one"
        )
    if reason := MEZO.missing(device):
        raise SystemExit(f"paper: {reason}")
    start = time.perf_counter()
    backends = [m.backend(device) for m in (MEZO, TRITON) if not m.missing(device)]
    check_bits(device, backends)
    print(f"bits equal the reference's: {', '.join(backends)}", flush=True)
    todo = jobs(arguments.model, device, arguments.quick)
    steps = sum(sum(plan(job, arguments.quick).values()) for job in todo)
    processes = sum(1 + len(some) for job in todo if (some := peaks(job, arguments.quick)))
    print(
        f"{len(todo)} jobs, {steps} steps of about {STEP_S} s on an H100 and {processes} processes "
        f"of about {PROCESS_S} s: {(steps * STEP_S + processes * PROCESS_S) / 60:.0f} minutes",
        flush=True,
    )
    where = conditions()
    if device == "cuda":
        where |= {"device": torch.cuda.get_device_name(), "clock_hz": None, "clock_source": ""}
    made = run(todo, plan, peaks, where, arguments.output, arguments.quick)
    seconds = time.perf_counter() - start
    print(f"{len(made)} rows in {seconds:.0f} s: {arguments.output.name}")
    if not arguments.no_plots:
        from benchmarks.plots import plot_paper

        plot_paper(arguments.output.parent)


if __name__ == "__main__":
    main()
