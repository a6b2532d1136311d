"""Builds adamezo_kernels._native with CMake and Ninja; everything static is in pyproject.toml.

ADAMEZO_NATIVE=OFF       a pure-Python install: the reference backend does the work
ADAMEZO_CUDA=AUTO|ON|OFF, ADAMEZO_CUDA_ARCHITECTURES, CXX, CUDACXX    see CMakeLists.txt
CMAKE_ARGS               more arguments for CMake
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SWITCH_OFF = "set ADAMEZO_NATIVE=OFF to install the slower pure-Python package without it"


def find_compiler() -> str | None:
    """The C++ compiler that CMake will take, or None where there is none."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)[0]] if named else ["c++", "g++", "clang++"]
    return next((name for name in candidates if shutil.which(name)), None)


def find_tool(name: str) -> str:
    """`cmake` or `ninja`: the build requirement's own first, whose folder may not be on PATH."""
    try:
        module = importlib.import_module(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
    except ImportError:
        folder = None
    found = (folder and shutil.which(name, path=folder)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"adamezo: no {name} found. Run `pip install {name}`, or {SWITCH_OFF}.")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # Kept between builds, one for each Python and compiler: a rebuild compiles what changed.
        compiler = Path(find_compiler() or "").name
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{compiler}"
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"adamezo: building the compiled module failed: see the output above of "
                f"`{shlex.join(error.cmd)}`. Mend that, or {SWITCH_OFF}."
            ) from None
        shutil.copy2(build / output.name, output)


class BuildPy(build_py):
    def run(self) -> None:
        # setuptools would pack whatever an older build left there.
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        if reason := why_pure_python():
            print(f"adamezo: pure-Python install ({reason}): the reference backend does the work")
        super().run()


def why_pure_python() -> str:
    """The reason not to build the compiled module; empty where there is none."""
    if os.environ.get("ADAMEZO_NATIVE", "").upper() == "OFF":
        return "ADAMEZO_NATIVE=OFF"
    if find_compiler() is None:
        named = os.environ.get("CXX")
        return f"no compiler at CXX={named}" if named else "no c++, g++ or clang++ on PATH"
    return ""


setup(
    packages=[
        "adamezo_kernels",
        "adamezo_kernels.backends",
        "adamezo",
        "adamezo.engine",
        "adamezo.engine.perturb",
        "adamezo.engine.perturb.served",
        "adamezo.methods",
        "adamezo.distributed",
        "adamezo.adapters",
        "adamezo.runlog",
        "adamezo.finetune",
        "adamezo.finetune.tasks",
        "adamezo.command",
        "adamezo.integrations",
        "adamezo.rewards",
    ],
    package_dir={"adamezo": "python_api/adamezo", "adamezo_kernels": "adamezo_kernels"},
    package_data={"adamezo": ["py.typed"], "adamezo_kernels": ["py.typed", "_native.pyi"]},
    ext_modules=[] if why_pure_python() else [Extension("adamezo_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
