"""A job of several ranks that torchrun starts, and starts again when one was killed.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 elastic.py FOLDER STEPS KIND [KILLS]

KIND is "replicas" or "pieces" (fully_shard). KILLS is a JSON list of [step, rank, evaluation,
signal]: each is carried out once, by the rank itself in that evaluation of that step; the signal
SIGSTOP makes a rank that hangs. The weights at the end go to FOLDER/weights.pt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import adamezo
from adamezo.engine.sharded import whole
from adamezo.runlog import StepLog

TIMEOUT = float(os.environ.get("ELASTIC_TIMEOUT", "60"))
"""Of the process group, in seconds: long enough for all ranks to start on busy cores."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(row).tanh()).square().mean()


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def train_alone(steps: int) -> list[torch.Tensor]:
    """The weights after a run of one process that nobody killed."""
    model = Model()
    optimizer = adamezo.AdaMeZO.for_model(model, lr=1e-2, seed=3)
    for step in range(steps):
        rows = batch(step)
        optimizer.step(
            lambda rows=rows: adamezo.LossSum.of(torch.stack([model(row) for row in rows]))
        )
    return [p.detach() for p in model.parameters()]


def main(folder: Path, steps: int, kind: str, kills: list[list[int]]) -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = Model()
    if kind == "pieces":
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = adamezo.AdaMeZO.for_model(model, lr=1e-2, seed=3)
    from adamezo.distributed import connect

    connect(optimizer, check_every=10)
    with StepLog.open(folder / "log", optimizer) as log:
        for step in range(log.steps, steps):
            rows, calls = batch(step).chunk(world)[rank], []

            def closure(rows=rows, calls=calls, step=step):
                calls.append(0)
                for number, (at, of, evaluation, how) in enumerate(kills):
                    done = folder / f"killed{number}"
                    if (at, of, evaluation) == (step, rank, len(calls)) and not done.exists():
                        done.touch()
                        os.kill(os.getpid(), how)
                return adamezo.LossSum.of(torch.stack([model(row) for row in rows]))

            optimizer.step(closure)
    adamezo.engine.sharded.reshard(model)
    weights = [whole(p).detach() for p in model.parameters()]
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    distributed.destroy_process_group()


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torchrun gives a job that it starts again the store of the one before, where Gloo and NCCL find
the addresses of processes that are gone (pytorch issues 135712, 167288); unless told not to."""


def command(
    folder: Path, steps: int, kind: str, kills: list, ranks: int, restarts: int
) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "--max-restarts", str(restarts)),
        *(str(Path(__file__).resolve()), str(folder), str(steps), kind, json.dumps(kills)),
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
