"""Do 16-bit weights follow what a step asks of them?

    python -m benchmarks.sixteen_bit still    about 5 minutes on two cores
    python -m benchmarks.sixteen_bit small    15 runs; six minutes on one core
    python -m benchmarks.sixteen_bit large    12 runs; over an hour on two cores

- `still`: what steps do to weights that should stay where they are. Cycles of +mu z, -2 mu z, +mu z
  and no update; one update of lr p = 1e-6.
- `small`: small steps of MeZO on a linear head over frozen features, which computes in float32
  whatever its weights' type. Few of them move a bfloat16 weight by half a unit of its last place.
- `large`: the main job (docs/main_job.md) with its own steps.

The runs have three seeds, which decide directions and order; one that is in the file is not made
again. Metrics of `still`, where x is the number of cycles: "drift" (root mean square of
the change over that of the weights before), "mean" (of the change, in the same unit), "changed"
(share of weights with other bits) and "followed" (what the change has along the update that was
asked for: 1 where it is followed).
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adamezo import MeZO
from adamezo_kernels import PhiloxState, Plan, perturb_, sample_, update_
from benchmarks.results import RESULTS, Point, Row, conditions, parser, run_once, settings, write

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# float32 stores ignore the rounding.
ROUNDINGS = {name: ("nearest", "stochastic") for name in TYPES} | {"float32": ("nearest",)}
SEED, ZO_EPS, LR = 2026, 1e-3, 1e-6
CYCLES = (100, 1000)

IN_PLACE, OUT_OF_PLACE = {"perturbation": "inplace"}, {"perturbation": "out_of_place"}
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", **IN_PLACE},
    "bfloat16 in place, nearest": {"dtype": "bfloat16", "rounding": "nearest", **IN_PLACE},
    "bfloat16 in place, stochastic": {"dtype": "bfloat16", "rounding": "stochastic", **IN_PLACE},
    "bfloat16 out of place": {"dtype": "bfloat16", "rounding": "stochastic", **OUT_OF_PLACE},
    # Here nothing but the update can move a weight: of small steps alone.
    "bfloat16 out of place, nearest": {"dtype": "bfloat16", "rounding": "nearest", **OUT_OF_PLACE},
}
SMALL_LR, EVERY = 2e-5, 500  # of the small steps; a point of their curves every so many steps


def weights(elements: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return (0.02 * torch.randn(elements, generator=generator)).to(TYPES[kind])


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def change(now: Tensor, before: Tensor) -> dict[str, float]:
    """drift, mean and changed, as above."""
    old = before.double()
    moved = now.double() - old
    size = old.square().mean().sqrt()
    return {
        "drift": (moved.square().mean().sqrt() / size).item(),
        "mean": (moved.mean() / size).item(),
        "changed": (bits(now) != bits(before)).double().mean().item(),
    }


def cycles(elements: int, counts: Iterable[int], kind: str, rounding: str) -> Iterator[tuple]:
    """(cycles, the changes) at each of the counts."""
    before = weights(elements, kind)
    now = before.clone()
    plan, done = Plan([now]), 0
    for wanted in counts:
        for cycle in range(done, wanted):
            z = PhiloxState(SEED, cycle)
            perturb_(plan, z, ZO_EPS)
            perturb_(plan, z, -2 * ZO_EPS)
            perturb_(plan, z, ZO_EPS, rounding=rounding)
        done = wanted
        yield wanted, change(now, before)


def one_update(elements: int, kind: str, rounding: str) -> dict[str, float]:
    state = PhiloxState(SEED, 0)
    asked = -LR * sample_(torch.empty(elements), state).double()
    before = weights(elements, kind)
    now = before.clone()
    update_(Plan([now]), [state], [1.0], None, lr=LR, rounding=rounding)
    moved = now.double() - before.double()
    return change(now, before) | {"followed": ((moved * asked).sum() / asked.square().sum()).item()}


def still(arguments: argparse.Namespace, where: dict[str, Any]) -> Iterator[Row]:
    elements = 10_000 if arguments.quick else 1_000_000
    for kind, rounding in [(t, rounding) for t in TYPES for rounding in ROUNDINGS[t]]:
        counts = (1, 2) if arguments.quick else CYCLES
        found = [("cycles", n, changes) for n, changes in cycles(elements, counts, kind, rounding)]
        for what, n, changes in [*found, ("update", 1, one_update(elements, kind, rounding))]:
            variant = rounding if what == "update" else f"in place, {rounding}"
            columns = settings(
                what=what, type=kind, weights=elements, threads=torch.get_num_threads()
            )
            for metric, value in changes.items():
                name = ("still", metric, "1", variant, columns, what, n)
                yield Row(*name, median=value, repeats=n, **where)


class Head(nn.Module):
    """A linear layer with one output: weights of any type, arithmetic in float32."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((0.05 * torch.randn(width)).to(dtype))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight.float()


def small(variant: str, seed: int, steps: int, data: tuple) -> Iterator[Point]:
    """The points of a run with small steps. A weight's distance from the start is the root mean
    square."""
    options = dict(VARIANTS[variant])
    training, held_out = data
    torch.manual_seed(seed)
    head = Head(training.features.shape[1], TYPES[options.pop("dtype")])
    before = head.weight.detach().float().clone()
    optimizer = MeZO.for_model(head, lr=SMALL_LR, seed=seed, **options)

    @torch.no_grad()
    def loss(of: Any = training) -> Tensor:
        score = nn.functional.binary_cross_entropy_with_logits
        return score(head(of.features), of.positive.float())

    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            moved = (head.weight.detach().float() - before).square().mean().sqrt().item()
            yield "held-out loss", "1", step, loss(held_out).item(), 1
            yield "distance from the start", "1", step, moved, 1
        if step < steps:
            optimizer.step(loss)


def large(settings: Any) -> Iterator[Point]:
    """The same of the main job."""
    from adamezo.finetune import finetune

    for point in finetune(settings)["held_out_curve"]:
        yield "held-out loss", "1", point["step"], point["loss"], 1
        yield "held-out accuracy", "1", point["step"], point["accuracy"], 1


def runs(arguments: argparse.Namespace, where: dict[str, Any]) -> None:
    """Makes the runs that are not in the file yet, seed by seed, so that what is cut off leaves
    whole comparisons."""
    from examples import demo, train_on_accuracy

    if arguments.what == "small":
        torch.set_num_threads(1)
        data = train_on_accuracy.load()
    for seed, variant in itertools.product(arguments.seeds, arguments.variants):
        if arguments.what == "small":
            steps = arguments.steps or 8000
            chosen = dict(method="MeZO", lr=SMALL_LR, held_out=600)
            make = functools.partial(small, variant, seed, steps, data)
        else:
            steps = arguments.steps or 80
            often = dict(eval_every=max(1, steps // 4), show=0, held_out=150)
            found = demo.options("adamezo", seed=seed, steps=steps, **often, **VARIANTS[variant])
            chosen = dict(method="adamezo", lr=found.lr, held_out=150)
            make = functools.partial(large, found)
        columns = settings(seed=seed, steps=steps, **chosen)
        run = Row(arguments.what, "", "", variant, columns, "step", **where)
        run_once(arguments.output, run, make)


def main() -> None:
    options = parser(__doc__, "")
    options.add_argument("what", choices=("still", "small", "large"))
    options.add_argument("--steps", type=int, help="fewer or more than the usual")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = options.parse_args()
    if arguments.output == RESULTS:
        arguments.output /= f"sixteen_bit_{arguments.what}.csv"
    where = conditions()
    if arguments.what == "still":
        write(arguments.output, still(arguments, where))
    else:
        runs(arguments, where)


if __name__ == "__main__":
    main()
