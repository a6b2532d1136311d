"""``adamezo finetune`` on the processes of torchrun and of ``accelerate launch``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from adamezo import cli
from adamezo.runlog import read
from helpers import command

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# What it runs with several GPUs; with CPUs alone it needs mpirun.
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
    *("--main_process_ip=127.0.0.1", "--mixed_precision=no", "--dynamo_backend=no"),
)


def arguments(model_folder, data_file, output, **changed) -> list[str]:
    changed = {"save_to": output / "trained"} | changed
    return command.arguments(model_folder, data_file, output, **changed)


def start(launcher, given) -> subprocess.Popen[str]:
    # docs/distributed.md: torchrun would give restarted processes the addresses of the old.
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "adamezo", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


def run(launcher, given) -> str:
    process = start(launcher, given)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def weights(output):
    return load_file(output / "trained" / "model.safetensors")


def assert_equal(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].equal(b[name]), name


def test_two_processes_share_a_batch_and_go_on_where_they_were(model_folder, data_file, tmp_path):
    whole, parts, alone = (tmp_path / name for name in ("whole", "parts", "alone"))
    said = run(TORCHRUN, arguments(model_folder, data_file, whole))
    assert said.count("written:") == 1, "one process reports"
    report = json.loads((whole / "report.json").read_text())
    assert report["processes"] == 2
    run(TORCHRUN, arguments(model_folder, data_file, parts, steps=2, checkpoint_every=1))
    run(TORCHRUN, arguments(model_folder, data_file, parts))
    assert_equal(weights(whole), weights(parts))
    assert (whole / "run.log").read_bytes() == (parts / "run.log").read_bytes()
    # One process has the same directions, and the same losses but for their last bits; and it goes
    # on with the log of two.
    assert cli.main(arguments(model_folder, data_file, alone)) == 0
    curve = json.loads((alone / "report.json").read_text())["curve"]
    for mine, theirs in zip(curve, report["curve"], strict=True):
        # Two float32 means of two rows, summed and halved: three roundings apart at most.
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2**-18)
    assert cli.main(arguments(model_folder, data_file, parts, steps=6)) == 0
    report = json.loads((parts / "report.json").read_text())
    assert (report["training"]["replayed"], report["processes"]) == (4, 1)


def test_the_first_process_finds_the_lr_of_all(model_folder, data_file, tmp_path):
    rates = []
    for launcher, name in ((TORCHRUN, "two"), ((), "one")):
        given = arguments(model_folder, data_file, tmp_path / name)
        place = given.index("--lr")
        given[place : place + 2] = ["--find-lr"]
        said = run(launcher, given)
        assert said.count("found in") == 1
        report = json.loads((tmp_path / name / "report.json").read_text())
        rates.append(report["options"]["lr"])
    assert rates[0] == rates[1] > 0


def test_a_killed_process_starts_all_again_from_the_log(model_folder, data_file, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(TORCHRUN, arguments(model_folder, data_file, whole, steps=200))
    given = arguments(model_folder, data_file, killed, steps=200)
    process = start((*TORCHRUN, "--max-restarts=3"), given)
    log, end = killed / "run.log", time.monotonic() + 120
    while not (log.exists() and log.stat().st_size > 4000) and time.monotonic() < end:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "replaying" in said
    assert read(log).steps == 200
    assert_equal(weights(whole), weights(killed))


def test_a_batch_that_the_processes_cannot_share_is_refused(model_folder, data_file, tmp_path):
    process = start(TORCHRUN, arguments(model_folder, data_file, tmp_path / "out", batch_size=3))
    said, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "--batch-size: got 3, expected a multiple of the 2 processes" in said


def test_under_accelerate(model_folder, data_file, tmp_path):
    pytest.importorskip("accelerate")
    run(TORCHRUN, arguments(model_folder, data_file, tmp_path / "a"))
    run(ACCELERATE, arguments(model_folder, data_file, tmp_path / "b"))
    assert_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
