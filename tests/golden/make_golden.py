"""Writes the golden files. By hand only, and rarely: README.md says when.

    python -m tests.golden.make_golden [--again]

Every backend and instruction set of this machine runs everything; where any two differ in a bit,
nothing is written. Without --again files that are there already are left alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import adamezo
import adamezo_kernels
from adamezo_kernels import STREAM_VERSION
from adamezo_kernels.backends import native

from . import runs


@contextmanager
def backend(name: str, isa: str | None) -> Iterator[None]:
    before = os.environ.get("ADAMEZO_BACKEND")
    os.environ["ADAMEZO_BACKEND"] = name
    try:
        if isa is None:
            yield
        else:
            with native.use_isa(isa):
                yield
    finally:
        del os.environ["ADAMEZO_BACKEND"]
        if before is not None:
            os.environ["ADAMEZO_BACKEND"] = before


def in_triton() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.runs"],
        env=os.environ | {"TRITON_INTERPRET": "1", "ADAMEZO_BACKEND": "triton"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_that_they_tell(results: dict[str, Any]) -> None:
    """Runs are different from each other, finite, and move the weights."""
    by_digest: dict[str, list[str]] = {}
    for name, (kept, trace) in results.items():
        by_digest.setdefault(kept["digests"][str(runs.STEPS)], []).append(name)
        happened = set(runs.CASES[name].events.values())
        assert any(row[0] == "failed" for row in trace) == any("failed" in e for e in happened)
        finite = all(math.isfinite(float.fromhex(row[1])) for row in trace if row[0] == "done")
        assert finite == ("skipped" not in happened), name
        run = runs.Run(runs.CASES[name])
        start = run.model.weights()
        start = {n: w.clone() for n, w in start.items()}
        run.to(runs.STEPS)
        for n, w in run.model.weights().items():
            assert w.isfinite().all(), (name, n)
            assert w.abs().max() < 16 if w.numel() else True, (name, n)
            moved = not torch.equal(w, start[n])
            assert moved == (w.numel() > 0 and n != "frozen.weight") or "defaults" in name, (
                name,
                n,
            )
    alike = {frozenset(names) for names in by_digest.values() if len(names) > 1}
    expected: dict[str, set[str]] = {}
    for name, other in runs.ALIKE.items():
        expected.setdefault(other, {other}).add(name)
    assert alike == {frozenset(names) for names in expected.values()}, alike


def made() -> dict[str, Any]:
    """By what: the last commit that changed what is tested, and versions."""
    folders = ("adamezo_kernels", "python_api", "csrc")
    git = ("git", "-C", str(runs.HERE))
    for package in (adamezo, adamezo_kernels):
        if runs.HERE.parents[1] not in Path(package.__file__).resolve().parents:
            raise SystemExit(
                f"{package.__name__} is imported from {package.__file__}, and not from the folder "
                "that these files are in: put it first in PYTHONPATH, or install it from here"
            )
    commit = subprocess.run(
        [*git, "log", "-1", "--format=%H", "--", *(f":/{folder}" for folder in folders)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *(f":/{folder}" for folder in folders)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    if changed.stdout:
        raise SystemExit(f"not committed, so that no commit could be named:\n{changed.stdout}")
    return {
        "commit": commit.stdout.strip(),
        "stream_version": STREAM_VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
    }


def write(kept: dict[str, Any], traces: dict[str, Any], directions: dict[str, str]) -> None:
    runs.RUNS.write_text(json.dumps(kept, indent=1) + "\n")
    runs.DIRECTIONS.write_text(json.dumps(directions, indent=1) + "\n")
    # Without a time, so that the same content is the same file.
    text = json.dumps(traces, separators=(",", ":")).encode()
    runs.TRACES.write_bytes(gzip.compress(text, mtime=0))
    # States and logs that are there stay: they are of their time, former names of options included.
    for name, of in runs.STATES.items():
        file = runs.state_file(name)
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            torch.save(runs.Run(runs.CASES[of]).to(runs.HALF).saved(), file)
    for name in runs.LOGS:
        file = runs.log_file(name)
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            runs.write_log(name, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--again",
        action="store_true",
        help="where files are there: write numbers anew, and states and logs that are missing",
    )
    again = parser.parse_args().again
    if not again and runs.RUNS.exists():
        raise SystemExit(
            f"{runs.RUNS} is there. Golden files change with STREAM_VERSION or for a new method "
            "only (README.md): if this is so, pass --again, and read the difference"
        )
    torch.set_num_threads(1)
    by = made()
    results: dict[str, Any] = {}
    directions: dict[str, str] = {}
    names: list[str] = []
    for name, isa in [*(("native", isa) for isa in native.instruction_sets()), ("reference", None)]:
        names.append(f"{name} {isa}" if isa else name)
        with backend(name, isa):
            found = {case: runs.result_of(case) for case in runs.CASES}
            elements = {**runs.directions(), **runs.low_rank_directions()}
        if not results:
            results, directions = found, elements
            check_that_they_tell(results)
        wrong = [key for key in found if found[key] != results[key]]
        wrong += [key for key in elements if elements[key] != directions[key]]
        if wrong:
            raise SystemExit(f"{names[-1]} and {names[0]} differ in: {'; '.join(wrong)}")
        print(f"{names[-1]}: {len(found)} runs, {len(elements)} pieces of directions", flush=True)
    interpreted = in_triton()
    names.append(f"triton: {interpreted['reason']}")
    if interpreted["able"]:
        early = {name: results[name][0]["digests"][str(runs.FIRST)] for name in interpreted["runs"]}
        if interpreted["runs"] != early or interpreted["directions"] != directions:
            raise SystemExit(f"{names[-1]}: it differs from {names[0]}")
    print(names[-1])
    kept = {name: result for name, (result, _) in results.items()}
    traces = {name: trace for name, (_, trace) in results.items()}
    write({"made by": {**by, "backends": names}, "runs": kept}, traces, directions)


if __name__ == "__main__":
    main()
