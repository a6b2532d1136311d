"""Directions spread over ranks, alone and beside parts of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import adamezo
from adamezo import FZOO, HELENE, AdaMeZO, AdaZeta, MeZO
from adamezo.distributed import connect

METHODS = {
    AdaMeZO: {},  # one direction: its two sides on two ranks
    MeZO: {"queries": 5},
    FZOO: {"queries": 6},
    AdaZeta: {"queries": 4, "steps_per_epoch": 2, "exponent": 1.0},
    HELENE: {"curvature_every": 2},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.calls = 0

    def losses(self, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.stack([self.second(self.first(row).tanh()).square().mean() for row in rows])


def train(method, options, roles=None, steps=12):
    model = Model()
    optimizer = method.for_model(model, lr=1e-3, seed=3, **METHODS[method], **options)
    parts, mine = 1, 0
    if roles == "queries":
        size = (distributed.get_world_size(),)
        mesh = init_device_mesh("cpu", size, mesh_dim_names=("queries",))
        connect(optimizer, mesh, queries="queries", check_every=3)
    elif roles == "both":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "queries"))
        connect(optimizer, mesh, data="data", queries="queries", check_every=3)
        parts, mine = 2, mesh.get_coordinate()[0]
    calls = []
    for step in range(steps):
        rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).chunk(parts)[mine]
        before = model.calls
        optimizer.step(lambda rows=rows: adamezo.LossSum.of(model.losses(rows)))
        calls.append(model.calls - before)
    return [p.detach().clone() for p in model.parameters()], optimizer.losses, calls


PERTURBATIONS = [
    {"perturbation": "inplace"},
    {"perturbation": "out_of_place"},
    {"perturbation": "regenerated", "distribution": "lowrank"},
]


CASES = [(AdaMeZO, PERTURBATIONS[0]), (MeZO, PERTURBATIONS[1]), (FZOO, PERTURBATIONS[2])]
ALL = [(method, options) for method in METHODS for options in PERTURBATIONS]


@pytest.mark.parametrize(
    ("method", "options"),
    [pytest.param(*case, marks=[] if case in CASES else pytest.mark.slow) for case in ALL],
)
def test_queries_on_ranks_have_the_bits_of_one_process(pool, method, options):
    expected, last, all_calls = train(method, options)
    for roles, world in (("queries", 2), ("queries", 3), ("both", 4)):
        found = pool.run(world, train, method, options, roles)
        for weights, of_last, _ in found:
            assert all(map(torch.equal, weights, expected))
            assert of_last == last
        # Each evaluation was made once for each part of the batch.
        parts = 2 if roles == "both" else 1
        made = [sum(calls) for calls in zip(*(calls for *_, calls in found), strict=True)]
        assert made == [parts * calls for calls in all_calls]


def test_evaluations_are_spread_evenly(pool):
    found = pool.run(3, train, FZOO, {"perturbation": "out_of_place"}, "queries", 1)
    assert [calls for *_, calls in found] == [[2], [2], [3]]
