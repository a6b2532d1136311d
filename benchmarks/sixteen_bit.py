"""Do 16-bit weights follow what a step asks of them?

    python -m benchmarks.sixteen_bit still    about 5 minutes on two cores
    python -m benchmarks.sixteen_bit small    15 runs; six minutes on one core
    python -m benchmarks.sixteen_bit large    12 runs; over an hour on two cores

- `still`: what steps do to weights that should stay where they are. Cycles of +mu z, -2 mu z, +mu z
  and no update; one update of lr p = 1e-6; steps of the optimizer at lr = 0.
- `small`: small steps of MeZO on a linear head over frozen features, which computes in float32
  whatever its weights' type. Few of them move a bfloat16 weight by half a unit of its last place.
- `large`: the main job (docs/main_job.md) with its own steps.

The runs have three seeds, which decide directions and order; one that is in the file is not made
again. Metrics of `still`, where x is the number of cycles or steps: "drift" (root mean square of
the change over that of the weights before), "mean" (of the change, in the same unit), "growth"
(what the change has along the weights), "changed" (share of weights with other bits) and "followed"
(what the change has along the update that was asked for: 1 where it is followed).
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamezo import AdaMeZO, MeZO
from adamezo_kernels import PhiloxState, Plan, perturb_, sample_, update_
from benchmarks.results import RESULTS, Row, append, conditions, load, parser, settings, write

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# float32 stores ignore the rounding.
ROUNDINGS = {name: ("nearest", "stochastic") for name in TYPES} | {"float32": ("nearest",)}
SEED, ZO_EPS, LR = 2026, 1e-3, 1e-6
CYCLES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

IN_PLACE, EXACT = {"perturbation": "inplace"}, {"perturbation": "exact"}
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", **IN_PLACE},
    "bfloat16 in place, nearest": {"dtype": "bfloat16", "rounding": "nearest", **IN_PLACE},
    "bfloat16 in place, stochastic": {"dtype": "bfloat16", "rounding": "stochastic", **IN_PLACE},
    "bfloat16 exact": {"dtype": "bfloat16", "rounding": "stochastic", **EXACT},
    # Here nothing but the update can move a weight: of small steps alone.
    "bfloat16 exact, nearest": {"dtype": "bfloat16", "rounding": "nearest", **EXACT},
}
SMALL_LR, SMALL_STEPS, EVERY = 2e-5, 8000, 500

# Weights that should stay -------------------------------------------------------------------------


def weights(elements: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return (0.02 * torch.randn(elements, generator=generator)).to(TYPES[kind])


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def change(now: Tensor, before: Tensor) -> dict[str, float]:
    """drift, mean, growth and changed, as above."""
    old = before.double()
    moved = now.double() - old
    size = old.square().mean().sqrt()
    return {
        "drift": (moved.square().mean().sqrt() / size).item(),
        "mean": (moved.mean() / size).item(),
        "growth": ((moved * old).sum() / old.square().sum()).item(),
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


def still_steps(steps: int, kind: str, perturbation: str, rounding: str) -> tuple[int, dict]:
    """(the number of weights, the changes) of a small transformer with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, max_position_embeddings=32)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True)  # type: ignore[arg-type]
    model = LlamaForCausalLM(config).to(TYPES[kind]).eval()
    tokens = torch.arange(16).view(2, 8)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    options = dict(seed=SEED, perturbation=perturbation, rounding=rounding)
    optimizer = AdaMeZO.for_model(model, lr=0.0, **options)
    for _ in range(steps):
        optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    now = torch.cat([p.detach().flatten() for p in model.parameters()])
    return now.numel(), change(now, before)


def still(arguments: argparse.Namespace, where: dict[str, Any]) -> Iterator[Row]:
    elements, steps, counts = 1_000_000, arguments.steps or 10_000, CYCLES
    threads = torch.get_num_threads()
    if arguments.quick:
        elements, steps, counts = 10_000, 20, CYCLES[:5]

    def rows(what: str, variant: str, kind: str, size: int, n: int, found: dict) -> Iterator[Row]:
        columns = settings(what=what, type=kind, weights=size, threads=threads)
        for metric, value in found.items():
            name = ("still", metric, "1", variant, columns, what, n)
            yield Row(*name, median=value, repeats=n, **where)

    every = [(kind, rounding) for kind in TYPES for rounding in ROUNDINGS[kind]]
    for kind, rounding in every:
        for n, found in cycles(elements, counts, kind, rounding):
            yield from rows("cycles", f"in place, {rounding}", kind, elements, n, found)
    for kind, rounding in every:
        found = one_update(elements, kind, rounding)
        yield from rows("update", rounding, kind, elements, 1, found)
    for kind in TYPES:
        for way, rounding in (("exact", "stochastic"), *(("inplace", r) for r in ROUNDINGS[kind])):
            n = steps if way == "exact" else steps // 10  # in place a tenth says it all
            size, found = still_steps(n, kind, way, rounding)
            variant = way if way == "exact" else f"in place, {rounding}"
            print(f"{n} steps at lr = 0, {kind}, {variant}: {found['changed']:.2%} changed")
            found = {metric: found[metric] for metric in ("changed", "drift")}
            yield from rows("steps", variant, kind, size, n, found)


# Runs ---------------------------------------------------------------------------------------------

Points = Iterable[tuple[str, int, float]]
"""(metric, steps taken, value)"""


class Head(nn.Module):
    """A linear layer with one output: weights of any type, arithmetic in float32."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((0.05 * torch.randn(width)).to(dtype))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight.float()


def small(variant: str, seed: int, steps: int, data: tuple) -> tuple[Points, float]:
    """The points of a run with small steps, and seconds a step. A weight's distance from the start
    is the root mean square."""
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

    points = []
    start = time.perf_counter()
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            moved = (head.weight.detach().float() - before).square().mean().sqrt().item()
            points += [("held-out loss", step, loss(held_out).item())]
            points += [("distance from the start", step, moved)]
        if step < steps:
            optimizer.step(loss)
    return points, (time.perf_counter() - start) / steps


def large(settings: Any) -> tuple[Points, float]:
    """The same of the main job."""
    from adamezo.finetune import finetune

    report = finetune(settings)
    points = [("training loss", point["step"], point["loss"]) for point in report["curve"]]
    for point in report["held_out_curve"]:
        points += [("held-out loss", point["step"], point["loss"])]
        points += [("held-out accuracy", point["step"], point["accuracy"])]
    return points, report["training"]["seconds_per_step"]


def runs(arguments: argparse.Namespace, where: dict[str, Any]) -> None:
    """Makes the runs that are not in the file yet, seed by seed, so that what is cut off leaves
    whole comparisons."""
    kind, path = arguments.what, arguments.output
    if kind == "small":
        from examples.train_on_accuracy import load as features

        torch.set_num_threads(1)
        data = features()
    steps = arguments.steps or (SMALL_STEPS if kind == "small" else 80)
    for seed in arguments.seeds:
        for variant in arguments.only or list(VARIANTS)[: 5 if kind == "small" else 4]:
            chosen = dict(method="MeZO", lr=SMALL_LR, held_out=600)
            if kind == "small":
                make = functools.partial(small, variant, seed, steps, data)
            else:
                from examples.demo import options

                found = options(
                    "adamezo",
                    **dict(seed=seed, steps=steps, eval_every=max(1, steps // 4), show=0),
                    **dict(held_out=arguments.held_out, **VARIANTS[variant]),
                )
                make = functools.partial(large, found)
                chosen = dict(method="adamezo", lr=found.lr, held_out=found.held_out)
            columns = settings(seed=seed, steps=steps, **chosen)
            if any((r.variant, r.settings) == (variant, columns) for r in load(path)):
                print(f"{variant}, seed {seed}: there already", flush=True)
                continue
            points, seconds = make()
            made = [
                Row(kind, metric, "1", variant, columns, "step", at, value, repeats=1, **where)
                for metric, at, value in points
            ]
            name = (kind, "time of a step", "s", variant, columns, "step", steps)
            append(path, [*made, Row(*name, median=seconds, repeats=steps, **where)])
            ends = ", ".join(f"{metric} {value:.4g}" for metric, _, value in list(points)[-2:])
            print(f"{variant}, seed {seed}: {ends}", flush=True)


def main() -> None:
    options = parser(__doc__, "")
    options.add_argument("what", choices=("still", "small", "large"))
    options.add_argument("--steps", type=int, help="fewer or more than the usual")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--held-out", type=int, default=150, help="reviews that score `large`")
    options.add_argument("--only", nargs="+", choices=VARIANTS, help="of the runs")
    arguments = options.parse_args()
    if arguments.output == RESULTS:
        arguments.output = Path(RESULTS, f"sixteen_bit_{arguments.what}.csv")
    where = conditions()
    if arguments.what == "still":
        write(arguments.output, still(arguments, where))
    else:
        runs(arguments, where)


if __name__ == "__main__":
    main()
