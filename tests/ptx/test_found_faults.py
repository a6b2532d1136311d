"""Faults that a launch is checked for are found: kernels with one each (faulty.cu), and faults
planted in the module's own sources."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from ptx.build import FOLDER, NVCC, ROOT, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine"),
]


@pytest.fixture(scope="module")
def faulty():
    """``faulty(name)``: what CUDA says of that launch of faulty.cu."""
    library = ctypes.CDLL(str(build("ptx_faulty")))
    library.launch.restype = ctypes.c_char_p
    library.launch.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
    _, given, _, made, _ = torch.zeros(5, 64)  # aligned to 16 bytes, with some memory between them
    given.copy_(torch.arange(64) + 1)
    ranges = torch.tensor(
        [[row.data_ptr(), row.data_ptr() + 256, row is made] for row in (given, made)]
    )
    library.ptx_allow(ctypes.c_void_p(ranges.data_ptr()), 2)

    def launch(name: str) -> str:
        made.zero_()
        said = library.launch(name.encode(), given.data_ptr(), made.data_ptr()).decode()
        if not said:
            assert torch.equal(made, given.flip(0)), name
        return said

    return launch


# Depending on which of two threads comes first.
NO_BARRIER = "race: no barrier since another thread wrote|read of shared memory that nobody wrote"
FAULTS = {
    "without_the_barrier": NO_BARRIER,
    "without_the_second_barrier": "race: no barrier since another thread (read|wrote)",
    "without_the_barrier_of_warps": NO_BARRIER,
    "without_the_second_barrier_of_warps": "race: no barrier since another thread (read|wrote)",
    "barrier_of_warps_between_warps": NO_BARRIER,
    "missed_barrier_of_a_warp": "31 threads wait at a barrier of their warp that 1 threads missed",
    "two_writers": "race: no barrier since another thread wrote this shared memory",
    "missed_barrier": "63 threads wait at a barrier that 1 threads missed",
    "never_written": "read of shared memory that nobody wrote: 4 bytes at 0x14, block 0, thread 5",
    "misaligned_load": "misaligned access of global memory: 16 bytes",
    "misaligned_store": "misaligned access of global memory: 8 bytes",
    "misaligned_shared": "misaligned access of shared memory: 16 bytes",
    "behind_shared_memory": "access behind the end of shared memory: 4 bytes at 0x100",
    "behind_the_input": "read of memory that the call does not read: 4 bytes",
    "behind_the_parameters": "read of memory that the call does not read: 4 bytes",
    "misaligned_parameter": "misaligned access of parameters: 8 bytes",
    "before_the_output": "write of memory that the call does not write: 4 bytes",
    "write_of_the_input": "write of memory that the call does not write: 4 bytes",
    "more threads than bounded": "a block of impossible shape",
    "more threads than there are": "a block of impossible shape",
    "no blocks": "a grid of impossible shape",
    "a second dimension": "a grid of impossible shape",
    "shared memory not asked for": "more dynamic shared memory than was asked for",
    "more shared memory than there is": "more shared memory than there is",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(faulty, name):
    assert re.search(FAULTS[name], faulty(name))
    assert faulty("right") == "", "a fault is left over"


def test_no_fault_is_found_where_there_is_none(faulty):
    assert faulty("shared memory asked for") == ""
    assert faulty("right_in_warps") == ""
    assert faulty("right_from_parameters") == ""


# --- planted in csrc/cuda ------------------------------------------------------------------------

PLANTED = [
    # A barrier removed, from calls along one direction, so that the others reach their own faults.
    ("kernels.cuh", "  __syncthreads();\n", "  if (given.job.horizon != 1) __syncthreads();\n"),
    # A test of alignment removed.
    ("bodies.cuh", "reinterpret_cast<uint64_t>(from) % sizeof(Words16) == 0;", "true;"),
    # The request for shared memory dropped: as if none were ever needed.
    ("kernels.cuh", "size_t kWithoutAsking = 48 << 10,", "size_t kWithoutAsking = ~size_t(0),"),
]
KERNELS = "(Sample|Update).*exact_normals.*EfEEEEv"  # of float32
CALLS = """
import torch
from ptx import launched
from adamezo_kernels import Plan, PhiloxState, sample_, update_

launched.stand_in()

def update(horizon, shift=0):
    tensor = torch.ones(2048)[shift:]
    states = [PhiloxState(7, k) for k in range(horizon)]
    update_(Plan([tensor]), states, [0.1] * horizon, [0.1] * horizon, lr=1e-3, backend=backend)
    return tensor

calls = [
    lambda: update(2),
    lambda: sample_(torch.empty(2048), PhiloxState(7, 1), backend=backend),
    lambda: update(2, shift=1),
    lambda: update(3000),
]
for call in calls:
    backend = "native"
    expected = call()
    backend = "cuda"
    try:
        print("right" if torch.equal(call(), expected) else "wrong")
    except RuntimeError as error:
        print(str(error).replace("\\n", " "))
"""


def said_by(module) -> list[str]:
    folders = [ROOT / "tests", ROOT, ROOT / "python_api"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "ADAMEZO_PTX_MODULE": str(module),
    }
    done = subprocess.run(
        [sys.executable, "-c", CALLS], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_planted_faults_are_found():
    csrc = FOLDER / "planted" / "csrc"
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", csrc)
    for name, right, wrong in PLANTED:
        file = csrc / "cuda" / name
        assert file.read_text().count(right) == 1, f"{name} has changed: {right}"
        file.write_text(file.read_text().replace(right, wrong))
    switches = {"ADAMEZO_PTX_PLANTED": str(csrc), "ADAMEZO_PTX_PLANTED_KERNELS": KERNELS}
    said = said_by(build("ptx_planted", **switches))
    assert said[0] == "right"
    assert re.search(NO_BARRIER, said[1])
    assert "misaligned access of global memory: 16 bytes" in said[2]
    assert "more dynamic shared memory than was asked for" in said[3]


def test_the_same_calls_are_right_without_the_faults():
    assert said_by(build("ptx_native")) == ["right"] * 4
