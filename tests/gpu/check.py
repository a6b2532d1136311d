"""`make gpu-check`: what only a CUDA device can show, in one call of less than ten minutes.

    make gpu-check PY=python3 OUT=build/gpu

It works on a machine without network whose `python3` has torch, triton, pytest, cmake, ninja and
pybind11, and which has nvcc: it builds the compiled module in place, for this device alone, and
imports the packages from this checkout. It fails where no device is seen, where one of the two GPU
backends cannot run, and where a file's tests are all skipped. What it printed and the benchmark's
CSV file are in the output folder.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[2]
# All files with tests for a device. What other files import need not be there.
FILES = ("tests/gpu", "tests/optimizers/test_capturable.py")
# What would make everything after it fail or hang, so it runs first and alone.
RISKIEST = "root or many_directions or failed_launch or int32 or side_stream"
WORKERS = min(12, os.cpu_count() or 1)  # each one has a CUDA context, of about half a GiB

start = time.perf_counter()


def run(name: str, output: Path, *arguments: str, **environment: str) -> None:
    """Runs Python with the arguments; its output goes to the terminal and to a file."""
    print(f"== {name}, after {time.perf_counter() - start:.0f} s", flush=True)
    paths = [str(ROOT / "python_api"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
    command = [sys.executable, *arguments]
    with (
        open(output / f"{name}.log", "w") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            print(line, end="", flush=True)
    if process.returncode:
        raise SystemExit(f"gpu-check: {name} failed with exit status {process.returncode}")


def tests(name: str, output: Path, *arguments: str) -> None:
    """Runs tests, and fails where all tests of a file were skipped or where there were none."""
    report = output / f"{name}.xml"
    run(name, output, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *arguments)
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for case in ElementTree.parse(report).iter("testcase"):
        file = ".".join(case.get("classname", "").split(".")[:3])
        counts[file]["skipped" if case.find("skipped") is not None else "passed"] += 1
    for file, count in counts.items():
        print(f"{file}: {count['passed']} passed, {count['skipped']} skipped")
        if not count["passed"]:
            raise SystemExit(f"gpu-check: every test of {file} was skipped, so nothing was shown")
    if not counts:
        raise SystemExit(f"gpu-check: {name} ran no test")


def main() -> None:
    options = argparse.ArgumentParser(description="what only a CUDA device can show")
    options.add_argument("--output", type=Path, default=ROOT / "build" / "gpu")
    output = options.parse_args().output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        raise SystemExit(
            f"gpu-check: torch {torch.__version__} sees no CUDA device, so no GPU test was run"
        )
    architecture = "{}{}-real".format(*torch.cuda.get_device_capability())
    print(f"{torch.cuda.get_device_name()}, {architecture}, torch {torch.__version__}", flush=True)
    switches = {"ADAMEZO_CUDA": "ON", "ADAMEZO_CUDA_ARCHITECTURES": architecture}
    run("build", output, "setup.py", "-q", "build_ext", "--inplace", **switches)
    run("backends", output, "-m", "adamezo_kernels", "--require", "cuda", "triton")
    tests("riskiest_tests", output, "-x", "-k", RISKIEST, "tests/gpu")
    parallel = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    tests("tests", output, *parallel, *FILES)
    benchmark = ["-m", "benchmarks.kernels", "--device=cuda", "--quick"]
    run("benchmark", output, *benchmark, "--output", str(output / "kernels_gpu.csv"))
    print(f"gpu-check: all passed in {time.perf_counter() - start:.0f} s; see {output}")


if __name__ == "__main__":
    main()
