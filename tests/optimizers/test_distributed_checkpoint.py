"""torch.distributed.checkpoint, in a single process: a run of any method goes on with its bits.

torch makes the state of a fresh optimizer by a ``step()`` without a closure at lr 0, and then loads
into the tensors that it finds there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as states

from adamezo import (
    FZOO,
    HELENE,
    MEAZO,
    AdaMeZO,
    AdaZeta,
    HiZOO,
    MeZO,
    ScalarAdaMeZO,
    ZOAdam,
    ZOAdaMU,
)
from adamezo.engine.optimizer import ZerothOrder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

METHODS = {
    AdaMeZO: {},
    ScalarAdaMeZO: {},
    MeZO: {"queries": 2},
    MEAZO: {},
    FZOO: {"queries": 2},
    AdaZeta: {"steps_per_epoch": 2, "exponent": 0.5},
    HiZOO: {"alpha": 0.1},
    HELENE: {"curvature_every": 2},
    ZOAdam: {},
    ZOAdaMU: {"warmup": 1, "anneal": 4},
}
INPUTS = torch.linspace(-1, 1, 18).view(3, 6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 4)

    def loss(self) -> torch.Tensor:
        return self.second(self.first(INPUTS)).square().mean()


def plain(model: Model) -> list[dict]:
    return [{"params": list(model.named_parameters())}]


def several_groups(model: Model) -> list[dict]:
    return [
        {"params": list(model.first.named_parameters("first")), "lr": 2e-3},
        {"params": list(model.second.named_parameters("second")), "weight_decay": 0.1},
    ]


def frozen(model: Model) -> list[dict]:
    model.first.weight.requires_grad_(False)
    return several_groups(model)


def empty_group(model: Model) -> list[dict]:
    return [{"params": list(model.parameters())}, {"params": []}]


GROUPS = [plain, several_groups, frozen, empty_group]


def make(method: type[ZerothOrder], groups) -> tuple[Model, ZerothOrder]:
    model = Model()
    return model, method(groups(model), lr=1e-3, seed=3, **METHODS[method])


def train(model: Model, optimizer: ZerothOrder, steps: int) -> None:
    for _ in range(steps):
        optimizer.step(model.loss)


def weights(model: Model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def through_torch(first, second, folder, flatten: bool) -> None:
    options = states.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model_state, optimizer_state = states.get_state_dict(*first, options=options)
    saved = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.save(saved, checkpoint_id=folder, no_dist=True)
    model_state, optimizer_state = states.get_state_dict(*second, options=options)
    loaded = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(loaded, checkpoint_id=folder, no_dist=True)
    states.set_state_dict(
        *second,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )


def raw(first, second, folder, flatten: bool) -> None:
    """The state_dicts themselves; the optimizer makes its state as torch would have it do."""
    saved = {"model": first[0].state_dict(), "optimizer": first[1].state_dict()}
    checkpoint.save(saved, checkpoint_id=folder, no_dist=True)
    second[1].step()
    loaded = {"model": second[0].state_dict(), "optimizer": second[1].state_dict()}
    checkpoint.load(loaded, checkpoint_id=folder, no_dist=True)
    second[0].load_state_dict(loaded["model"])
    second[1].load_state_dict(loaded["optimizer"])


WAYS = ["torch's", "torch's, flat", "raw"]
CASES = [(way, groups) for way in WAYS for groups in GROUPS]
CASES.remove(("torch's, flat", empty_group))  # see below


@pytest.mark.parametrize(("way", "groups"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on(method, way, groups, tmp_path):
    whole = make(method, groups)
    train(*whole, 6)
    first = make(method, groups)
    train(*first, 3)
    second = make(method, groups)
    with torch.no_grad():
        for p in second[0].parameters():
            p.zero_()
    move = raw if way == "raw" else through_torch
    move(first, second, tmp_path, way == "torch's, flat")
    train(*second, 3)
    assert all(map(torch.equal, weights(second[0]), weights(whole[0])))
    assert not all(map(torch.equal, weights(second[0]), weights(first[0])))


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_before_the_first_step(method, tmp_path):
    whole = make(method, plain)
    train(*whole, 3)
    first, second = make(method, plain), make(method, plain)
    through_torch(first, second, tmp_path, False)
    train(*second, 3)
    assert all(map(torch.equal, weights(second[0]), weights(whole[0])))


@pytest.mark.parametrize("method", METHODS)
def test_step_without_a_closure_changes_no_weight(method):
    model, optimizer = make(method, frozen)
    before = weights(model)
    optimizer.step()
    assert all(map(torch.equal, weights(model), before))
    trained = {p for p in model.parameters() if p.requires_grad}
    assert set(optimizer.state) == (trained if getattr(method, "buffers", None) else set())
    assert all(group["steps"] == 0 for group in optimizer.param_groups)


def test_torch_cannot_flatten_a_group_without_parameters():
    """Of its own optimizers neither, as it names a group by its first parameter."""
    options = states.StateDictOptions(flatten_optimizer_state_dict=True)
    for method in (torch.optim.AdamW, AdaMeZO):
        model = Model()
        optimizer = method(empty_group(model), lr=1e-3)
        state = states.get_optimizer_state_dict(model, optimizer, options=options)
        with pytest.raises(IndexError):
            states.set_optimizer_state_dict(model, optimizer, state, options=options)
