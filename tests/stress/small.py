"""The small run that is attacked, and what has to hold after each attack."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamezo import AdaMeZO
from adamezo.engine.optimizer import ZerothOrder
from adamezo.runlog import optimizer_for, read, replay
from adamezo_kernels import PhiloxState, sample_

ROOT = Path(__file__).parent.parent.parent
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The largest relative error of one store to the type, to nearest."""


def expect(condition: object, message: object) -> None:
    if not condition:
        raise SystemExit(f"attack: {message}")


class Small(nn.Module):
    """A few kinds of modules, in two types."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.norm = nn.LayerNorm(12)
        self.middle = nn.Linear(12, 33, dtype=torch.bfloat16)
        self.act = nn.GELU()
        self.out = nn.Linear(33, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.act(self.middle(self.norm(self.embed(tokens)).bfloat16()))
        return self.out(hidden.float())


TOKENS = torch.arange(40).view(8, 5) % 20
OPTIONS: dict[str, Any] = {
    "lr": 1e-3,
    "zo_eps": 1e-2,
    "horizon": 4,
    "seed": 7,
    "max_skipped": 10**9,
}


def small() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model(TOKENS).square().mean()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(x, y) and torch.equal(x.signbit(), y.signbit())
        for x, y in zip(a, b, strict=True)
    )


def history(optimizer: ZerothOrder) -> list[dict[str, Any]]:
    names = [*optimizer.history, "steps", "next_direction"]
    return [copy.deepcopy({name: g[name] for name in names}) for g in optimizer.param_groups]


def came_back(
    before: Sequence[Tensor], after: Sequence[Tensor], direction: int, exact: bool
) -> bool:
    """Whether weights are where they were: to the bit, or within three stores to nearest and one
    of twice that error (stochastic), as they were perturbed in place. Numbers stored are at most
    |theta| + zo_eps |z|; the last 1 % is for the products of errors."""
    if exact:
        return same_bits(before, after)
    for index, (x, y) in enumerate(zip(before, after, strict=True)):
        z = sample_(
            torch.empty(x.numel()), PhiloxState(OPTIONS["seed"], direction), parameter=index
        )
        reach = x.double().abs() + OPTIONS["zo_eps"] * z.double().abs().view(x.shape)
        if ((x.double() - y.double()).abs() > 4.04 * UNIT[x.dtype] * reach).any():
            return False
    return True


def make_optimizer(model: nn.Module, exact: bool) -> AdaMeZO:
    options = {**OPTIONS, "perturbation": "exact" if exact else "inplace"}
    return AdaMeZO(model.named_parameters(), model=model, **options)


def check_log(path: Path, model: nn.Module) -> None:
    """The log alone gives the model's weights, to the bit, from those of :func:`small`."""
    log, base = read(path), dict(small().named_parameters())
    tensors = {name: p.detach() for name, p in base.items()}
    replay(log, optimizer_for(log.header, tensors))
    expect(same_bits(list(tensors.values()), values(model)), "the replay has other bits")
