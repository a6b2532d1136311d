"""Which horizon H should one take? What a step costs against H, and what truncation leaves out.

    python -m benchmarks.horizon                  about 5 minutes on two cores
    python -m benchmarks.horizon --device cuda    under a minute on an H100
    python -m benchmarks.horizon --quick          a minute

Time and memory are those of AdaMeZO steps on the CPU's main job, or on the GPU's of
`benchmarks.paper`. What is left out is looked at in two ways, the same on every device: the share
of the exponential averages that the last H terms hold, 1 - beta^H; and the update vector from the
last H directions beside the one from all of them (ZO-Adam's moments), for the projected gradients
of three recorded runs of the demo (examples/results/three_seeds_adamezo.json). Writes
benchmarks/results/horizon_cpu.csv or horizon_gpu.csv.

"cosine" and "error" rows are over TIMES of every recorded run: the median, and the worst.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from adamezo_kernels import PhiloxState, Plan, moments
from benchmarks.harness import gate
from benchmarks.library_calls import coefficients
from benchmarks.results import RESULTS, Row, on, parser, settings, write
from benchmarks.step import SHORT, measure, measure_peaks
from benchmarks.step_jobs import ADAMEZO, SEED, Job, Method

HORIZONS = (1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 64)
MEMORY_HORIZONS = (1, 10, 64)
BETAS = ((0.7, 0.9), (0.7, 0.99), (0.9, 0.99), (0.9, 0.999))
WEIGHTS = 1_000_000
# Steps of a recorded run after which its update is looked at: later than the longest horizon.
TIMES = (80, 100, 120)
RUNS = Path(__file__).parent.parent / "examples" / "results" / "three_seeds_adamezo.json"
JOBS = {
    "cpu": replace(SHORT, benchmark="horizon"),
    "cuda": Job("horizon", "OPT-1.3B", "bfloat16", 256, device="cuda"),
}


def recorded(path: Path = RUNS) -> list[list[float]]:
    """The projected gradients of each recorded run, the oldest first."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return [[point["projected_grad"] for point in run["curve"]] for run in runs]


def row(metric: str, horizon: int, value: float, where: dict[str, Any], **columns: object) -> Row:
    name = ("horizon", metric, "1", "AdaMeZO", settings(**columns), "horizon", horizon)
    return Row(*name, median=value, **where)


def update_vectors(
    grads: Sequence[float], betas: tuple[float, float], horizon: int, weights: int
) -> dict[str, Tensor]:
    """m / (sqrt(v) + eps) by normalization, from the newest `horizon` directions of a run."""
    grads = list(grads)[::-1][:horizon]
    newest = 1000  # any index will do: a run's directions are as random as these
    states = [PhiloxState(SEED, newest - age) for age in range(len(grads))]
    (m,), (v,) = moments(Plan([torch.empty(weights)]), states, *coefficients(grads, betas))
    # The two differ by the shares kept: one number for m and one for v.
    kept = [1 - beta ** len(grads) for beta in betas]
    return {
        name: (m / over_m) / ((v / over_v).sqrt() + 1e-8)
        for name, (over_m, over_v) in {"paper": (1.0, 1.0), "bias_corrected": kept}.items()
    }


def distances(
    runs: Sequence[Sequence[float]],
    betas: tuple[float, float],
    horizons: Sequence[int],
    times: Sequence[int],
    weights: int,
    where: dict[str, Any],
) -> Iterator[Row]:
    """Cosine and relative error of the update against the one from all directions so far."""
    samples = [run[:end] for run in runs for end in times]
    whole = [update_vectors(grads, betas, len(grads), weights) for grads in samples]
    pair = f"{betas[0]}, {betas[1]}"
    for horizon in horizons:
        cosines = []
        errors: dict[str, list[float]] = {"paper": [], "bias_corrected": []}
        for grads, full in zip(samples, whole, strict=True):
            cut = update_vectors(grads, betas, horizon, weights)
            for name, u in cut.items():
                errors[name].append(float((u - full[name]).norm() / full[name].norm()))
            # Normalizations multiply the whole update by a number: one cosine for both.
            u, w = cut["paper"], full["paper"]
            cosines.append(float(torch.dot(u, w) / (u.norm() * w.norm())))
        yield row("cosine", horizon, median(cosines), where, betas=pair)
        yield row("cosine, worst", horizon, min(cosines), where, betas=pair)
        for name, values in errors.items():
            columns = dict(betas=pair, normalization=name)
            yield row("error", horizon, median(values), where, **columns)
            yield row("error, worst", horizon, max(values), where, **columns)


def main() -> None:
    options = parser(__doc__, "")
    options.add_argument("--device", default="cpu", choices=tuple(JOBS))
    options.add_argument("--model", help="another of benchmarks.step_jobs.MODELS")
    arguments = options.parse_args()
    device, quick, output = arguments.device, arguments.quick, arguments.output
    if output == RESULTS:
        output /= {"cpu": "horizon_cpu.csv", "cuda": "horizon_gpu.csv"}[device]
    job = replace(JOBS[device], model=arguments.model or JOBS[device].model)
    if reason := ADAMEZO.missing(device):
        raise SystemExit(f"horizon: {reason}")
    gate([getattr(torch, job.type)], backend=ADAMEZO.backend(device), device=device)
    where = on(device)
    horizons = HORIZONS[::5] if quick else HORIZONS
    made = measure(job, {Method("ours", "AdaMeZO", h): 2 if quick else 5 for h in horizons}, where)
    remembering = [Method("ours", "AdaMeZO", h) for h in (horizons if quick else MEMORY_HORIZONS)]
    made += measure_peaks(job, remembering, where)
    write(output, made)
    if device == "cpu":
        for beta in sorted({b for betas in BETAS for b in betas}):
            made += [row("kept", h, 1 - beta**h, where, beta=beta) for h in horizons]
        for betas in BETAS:
            weights = WEIGHTS // 10 if quick else WEIGHTS
            made += distances(recorded(), betas, horizons, TIMES, weights, where)
        write(output, made)
    print(f"{len(made)} rows: {output.name}")


if __name__ == "__main__":
    main()
