"""What do steps do to weights that should stay where they are?

    python -m benchmarks.drift            about 5 minutes on two cores
    python -m benchmarks.drift --quick    seconds: fewer weights, cycles and steps

- `cycles`: weights N(0, 0.02) go to +mu z, by -2 mu z to -mu z, and back, as in a step without an
  update, along a new direction each time. Displaced weights are rounded to nearest, restored ones
  as the variant says.
- `update`: one update of lr p = 1e-6 along one direction.
- `steps`: steps of the optimizer at lr = 0 on a small transformer with tied embeddings.

Writes benchmarks/results/drift.csv and draws its plot from it. `ratio` holds, by `what`:

    drift       root mean square of the change, over that of the weights before
    mean        mean of the change, over the root mean square of the weights before
    growth      what the change has along the weights: the factor by which they grew, minus 1
    changed     share of the weights that are not the same bits as before
    followed    what the change has along the update that was asked for: 1 where it is followed
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamezo import AdaMeZO
from adamezo_kernels import PhiloxState, Plan, perturb_, sample_, update_
from benchmarks.rows import RESULTS, Row, conditions, find, markdown, read_rows, write_rows

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED, ZO_EPS, LR = 2026, 1e-3, 1e-6
CYCLES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
# float32 stores ignore the rounding.
ROUNDINGS = {name: ("nearest", "stochastic") for name in ("bfloat16", "float16")}
ROUNDINGS["float32"] = ("nearest",)


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


def cycle_rows(elements: int, cycles: Iterable[int]) -> Iterator[dict[str, Any]]:
    for kind in TYPES:
        for rounding in ROUNDINGS[kind]:
            before = weights(elements, kind)
            now = before.clone()
            plan = Plan([now])
            done = 0
            for wanted in cycles:
                for cycle in range(done, wanted):
                    z = PhiloxState(SEED, cycle)
                    perturb_(plan, z, ZO_EPS)
                    perturb_(plan, z, -2 * ZO_EPS)
                    perturb_(plan, z, ZO_EPS, rounding=rounding)
                done = wanted
                for what, ratio in change(now, before).items():
                    yield dict(
                        benchmark="drift cycles",
                        what=what,
                        variant=f"in place, {rounding}",
                        type=kind,
                        elements=elements,
                        repeats=wanted,
                        ratio=ratio,
                    )


def update_rows(elements: int) -> Iterator[dict[str, Any]]:
    state = PhiloxState(SEED, 0)
    asked = -LR * sample_(torch.empty(elements), state).double()
    for kind in TYPES:
        for rounding in ROUNDINGS[kind]:
            before = weights(elements, kind)
            now = before.clone()
            update_(Plan([now]), [state], [1.0], None, lr=LR, rounding=rounding)
            moved = now.double() - before.double()
            followed = ((moved * asked).sum() / asked.square().sum()).item()
            for what, ratio in (*change(now, before).items(), ("followed", followed)):
                yield dict(
                    benchmark="drift update",
                    what=what,
                    variant=rounding,
                    type=kind,
                    elements=elements,
                    repeats=1,
                    ratio=ratio,
                )


def transformer(kind: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(TYPES[kind]).eval()


def step_rows(steps: int) -> Iterator[dict[str, Any]]:
    """Exact perturbation, and beside it a tenth of the steps in place."""
    tokens = torch.arange(16).view(2, 8)
    for kind in TYPES:
        for perturbation, rounding in (
            ("exact", "stochastic"),
            *(("inplace", rounding) for rounding in ROUNDINGS[kind]),
        ):
            model = transformer(kind)
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            optimizer = AdaMeZO.for_model(
                model, lr=0.0, seed=SEED, perturbation=perturbation, rounding=rounding
            )
            taken = steps if perturbation == "exact" else steps // 10
            start = time.perf_counter()
            for _ in range(taken):
                optimizer.step(lambda model=model: model(input_ids=tokens, labels=tokens).loss)
            seconds = time.perf_counter() - start
            now = torch.cat([p.detach().flatten() for p in model.parameters()])
            place = "exact" if perturbation == "exact" else f"in place, {rounding}"
            found = change(now, before)
            print(
                f"{taken} steps at lr = 0, {kind}, {place}: {found['changed']:.2%} of "
                f"{now.numel()} weights have other bits, drift {found['drift']:.2g}; "
                f"{seconds:.0f} s",
                flush=True,
            )
            for what in ("changed", "drift"):
                yield dict(
                    benchmark="drift steps",
                    what=what,
                    variant=place,
                    type=kind,
                    elements=now.numel(),
                    horizon=10,
                    repeats=taken,
                    ratio=found[what],
                )


def blocks(rows: Sequence[Row]) -> dict[str, str]:
    """The tables of docs/perturbation.md, by the names of their places."""
    cycles = find(rows, benchmark="drift cycles")
    most = max(r.repeats for r in cycles)
    body = []
    for row in find(cycles, what="drift", repeats=most):
        columns = dict(type=row.type, variant=row.variant)
        cells = [
            _only(cycles, what=what, repeats=repeats, **columns)
            for repeats in (100, most)
            for what in ("drift", "mean")
        ]
        body.append((f"{row.type}, {row.variant}", *(f"{r.ratio:.2g}" for r in cells)))
    header = [f"{what} after {n:,}" for n in (100, most) for what in ("drift", "mean")]
    updates = find(rows, benchmark="drift update")
    steps = find(rows, benchmark="drift steps", what="changed")
    drift = find(rows, benchmark="drift steps", what="drift")
    return {
        "drift-cycles": markdown(("weights", *header), body),
        "drift-update": markdown(
            ("weights, rounding", "weights that changed", "followed"),
            [
                (
                    f"{r.type}, {r.variant}",
                    f"{r.ratio or 0:.1%}",
                    f"{_only(updates, what='followed', type=r.type, variant=r.variant).ratio:.2f}",
                )
                for r in find(updates, what="changed")
            ],
        ),
        "drift-steps": markdown(
            ("weights, perturbation", "steps", "weights with other bits", "drift"),
            [
                (
                    f"{r.type}, {r.variant}",
                    f"{r.repeats:,}",
                    f"{r.ratio or 0:.2%}",
                    f"{_only(drift, type=r.type, variant=r.variant).ratio:.2g}",
                )
                for r in steps
            ],
        ),
    }


def _only(rows: Iterable[Row], **wanted: object) -> Row:
    (row,) = find(rows, **wanted)
    return row


def plot(path: Path) -> None:
    """Drift over cycles, a line for each type and rounding."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = find(read_rows(path), benchmark="drift cycles", what="drift")
    colours = dict(zip(TYPES, ("#333333", "#c8553d", "#1b4f9c"), strict=True))
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind in TYPES:
        for rounding, style in (("nearest", "o-"), ("stochastic", "s--")):
            line = find(rows, type=kind, variant=f"in place, {rounding}")
            line = [r for r in line if r.ratio]
            if line:
                axis.plot(
                    [r.repeats for r in line],
                    [r.ratio for r in line],
                    style,
                    color=colours[kind],
                    markersize=4,
                    label=kind if kind == "float32" else f"{kind}, {rounding}",
                )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="cycles of +mu, -2 mu, +mu, and no update",
        ylabel="change of the weights, relative (RMS)",
        title=f"In place, weights N(0, 0.02), mu = {ZO_EPS}",
    )
    axis.grid(True, which="major", color="#eeeeee")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path.with_name("drift.png"), dpi=150, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds, for a first look")
    parser.add_argument("--steps", type=int, default=10_000, help="of the optimizer, at lr = 0")
    parser.add_argument("--output", type=Path, default=RESULTS / "drift.csv")
    parser.add_argument("--plot", action="store_true", help="draw the results that are there")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.output)
        return
    elements, steps, cycles = 1_000_000, arguments.steps, CYCLES
    if arguments.quick:
        elements, steps, cycles = 10_000, min(steps, 20), CYCLES[:5]
    where: dict[str, Any] = conditions() | {"threads": torch.get_num_threads()}
    made: list[Row] = []
    for part in (cycle_rows(elements, cycles), update_rows(elements), step_rows(steps)):
        made += [Row(**columns, reference="weights before", **where) for columns in part]
        write_rows(arguments.output, made)
    for row in made:
        if row.benchmark != "drift steps" and row.repeats in (1, cycles[-1], 100):
            print(
                f"{row.benchmark} {row.repeats}, {row.type}, {row.variant}: {row.what} "
                f"{row.ratio:.3g}"
            )
    plot(arguments.output)
    print(f"{len(made)} rows: {arguments.output.name}")


if __name__ == "__main__":
    main()
