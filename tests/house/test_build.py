"""The build, for real on a copy of the tree: with CUDA and without, with a compiler and without.

Where configuring is enough to see the outcome nothing is compiled; one wheel is. CUDA's kernels are
compiled by `make nvcc`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "c++ g++ gcc cc as ld ar ranlib nm strip"  # what CMake and the compiler call by name
# pip puts these beside Python, which need not be on PATH.
SCRIPTS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
CMAKE, NINJA = (shutil.which(tool, path=SCRIPTS) for tool in ("cmake", "ninja"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin:/opt/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")


def run(command: list[object], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree without anything built in it."""
    copy = tmp_path_factory.mktemp("source") / "adamezo"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, copy, ignore=unwanted)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """No nvcc and no switch set; PATH has the compiler's tools alone."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS.split():
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    unset = ("ADAMEZO_", "CUDA", "CMAKE_", "CXX", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    return kept | {"PATH": str(tools), "ADAMEZO_CUDA_ROOTS": ""}


@pytest.fixture
def configure(source, tmp_path, environment):
    """``configure(ADAMEZO_CUDA="ON", ...)`` with these environment variables; (worked, output)."""

    def call(**variables: str) -> tuple[bool, str]:
        command = [CMAKE, "-S", source, "-B", tmp_path / "build", "-G", "Ninja"]
        command += [f"-DCMAKE_MAKE_PROGRAM={NINJA}", f"-DPython_EXECUTABLE={sys.executable}"]
        command += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
        done = run(command, env=environment | variables)
        return done.returncode == 0, " ".join(done.stdout.split())

    return call


def fake_nvcc(folder: Path, body: str) -> str:
    script = folder / "nvcc"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)


# An nvcc is broken in three ways: it fails, it says nothing that makes sense, it compiles nothing.
BROKEN = {
    "fails": "echo no driver here >&2; exit 1",
    "garbage": "echo '\"; $(garbage) <&> %d'",
    "compiles nothing": (
        '[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88" && exit 0\n'
        "exit 1"
    ),
}


class TestCuda:
    def test_off(self, configure):
        variables = {"CUDACXX": NVCC} if NVCC else {}
        worked, output = configure(ADAMEZO_CUDA="OFF", **variables)
        assert worked, output
        assert "CUDA off: ADAMEZO_CUDA=OFF" in output

    def test_no_nvcc(self, configure):
        worked, output = configure()
        assert worked, output
        assert "CUDA off: no nvcc found (looked in CUDACXX" in output

    def test_no_nvcc_but_asked_for(self, configure):
        worked, output = configure(ADAMEZO_CUDA="ON")
        assert not worked
        assert "ADAMEZO_CUDA=ON, but no nvcc found" in output
        assert "set ADAMEZO_CUDA=OFF" in output

    @pytest.mark.parametrize("kind", BROKEN)
    def test_broken_nvcc(self, configure, tmp_path, kind):
        nvcc = fake_nvcc(tmp_path, BROKEN[kind])
        worked, output = configure(CUDACXX=nvcc)
        assert worked, output
        assert "is broken" in output
        worked, output = configure(CUDACXX=nvcc, ADAMEZO_CUDA="ON")
        assert not worked
        assert "is broken" in output
        assert "set ADAMEZO_CUDA=OFF" in output

    def test_unknown_switch(self, configure):
        worked, output = configure(ADAMEZO_CUDA="MAYBE")
        assert not worked
        assert "ADAMEZO_CUDA is MAYBE; it may be AUTO, ON or OFF" in output

    @needs_nvcc
    def test_nvcc(self, configure, tmp_path):
        worked, output = configure(ADAMEZO_CUDA_ROOTS=str(Path(NVCC).parent.parent))
        assert worked, output
        assert "for 80-real 90-real 90-virtual" in output
        commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
        cuda = [c["command"] for c in commands if c["file"].endswith(".cu")]
        assert cuda
        for command in cuda:
            assert "--fmad=false" in command
            assert "fast" not in command.replace("kernels_fast", "")
            for target in ("code=[sm_80]", "code=[sm_90]", "code=[compute_90]"):
                assert target in command

    @needs_nvcc
    def test_architecture_that_the_toolkit_lacks(self, configure):
        worked, output = configure(CUDACXX=NVCC, ADAMEZO_CUDA_ARCHITECTURES="1-real")
        assert worked, output
        assert "it compiles nothing for 1-real" in output


def test_flags_keep_every_bit(configure, tmp_path):
    """No file may be compiled so that the compiler can change a result, or use what a CPU lacks."""
    worked, output = configure()
    assert worked, output
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    by_name = {Path(c["file"]).name: c["command"].split() for c in commands}
    assert {"bindings.cpp", "dispatch.cpp", "kernels_portable.cpp"} <= by_name.keys()
    for name, flags in by_name.items():
        assert "-ffp-contract=off" in flags, name
        assert not {"-Ofast", "-ffast-math", "-march=native"} & set(flags), name
        machine = {flag for flag in flags if flag.startswith("-m")}
        assert not machine or name in ("kernels_avx2.cpp", "kernels_avx512.cpp"), name


# ---- packages ------------------------------------------------------------------------------------


def pip(*arguments: object, source: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return run([*command, "--no-deps", "--no-build-isolation", source], env=os.environ | env)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """A wheel with the compiled module, built where importing torch is an error."""
    folder = tmp_path_factory.mktemp("wheel")
    poison = folder / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise RuntimeError('the build imported torch')\n")
    env = {"PYTHONPATH": str(poison), "ADAMEZO_CUDA": "OFF"}
    imported = run([sys.executable, "-c", "import torch"], env=os.environ | env)
    assert "the build imported torch" in imported.stdout
    done = pip("wheel", "--wheel-dir", folder, source=source, env=env)
    assert done.returncode == 0, done.stdout
    (built,) = folder.glob("*.whl")
    return built


def python_files(folder: Path) -> set[str]:
    return {f.relative_to(folder.parent).as_posix() for f in folder.rglob("*.py")}


@pytest.mark.slow
def test_wheel_contents(wheel, source):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    (module,) = (n for n in names if n.startswith("adamezo_kernels/_native.") and n.endswith(".so"))
    modules = python_files(source / "adamezo_kernels")
    modules |= python_files(source / "python_api" / "adamezo")
    typing = {"adamezo/py.typed", "adamezo_kernels/py.typed", "adamezo_kernels/_native.pyi"}
    assert names == modules | typing | {module}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on this machine")
def test_instruction_sets_stay_apart(wheel, source):
    """A function that a file for AVX shares by name could be the one linked for every CPU."""
    objects = [o for o in (source / "build").rglob("kernels_*.o") if "cuda" not in o.parts]
    assert objects
    for file in objects:
        shared = [line for line in run(["nm", file]).stdout.splitlines() if line[17:18] in "WVu"]
        assert not shared, file.name


def test_sdist_holds_every_source(source, tmp_path):
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    done = run([sys.executable, "-c", code], cwd=source, env=os.environ | {"ADAMEZO_NATIVE": "OFF"})
    assert done.returncode == 0, done.stdout
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (unpacked,) = (p for p in tmp_path.iterdir() if p.is_dir())
    wanted = [f for f in (source / "csrc").rglob("*") if f.is_file()]
    assert wanted
    for file in [*wanted, source / "CMakeLists.txt", source / "LICENSE"]:
        assert (unpacked / file.relative_to(source)).is_file(), file.name


USE = """
import adamezo, adamezo_kernels, torch
print(adamezo.__file__, adamezo_kernels.__file__)
out = torch.full((8,), float("nan"))
adamezo_kernels.sample_(out, adamezo_kernels.PhiloxState(1, 2))
assert out.isfinite().all()
print({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line})
"""


def python(*arguments: str, packages: Path) -> str:
    """What Python prints that finds our packages in this folder alone."""
    env = {n: v for n, v in os.environ.items() if not n.startswith("ADAMEZO_")}
    # -S, and torch's folder by hand: an editable install would otherwise lend its compiled module.
    site = [path for path in sys.path if path.endswith("-packages")]
    env["PYTHONPATH"] = os.pathsep.join([str(packages), *site])
    done = run([sys.executable, "-S", *arguments], env=env, cwd=packages.parent)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CXX": "/nonexistent"}, "no compiler at CXX=/nonexistent"),
        ({"ADAMEZO_NATIVE": "OFF"}, "ADAMEZO_NATIVE=OFF"),
    ],
    ids=["no compiler", "switched off"],
)
def test_pure_python_install(source, tmp_path, env, reason):
    target = tmp_path / "installed"
    done = pip("install", "--verbose", "--target", target, source=source, env=env)
    assert done.returncode == 0, done.stdout
    assert f"adamezo: pure-Python install ({reason})" in done.stdout
    assert not list(target.rglob("_native*.so"))
    assert python("-c", USE, packages=target).count(str(target)) == 2
    assert "compiled module cannot be imported" in python("-m", "adamezo_kernels", packages=target)


@pytest.mark.slow
def test_compiled_install_shares_torchs_openmp(wheel, tmp_path):
    """Two OpenMP runtimes in a process would each start a thread for every core."""
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    output = python("-c", USE, packages=target)
    assert output.count(str(target)) == 2
    assert output.splitlines()[-1].count("libgomp") == 1


def test_compiler_that_fails(source):
    """Not taken for a missing one: whoever has a compiler wants to know."""
    done = pip("wheel", source=source, env={"CXX": "/bin/false"})
    assert done.returncode != 0
    assert "set ADAMEZO_NATIVE=OFF to install the slower pure-Python package" in done.stdout
