"""What does an update of AdaMeZO lose by summing over the last H directions alone?

    python -m benchmarks.horizon            minutes
    python -m benchmarks.horizon --quick    seconds, of fewer weights

"cosine" is between the update vector from the last H directions and the one from all of them
(ZO-Adam's moments), for the projected gradients of three recorded runs of the demo
(examples/results/three_seeds_adamezo.json): the median and the worst over TIMES of every run.
Writes benchmarks/results/horizon.csv. `python -m benchmarks.step horizon_cpu` measures what a step
costs against H.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from adamezo_kernels import PhiloxState, Plan, moments
from benchmarks.library_calls import coefficients
from benchmarks.results import Row, conditions, parser, settings, write
from benchmarks.step_jobs import BY_HORIZON, SEED

BETAS = ((0.7, 0.9), (0.7, 0.99), (0.9, 0.99), (0.9, 0.999))
# Steps of a recorded run after which its update is looked at: later than the longest horizon.
TIMES = (80, 100, 120)
RUNS = Path(__file__).parent.parent / "examples" / "results" / "three_seeds_adamezo.json"


def recorded() -> list[list[float]]:
    """The projected gradients of each recorded run, the oldest first."""
    runs = json.loads(RUNS.read_text(encoding="utf-8"))["runs"]
    return [[point["projected_grad"] for point in run["curve"]] for run in runs]


def update_vector(
    grads: Sequence[float], betas: tuple[float, float], horizon: int, weights: int
) -> Tensor:
    """m / (sqrt(v) + eps) from the newest `horizon` directions of a run. Bias correction would
    multiply it by a number, which no cosine sees."""
    grads = list(grads)[::-1][:horizon]
    newest = 1000  # any index will do: a run's directions are as random as these
    states = [PhiloxState(SEED, newest - age) for age in range(len(grads))]
    (m,), (v,) = moments(Plan([torch.empty(weights)]), states, *coefficients(grads, betas))
    return m / (v.sqrt() + 1e-8)


def distances(
    runs: Sequence[Sequence[float]],
    betas: tuple[float, float],
    horizons: Iterable[int],
    weights: int,
    where: dict[str, Any],
) -> Iterator[Row]:
    """Cosines of the update with the one from all directions so far, at TIMES of the runs."""
    samples = [run[:end] for run in runs for end in TIMES]
    whole = [update_vector(grads, betas, len(grads), weights) for grads in samples]
    columns = settings(betas=f"{betas[0]}, {betas[1]}")
    for horizon in horizons:
        cut = [update_vector(grads, betas, horizon, weights) for grads in samples]
        cosines = torch.stack([cosine_similarity(u, w, 0) for u, w in zip(cut, whole, strict=True)])
        for metric, value in (("cosine", cosines.median()), ("cosine, worst", cosines.min())):
            name = ("horizon", metric, "1", "AdaMeZO", columns, "horizon", horizon)
            yield Row(*name, median=value.item(), **where)


def main() -> None:
    arguments = parser(__doc__, "horizon.csv").parse_args()
    where = conditions()
    weights = 10_000 if arguments.quick else 1_000_000
    made = [
        row for betas in BETAS for row in distances(recorded(), betas, BY_HORIZON, weights, where)
    ]
    write(arguments.output, made)
    print(f"{len(made)} rows: {arguments.output.name}")


if __name__ == "__main__":
    main()
