"""A small network for images, built as timm builds its own: convolutions, BatchNorm, blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from adamezo import FZOO, AdaMeZO, MeZO
from adamezo.runlog import LogError, StepLog


class Block(nn.Module):
    """A depthwise and a pointwise convolution with BatchNorm, and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.depthwise(x)))
        return torch.relu(x + self.bn2(self.pointwise(y)))


class Net(nn.Module):
    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def make() -> Net:
    torch.manual_seed(0)
    return Net()


def images(seed: int, count: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes along rows, along columns, or noise, 8 x 8, with noise over all."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    stripes = torch.arange(8) % 2 * 2.0 - 1
    kinds = torch.stack([stripes[:, None].expand(8, 8), stripes.expand(8, 8), torch.zeros(8, 8)])
    noise = torch.randn(count, 8, 8, generator=generator)
    return (kinds[labels] + 0.5 * noise)[:, None], labels


def train(model: nn.Module, optimizer, steps: int) -> None:
    for step in range(steps):
        x, y = images(step)
        optimizer.step(lambda x=x, y=y: cross_entropy(model(x), y))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    x, y = images(10**6, 300)
    model.eval()
    return (model(x).argmax(1) == y).float().mean().item()


def test_it_learns_in_train_mode_and_its_statistics_serve_in_evaluation():
    model = make().train()
    optimizer = AdaMeZO.for_model(model, lr=2e-3, seed=1, betas=(0.9, 0.99))
    optimizer.module_buffers = "last"
    train(model, optimizer, 300)
    # One evaluation of each step moved them, and not both.
    assert {b.item() for n, b in model.named_buffers() if "batches" in n} == {300}
    assert accuracy(make()) < 0.5
    assert accuracy(model) > 0.8


@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
@pytest.mark.parametrize("method", [AdaMeZO, MeZO, FZOO])
def test_in_evaluation_mode_no_buffer_moves(method, perturbation):
    model = make().eval()
    before = {name: b.clone() for name, b in model.named_buffers()}
    weights = [p.detach().clone() for p in model.parameters()]
    train(model, method.for_model(model, lr=1e-2, seed=1, perturbation=perturbation), 2)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert not any(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_a_log_wants_the_statistics_to_rest(tmp_path):
    model = make().train()
    with pytest.raises(LogError, match="running statistics of stem.1.*eval"):
        StepLog.create(tmp_path / "steps.log", AdaMeZO.for_model(model, seed=1))
