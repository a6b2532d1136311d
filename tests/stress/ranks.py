"""Ranks of a torchrun job that are killed, many times in a row: `python -m tests.stress ranks`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from adamezo.runlog import read

from .small import ROOT, expect, same_bits

if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))

from helpers import elastic


def killed_ranks(count: int, folder: Path, kind: str, seed: int = 0) -> Counter[str]:
    """Starts a job of two ranks under torchrun, of which one is killed in one evaluation or the
    other of a random step, `count` times, each in a process that torchrun has started again. The
    weights have to be those of one process that nobody killed, and the log has to have each step
    once."""
    chosen = random.Random(seed)
    steps = 3 * count
    kills = [
        [3 * i + chosen.randrange(3), chosen.randrange(2), chosen.randrange(1, 3), signal.SIGKILL]
        for i in range(count)
    ]
    paths = [str(ROOT), str(ROOT / "python_api"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(paths)
    environment = {**os.environ, **elastic.ENVIRONMENT, "PYTHONPATH": path}
    done = subprocess.run(
        elastic.command(folder, steps, kind, kills, 2, count),
        env=environment,
        capture_output=True,
        text=True,
    )
    expect(done.returncode == 0, f"the job failed: {done.stderr[-3000:]}")
    expect(len(list(folder.glob("killed*"))) == count, "a kill was not carried out")
    found = torch.load(folder / "weights.pt")
    expect(same_bits(found, elastic.train_alone(steps)), "the killed job has other weights")
    records = read(folder / "log").records
    expect(
        [record.direction for record in records] == list(range(steps)), "the log has other steps"
    )
    return Counter(f"rank {rank}" for _, rank, _, _ in kills)
