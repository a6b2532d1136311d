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
import dataclasses
import datetime
import fcntl
import importlib.metadata
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import pandas
import torch

from benchmarks.clock import core_clock

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One metric of one variant at one x. Seconds, bytes, hertz, or 1 for what has no unit.

    `median` is empty where something could not be measured, because it did not fit into memory.
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
    clock_source: str = ""
    torch: str = ""
    adamezo: str = ""
    python: str = ""
    compiler: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""


COLUMNS = [f.name for f in fields(Row)]
NUMBERS = ["x_value", "median", "p20", "p80", "clock_hz"]
# Settings that a row may have; a table has a column for each, empty where no row has it.
SETTINGS = (
    *("what", "type", "horizon", "threads", "isa", "elements", "method", "part", "tokens"),
    *("weights", "beta", "betas", "normalization", "seed", "steps", "step", "lr", "held_out"),
    *("cycles", "update", "job", "mode", "budget", "forwards", "by", "target"),
    *("attack", "outcome"),
)
# Two rows with the same of these would be two answers to one question.
IDENTITY = ["benchmark", "metric", "variant", "settings", "x_name", "x_value"]


def settings(**columns: object) -> str:
    """The text of `Row.settings`; what is empty or None is left out."""
    return "; ".join(f"{k}={_cell(v)}" for k, v in columns.items() if v not in ("", None))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The columns of a Row that sum up repeated measurements; no columns for none."""
    if not len(values):
        return {}
    p20, median, p80 = numpy.quantile(values, [0.2, 0.5, 0.8]).tolist()
    return dict(median=median, p20=p20, p80=p80, repeats=len(values))


def _cell(value: object) -> str:
    """Floats keep six significant digits, far below the noise of any timing."""
    if value is None:
        return ""
    if isinstance(value, float) and math.isfinite(value) and value == int(value) < 1e15:
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# Files -------------------------------------------------------------------------------------------


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes a file of these rows alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        _write(file, rows, header=True)


def append(path: Path, rows: Sequence[Row]) -> bool:
    """Adds rows to a file that other processes may be adding to; False if they are there by now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        there = {_identity(row) for row in load(path)}
        if any(_identity(row) in there for row in rows):
            return False
        _write(file, rows, header=not there)
        file.flush()
        os.fsync(file.fileno())
    return True


def _write(file: Any, rows: Iterable[Row], *, header: bool) -> None:
    writer = csv.writer(file, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    writer.writerows([_cell(value) for value in dataclasses.astuple(row)] for row in rows)


def _identity(row: Row) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in IDENTITY)


def load(path: Path) -> list[Row]:
    """The rows of a file; none if it is not there. Other columns than a Row's are an error."""
    if not path.exists() or path.stat().st_size == 0:
        return []
    table = pandas.read_csv(path, dtype=str, keep_default_na=False)
    if list(table.columns) != COLUMNS:
        raise ValueError(
            f"{path.name} has columns {list(table.columns)}, expected {COLUMNS}: "
            "move it away and run the benchmark again"
        )
    return [
        Row(**{str(name): _parsed(str(name), text) for name, text in record.items()})
        for record in table.to_dict("records")
    ]


def _parsed(name: str, text: str) -> Any:
    if name in NUMBERS:
        return float(text) if text else None
    return int(text) if name == "repeats" else text


def read(*paths: Path) -> pandas.DataFrame:
    """The rows of all these files that are there, with their settings as columns."""
    return frame([row for path in paths for row in load(path)])


def frame(rows: Sequence[Row]) -> pandas.DataFrame:
    """Rows as a table, their settings and their x as columns of their own."""
    table = pandas.DataFrame([dataclasses.astuple(row) for row in rows], columns=COLUMNS)
    table = table.astype({name: float for name in NUMBERS})
    expanded = pandas.DataFrame([_expanded(row) for row in rows], index=table.index)
    if unknown := set(expanded) - set(SETTINGS):
        raise ValueError(f"rows have the settings {sorted(unknown)}: add them to SETTINGS")
    return table.join(expanded.reindex(columns=list(SETTINGS)))


def _expanded(row: Row) -> dict[str, Any]:
    parts = (part.split("=", 1) for part in row.settings.split("; ") if part)
    found = {name: _number(text) for name, text in parts}
    return found | ({row.x_name: row.x_value} if row.x_name else {})


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# Selecting ---------------------------------------------------------------------------------------


def pick(table: pandas.DataFrame, **wanted: Any) -> pandas.DataFrame:
    """The rows whose columns equal `wanted`, or are one of a list."""
    for name, value in wanted.items():
        several = isinstance(value, (list, tuple, set))
        table = table[table[name].isin(list(value)) if several else table[name] == value]
    return table


def only(table: pandas.DataFrame, **wanted: Any) -> float:
    """The median of the one such row; LookupError where there is none or it was not measured."""
    found = pick(table, **wanted)["median"].dropna()
    if len(found) != 1:
        raise LookupError(f"found {len(found)} rows with {wanted}, expected one")
    return float(found.iloc[0])


# Conditions --------------------------------------------------------------------------------------


def conditions(**other: Any) -> dict[str, Any]:
    """The columns that say where, with what and when: the same for every row of a run."""
    clock_hz, clock_source = core_clock()
    found = {
        "device": device_name(),
        "clock_hz": clock_hz,
        "clock_source": clock_source,
        "torch": torch.__version__,
        "adamezo": adamezo_version(),
        "python": platform.python_version(),
        "compiler": compiler_name(),
        "commit": commit(),
        "command": command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
    return found | other


def on(device: str) -> dict[str, Any]:
    """The conditions of a run on "cpu" or on "cuda", whose clock nobody has measured."""
    if device == "cpu":
        return conditions()
    return conditions(device=torch.cuda.get_device_name(), clock_hz=None, clock_source="")


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


def adamezo_version() -> str:
    """Empty where it is used without being installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("adamezo")
    return ""


def commit() -> str:
    """The short commit, with a + where the tree differs from it; empty outside git."""
    # Results are what a benchmark writes: they do not make the code measured a different one.
    status = ["status", "--porcelain", "--", "..", ":!results", ":!../docs"]
    found = [
        subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True)
        for words in (["rev-parse", "--short", "HEAD"], status)
    ]
    head, changed = (done.stdout.strip() for done in found)
    return "" if any(done.returncode for done in found) else head + ("+" if changed else "")


def parser(text: str, output: str) -> argparse.ArgumentParser:
    """The options that every benchmark has. `output` is a file's name in the folder of results."""
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="less of everything, for a first look")
    made.add_argument("--output", type=Path, default=RESULTS / output, help="another file")
    return made
