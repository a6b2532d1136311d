"""The bits of runs, saved states, logs and directions are those that were kept (golden/README.md).

What this file holds does not change when the package is put in order: it goes by public names
only. golden/make_golden.py made the files; nothing here writes one.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import adamezo
from adamezo_kernels import STREAM_VERSION
from adamezo_kernels.backends import native
from golden import runs
from golden.runs import (
    CASES,
    EARLY,
    FIRST,
    HALF,
    LATER,
    LOGS,
    STATES,
    STEPS,
    STOPS,
    Run,
    step_log,
)
from helpers.backends import INSTRUCTION_SETS, needs_native

GOLDEN = json.loads(runs.RUNS.read_text())
TRACES = json.loads(gzip.decompress(runs.TRACES.read_bytes()))
DIRECTIONS = json.loads(runs.DIRECTIONS.read_text())

BACKENDS = [
    *(f"native-{isa}" for isa in INSTRUCTION_SETS),
    *([] if INSTRUCTION_SETS else [pytest.param("native", marks=needs_native)]),
    "reference",
]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Everything is done by one backend, with one instruction set."""
    name, _, isa = request.param.partition("-")
    monkeypatch.setenv("ADAMEZO_BACKEND", name)
    if not isa:
        yield name
    else:
        with native.use_isa(isa):
            yield name


@pytest.fixture
def fastest(monkeypatch):
    """Whatever backend is best here."""
    monkeypatch.delenv("ADAMEZO_BACKEND", raising=False)


def digest(case: str, stop: int) -> str:
    return GOLDEN["runs"][case]["digests"][str(stop)]


def check(case: str, run: Run, before: int = 0) -> None:
    """What the run measured, which of its steps is the first that differs, its bits, its history.

    ``before`` is how many entries of the golden trace are of steps that it has not taken.
    """
    expected = TRACES[case][before : before + len(run.trace)]
    for i, (got, wanted) in enumerate(zip(run.trace, expected, strict=True)):
        assert got == wanted, f"{case}: entry {before + i} of the trace differs"
    assert run.digest() == digest(case, run.step), f"{case}: other bits after {run.step} steps"
    if run.step == STEPS:
        assert before + len(run.trace) == len(TRACES[case])
        assert run.history() == GOLDEN["runs"][case]["history"]


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_run_has_its_bits(case, backend):
    run = Run(CASES[case])
    # The reference takes a hundred times as long.
    for stop in (FIRST, EARLY) if backend == "reference" else STOPS:
        run.to(stop)
        check(case, run)


def test_all_is_here():
    assert GOLDEN["made by"]["stream_version"] == STREAM_VERSION
    assert GOLDEN["runs"].keys() == TRACES.keys() == CASES.keys()
    public = [getattr(adamezo, name) for name in adamezo.__all__]
    methods = {
        found.__name__
        for found in public
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
    }
    assert len(methods) >= 10
    assert {case.method for case in CASES.values()} == methods
    assert {CASES[case].method for case in STATES.values()} == methods
    assert {CASES[case].method for case in runs.IN_TRITON} == methods
    assert {file.stem for file in (runs.HERE / "states").glob("*.pt")} == STATES.keys()
    assert {file.stem for file in (runs.HERE / "logs").glob("*.log")} == LOGS.keys()


def test_runs_that_are_alike():
    """Steps whose numbers stay on the device have the bits of the others."""
    for case, other in runs.ALIKE.items():
        assert digest(case, STEPS) == digest(other, STEPS), case
    assert len({digest(case, STEPS) for case in CASES.keys() - runs.ALIKE.keys()}) == len(
        CASES
    ) - len(runs.ALIKE)


# --- saved states ---------------------------------------------------------------------------------


def saved(state: str) -> dict[str, Any]:
    return torch.load(runs.state_file(state), weights_only=True)


def entries_until(case: str, step: int) -> int:
    """How many entries of its trace are of the steps before that one: a failed step has two."""
    failed = sum(e.startswith("failed") for at, e in CASES[case].events.items() if at < step)
    return step + failed


@pytest.mark.parametrize("state", STATES)
def test_a_saved_state_goes_on(state, backend):
    case = STATES[state]
    run = Run(CASES[case]).load(saved(state), HALF)
    assert run.digest() == digest(case, HALF)
    for stop in (LATER,) if backend == "reference" else (LATER, STEPS):
        run.to(stop)
        check(case, run, entries_until(case, HALF))


@pytest.mark.parametrize("state", STATES)
def test_a_state_of_today_is_the_saved_one(state, fastest):
    now = Run(CASES[STATES[state]]).to(HALF).saved()
    assert runs.state_as_text(now) == runs.state_as_text(saved(state))


@pytest.mark.parametrize("state", ["MeZO", "HiZOO"])
def test_one_bit_is_seen(state, fastest):
    """The last one of an element, of any weight and of any buffer."""
    case, kept = STATES[state], saved(state)

    def tensors(of: dict[str, Any]) -> list[torch.Tensor]:
        return [
            *of["weights"].values(),
            *(b for p in of["state"]["state"].values() for b in p.values()),
        ]

    for i, tensor in enumerate(tensors(kept)):
        if tensor.numel():
            changed = copy.deepcopy(kept)
            tensors(changed)[i].reshape(-1).view(torch.uint8)[0] ^= 1
            assert Run(CASES[case]).load(changed, HALF).digest() != digest(case, HALF), i
            assert runs.state_as_text(changed) != runs.state_as_text(kept)


# --- logs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", LOGS)
def test_a_log_of_today_has_the_bytes_of_the_kept_one(log, backend, tmp_path):
    kept = runs.log_file(log).read_bytes()
    if backend != "reference":
        assert runs.write_log(log, tmp_path / "log") == kept
        return
    steps = LOGS[log][1] + EARLY
    written = runs.write_log(log, tmp_path / "log", steps)
    assert step_log.read(tmp_path / "log").steps == EARLY
    assert kept.startswith(written)


@pytest.mark.parametrize("log", LOGS)
def test_a_log_is_replayed(log, fastest):
    case, begin = LOGS[log]
    contents = step_log.read(runs.log_file(log))
    assert contents.torn == 0
    for stop in (LATER, STEPS):
        base = runs.begun(log).model
        optimizer = step_log.optimizer_for(contents.header, base.weights())
        step_log.replay(contents, optimizer, until=stop - begin)
        assert runs.digest(base, optimizer) == digest(case, stop)


@pytest.mark.parametrize("log", LOGS)
def test_a_kept_log_goes_on(log, fastest, tmp_path):
    """It is cut off within a record, as it is when a process is killed."""
    case, begin = LOGS[log]
    kept = runs.log_file(log).read_bytes()
    contents = step_log.read(runs.log_file(log))
    # Where weights are never written there is no record of a step that failed.
    over = [i for i, r in enumerate(contents.records, 1) if r.outcome in ("updated", "skipped")]
    left = len(contents.records) - over[LATER - begin - 1]
    path = tmp_path / "log"
    path.write_bytes(kept[: 5 - left * contents.header.record.size])
    run = runs.begun(log)
    with step_log.StepLog.resume(path, run.optimizer, run=runs.IN_HEADER) as going_on:
        assert going_on.steps == LATER - begin
        run.step = LATER
        assert run.digest() == digest(case, LATER)
        run.to(STEPS)
    check(case, run, entries_until(case, LATER))
    assert path.read_bytes() == kept


# --- directions -----------------------------------------------------------------------------------


def test_directions_have_their_bits(backend):
    assert {**runs.directions(), **runs.low_rank_directions()} == DIRECTIONS


# --- Triton ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What Triton's interpreter gives, which is chosen for a whole process."""
    done = subprocess.run(
        [sys.executable, "-m", "golden.runs"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1", "ADAMEZO_BACKEND": "triton"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    if not found["able"]:
        pytest.skip(found["reason"])
    return found


@pytest.mark.parametrize("case", runs.IN_TRITON)
def test_a_run_in_triton_has_its_bits(case, interpreted):
    assert interpreted["runs"][case] == digest(case, FIRST)


def test_directions_in_triton_have_their_bits(interpreted):
    assert interpreted["directions"] == DIRECTIONS
