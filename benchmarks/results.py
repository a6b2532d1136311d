"""One row type for every number that a benchmark measures, one writer and one reader.

A file is CSV in long format: a row is one metric of one variant at one x. What else tells rows
apart (a type, a number of threads, a seed) is in `settings`, as "name=value; name=value", so that
every benchmark has the same columns. Each row has its conditions: device, versions, commit,
command. The reader gives a pandas table with a column more for each setting, and one named after
`x_name`, so that tables and fits select by name.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import fcntl
import functools
import importlib
import io
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import pandas
import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One metric of one variant at one x. Seconds, bytes, hertz, or 1 for what has no unit.

    `repeats` is how many measurements the quantiles are of; 0 says that the number was counted or
    predicted, and not timed.
    """

    benchmark: str
    metric: str
    unit: str
    variant: str
    settings: str = ""
    x_name: str = ""
    x_value: float | None = None
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    repeats: int = 0
    device: str = ""
    clock_hz: float | None = None
    torch: str = ""
    python: str = ""
    compiler: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    @property
    def columns(self) -> dict[str, Any]:
        """The settings and x by name, numbers as float."""
        found: dict[str, Any] = {}
        for part in filter(None, self.settings.split("; ")):
            name, text = part.split("=", 1)
            try:
                found[name] = float(text)
            except ValueError:
                found[name] = text
        return found | ({self.x_name: self.x_value} if self.x_name else {})


COLUMNS = [f.name for f in fields(Row)]
NUMBERS = ["x_value", "median", "p20", "p80", "clock_hz"]
# Settings that a row may have; a table has a column for each, empty where no row has it.
SETTINGS = (
    *("what", "type", "horizon", "threads", "isa", "elements", "method", "part", "tokens"),
    *("weights", "betas", "seed", "steps", "step", "lr", "held_out"),
    *("cycles", "update", "job", "mode", "budget", "forwards", "by", "target"),
    *("attack", "outcome", "ranks", "latency", "loss"),
)


def settings(**columns: object) -> str:
    """The text of `Row.settings`; what is empty or None is left out."""
    return "; ".join(f"{k}={_cell(v)}" for k, v in columns.items() if v not in ("", None))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The columns of a Row that sum up repeated measurements."""
    p20, median, p80 = numpy.quantile(values, [0.2, 0.5, 0.8]).tolist()
    return dict(median=median, p20=p20, p80=p80, repeats=len(values))


def _cell(value: object) -> str:
    """Floats that are no integers keep six significant digits, far below the noise of timings."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.6g}"
    return "" if value is None else str(value)


Point = tuple[str, str, float, float, int]
"""(metric, unit, x, value, repeats)"""

# Files -------------------------------------------------------------------------------------------


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes a file of these rows alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_lines([COLUMNS, *map(dataclasses.astuple, rows)]))


def run_once(path: Path, run: Row, make: Callable[[], Iterable[Point]]) -> list[Row]:
    """The rows of a run, a point each, which is made and added to a file unless it is there.

    Other processes may be adding runs to the same file: if one has added this run meanwhile, its
    rows count. `run` has what a run's rows share.
    """

    def there() -> list[Row]:
        same = (run.variant, run.settings)
        return [row for row in load(path) if (row.variant, row.settings) == same]

    if made := there():
        print(f"{run.variant}, {run.settings}: there already", flush=True)
        return made
    made = [
        dataclasses.replace(run, metric=metric, unit=unit, x_value=x, median=value, repeats=repeats)
        for metric, unit, x, value, repeats in make()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if others := there():
            return others
        header = [] if path.stat().st_size else [COLUMNS]
        # One write, so that an interrupt leaves all of a run or nothing.
        file.write(_lines([*header, *map(dataclasses.astuple, made)]))
    ends = {row.metric: f"{row.metric} {row.median:.4g}" for row in made}
    print(f"{run.variant}, {run.settings}: {', '.join(ends.values())}", flush=True)
    return made


def _lines(lines: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(_cell, line) for line in lines)
    return text.getvalue().encode()


def load(path: Path) -> list[Row]:
    """The rows of a file; none if it is not there. Other columns than a Row's are an error."""
    if not path.exists() or path.stat().st_size == 0:
        return []
    with path.open("rb") as file:
        file.seek(-1, io.SEEK_END)
        if file.read() != b"\n":
            raise ValueError(
                f"{path.name} ends in the middle of a row, as a write was cut short: delete the "
                "rows of the run that it ends with"
            )
    empty = {name: ["", "nan"] for name in NUMBERS}  # of a run whose loss was lost
    types = dict.fromkeys(COLUMNS, str) | dict.fromkeys(NUMBERS, float) | {"repeats": int}
    table = pandas.read_csv(path, dtype=types, keep_default_na=False, na_values=empty)
    if list(table.columns) != COLUMNS:
        raise ValueError(
            f"{path.name} has columns {list(table.columns)}, expected {COLUMNS}: "
            "move it away and run the benchmark again"
        )
    table = table.astype(object).where(table.notna(), None)
    return [Row(*values) for values in table.itertuples(index=False)]


def read(*paths: Path) -> pandas.DataFrame:
    """The rows of all these files that are there, with their settings as columns."""
    return frame([row for path in paths for row in load(path)])


def frame(rows: Sequence[Row]) -> pandas.DataFrame:
    """Rows as a table, their settings and their x as columns of their own."""
    table = pandas.DataFrame([dataclasses.astuple(row) for row in rows], columns=COLUMNS)
    table = table.astype({name: float for name in NUMBERS})
    expanded = pandas.DataFrame([row.columns for row in rows], index=table.index)
    if unknown := set(expanded) - set(SETTINGS):
        raise ValueError(f"rows have the settings {sorted(unknown)}: add them to SETTINGS")
    return table.join(expanded.reindex(columns=list(SETTINGS)))


# Selecting ---------------------------------------------------------------------------------------


def pick(table: pandas.DataFrame, **wanted: Any) -> pandas.DataFrame:
    """The rows whose columns equal `wanted`, are one of a list, or are empty where it is None."""
    for name, value in wanted.items():
        several = isinstance(value, (list, tuple, set))
        found = table[name].isin(list(value)) if several else table[name] == value
        table = table[table[name].isna() if value is None else found]
    return table


# Conditions --------------------------------------------------------------------------------------


def conditions(**other: Any) -> dict[str, Any]:
    """The columns that say where, with what and when: the same for every row of a run."""
    found = {
        "device": device_name(),
        "clock_hz": core_clock(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": compiler_name(),
        "commit": commit(),
        "command": command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
    return found | other


def on(device: str) -> dict[str, Any]:
    """The conditions of a run on "cpu" or on "cuda"."""
    if device == "cpu":
        return conditions()
    return conditions(device=torch.cuda.get_device_name(), clock_hz=gpu_clock())


def gpu_clock(cycles: int = 2_000_000) -> float:
    """The clock of the current device in Hz, as one multiprocessor counts it right after what the
    device did before: a kernel that waits for that many of its cycles, between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (begin.elapsed_time(end) * 1e-3)


def device_name() -> str:
    """The CPU's model name, family and model, and how many cores we may use."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']} model {facts.get('model', '?')})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def compiler_name() -> str:
    """What compiled the native kernels, as they report it; empty where there are none."""
    with contextlib.suppress(ImportError):
        module = importlib.import_module("adamezo_kernels._native")
        return str(module.build_report()["compiler"])
    return ""


def command_line() -> str:
    """The command that makes this run again, as a shell reads it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    head = f"python -m {module.name.removesuffix('.__main__')}" if module else "python"
    return " ".join([head, shlex.join(sys.argv[1:] if module else sys.argv)]).strip()


def commit() -> str:
    """The short commit, with a + where the tree differs from it; empty outside git, where
    ADAMEZO_COMMIT may name it: a device's machine may be given the tree alone."""
    if named := os.environ.get("ADAMEZO_COMMIT"):
        return named
    # Results are what a benchmark writes: they do not make the code measured a different one.
    status = ["status", "--porcelain", "--", "..", ":!results", ":!../docs"]
    if shutil.which("git") is None:
        return ""
    found = [
        subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True)
        for words in (["rev-parse", "--short", "HEAD"], status)
    ]
    head, changed = (done.stdout.strip() for done in found)
    return "" if any(done.returncode for done in found) else head + ("+" if changed else "")


# A chain of register additions, each of which needs the one before it: one cycle each on every core
# that we know. The empty assembly keeps the compiler from folding the chain; a register and not a
# constant is added, because some cores eliminate constant additions at rename.
_SOURCE = """
#include <stdint.h>
#include <time.h>
#define ADD x += y; __asm__ volatile("" : "+r"(x));
#define ADD8 ADD ADD ADD ADD ADD ADD ADD ADD
double additions_per_second(uint64_t rounds, uint64_t y) {
    uint64_t x = 0;
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (uint64_t i = 0; i < rounds; ++i) { ADD8 ADD8 ADD8 ADD8 ADD8 ADD8 ADD8 ADD8 }
    clock_gettime(CLOCK_MONOTONIC, &b);
    return 64.0 * (double)rounds
        / ((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec));
}
"""


@functools.cache
def core_clock() -> float | None:
    """Hertz of a busy core, measured; None where there is no C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "clock.so")
        command = [compiler, "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
        subprocess.run(command, input=_SOURCE, text=True, check=True)
        measure = ctypes.CDLL(library).additions_per_second
        measure.restype = ctypes.c_double
        measure.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        # About 1 ms a try, shorter than a time slice: the fastest was not interrupted.
        return float(max(measure(50_000, 1) for _ in range(200)))


def parser(text: str, output: str) -> argparse.ArgumentParser:
    """The options that every benchmark has. `output` is a file's name in the folder of results."""
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="less of everything, for a first look")
    made.add_argument("--output", type=Path, default=RESULTS / output, help="another file")
    return made
