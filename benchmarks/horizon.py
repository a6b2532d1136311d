"""Which horizon H should one take? What a step costs against H, and what truncation leaves out.

    python -m benchmarks.horizon                  about 5 minutes on two cores
    python -m benchmarks.horizon --device cuda    under a minute on an H100
    python -m benchmarks.horizon --quick          a minute

Time and memory are those of AdaMeZO steps on the CPU's main job, or on the GPU's of
`benchmarks.paper`. What is left out is looked at in two ways, the same on every device: the share
of the exponential averages that the last H terms hold, 1 - beta^H; and the update vector from the
last H directions beside the one from all of them (ZO-Adam's moments), for the projected gradients
of three recorded runs of the demo (examples/results/three_seeds_adamezo.json). Writes
benchmarks/results/horizon_cpu.csv or horizon_gpu.csv and draws horizon.png.

Rows that compare with untruncated moments have `reference` "all directions" and the number in
`ratio`; "cosine" and "error" rows are over TIMES of every recorded run: the median, and the worst.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adamezo.methods.history import coefficients
from adamezo_kernels import PhiloxState, Plan, moments
from benchmarks.paper import check_bits
from benchmarks.rows import RESULTS, Row, conditions, quantile, write_rows
from benchmarks.step import ADAMEZO, SEED, SHORT, Job, Method, measure, measure_peaks

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
ALL = "all directions"


def recorded(path: Path = RUNS) -> list[list[float]]:
    """The projected gradients of each recorded run, the oldest first."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return [[point["projected_grad"] for point in run["curve"]] for run in runs]


def kept(betas: Sequence[float], horizons: Sequence[int]) -> Iterator[Row]:
    """The share of an exponential average that its newest H terms hold."""
    for beta in betas:
        for horizon in horizons:
            yield _row("kept", f"beta {beta}", horizon, 1 - beta**horizon)


def update_vectors(
    grads: Sequence[float], betas: tuple[float, float], horizon: int, weights: int
) -> dict[str, Tensor]:
    """m / (sqrt(v) + eps) by normalization, from the newest `horizon` directions of a run."""
    grads = list(grads)[::-1][:horizon]
    newest = 1000  # any index will do: a run's directions are as random as these
    states = [PhiloxState(SEED, newest - age) for age in range(len(grads))]
    plan = Plan([torch.empty(weights)])
    made = {}
    (m,), (v,) = moments(plan, states, *coefficients(grads, betas, "paper"))
    for name in ("paper", "bias_corrected"):
        # The two differ by the shares kept: one number for m and one for v.
        over_m, over_v = (
            (1.0, 1.0) if name == "paper" else (1 - beta ** len(grads) for beta in betas)
        )
        made[name] = (m / over_m) / ((v / over_v).sqrt() + 1e-8)
    return made


def distances(
    runs: Sequence[Sequence[float]],
    betas: tuple[float, float],
    horizons: Sequence[int],
    times: Sequence[int],
    weights: int,
) -> Iterator[Row]:
    """Cosine and relative error of the update against the one from all directions so far."""
    samples = [run[:end] for run in runs for end in times]
    whole = [update_vectors(grads, betas, len(grads), weights) for grads in samples]
    variant = f"betas {betas[0]}, {betas[1]}"
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
        yield _row("cosine", variant, horizon, quantile(cosines, 0.5))
        yield _row("cosine, worst", variant, horizon, min(cosines))
        for name, values in errors.items():
            yield _row("error", f"{variant}, {name}", horizon, quantile(values, 0.5))
            yield _row("error, worst", f"{variant}, {name}", horizon, max(values))


def _row(what: str, variant: str, horizon: int, ratio: float) -> Row:
    return Row("horizon", what, variant, horizon=horizon, reference=ALL, ratio=ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute, for a first look")
    parser.add_argument("--device", default="cpu", choices=tuple(JOBS))
    parser.add_argument("--model", help="another of benchmarks.step.MODELS")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--no-plots", action="store_true", help="write the CSV alone")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    name = {"cpu": "horizon_cpu.csv", "cuda": "horizon_gpu.csv"}[device]
    output = arguments.output or RESULTS / name
    job = JOBS[device]
    if arguments.model:
        job = replace(job, model=arguments.model)

    if reason := ADAMEZO.missing(device):
        raise SystemExit(f"horizon: {reason}")
    start = time.perf_counter()
    check_bits(device, [ADAMEZO.backend(device)], [job.type])
    where = conditions()
    if device == "cuda":
        where |= {"device": torch.cuda.get_device_name(), "clock_hz": None, "clock_source": ""}
    horizons = HORIZONS[::5] if quick else HORIZONS
    methods = {Method("ours", "AdaMeZO", h): 2 if quick else 5 for h in horizons}
    made = measure(job, methods, where)
    write_rows(output, made)
    made += measure_peaks(
        job, [Method("ours", "AdaMeZO", h) for h in (horizons if quick else MEMORY_HORIZONS)], where
    )
    write_rows(output, made)
    if device == "cpu":
        weights = WEIGHTS // 10 if quick else WEIGHTS
        compared = list(kept(sorted({b for betas in BETAS for b in betas}), horizons))
        for betas in BETAS:
            compared += distances(recorded(), betas, horizons, TIMES, weights)
        made += [replace(row, **where) for row in compared]
        write_rows(output, made)
    print(f"{len(made)} rows in {time.perf_counter() - start:.0f} s: {output.name}")
    if not arguments.no_plots:
        from benchmarks.plots import plot_horizon

        plot_horizon(output.parent)


if __name__ == "__main__":
    main()
