"""Do 16-bit weights follow a float32 run?

    python -m benchmarks.faithful                     12 runs; over an hour on two cores
    python -m benchmarks.faithful --steps 3           the same, shortened
    python -m benchmarks.faithful --only "bfloat16 exact" --seeds 0
    python -m benchmarks.faithful --plot              the picture again, from the results

The main job (docs/main_job.md) in float32, in bfloat16 perturbed in place with updates rounded to
nearest and stochastically, and in bfloat16 perturbed exactly; three seeds each, which decide the
directions and the order of the reviews. Results are written after every run, and a run that is
already there, with the same settings, is not made again. Writes benchmarks/results/faithful.csv and
draws its plot from it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, conditions, markdown

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "perturbation": "inplace"},
    "bfloat16 in place, nearest": {
        "dtype": "bfloat16",
        "perturbation": "inplace",
        "rounding": "nearest",
    },
    "bfloat16 in place, stochastic": {
        "dtype": "bfloat16",
        "perturbation": "inplace",
        "rounding": "stochastic",
    },
    "bfloat16 exact": {
        "dtype": "bfloat16",
        "perturbation": "exact",
        "rounding": "stochastic",
    },
}
LOSS, HELD_OUT, ACCURACY = "training loss", "held-out loss", "held-out accuracy"
COLOURS = dict(zip(VARIANTS, ("#333333", "#c8553d", "#e0a030", "#1b4f9c"), strict=True))


@dataclass(frozen=True)
class Point:
    """One number of one run. `what` is one of the three above, after `step` steps."""

    method: str
    variant: str
    seed: int
    steps: int
    lr: float
    held_out: int
    what: str
    step: int
    value: float
    seconds_per_step: float
    device: str = ""
    torch: str = ""
    adamezo: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    @property
    def run(self) -> tuple[object, ...]:
        return self.method, self.variant, self.seed, self.steps, self.lr, self.held_out


def write_points(path: Path, points: Iterable[Point]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f.name for f in fields(Point))
        for point in points:
            writer.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in astuple(point))


def read_points(path: Path) -> list[Point]:
    """The points of a file; none if it is not there. Other columns than Point's are an error."""
    if not path.exists():
        return []
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        expected = [f.name for f in fields(Point)]
        if reader.fieldnames != expected:
            raise ValueError(
                f"{path.name} has columns {reader.fieldnames}, expected {expected}: "
                "move it away and run the benchmark again"
            )
        return [
            Point(**{f.name: kinds[str(f.type)](record[f.name]) for f in fields(Point)})
            for record in reader
        ]


def points_of(report: dict[str, Any], columns: dict[str, Any]) -> list[Point]:
    """The points of a report of :func:`adamezo.finetune.finetune`."""
    seconds = report["training"]["seconds_per_step"]
    found = [(LOSS, point["step"], point["loss"]) for point in report["curve"]]
    for point in report["held_out_curve"]:
        found += [(HELD_OUT, point["step"], point["loss"])]
        found += [(ACCURACY, point["step"], point["accuracy"])]
    return [
        Point(what=what, step=step, value=value, seconds_per_step=seconds, **columns)
        for what, step, value in found
    ]


def values(points: Iterable[Point], variant: str, what: str) -> dict[int, dict[int, float]]:
    """By seed and step."""
    found: dict[int, dict[int, float]] = {}
    for point in points:
        if (point.variant, point.what) == (variant, what):
            found.setdefault(point.seed, {})[point.step] = point.value
    return found


def plot(path: Path, points: Sequence[Point]) -> None:
    """Training and held-out losses, and how far each run is from float32 with the same seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    reference = values(points, "float32", HELD_OUT)
    for variant, colour in COLOURS.items():
        for curve in values(points, variant, LOSS).values():
            steps = sorted(curve)
            recent = [
                statistics.mean(curve[s] for s in steps[max(0, i - 9) : i + 1])
                for i in range(len(steps))
            ]
            left.plot(steps, recent, color=colour, alpha=0.25, linewidth=1)
        held_out = values(points, variant, HELD_OUT)
        _band(left, held_out, colour, variant)
        if variant != "float32":
            apart = {
                seed: {s: v - reference[seed][s] for s, v in curve.items() if s in reference[seed]}
                for seed, curve in held_out.items()
                if seed in reference
            }
            _band(right, apart, colour, variant)
    left.set(xlabel="step", ylabel="loss; pale: training batches, mean of ten", title="held-out")
    right.set(xlabel="step", title="held-out loss over that of float32, same seed")
    right.axhline(0, color=COLOURS["float32"], linewidth=1)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
    plt.close(figure)


def plot_lines(path: Path, points: Sequence[Point], whats: Sequence[str]) -> None:
    """A panel for each of `whats`, a line for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(whats), figsize=(10, 4), layout="constrained")
    for axis, what in zip(axes, whats, strict=True):
        for variant in dict.fromkeys(point.variant for point in points):
            colour = COLOURS.get(variant, "#6a9a3a")
            _band(axis, values(points, variant, what), colour, variant)
        axis.set(xlabel="step", title=what)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
    plt.close(figure)


def _band(axis: Any, curves: dict[int, dict[int, float]], colour: str, label: str) -> None:
    """The mean over seeds, and a band from the lowest to the highest."""
    if not curves:
        return
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    columns = [[curve[s] for curve in curves.values()] for s in steps]
    axis.plot(steps, [statistics.mean(c) for c in columns], "o-", color=colour, label=label)
    axis.fill_between(
        steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.12
    )


def block(path: Path) -> str:
    """The table and the picture of docs/perturbation.md, or that there are none yet."""
    points = longest(read_points(path))
    if not points:
        return "Not measured yet."
    header = ("", "seeds", "held-out loss", "accuracy", "loss over float32's")
    head = (
        f"{points[0].steps} steps, lr = {points[0].lr:g}; mean and standard deviation over seeds."
    )
    picture = f"![loss over steps](../benchmarks/results/{path.with_suffix('.png').name})"
    return "\n\n".join([head, markdown(header, table(points)), picture])


def longest(points: Sequence[Point]) -> list[Point]:
    """Those of the runs with the most steps."""
    most = max((p.steps for p in points), default=0)
    return [p for p in points if p.steps == most]


def table(points: Sequence[Point]) -> list[list[str]]:
    """variant, seeds, held-out loss and accuracy at the end (mean and standard deviation), the mean
    distance of the loss from float32's with the same seed."""
    body = []
    reference = values(points, "float32", HELD_OUT)
    for variant in VARIANTS:
        losses = {s: c[max(c)] for s, c in values(points, variant, HELD_OUT).items()}
        if not losses:
            continue
        accuracies = [c[max(c)] for c in values(points, variant, ACCURACY).values()]
        pairs = [v - reference[s][max(reference[s])] for s, v in losses.items() if s in reference]
        body.append(
            [
                variant,
                str(len(losses)),
                _spread(list(losses.values())),
                _spread(accuracies),
                _spread(pairs) if pairs and variant != "float32" else "",
            ]
        )
    return body


def _spread(numbers: Sequence[float]) -> str:
    mean = f"{statistics.mean(numbers):.3f}"
    return mean + (f" +- {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", default="adamezo", help="of examples/demo.py")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, help="other than the demo's")
    parser.add_argument("--held-out", type=int, help="reviews to score, other than the demo's 600")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--again", action="store_true", help="make runs that are there anew")
    parser.add_argument("--output", type=Path, default=RESULTS / "faithful.csv")
    parser.add_argument("--plot", action="store_true", help="draw the results that are there")
    arguments = parser.parse_args()
    points = read_points(arguments.output)
    if not arguments.plot:
        points = run(arguments, points)
    shown = longest(points)
    for line in table(shown):
        print("  ".join(line))
    plot(arguments.output, shown)


def run(arguments: argparse.Namespace, points: list[Point]) -> list[Point]:
    from adamezo.finetune import finetune
    from examples.demo import options

    where = conditions()
    where = {name: value for name, value in where.items() if name in Point.__annotations__}
    # Seed by seed, so that what is cut off leaves whole comparisons.
    for seed in arguments.seeds:
        for variant in arguments.only:
            changed = {} if arguments.lr is None else {"lr": arguments.lr}
            if arguments.held_out is not None:
                changed["held_out"] = arguments.held_out
            settings = options(
                arguments.method,
                seed=seed,
                steps=arguments.steps,
                eval_every=max(1, arguments.steps // 4),
                show=0,
                **VARIANTS[variant],
                **changed,
            )
            chosen = dict(
                method=arguments.method,
                variant=variant,
                seed=seed,
                steps=settings.steps,
                lr=settings.lr,
                held_out=settings.held_out,
            )
            key = tuple(chosen.values())
            if not arguments.again and any(p.run == key for p in points):
                print(f"{variant}, seed {seed}: there already", flush=True)
                continue
            made = points_of(finetune(settings), chosen | where)
            points = [p for p in points if p.run != key] + made
            write_points(arguments.output, points)
            ends = {p.what: p.value for p in made}
            print(
                f"{variant}, seed {seed}: held-out loss {ends[HELD_OUT]:.4f}, accuracy "
                f"{ends[ACCURACY]:.4f}, {made[0].seconds_per_step:.2f} s a step",
                flush=True,
            )
    return points


if __name__ == "__main__":
    main()
