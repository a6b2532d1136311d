"""Builds the modules of ptx.cmake, in the build folder of the package, whose objects they share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
FOLDER = ROOT / "build" / f"{sys.implementation.cache_tag}-{Path(COMPILER).name}"  # as in setup.py
TOOLKITS = os.pathsep.join(["/usr/local/cuda/bin", "/opt/cuda/bin"])
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=TOOLKITS)


def build(target: str, **switches: str) -> Path:
    """The path of a module, built with switches of CMake's where some are given.

    Raises:
        RuntimeError: with what CMake, nvcc, the translation or the compiler said.
    """
    # pip puts cmake and ninja beside Python, which need not be on PATH.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    configure = ["cmake", "-S", ROOT, "-B", FOLDER, "-G", "Ninja", "-DADAMEZO_PTX=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-D{name}={value}" for name, value in switches.items()]
    for command in (configure, ["cmake", "--build", FOLDER, "--target", target]):
        done = subprocess.run(
            [shutil.which("cmake", path=path) or "cmake", *map(str, command[1:])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Not with -D, which the package's later builds in this folder would meet again.
            env=os.environ | {"PATH": path, "ADAMEZO_CUDA": "ON"},
        )
        if done.returncode:
            raise RuntimeError(done.stdout)
    return FOLDER / "ptx" / f"{target}.so"
