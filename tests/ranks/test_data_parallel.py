"""Data parallel on real process groups (Gloo): the same bits at every world size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adamezo
from adamezo import FZOO, HELENE, AdaMeZO, MeZO, ZOAdam
from adamezo.distributed import RankFailed, RanksLost, connect

SAMPLES = 8
METHODS = {
    AdaMeZO: dict(lr=1e-3),
    MeZO: dict(lr=1e-3, queries=3),
    FZOO: dict(lr=1e-3, queries=4),
    ZOAdam: dict(lr=1e-3),
    HELENE: dict(lr=1e-3, curvature_every=2),
}


class Model(nn.Module):
    """Computes sample by sample, so that a sample's loss has the same bits in any batch."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, width)
        self.second = nn.Linear(width, 3)

    def losses(self, rows: torch.Tensor) -> torch.Tensor:
        outputs = [self.second(self.first(row).tanh()) for row in rows]
        return torch.stack([output.square().mean() for output in outputs])


def inputs(step: int) -> torch.Tensor:
    return torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(step))


def part(rows: torch.Tensor) -> torch.Tensor:
    """This rank's part of a batch."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    return rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]


def train(model, optimizer, steps, first=0) -> None:
    for step in range(first, first + steps):
        rows = part(inputs(step))
        optimizer.step(lambda rows=rows: adamezo.LossSum.of(model.losses(rows)))


def made(method=AdaMeZO, width=5, **options):
    model = Model(width)
    return model, method.for_model(model, seed=3, **{**METHODS[method], **options})


def bits(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def run(method, options, steps=50):
    model, optimizer = made(method, **options)
    connect(optimizer, check_every=10)
    train(model, optimizer, steps)
    return bits(model), optimizer.losses, optimizer.state_dict()["param_groups"]


def alone(method, options, steps=50):
    """The same in one process without a process group."""
    model, optimizer = made(method, **options)
    for step in range(steps):
        rows = inputs(step)
        optimizer.step(lambda rows=rows: adamezo.LossSum.of(model.losses(rows)))
    return bits(model), optimizer.losses, optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize(
    ("method", "perturbation"),
    [
        pytest.param(method, at, marks=[] if method in quick else pytest.mark.slow)
        for at, quick in (("inplace", METHODS), ("out_of_place", [AdaMeZO]))
        for method in METHODS
    ],
)
def test_world_sizes_have_the_same_bits(pool, method, perturbation):
    options = dict(perturbation=perturbation)
    steps = 50 if method is AdaMeZO else 12
    expected = alone(method, options, steps)
    for world in (1, 2, 4):
        for weights, losses, groups in pool.run(world, run, method, options, steps):
            assert all(map(torch.equal, weights, expected[0]))
            assert losses == expected[1]
            assert groups == expected[2]
    assert not all(map(torch.equal, expected[0], bits(Model())))


def test_a_sum_of_losses_has_no_order():
    """Of float32 losses of any size, and of any division into parts."""
    generator = torch.Generator().manual_seed(1)
    losses = torch.randn(4096, generator=generator).mul(3).exp()  # from 1e-5 to 1e5
    losses[::7] *= 1e-9
    assert losses.sum() < 2**23
    whole = adamezo.LossSum.of(losses).loss
    for parts in (2, 3, 64):
        pieces = losses[torch.randperm(4096, generator=generator)].chunk(parts)
        total = adamezo.LossSum.of(pieces[0])
        for piece in pieces[1:]:
            total = total + adamezo.LossSum.of(piece)
        assert torch.equal(total.loss, whole)
    exact = math.fsum(map(float, losses)) / 4096
    # Each loss lost at most 2^-65.
    assert abs(whole.item() - exact) <= 2.0**-65 + 2.0**-52 * exact
    orders = [losses[torch.randperm(4096, generator=generator)].mean() for _ in range(9)]
    assert len({mean.item() for mean in orders}) > 1  # what it avoids


def test_weights_of_a_sum_leave_out_samples():
    losses = torch.tensor([1.0, 50.0, 4.0])
    assert adamezo.LossSum.of(losses, torch.tensor([1.0, 0.0, 2.0])).loss == 3.0
    with pytest.raises(ValueError, match=r"weights of the losses' shape \(3,\), got \(2,\)"):
        adamezo.LossSum.of(losses, torch.ones(2))


def uneven():
    """Parts of unlike sizes, one of them empty, and plain losses."""
    model, optimizer = made()
    connect(optimizer)
    rank = distributed.get_rank()
    rows = inputs(0)
    mine = [rows[:1], rows[1:7], rows[7:7], rows[7:]][rank]
    optimizer.step(
        lambda: adamezo.LossSum.of(model.losses(mine) if len(mine) else rows.new_empty(0))
    )
    summed = optimizer.losses
    optimizer.step(lambda: float(rank) ** 2)
    return bits(model), summed, optimizer.losses


def test_uneven_and_empty_parts_weigh_by_their_samples(pool):
    model, optimizer = made()
    optimizer.step(lambda: adamezo.LossSum.of(model.losses(inputs(0))))
    found = pool.run(4, uneven)
    for weights, summed, plain in found:
        assert summed == optimizer.losses
        assert plain == (3.5, 3.5)  # (0 + 1 + 4 + 9) / 4
        assert all(map(torch.equal, weights, found[0][0]))


def nothing_at_all():
    model, optimizer = made()
    connect(optimizer)
    with pytest.raises(ValueError, match="no rank has a sample"):
        optimizer.step(lambda: adamezo.LossSum.of(torch.empty(0)))
    return bits(model)


def test_a_step_without_samples_is_refused_on_all(pool):
    for weights in pool.run(2, nothing_at_all):
        for here, before in zip(weights, bits(Model()), strict=True):
            # Restored after three roundings of numbers below 1.
            assert torch.allclose(here, before, rtol=0, atol=4e-7)


# ---- failures ----------------------------------------------------------------------------------


def nan_on_one(nonfinite):
    model, optimizer = made(nonfinite=nonfinite)
    connect(optimizer, check_every=1)
    said = ""
    for step in range(4):
        rows = part(inputs(step))
        bad = step == 1 and distributed.get_rank() == 1

        def closure(rows=rows, bad=bad):
            losses = model.losses(rows)
            return adamezo.LossSum.of(losses * float("nan") if bad else losses)

        try:
            optimizer.step(closure)
        except FloatingPointError as error:
            said = str(error)
    return bits(model), optimizer.skipped, optimizer.param_groups[0]["steps"], said


@pytest.mark.filterwarnings("ignore:the losses of a step were")
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_nan_on_one_rank_is_one_on_all(pool, nonfinite):
    found = pool.run(4, nan_on_one, nonfinite)
    for weights, skipped, steps, said in found:
        assert all(map(torch.equal, weights, found[0][0]))
        assert (skipped, steps) == (1, 3)
        assert said == found[0][3]
    assert ("nan" in found[0][3]) == (nonfinite == "raise")


def raises_on_one(perturbation, at):
    """The closure of rank 1 raises at its first or second call of step 1, and the run goes on."""
    model, optimizer = made(perturbation=perturbation)
    connect(optimizer, check_every=1)
    said, records = [], []
    optimizer.recorder = lambda record: records.append(record[:3])
    for step in range(4):
        rows, calls = part(inputs(step)), []

        def closure(rows=rows, step=step, calls=calls):
            calls.append(0)
            if step == 1 and distributed.get_rank() == 1 and len(calls) == at:
                raise OverflowError("a bad sample")
            return adamezo.LossSum.of(model.losses(rows))

        try:
            optimizer.step(closure)
        except (OverflowError, RankFailed) as error:
            said.append((type(error).__name__, str(error)))
    return bits(model), said, records


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("perturbation", ["inplace", "out_of_place"])
def test_a_closure_that_raises_on_one_rank_fails_on_all(pool, perturbation, at):
    """At once, with the same weights: those who had perturbed further have other roundings
    otherwise, and check_every would find them."""
    found = pool.run(4, raises_on_one, perturbation, at)
    for rank, (weights, said, records) in enumerate(found):
        assert all(map(torch.equal, weights, found[0][0]))
        assert records == found[0][2]
        (error,) = said
        if rank == 1:
            assert error == ("OverflowError", "a bad sample")
        else:
            assert error == ("RankFailed", "rank 1 raised OverflowError: a bad sample")


def other_weights(when):
    model, optimizer = made()
    if when == "start" and distributed.get_rank() == 2:
        with torch.no_grad():
            model.first.weight[3, 4] += 1e-6
    try:
        connect(optimizer, check_every=5)
        for step in range(12):
            if step == 7 and distributed.get_rank() == 2:
                with torch.no_grad():
                    model.second.bias[1] += 1e-6
            train(model, optimizer, 1, step)
    except RanksLost as error:
        with pytest.raises(RanksLost):  # no step after that
            optimizer.step(lambda: 0.0) if optimizer.ranks else connect(optimizer)
        return str(error), optimizer.param_groups[0]["steps"]
    return "", 0


@pytest.mark.parametrize(("when", "steps"), [("start", 0), ("later", 10)])
def test_a_rank_with_other_weights_is_named(pool, when, steps):
    for said, at in pool.run(4, other_weights, when):
        assert f"before step {steps + 1} the weights of rank 2 differ" in said
        assert at == steps


def other_options(what):
    rank = distributed.get_rank()
    model, optimizer = made(lr=1e-3, **({"zo_eps": 1e-3 + rank * 1e-4} if what == "zo_eps" else {}))
    try:
        connect(optimizer)
        train(model, optimizer, 2)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + rank)
        train(model, optimizer, 1)
    except RanksLost as error:
        return str(error), optimizer.param_groups[0]["steps"]


@pytest.mark.parametrize(("what", "steps"), [("zo_eps", 0), ("lr", 2)])
def test_ranks_with_other_options_are_refused(pool, what, steps):
    for said, at in pool.run(2, other_options, what):
        assert f"rank 1 has {what} 0.00" in said
        assert "rank 0 has 0.001" in said
        assert at == steps


def refused():
    said = []
    model = Model()

    def note(make):
        try:
            make()
        except (ValueError, RuntimeError) as error:
            said.append(str(error))

    wrapped = nn.parallel.DistributedDataParallel(Model())
    note(lambda: connect(AdaMeZO.for_model(wrapped, seed=1)))
    note(lambda: connect(AdaMeZO.for_model(model, seed=1, capturable=True)))
    note(lambda: connect(AdaMeZO.for_model(model, seed=1), data="dp"))
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    note(lambda: connect(AdaMeZO.for_model(model, seed=1), mesh, data="dp"))
    note(lambda: connect(AdaMeZO.for_model(model, seed=1), mesh, data="dp", model="pp"))
    note(lambda: connect(AdaMeZO.for_model(model, seed=1), check_every=-1))
    return said


def test_what_cannot_be_served_is_refused(pool):
    for said in pool.run(2, refused):
        wanted = [
            "the model is a DistributedDataParallel, which keeps a gradient",
            "capturable=True on connected ranks",
            "expected a DeviceMesh",
            "of which tp got no role",
            "model='pp', expected a dimension of the mesh",
            "Invalid check_every: -1",
        ]
        assert len(said) == len(wanted)
        for text, part_of_it in zip(said, wanted, strict=True):
            assert part_of_it in text


def unconnected():
    model, optimizer = made()
    with pytest.warns(UserWarning, match="torch.distributed has 2 ranks, and this AdaMeZO"):
        optimizer.step(lambda: 1.0)
    return True


def test_ranks_that_are_not_connected_are_warned_of(pool):
    assert pool.run(2, unconnected) == [True, True]


def test_without_a_process_group():
    _, optimizer = made()
    with pytest.raises(RuntimeError, match="torch.distributed has no process group"):
        connect(optimizer)


# ---- the network -------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Bytes that this rank gives to collective operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # allgather_(outputs, inputs, ...): what is given is the second.
            given = args[1] if "allgather" in func._opname else args[0]
            self.calls.append((func._opname, sum(t.nbytes for t in given)))
        return func(*args, **(kwargs or {}))


def counted(method, width, options):
    model, optimizer = made(method, width, **options)
    connect(optimizer, check_every=0)
    train(model, optimizer, 1)
    with Sent() as sent:
        train(model, optimizer, 3, 1)
    return sent.calls, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("method", "bytes_a_step"), [(AdaMeZO, 64), (MeZO, 160), (FZOO, 136)])
def test_bytes_on_the_network_do_not_depend_on_the_model(pool, method, bytes_a_step):
    """8 (2 + 3 evaluations) for each rank, in one all_gather a step."""
    sizes = set()
    for width in (5, 500):
        for calls, size in pool.run(2, counted, method, width, {}):
            assert calls == [("allgather_", bytes_a_step)] * 3
            sizes.add(size)
    assert max(sizes) > 50 * min(sizes)
