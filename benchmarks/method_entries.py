"""The methods that benchmarks/methods.py compares, and the kinds of directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

import adamezo

if TYPE_CHECKING:
    from benchmarks.method_jobs import Job, Start


def _adazeta(job: Job) -> dict[str, Any]:
    """The published schedule over six epochs, in which it has 1, 1, 2, 5, 9 and 14 directions: 64
    forward passes for each step of an epoch. A run sees too few epochs of the data for it."""
    exponent = math.log(20 / 0.85) / math.log(6)
    return {"steps_per_epoch": max(1, job.budget // 64), "exponent": exponent}


def _zo_adamu(job: Job) -> dict[str, Any]:
    """The published schedule, of runs of 20,000 steps, over those of a run here."""
    steps = job.budget // 2
    return {"warmup": steps * 1024 // 20_000, "anneal": steps * 16_000 // 20_000}


@dataclass(frozen=True)
class Entry:
    """A method as it is compared."""

    name: str
    lr: dict[str, float]
    """The centre of the grid in each mode, or in a mode of one job."""
    of: str = ""
    """The class in `adamezo`, or with `backward` in torch.optim; if it is not the name."""
    options: Callable[[Job], dict[str, Any]] = lambda job: {}
    """Other than the defaults."""
    forwards: int = 2
    """Forward passes a step, a backward pass counted as two; 0 where they change."""
    backward: bool = False
    in_batches: bool = False
    """Whether a step is one forward of a batch as many times as large, which counts as so many."""
    constant: bool = False
    """Whether lr stays what it is, and does not fall linearly to 0."""

    def make(self, job: Job, start: Start, lr: float, seed: int) -> Any:
        options = {"lr": lr, **self.options(job)}
        if self.backward:
            return getattr(torch.optim, self.of or self.name)(start.weights, **options)
        made = getattr(adamezo, self.of or self.name)
        return made(start.weights, seed=seed, model=start.module, **options)

    def varied(self, suffix: str, scale: float = 1.0, **options: Any) -> Entry:
        """The same with other options, and with lrs that are ``scale`` times as high."""
        return replace(
            self,
            name=f"{self.name}, {suffix}",
            of=self.of or self.name,
            lr={mode: centre * scale for mode, centre in self.lr.items()},
            options=lambda job: {**self.options(job), **options},
        )

    def along(self, distribution: str) -> Entry:
        """The same with directions of another kind."""
        return self.varied(distribution, distribution=distribution)


def _rates(full: float, lora: float, main_full: float) -> dict[str, float]:
    centres = {"full": full, "lora": lora, "tensor-train": lora, "main full": main_full}
    of_bert = {"tweets lora": lora / 10**0.5, "reviews lora": lora / 10**0.5}
    return centres | {"main tensor-train": lora / 10} | of_bert


ENTRIES = [
    Entry("MeZO", _rates(1e-3, 1e-2, 1e-4)),
    Entry("MeZO, n = 4", _rates(1e-3, 1e-2, 1e-4), "MeZO", lambda job: {"queries": 4}, 8),
    Entry("AdaZeta", _rates(1e-3, 1e-2, 1e-4), options=_adazeta, forwards=0),
    Entry("momentum", _rates(1e-3, 1e-2, 1e-4), "AdaMeZO", lambda job: {"betas": (0.7, 0.0)}),
    Entry("AdaMeZO", _rates(1e-3, 1e-2, 1e-3)),
    Entry("ScalarAdaMeZO", _rates(1e-3, 1e-2, 1e-3)),
    Entry("MEAZO", _rates(1e-3, 1e-2, 1e-3)),
    Entry("FZOO", _rates(1e-6, 1e-5, 1e-7), forwards=9),
    Entry(
        "GRZO",
        _rates(1e-5, 1e-4, 1e-6),
        options=lambda job: {"examples": job.batch, "perturbation": "regenerated"},
        in_batches=True,
    ),
    Entry("HiZOO", _rates(1e-3, 1e-2, 1e-4), forwards=3),
    Entry("HELENE", _rates(1e-3, 1e-2, 1e-4), options=lambda job: {"batch_size": job.batch}),
    Entry("ZOAdaMU", _rates(1e-3, 1e-2, 1e-4), options=_zo_adamu),
    Entry("ZOAdam", _rates(1e-3, 1e-2, 1e-3)),
    Entry(
        "AdamW, by backpropagation", _rates(1e-4, 1e-3, 1e-5), "AdamW", forwards=3, backward=True
    ),
    Entry("SGD, by backpropagation", _rates(1e-2, 1e-1, 1e-3), "SGD", forwards=3, backward=True),
]
DISTRIBUTIONS = ("exact", "lowrank", "lowrank:4", "rademacher")
USUAL = {"MeZO": "exact", "AdaMeZO": "exact", "FZOO": "rademacher"}
"""Methods that are compared with every kind of directions, and the kind of their entry above."""
BY_DIRECTIONS = {
    (entry.name, kind): entry if kind == USUAL[entry.name] else entry.along(kind)
    for entry in ENTRIES
    for kind in DISTRIBUTIONS
    if entry.name in USUAL
}
