"""The three toy functions of the AdaMeZO paper (its Figure 3): trajectories over contours.

    python -m examples.toy_functions            # writes examples/results/toy_functions.png

On the left as published: directions take turns between two, torch's ``randn(2)`` of seeds 0 and 1,
and are given to the rule that the kernels are tested against. Beside them this package's methods as
anyone uses them, along directions of their own: those that keep nothing for each weight, and those
that do. Adam, by backpropagation, is everywhere. FZOO has normals
for its directions: of four sign vectors in two dimensions often all lie on one line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adamezo import (
    FZOO,
    HELENE,
    MEAZO,
    AdaMeZO,
    HiZOO,
    MeZO,
    ScalarAdaMeZO,
    ZOAdam,
    ZOAdaMU,
)
from adamezo.plots import PALETTE, figure, save
from adamezo_kernels.backends.reference import apply_perturbation, apply_update

RESULT = Path(__file__).parent / "results" / "toy_functions.png"
ZO_EPS, HORIZON, BETAS, EPS = 1e-3, 20, (0.7, 0.9), 1e-8
ADAM_LR = 0.01


class Toy(NamedTuple):
    """A function of two numbers, and how the paper walks on it."""

    function: Callable[[Any, Any], Any]
    start: tuple[float, float]
    steps: int
    lr: float
    """Of the zeroth-order methods."""
    window: tuple[float, float, float, float]
    """Of the drawing: x from and to, y from and to."""


def quartic(x: Any, y: Any) -> Any:
    return 8 * (x - 1) ** 2 * (1.3 * x**2 + 2 * x + 1) + 0.5 * (y - 4) ** 2


def beale(x: Any, y: Any) -> Any:
    terms = (1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3)
    return sum(term**2 for term in terms) + 1e-3


def valley(x: Any, y: Any) -> Any:
    return 100 * x**2 + y**2


TOYS = {
    "quartic": Toy(quartic, (0.25, 6.75), 600, 0.01, (-0.6, 1.8, 3.5, 7.2)),
    "Beale": Toy(beale, (-1.0, -1.0), 2500, 0.002, (-2.0, 4.0, -1.8, 1.5)),
    "valley": Toy(valley, (-1.0, 1.0), 500, 0.002, (-1.3, 1.3, -1.3, 1.3)),
}


def value(toy: Toy, theta: Tensor) -> float:
    x, y = theta
    return float(toy.function(x, y))


def length(path: Tensor) -> float:
    """Of a path of shape (steps + 1, 2)."""
    return path.double().diff(dim=0).norm(dim=1).sum().item()


# --- as published ---------------------------------------------------------------------------------


def published(toy: Toy, method: str, horizon: int = HORIZON) -> Tensor:
    """The path of "MeZO" or "AdaMeZO", of shape (steps + 1, 2), float32.

    AdaMeZO's sums are not scaled by 1 - beta, and its first ``horizon`` + 1 steps are MeZO's.
    """
    both = [torch.randn(2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    theta, grads, path = torch.tensor(toy.start), [], [torch.tensor(toy.start)]
    for t in range(toy.steps):
        z = both[t % 2]
        plus = apply_perturbation(theta, z, ZO_EPS)
        minus = apply_perturbation(plus, z, -2 * ZO_EPS)
        grads = [(value(toy, plus) - value(toy, minus)) / (2 * ZO_EPS), *grads][:horizon]
        first, second = grads[:1], None
        if method == "AdaMeZO" and t > horizon:
            first = [BETAS[0] ** k * p for k, p in enumerate(grads)]
            second = [BETAS[1] ** k * p * p for k, p in enumerate(grads)]
        theta = apply_update(
            minus,
            [both[(t - k) % 2] for k in range(len(first))],
            first,
            second,
            lr=toy.lr,
            eps=EPS,
            decay=1.0,
            restore=ZO_EPS,
        )
        path.append(theta)
    return torch.stack(path)


def adam(toy: Toy) -> Tensor:
    """The path of torch's own Adam, with its default betas."""
    theta = nn.Parameter(torch.tensor(toy.start))
    optimizer = torch.optim.Adam([theta], lr=ADAM_LR)
    path = [theta.detach().clone()]
    for _ in range(toy.steps):
        optimizer.zero_grad()
        toy.function(*theta).backward()
        optimizer.step()
        path.append(theta.detach().clone())
    return torch.stack(path)


# --- the methods of this package ------------------------------------------------------------------

Make = Callable[[Sequence[nn.Parameter], float], Any]

_LONG = {"horizon": HORIZON, "normalization": "bias_corrected"}
MEMORYLESS: dict[str, Make] = {
    "MeZO": lambda p, lr: MeZO(p, lr, seed=0),
    "MeZO, 4 directions": lambda p, lr: MeZO(p, lr, queries=4, seed=0),
    "momentum": lambda p, lr: AdaMeZO(p, lr, betas=(0.7, 0.0), seed=0, **_LONG),
    "AdaMeZO": lambda p, lr: AdaMeZO(p, lr, seed=0, **_LONG),
    "ScalarAdaMeZO": lambda p, lr: ScalarAdaMeZO(p, lr, seed=0, **_LONG),
    "MEAZO": lambda p, lr: MEAZO(p, lr, seed=0),
    "FZOO": lambda p, lr: FZOO(
        p, lr * ZO_EPS, queries=4, zo_eps=ZO_EPS, distribution="exact", seed=0
    ),
}
BUFFERED: dict[str, Make] = {
    "ZOAdam": lambda p, lr: ZOAdam(p, lr, betas=BETAS, seed=0),
    "HiZOO": lambda p, lr: HiZOO(p, lr, alpha=1e-3, seed=0),
    "HELENE": lambda p, lr: HELENE(p, lr, clip=1.0, curvature_every=1, seed=0),
    "ZOAdaMU": lambda p, lr: ZOAdaMU(p, lr / 10, warmup=0, anneal=100, seed=0),
}
FAMILY = MEMORYLESS | BUFFERED


def family(toy: Toy, method: str) -> Tensor:
    """The path of one of FAMILY, of shape (steps + 1, 2), float32."""
    theta = nn.Parameter(torch.tensor(toy.start))
    optimizer = FAMILY[method]([theta], toy.lr)
    path = [theta.detach().clone()]
    for _ in range(toy.steps):
        optimizer.step(lambda: toy.function(*theta))
        path.append(theta.detach().clone())
    return torch.stack(path)


SIDES = ("as published", "nothing for each weight", "one or two numbers for each")


def draw(paths: dict[tuple[str, str], dict[str, Tensor]], out: Path) -> None:
    """Paths by (toy, side), over contours of equal ratio."""
    made, axes = figure(len(SIDES), width=4.6, height=4, rows=len(TOYS))
    panels = iter(axes)
    colours = {"Adam": PALETTE[-1], **dict(zip(FAMILY, cycle(PALETTE[:-1]), strict=False))}
    for name, toy in TOYS.items():
        x, y = torch.meshgrid(
            torch.linspace(*toy.window[:2], 200),
            torch.linspace(*toy.window[2:], 200),
            indexing="xy",
        )
        heights = toy.function(x, y).clamp(min=1e-3).log10()
        for side in SIDES:
            axis = next(panels)
            axis.contour(x, y, heights, levels=20, colors="0.85", linewidths=0.6)
            for method, path in paths[name, side].items():
                colour = colours[method]
                axis.plot(*path.T, color=colour, linewidth=1, label=method)
                axis.plot(*path[-1], "o", color=colour, markersize=4)
            axis.set(title=f"{name}, {side}", xlim=toy.window[:2], ylim=toy.window[2:])
            axis.legend(fontsize=7)
    out.parent.mkdir(exist_ok=True)
    save(made, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="the drawing (%(default)s)")
    out = parser.parse_args().out
    paths = {}
    print(f"{'':42}path length  last value")
    for name, toy in TOYS.items():
        by_adam = {"Adam": adam(toy)}
        as_published = {method: published(toy, method) for method in ("MeZO", "AdaMeZO")}
        paths[name, SIDES[0]] = by_adam | as_published
        for side, methods in ((SIDES[1], MEMORYLESS), (SIDES[2], BUFFERED)):
            paths[name, side] = by_adam | {method: family(toy, method) for method in methods}
        for side in SIDES:
            for method, path in paths[name, side].items():
                head = f"{name}, {side}, {method}"
                print(f"{head:<52} {length(path):8.4f}  {value(toy, path[-1]):.4g}")
    draw(paths, out)


if __name__ == "__main__":
    main()
