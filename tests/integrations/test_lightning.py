"""Lightning: manual optimization, where a step gets its closure."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from adamezo import AdaMeZO

lightning = pytest.importorskip("lightning")

ROWS = torch.linspace(-1, 1, 96).view(16, 6)


def make_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def make_optimizer(model: nn.Module) -> AdaMeZO:
    return AdaMeZO.for_model(model, lr=0.1, seed=1)


class Tuned(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = make_model()

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        loss = optimizer.step(closure=lambda: self.model(batch).square().mean())
        self.log_dict({"loss": loss, "projected_grad": optimizer.optimizer.projected_grad})
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = make_optimizer(self.model)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)]


def fit(folder, epochs: int, checkpoint=None):
    module = Tuned()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(ROWS, batch_size=4), ckpt_path=checkpoint)
    return trainer, [p.detach().clone() for p in module.model.parameters()]


def test_a_run_has_the_bits_of_a_loop_by_hand(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
    for batch in [*ROWS.split(4), *ROWS.split(4)]:
        optimizer.step(lambda batch=batch: model(batch).square().mean())
        schedule.step()
    trainer, weights = fit(tmp_path, 2)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert trainer.callback_metrics["projected_grad"].item() == pytest.approx(
        optimizer.projected_grad, rel=1e-6  # which Lightning keeps in float32
    )  # fmt: skip
    assert trainer.global_step == 8


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    _, expected = fit(tmp_path / "whole", 2)
    trainer, _ = fit(tmp_path / "cut", 1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, weights = fit(tmp_path / "resumed", 2, tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
