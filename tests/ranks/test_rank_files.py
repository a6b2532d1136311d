"""Logs and checkpoints cross world sizes: written at one, read at another."""

from __future__ import annotations

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import adamezo
from adamezo import AdaMeZO, MeZO, ZOAdam
from adamezo.distributed import RankFailed, connect
from adamezo.engine.sharded import reshard, whole
from adamezo.runlog import LogError, StepLog, optimizer_for, read, replay
from helpers.elastic import Model

METHODS = {AdaMeZO: {}, MeZO: {"queries": 2}, ZOAdam: {}}


def make(kind, method, options=None):
    """A model alone, on replicas or in pieces; its optimizer, connected; and what part it sees."""
    model = Model()
    if kind == "pieces":
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = method.for_model(model, lr=1e-2, seed=3, **METHODS[method], **(options or {}))
    if kind == "alone":
        return model, optimizer, 1, 0
    connect(optimizer, check_every=2)
    return model, optimizer, distributed.get_world_size(), distributed.get_rank()


def train(run, steps) -> None:
    model, optimizer, parts, mine = run
    for step in steps:
        rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        rows = rows.chunk(parts)[mine]

        def closure(rows=rows):
            return adamezo.LossSum.of(torch.stack([model(row) for row in rows]))

        optimizer.step(closure)


def weights(model) -> list[torch.Tensor]:
    reshard(model)
    return [whole(p).detach().clone() for p in model.parameters()]


def whole_run(method, steps=8):
    run = make("alone", method)
    train(run, range(steps))
    return weights(run[0])


# ---- torch.distributed.checkpoint --------------------------------------------------------------


def save(kind, method, folder, steps):
    run = make(kind, method)
    train(run, range(steps))
    reshard(run[0])
    model_state, optimizer_state = states.get_state_dict(*run[:2])
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(kind, method, folder, steps):
    run = make(kind, method)
    with torch.no_grad():
        for p in run[0].parameters():
            p.zero_()
    model_state, optimizer_state = states.get_state_dict(*run[:2])
    loaded = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(loaded, checkpoint_id=folder)
    states.set_state_dict(
        *run[:2], model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    train(run, steps)
    return weights(run[0])


WORLDS = [
    (("pieces", 4), ("pieces", 2)),
    (("pieces", 2), ("pieces", 4)),
    (("pieces", 4), ("replicas", 2)),
    (("replicas", 2), ("pieces", 4)),
    (("pieces", 2), ("alone", 1)),
    (("alone", 1), ("replicas", 4)),
]


def slow_unless(quick, *case):
    return pytest.param(*case, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "saved", "loaded"),
    [
        # ZOAdam has buffers, which are in pieces as the weights are.
        slow_unless(method is ZOAdam or saved[0] == "alone", method, saved, loaded)
        for method in METHODS
        for saved, loaded in WORLDS
    ],
)
def test_a_checkpoint_of_one_world_goes_on_at_another(pool, method, saved, loaded, tmp_path):
    expected = whole_run(method)
    pool.run(saved[1], save, saved[0], method, str(tmp_path), 5)
    for found in pool.run(loaded[1], load, loaded[0], method, str(tmp_path), range(5, 8)):
        assert all(map(torch.equal, found, expected))


# ---- logs --------------------------------------------------------------------------------------


def log_part(kind, method, path, steps, options=None):
    """Opens a log, which replays what it has, and takes steps up to this number."""
    run = make(kind, method, options)
    with StepLog.open(path, run[1]) as log:
        had = log.steps
        train(run, range(had, steps))
    return had, weights(run[0])


@pytest.mark.parametrize(
    ("method", "perturbation"),
    [
        slow_unless(method is AdaMeZO or at == "out_of_place", method, at)
        for method in METHODS
        for at in ("inplace", "out_of_place")
    ],
)
def test_a_log_goes_on_at_other_world_sizes(pool, method, perturbation, tmp_path):
    """One process, four in pieces, two replicas, two in pieces; and a replay alone."""
    path, options = str(tmp_path / "log"), {"perturbation": perturbation}
    base = {name: p.detach().clone() for name, p in Model().named_parameters()}
    at = 0
    for kind, world in (("alone", 1), ("pieces", 4), ("replicas", 2), ("pieces", 2)):
        found = pool.run(world, log_part, kind, method, path, at + 2, options)
        for had, now in found:
            assert had == at
            assert all(map(torch.equal, now, found[0][1]))
        at += 2
    run = make("alone", method, options)
    train(run, range(8))
    assert all(map(torch.equal, found[0][1], weights(run[0])))
    log = read(path)
    assert replay(log, optimizer_for(log.header, base)) == 8
    assert all(map(torch.equal, base.values(), weights(run[0])))


def test_a_log_is_that_of_one_process_byte_for_byte(pool, tmp_path):
    log_part("alone", AdaMeZO, tmp_path / "alone", 4)
    for kind in ("replicas", "pieces"):
        pool.run(2, log_part, kind, AdaMeZO, str(tmp_path / kind), 4)
        assert (tmp_path / kind).read_bytes() == (tmp_path / "alone").read_bytes()


def at_a_failure(path):
    """A log whose third step fails on one rank goes on, and is the same on all."""
    run = make("replicas", AdaMeZO)
    with StepLog.open(path, run[1]):
        train(run, range(2))

        def closure():
            if distributed.get_rank() == 1:
                raise OSError("a file is gone")
            return 1.0

        with pytest.raises((OSError, RankFailed)):
            run[1].step(closure)
        train(run, range(2, 4))
    return weights(run[0])


def test_a_failed_step_is_in_the_log(pool, tmp_path):
    base = {name: p.detach().clone() for name, p in Model().named_parameters()}
    found = pool.run(4, at_a_failure, str(tmp_path / "log"))
    log = read(tmp_path / "log")
    assert [record.outcome for record in log.records] == ["updated"] * 2 + [
        "failed",
        *["updated"] * 2,
    ]
    assert replay(log, optimizer_for(log.header, base)) == 4
    for now in found:
        assert all(map(torch.equal, now, base.values()))


def refused(path):
    said = []
    run = make("replicas", AdaMeZO)
    for act in (
        lambda: StepLog.create(path, run[1]),
        lambda: StepLog.resume(path + "none", run[1]),
        lambda: StepLog.resume(path, run[1], run={"data": "another"}),
    ):
        try:
            act()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_errors_of_the_first_rank_are_raised_on_all(pool, tmp_path):
    path = str(tmp_path / "log")
    pool.run(2, log_part, "replicas", AdaMeZO, path, 1)
    for said in pool.run(2, refused, path):
        assert said[0].startswith("FileExistsError: ")
        assert "is there already: resume it" in said[0]
        assert said[1].startswith("FileNotFoundError: ")
        assert said[2].startswith("LogError: ")
        assert "data was None, here it is 'another'" in said[2]


def late(path, steps):
    """A rank that has nothing but the base weights and the log stands where the others do."""
    run = make("alone", AdaMeZO)
    log = read(path)
    taken = replay(log, run[1])
    connect(run[1])  # compares the weights and the history of all ranks
    train((run[0], run[1], 2, distributed.get_rank()), range(taken, steps))
    return taken, weights(run[0])


def test_a_rank_catches_up_by_the_log(pool, tmp_path):
    path = str(tmp_path / "log")
    pool.run(2, log_part, "replicas", AdaMeZO, path, 5)
    for taken, now in pool.run(2, late, path, 8):
        assert taken == 5
        assert all(map(torch.equal, now, whole_run(AdaMeZO)))


def test_a_log_of_other_weights_is_refused_on_all(pool, tmp_path):
    path = str(tmp_path / "log")
    run = make("alone", AdaMeZO)
    with torch.no_grad():
        run[0].first.bias[0] = 5.0
    with StepLog.create(path, run[1]):
        train(run, range(1))
    with pytest.raises(RuntimeError, match="LogError.*the weights are not those"):
        pool.run(2, log_part, "pieces", AdaMeZO, path, 2)
    with pytest.raises(LogError, match="the weights are not those"):
        log_part("alone", AdaMeZO, path, 2)
