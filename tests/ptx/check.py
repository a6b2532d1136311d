"""`make ptx-check`: the CUDA kernels launched on the CPU (tests/ptx/README.md).

make ptx-check COUNT=5000 SEED=7      # more random calls than by default, and others
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ptx.build import FOLDER, ROOT, build

start = time.perf_counter()


def run(name: str, *arguments: str, **environment: str) -> str:
    """Runs Python with the arguments, and returns what it printed last.

    Raises:
        SystemExit: it failed; all that it printed is in the message.
    """
    before = time.perf_counter()
    paths = [ROOT / "tests", ROOT, ROOT / "python_api", os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, paths)))} | environment
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nptx-check: {name} failed")
    last = done.stdout.strip().splitlines()[-1].strip("= ")
    print(f"{name}: {last} ({time.perf_counter() - before:.0f} s)", flush=True)
    return last


def summary(reports: list[Path]) -> str:
    """What ran, by the reports of all processes.

    Raises:
        SystemExit: a kernel was never launched.
    """
    launches: dict[str, int] = {}
    covered: dict[str, int] = {}
    pieces: dict[str, int] = {}
    for line in (line for report in reports for line in report.read_text().splitlines()):
        count, _, bits, name = line.split()
        launches[name] = launches.get(name, 0) + int(count)
        covered[name] = covered.get(name, 0) | int(bits, 2)
        pieces[name] = len(bits)
    never = [name for name in launches if not launches[name]]
    if never:
        raise SystemExit("ptx-check: never launched: " + ", ".join(sorted(never)))
    ran = sum(bin(bits).count("1") for bits in covered.values())
    return (
        f"{len(launches)} kernels, {sum(launches.values())} launches, {ran} of "
        f"{sum(pieces.values())} pieces of code ran"
    )


def main() -> None:
    options = argparse.ArgumentParser(description="the CUDA kernels launched on the CPU")
    options.add_argument("--count", type=int, default=300, help="how many random calls")
    options.add_argument("--seed", type=int, default=1, help="of the first of them")
    given = options.parse_args()
    try:
        module = build("ptx_native")
    except RuntimeError as error:
        raise SystemExit(f"{error}\nptx-check: the build failed") from None
    print(f"built after {time.perf_counter() - start:.0f} s", flush=True)
    reports = FOLDER / "ptx" / "reports"
    reports.mkdir(exist_ok=True)
    for report in reports.iterdir():
        report.unlink()

    def launched(name: str, *arguments: str) -> None:
        environment = {"ADAMEZO_PTX_MODULE": str(module)}
        run(name, *arguments, ADAMEZO_PTX_REPORT=str(reports / name), **environment)

    pytest = ("-m", "pytest", "-q", "-p", "ptx.launched", "-p", "no:cacheprovider")
    fuzz = ("-m", "ptx.fuzz", f"--seed={given.seed}", f"--count={given.count}")
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        done = [
            pool.submit(launched, "gpu_tests", *pytest, "tests/gpu/test_cuda_gpu.py"),
            pool.submit(launched, "bodies", *pytest, "tests/gpu/test_cuda_bodies.py"),
            pool.submit(launched, "fuzz", *fuzz),
            pool.submit(run, "faults", "-m", "pytest", "-q", "tests/ptx"),
        ]
        for future in done:
            future.result()
    print(f"ptx-check: {summary(list(reports.iterdir()))}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
