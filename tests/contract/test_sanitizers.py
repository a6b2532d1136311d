"""The compiled kernels under the address and the undefined-behaviour sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # a debugger's work, not ours

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja"
    ),
]


@pytest.fixture(scope="module")
def program() -> Path:
    for command in (
        ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DADAMEZO_CUDA=OFF",
         "-DADAMEZO_SANITIZE=address,undefined", f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", BUILD],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "kernels_sanitized"


def test_every_kernel_over_odd_sizes(program):
    done = subprocess.run([program], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = re.fullmatch(r"(\d+) calls\n", done.stdout)
    assert calls
    assert int(calls.group(1)) > 5000


def test_one_element_too_many_is_caught(program):
    done = subprocess.run([program, "overrun"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "not caught" not in done.stdout
