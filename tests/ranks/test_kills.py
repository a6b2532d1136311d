"""Ranks that are killed, or hang: the job ends with a message, and goes on from its log."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adamezo.runlog import read
from helpers import elastic

STEPS = 8
HANGS = 30
"""Seconds after which a rank gives up one that hangs: enough for both to start on busy cores."""


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(sys.path)
    return {**os.environ, **elastic.ENVIRONMENT, "PYTHONPATH": path, **more}


def started(folder: Path, kind: str, kills: list, ranks: int) -> list[subprocess.Popen[str]]:
    """The ranks of a job without torchrun, which would end them all itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = elastic.command(folder, STEPS, kind, kills, ranks, 0)
    program = [sys.executable, *job[job.index(str(Path(elastic.__file__).resolve())) :]]
    return [
        subprocess.Popen(
            program,
            env=environment(
                RANK=str(rank),
                WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                ELASTIC_TIMEOUT=str(HANGS),
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("replicas", signal.SIGKILL),
        pytest.param("pieces", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("replicas", signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_ends_the_job_with_a_message(tmp_path, kind, how):
    """Killed: when its connection closes. Hanging: by the timeout of the process group."""
    processes = started(tmp_path, kind, [[3, 1, 2, how]], 2)
    try:
        while not (tmp_path / "killed0").exists():
            assert processes[0].poll() is None, processes[0].communicate()[1]
            time.sleep(0.02)
        # Beside the timeout, Python and torch need a while to end on busy cores.
        _, said = processes[0].communicate(timeout=HANGS + 60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1
    if kind == "replicas":
        assert "RanksLost: rank 0 had no answer from all ranks after 4 steps" in said
        assert "Start the job again" in said
    assert ("imed out" in said) == (how == signal.SIGSTOP)
    # A model in pieces waits for a piece of the weights then, and the error is torch's.
    assert ("onnection" in said) == (how == signal.SIGKILL)
    # The step that was cut short is in no log: the job goes on from the one before.
    assert [record.outcome for record in read(tmp_path / "log").records] == ["updated"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicas", "pieces"])
def test_torchrun_starts_again_and_ends_where_nobody_was_killed(tmp_path, kind):
    """Rank 0, which writes the log, rank 1, and both."""
    kills = [[2, 0, 1, signal.SIGKILL], [2, 1, 2, signal.SIGKILL], [5, 0, 2, signal.SIGKILL],
             [5, 1, 2, signal.SIGKILL]]  # fmt: skip
    done = subprocess.run(
        elastic.command(tmp_path, STEPS, kind, kills, 2, 4),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.glob("killed*"))) == 4
    found = torch.load(tmp_path / "weights.pt")
    assert all(map(torch.equal, found, elastic.train_alone(STEPS)))
    assert read(tmp_path / "log").steps == STEPS
