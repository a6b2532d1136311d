"""Processes of their own for Triton's interpreter, and which Triton is here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def in_a_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=env | environment,
    )


def installed() -> tuple[int, int] | None:
    try:
        import triton as found
    except Exception:
        return None
    major, minor = found.__version__.split(".")[:2]
    return int(major), int(minor)


def needs_linker(target: str) -> None:
    """Triton brings one for AMD since 3.8."""
    if target.startswith("hip") and installed() < (3, 8):
        if not shutil.which("ld.lld", path="/opt/rocm/llvm/bin"):
            pytest.skip(f"Triton {installed()} compiles for AMD with the linker of ROCm")


needs_triton = pytest.mark.skipif(installed() is None, reason="no Triton: `pip install triton`")
