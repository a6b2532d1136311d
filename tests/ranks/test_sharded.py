"""Models in pieces (fully_shard, tensor parallel, both) on real process groups."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import adamezo
from adamezo import HELENE, AdaMeZO, MeZO, ZOAdam
from adamezo.distributed import connect
from adamezo.engine.sharded import local, shard_of, whole
from adamezo.runlog import StepLog, optimizer_for, read, replay

SAMPLES = 4


class Model(nn.Module):
    """Sizes that no world divides, a vector shorter than any, and weights of the root's own."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.scale = nn.Parameter(torch.ones(1))
        self.first = nn.Linear(6, hidden)
        self.second = nn.Linear(hidden, 3)
        self.third = nn.Linear(3, 6, bias=False)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(row).tanh()).tanh()
        return self.third(hidden * self.scale).square().mean()


def inputs(step: int) -> torch.Tensor:
    return torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(step))


def shard_fsdp(model, mesh, **more):
    for module in (model.first, model.second, model.third):
        fully_shard(module, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def shard_tp(model, mesh):
    return parallelize_module(
        model, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()}
    )


def sharded(kind: str, hidden: int = 7):
    """(model, arguments of connect, parts of the batch, this rank's part)"""
    world = distributed.get_world_size()
    model = Model(hidden)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
        shard_fsdp(model, mesh)
        return model, (mesh,), {}, world, distributed.get_rank()
    if kind == "tp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        shard_tp(model, mesh)
        return model, (mesh,), {"model": "tp"}, 1, 0
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    shard_tp(model, mesh["tp"])
    shard_fsdp(model, mesh["dp"])
    return model, (mesh,), {"data": "dp", "model": "tp"}, world // 2, mesh.get_coordinate()[0]


def losses(model, rows):
    """Of each sample. Modules of fully_shard gather their weights at every call."""
    return torch.stack([model(row) for row in rows])


def train(model, optimizer, steps, parts=1, mine=0, first=0):
    for step in range(first, first + steps):
        rows = inputs(step).chunk(parts)[mine]
        optimizer.step(lambda rows=rows: adamezo.LossSum.of(losses(model, rows)))


def gathered(model) -> list[torch.Tensor]:
    return [whole(p).detach().clone() for p in model.parameters()]


def make(method, model, options):
    return method.for_model(model, **{"lr": 1e-2, "seed": 3, **options})


def run(kind, method, options, steps):
    # The layers of tensor parallel want sizes that the mesh divides; its placements do not.
    model, where, roles, parts, mine = sharded(kind, 7 if kind == "fsdp" else 8)
    optimizer = make(method, model, options)
    connect(optimizer, *where, **roles, check_every=5)
    train(model, optimizer, steps, parts, mine)
    adamezo.engine.sharded.reshard(model)
    return gathered(model), optimizer.losses, [g["steps"] for g in optimizer.param_groups]


def alone(method, options, steps, hidden=7):
    model = Model(hidden)
    optimizer = make(method, model, options)
    train(model, optimizer, steps)
    return [p.detach() for p in model.parameters()], optimizer.losses


CASES = [
    (AdaMeZO, {"perturbation": "inplace"}),
    (AdaMeZO, {"perturbation": "out_of_place"}),
    (AdaMeZO, {"distribution": "lowrank:2"}),
    (MeZO, {"queries": 2, "distribution": "rademacher"}),
    (ZOAdam, {}),
    (HELENE, {"curvature_every": 2, "perturbation": "out_of_place"}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_fully_shard_has_the_bits_of_one_process(pool, method, options):
    """Gathered weights are whole ones, and a sample's loss has the same bits."""
    steps = 50 if options == CASES[0][1] else 6
    expected, last = alone(method, options, steps)
    for world in (2, 4):
        for weights, of_last, at in pool.run(world, run, "fsdp", method, options, steps):
            assert all(map(torch.equal, weights, expected))
            assert of_last == last
            assert at == [steps]


# ---- directions --------------------------------------------------------------------------------


def one_step(kind, distribution):
    """The weights after a step from 0 along +z: losses +1 and -1 make p = 1."""
    model, where, roles, *_ = (Model(), None, None, 1, 0) if kind == "alone" else sharded(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = make(MeZO, model, {"distribution": distribution, "zo_eps": 1.0, "lr": 1.0})
    if kind != "alone":
        connect(optimizer, *where, **roles)
    numbers = iter([1.0, -1.0])
    optimizer.step(lambda: next(numbers))
    return gathered(model)


@pytest.mark.parametrize("distribution", ["exact", "rademacher", "lowrank", "lowrank:3"])
@pytest.mark.parametrize(("kind", "world"), [("fsdp", 4), ("tp", 2), ("tp", 4), ("2d", 4)])
def test_directions_are_those_of_one_process(pool, kind, world, distribution):
    expected = one_step("alone", distribution)
    assert all(w.count_nonzero() == w.numel() for w in expected)
    for weights in pool.run(world, one_step, kind, distribution):
        assert all(map(torch.equal, weights, expected))


# ---- tensor parallel ---------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
def test_fully_shard_over_tensor_parallel_has_the_bits_of_tensor_parallel(pool, perturbation):
    """Both sum the same two partial products."""
    options, steps = {"perturbation": perturbation}, 50
    expected, last, _ = pool.run(2, run, "tp", AdaMeZO, options, steps)[0]
    for weights, of_last, _ in pool.run(4, run, "2d", AdaMeZO, options, steps):
        assert all(map(torch.equal, weights, expected))
        assert of_last == last


def test_tensor_parallel_measures_other_losses_by_rounding_alone(pool):
    """At the first step, where weights and directions are those of one process."""
    _, expected = alone(AdaMeZO, {}, 1, hidden=8)
    for kind, world in (("tp", 2), ("2d", 4)):
        for _, found, _ in pool.run(world, run, kind, AdaMeZO, {}, 1):
            for here, there in zip(found, expected, strict=True):
                # Sums of eight float32 products, in another order, through two layers.
                assert abs(here - there) < 2.0**-20 * there


def logged(path):
    model, where, roles, parts, mine = sharded("2d", 8)
    optimizer = make(AdaMeZO, model, {})
    connect(optimizer, *where, **roles)
    with StepLog.open(path, optimizer):
        train(model, optimizer, 6, parts, mine)
    adamezo.engine.sharded.reshard(model)
    return gathered(model)


def test_a_log_gives_the_weights_in_one_process(pool, tmp_path):
    """Though one process would measure other losses."""
    found = pool.run(4, logged, str(tmp_path / "log"))
    base = {name: p.detach().clone() for name, p in Model(8).named_parameters()}
    log = read(tmp_path / "log")
    assert replay(log, optimizer_for(log.header, base)) == 6
    for weights in found:
        assert all(map(torch.equal, weights, base.values()))


def other_batch():
    model, where, roles, *_ = sharded("tp", 8)
    optimizer = make(AdaMeZO, model, {})
    connect(optimizer, *where, **roles)
    rank = distributed.get_rank()
    said = pytest.raises(adamezo.distributed.RanksLost, optimizer.step, lambda: 1.0 + rank).value
    return str(said)


def test_ranks_of_one_model_need_one_batch(pool):
    for said in pool.run(2, other_batch):
        assert "ranks 0 and 1 have one role in the batch" in said


# ---- what a forward gathers --------------------------------------------------------------------


def stale():
    """Losses at the four probes, once with a forward of somebody else in between."""
    found = []
    for eager in (False, True):
        model, where, roles, parts, mine = sharded("fsdp")
        optimizer = make(AdaMeZO, model, {})
        connect(optimizer, *where, **roles)
        for step in range(2):
            if eager:
                with torch.no_grad():
                    model(inputs(9)[0])  # gathers the root's weights, and keeps them
            train(model, optimizer, 1, parts, mine, step)
            found.append(optimizer.losses)
        with torch.no_grad():
            found.append(float(model(inputs(9)[0])))
    return found


def test_a_forward_never_sees_weights_as_they_were(pool):
    expected = []
    model = Model()
    optimizer = make(AdaMeZO, model, {})
    for step in range(2):
        train(model, optimizer, 1, first=step)
        expected.append(optimizer.losses)
    with torch.no_grad():
        expected.append(float(model(inputs(9)[0])))
    assert expected[0][0] != expected[0][1]
    for found in pool.run(2, stale):
        assert found == expected * 2


def from_gathered():
    """An optimizer that is made while the root shows gathered weights."""
    model, where, roles, parts, mine = sharded("fsdp")
    with torch.no_grad():
        model(inputs(0)[0])
    assert not isinstance(model.scale, DTensor)
    wrong = AdaMeZO([model.scale, model.first.weight], model=model, seed=1)
    with pytest.raises(ValueError, match="the model has no parameter 0 of group 0"):
        connect(wrong, *where, **roles)
    optimizer = make(AdaMeZO, model, {})
    connect(optimizer, *where, **roles)
    train(model, optimizer, 3, parts, mine)
    adamezo.engine.sharded.reshard(model)
    return gathered(model)


def test_an_optimizer_is_of_the_pieces(pool):
    expected, _ = alone(AdaMeZO, {}, 3)
    for weights in pool.run(2, from_gathered):
        assert all(map(torch.equal, weights, expected))


def raises_everywhere():
    """An evaluation that ends in the middle of a forward leaves nothing gathered."""
    model, where, roles, parts, mine = sharded("fsdp")
    optimizer = make(AdaMeZO, model, {"perturbation": "out_of_place"})
    connect(optimizer, *where, **roles)
    train(model, optimizer, 1, parts, mine)

    def fails():
        handle = model.second.register_forward_pre_hook(lambda *_: 1 / 0)
        try:
            return model(inputs(0)[0])
        finally:
            handle.remove()

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fails)
    return str(pytest.raises(adamezo.distributed.RanksLost, optimizer.step, lambda: 0.0).value)


def test_a_model_in_pieces_does_not_go_on_after_an_error(pool):
    for said in pool.run(2, raises_everywhere):
        assert "the job has to be started again" in said


def mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = Model()
    shard_fsdp(model, mesh, mp_policy=policy)
    optimizer = make(AdaMeZO, model, {"zo_eps": 1e-1})
    connect(optimizer, mesh)
    parts, mine = distributed.get_world_size(), distributed.get_rank()
    train(model, optimizer, 6, parts, mine)
    adamezo.engine.sharded.reshard(model)
    return gathered(model), optimizer.losses


def test_mixed_precision(pool):
    first = pool.run(1, mixed_precision)[0]
    assert first[0][0].dtype == torch.float32
    assert first[1][0] != first[1][1]
    for weights, last in pool.run(4, mixed_precision):
        assert all(map(torch.equal, weights, first[0]))
        assert last == first[1]


def sixteen_bits():
    """Weights themselves in bfloat16, with stochastic rounding, whose bits go by place."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = Model().bfloat16()
    shard_fsdp(model, mesh)
    optimizer = make(AdaMeZO, model, {"perturbation": "out_of_place", "zo_eps": 1e-1})
    connect(optimizer, mesh)
    for step in range(4):
        rows = inputs(step).bfloat16()
        rows = rows.chunk(distributed.get_world_size())[distributed.get_rank()]
        optimizer.step(lambda rows=rows: adamezo.LossSum.of(losses(model, rows)))
    adamezo.engine.sharded.reshard(model)
    return gathered(model)


def test_sixteen_bits(pool):
    first = pool.run(1, sixteen_bits)[0]
    for weights in pool.run(4, sixteen_bits):
        assert all(map(torch.equal, weights, first))


# ---- places ------------------------------------------------------------------------------------


def places():
    """Each placement: the local elements of arange are the indices that the Shard gives."""
    checked = refused = 0
    world = distributed.get_world_size()
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("a",))
    square = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b"))
    for shape in [(1,), (5,), (16,), (3, 5), (4, 6), (1, 9), (7, 1), (2, 3, 4), (5, 1, 3)]:
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        for d in range(len(shape)):
            for mesh, placements in (
                (line, [Shard(d)]),
                (square, [Shard(d), Replicate()]),
                (square, [Replicate(), Shard(d)]),
                (square, [Shard(d), Shard(d)]),
                *[(square, [Shard(d), Shard(e)]) for e in range(len(shape)) if e != d],
            ):
                tensor = distribute_tensor(numbers, mesh, placements)
                try:
                    place = shard_of(tensor, "w")
                except ValueError:
                    # Two dimensions after the first are cut, and the first is longer than 1.
                    assert shape[0] > 1
                    assert all(p.dim > 0 for p in placements)
                    refused += 1
                    continue
                here = local(tensor)
                if here.numel():
                    rows = here.reshape(place.rows, -1)
                    first = place.offset + place.stride * torch.arange(place.rows)
                    indices = first[:, None] + torch.arange(rows.shape[1])
                    assert torch.equal(rows, indices.float()), (shape, placements)
                    assert place.columns == (numbers[0].numel() if len(shape) > 1 else 0)
                    checked += 1
    return checked, refused


def test_places_of_pieces(pool):
    found = pool.run(4, places)
    for checked, refused in found:
        assert checked > 40
        assert refused <= 2  # of shape (2, 3, 4), unless this rank's piece is but one row
    assert sum(refused for _, refused in found) > 0


def placed_by_fsdp_over_tp():
    """Row counts of which some ranks get nothing, from fully_shard itself."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    checked = []
    for rows in (1, 2, 3, 4, 5, 6, 7, 9, 16):
        model = nn.Sequential(nn.Linear(5, rows, bias=False), nn.Linear(rows, 5, bias=False))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.arange(p.numel()).view_as(p))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        for p in model.parameters():
            place, here = shard_of(p, "w"), local(p)
            if here.numel():
                pieces = here.reshape(place.rows, -1)
                first = place.offset + place.stride * torch.arange(place.rows)
                assert torch.equal(pieces, (first[:, None] + torch.arange(pieces.shape[1])).float())
                checked.append(tuple(map(str, p.placements)))
    return checked


def test_places_of_fully_shard_over_tensor_parallel(pool):
    for checked in pool.run(4, placed_by_fsdp_over_tp):
        assert len(checked) > 12
        assert len(set(checked)) == 2


def refused():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("a",))
    said = []
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    holder = nn.Module()
    holder.w = partial
    optimizer = AdaMeZO([("w", partial)], model=holder, seed=1)
    for act in (
        lambda: connect(optimizer),
        lambda: AdaMeZO([nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))],
                        seed=1).step(lambda: 0.0),
        lambda: fsdp_regenerated(mesh),
        lambda: without_model(mesh),
    ):  # fmt: skip
        try:
            act()
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def fsdp_regenerated(mesh):
    model = shard_fsdp(Model(), mesh)
    optimizer = make(AdaMeZO, model, {"perturbation": "regenerated", "distribution": "lowrank"})
    connect(optimizer, mesh)
    optimizer.step(lambda: 0.0)


def without_model(mesh):
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = AdaMeZO([weight], seed=1)
    connect(optimizer, mesh)
    optimizer.step(lambda: 0.0)


def test_what_cannot_be_served_is_refused(pool):
    for said in pool.run(2, refused):
        wanted = [
            "w is a DTensor with placements (Partial(sum),) on a mesh of shape (2,), so that its",
            "call `adamezo.distributed.connect(optimizer, ...)` once",
            "perturbation='regenerated' with 6 DTensors",
            "a model in pieces (DTensors) needs the model",
        ]
        assert len(said) == len(wanted)
        for text, part_of_it in zip(said, wanted, strict=True):
            assert part_of_it in text


def kept():
    """Plans are made once, and not anew at every step."""
    model, where, roles, parts, mine = sharded("fsdp")
    optimizer = make(AdaMeZO, model, {})
    connect(optimizer, *where, **roles)
    train(model, optimizer, 1, parts, mine)  # fully_shard may replace pieces at its first forward
    plans = optimizer.plans()
    train(model, optimizer, 2, parts, mine, 1)
    return optimizer.plans() is plans


def test_plans_are_kept(pool):
    assert pool.run(2, kept) == [True, True]
