"""What do AdaMeZO's moments cost on a GPU, beside what its paper measured with library calls?

    python -m benchmarks.paper            about 5 minutes on an H100
    python -m benchmarks.paper --quick    about 2 minutes: bfloat16 at one length, 3 repeats

The paper (arXiv 2605.00650) has the time of a step in its Table 7 and the peak memory in Table 4.
Here both are measured on a model of OPT-1.3B's shapes with random weights, in bfloat16 and float16,
with 16 sequences of 64 and of 256 tokens; `benchmarks.step` has the same for the CPU's main job.
Needs a CUDA device. Writes benchmarks/results/paper_gpu.csv.

    python -m benchmarks.paper --model OPT-tiny --device cpu --output tiny.csv

runs all of it on a toy model without a GPU: only the device differs.
"""

from __future__ import annotations

import itertools

import torch

from benchmarks.harness import gate
from benchmarks.results import on, parser
from benchmarks.step import run
from benchmarks.step_jobs import (
    ADAMEZO,
    ADAMEZO_20,
    ADAMW,
    BARE,
    EXACT,
    HIZOO,
    MEZO,
    RELEASED,
    TORCH,
    Job,
    Method,
)

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


def plan(job: Job, quick: bool) -> dict[Method, int]:
    return dict.fromkeys(METHODS, 3 if quick else 7)


def peaks(job: Job, quick: bool) -> list[Method]:
    """Memory does not depend on which 16 bits a weight is in, and each of these is a process."""
    if job.type != TYPES[0]:
        return []
    return JUDGED + (OTHERS if job.length == LENGTHS[-1] and not quick else [])


def main() -> None:
    options = parser(__doc__, "paper_gpu.csv")
    options.add_argument("--model", default="OPT-1.3B", help="one of benchmarks.step_jobs.MODELS")
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = options.parse_args()
    device, quick = arguments.device, arguments.quick
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"paper: torch {torch.__version__} finds no CUDA device; --model OPT-tiny --device cpu "
            "--output FILE tries it out without one"
        )
    if reason := MEZO.missing(device):
        raise SystemExit(f"paper: {reason}")
    backends = [m.backend(device) for m in (MEZO, TRITON) if not m.missing(device)]
    for backend in backends:
        gate([getattr(torch, kind) for kind in TYPES], backend=backend, device=device)
    print(f"bits equal the reference's: {', '.join(backends)}", flush=True)
    cases = [(TYPES[0], LENGTHS[-1])] if quick else itertools.product(TYPES, LENGTHS)
    jobs = [Job("paper", arguments.model, kind, length, device=device) for kind, length in cases]
    run(jobs, plan, peaks, on(device), arguments.output, quick)


if __name__ == "__main__":
    main()
