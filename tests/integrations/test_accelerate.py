"""accelerate: prepared optimizers, and their steps, checkpoints and schedules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adamezo import AdaMeZO
from adamezo.integrations.accelerate import unwrapped

accelerate = pytest.importorskip("accelerate")

ROWS = torch.linspace(-1, 1, 96).view(16, 6)


def make_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def make(model: nn.Module):
    optimizer = AdaMeZO.for_model(model, lr=0.1, seed=1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
    return optimizer, schedule, torch.utils.data.DataLoader(ROWS, batch_size=4)


def train(model, optimizer, schedule, loader, steps=8):
    for batch in [*loader, *loader][:steps]:
        optimizer.step(lambda batch=batch: model(batch).square().mean())
        schedule.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture
def accelerator():
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_the_step_of_a_prepared_optimizer_tells_nothing(accelerator):
    model = make_model()
    optimizer, *_ = make(model)
    prepared = accelerator.prepare(optimizer)
    assert prepared.step(lambda: model(ROWS).square().mean()) is None
    assert not hasattr(prepared, "projected_grad")
    assert unwrapped(prepared) is unwrapped(optimizer) is optimizer
    assert unwrapped(prepared).step(lambda: model(ROWS).square().mean()).item() > 0
    assert optimizer.projected_grad != 0
    with pytest.raises(TypeError, match="expected an optimizer of adamezo.*got SGD"):
        unwrapped(torch.optim.SGD(model.parameters()))


def test_the_documented_loop_has_the_bits_of_one_without_accelerate(accelerator, tmp_path):
    expected = train(plain := make_model(), *make(plain))
    model = make_model()
    optimizer, schedule, loader = make(model)
    model = accelerator.prepare_model(model, evaluation_mode=True)  # no DistributedDataParallel
    optimizer, schedule, loader = accelerator.prepare(optimizer, schedule, loader)
    got = train(model, unwrapped(optimizer), schedule, loader, steps=8)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_saved_state_goes_on_bit_for_bit(accelerator, tmp_path):
    expected = train(plain := make_model(), *make(plain))
    for resumed in (False, True):
        model = make_model()
        optimizer, schedule, loader = make(model)
        prepared = accelerator.prepare(model, optimizer, schedule, loader)
        model, optimizer, schedule, loader = prepared
        if resumed:
            accelerator.load_state(tmp_path / "state")
        got = train(model, unwrapped(optimizer), schedule, loader, steps=4)
        if not resumed:
            accelerator.save_state(tmp_path / "state")
            accelerator.free_memory()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_bf16_of_accelerate(accelerator):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    mixed = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, types = make_model(), set()
    model[0].register_forward_hook(lambda module, args, output: types.add(output.dtype))
    optimizer, *_ = make(model)
    model = mixed.prepare_model(model, evaluation_mode=True)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(lambda: model(ROWS).square().mean())
    assert types == {torch.bfloat16}
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
