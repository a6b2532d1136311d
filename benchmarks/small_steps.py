"""Do small steps get anywhere with 16-bit weights?

    python -m benchmarks.small_steps            15 runs; six minutes on one core
    python -m benchmarks.small_steps --plot     the picture again, from the results

MeZO with a small learning rate, on a linear head over the features of a frozen MiniLM (the reviews
of examples/data; the head computes in float32 whatever its weights' type). Few steps move a
bfloat16 weight by as much as half a unit of its last place. The weights are float32, or bfloat16
perturbed and stored in the ways of benchmarks/faithful.py, of which this is the counterpart: there
the steps are large. And in one way more: exact perturbation with updates rounded to nearest, where
nothing but the update can move a weight. Writes benchmarks/results/small_steps.csv and draws its
plot from it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from adamezo import MeZO
from benchmarks.faithful import VARIANTS, Point, plot_lines, read_points, values, write_points
from benchmarks.rows import RESULTS, conditions, markdown

LR, STEPS, EVERY = 2e-5, 8000, 500
RUNS = {
    **VARIANTS,
    "bfloat16 exact, nearest": {
        "dtype": "bfloat16",
        "perturbation": "exact",
        "rounding": "nearest",
    },
}
LOSS, DRIFT = "held-out loss", "distance from the start"


class Head(nn.Module):
    """A linear layer with one output: weights of any type, arithmetic in float32."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((0.05 * torch.randn(width)).to(dtype))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight.float()


def run(variant: str, seed: int, rows: tuple, steps: int, columns: dict) -> list[Point]:
    """The points of one run: held-out loss, and the root mean square of the change of a weight."""
    options = dict(RUNS[variant])
    dtype = getattr(torch, options.pop("dtype"))
    training, held_out = rows
    torch.manual_seed(seed)
    head = Head(training.features.shape[1], dtype)
    start_weight = head.weight.detach().float().clone()
    optimizer = MeZO.for_model(head, lr=LR, seed=seed, **options)

    @torch.no_grad()
    def loss(of=training) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(
            head(of.features), of.positive.float()
        )

    points = []
    start = time.perf_counter()
    for step in range(steps + 1):
        if step % EVERY == 0:
            moved = (head.weight.detach().float() - start_weight).square().mean().sqrt().item()
            points += [(LOSS, step, loss(held_out).item()), (DRIFT, step, moved)]
        if step < steps:
            optimizer.step(loss)
    seconds = (time.perf_counter() - start) / steps
    return [
        Point("MeZO", variant, seed, steps, LR, len(held_out.positive), *p, seconds, **columns)
        for p in points
    ]


def block(path: Path) -> str:
    """The table and the picture of docs/perturbation.md, or that there are none yet."""
    points = read_points(path)
    if not points:
        return "Not measured yet."
    body = []
    for variant in RUNS:
        cells = []
        for what, digits in ((LOSS, 3), (DRIFT, 4)):
            ends = [curve[max(curve)] for curve in values(points, variant, what).values()]
            cells.append(
                f"{statistics.mean(ends):.{digits}f} ({min(ends):.{digits}f} to "
                f"{max(ends):.{digits}f})"
            )
        body.append((variant, *cells))
    starts = [curve[0] for curve in values(points, "float32", LOSS).values()]
    table = markdown(("weights", "held-out loss at the end", "a weight has moved by"), body)
    return (
        f"{table}\n\nMean of {len(starts)} seeds (lowest to highest) after {points[0].steps:,} "
        f"steps at lr {LR:g}; before, the loss with float32 weights is "
        f"{statistics.mean(starts):.3f}.\n\n"
        "![loss and distance over steps](../benchmarks/results/small_steps.png)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "small_steps.csv")
    parser.add_argument("--plot", action="store_true", help="draw the results that are there")
    arguments = parser.parse_args()
    if not arguments.plot:
        from examples.train_on_accuracy import load

        torch.set_num_threads(1)
        names = ("device", "torch", "adamezo", "commit", "command", "date")
        columns = {name: value for name, value in conditions().items() if name in names}
        rows = load()
        points: list[Point] = []
        for seed in arguments.seeds:
            for variant in RUNS:
                points += run(variant, seed, rows, arguments.steps, columns)
                end = {p.what: p.value for p in points}
                print(
                    f"{variant}, seed {seed}: loss {end[LOSS]:.4f}, moved {end[DRIFT]:.5f}",
                    flush=True,
                )
                write_points(arguments.output, points)
    plot_lines(arguments.output, read_points(arguments.output), (LOSS, DRIFT))


if __name__ == "__main__":
    main()
