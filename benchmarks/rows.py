"""The CSV row type of benchmarks of speed, the one way to write a row, and the one way to time."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.clock import core_clock

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measured variant. Seconds, bytes and hertz; what does not apply stays empty.

    `ratio` is the median of `reference` (the variant it names, same parameters, same run) over
    `median_s`: above 1 is faster than the reference. Of `peak_bytes` it is this variant's over the
    reference's.
    """

    benchmark: str
    what: str
    variant: str
    type: str = ""
    elements: int = 0
    horizon: int = 0
    threads: int = 1
    isa: str = ""
    tokens: str = ""
    median_s: float | None = None
    q20_s: float | None = None
    q80_s: float | None = None
    repeats: int = 0
    reference: str = ""
    ratio: float | None = None
    elements_per_s: float | None = None
    normals_per_s: float | None = None
    bytes_per_s: float | None = None
    cycles_per_normal: float | None = None
    peak_bytes: int | None = None
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


_Kind = TypeVar("_Kind")


def write_rows(path: Path, rows: Iterable[Any], kind: type = Row) -> None:
    """Writes rows, of this dataclass, as CSV. Floats keep six significant digits, far below the
    noise of any timing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f.name for f in fields(kind))
        for row in rows:
            writer.writerow(cells(row))


def cells(row: Any) -> list[str]:
    """A row as the CSV has it."""
    return [_cell(value) for value in dataclasses.astuple(row)]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_rows(path: Path, kind: type[_Kind] = Row) -> list[_Kind]:  # type: ignore[assignment]
    """Reads what `write_rows` wrote; an unknown or a missing column is an error."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        expected = [f.name for f in fields(kind)]  # type: ignore[arg-type]
        if reader.fieldnames != expected:
            raise ValueError(
                f"{path.name} has columns {reader.fieldnames}, expected {expected}: "
                "run the benchmark again"
            )
        return [_row(record, kind) for record in reader]


def _row(record: dict[str, str], of: type[_Kind]) -> _Kind:
    values: dict[str, object] = {}
    for f in fields(of):  # type: ignore[arg-type]
        text, kind = record[f.name], str(f.type)
        if kind.endswith("| None") and text == "":
            values[f.name] = None
        elif kind.startswith("int"):
            values[f.name] = int(text)
        elif kind.startswith("float"):
            values[f.name] = float(text)
        else:
            values[f.name] = text
    return of(**values)


def find(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows whose columns equal `wanted`."""
    return [r for r in rows if all(getattr(r, name) == value for name, value in wanted.items())]


def markdown(header: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, rule, *body])


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation between order statistics (numpy's default)."""
    if not values:
        raise ValueError("quantile of no values; expected at least one measurement")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def linear_fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares y = slope x + intercept of positive y; returns slope, intercept, R^2.

    Points weigh 1 / y^2, since a time's noise is proportional to it: unweighted, the largest of
    sizes over four decades would decide alone.
    """
    weights = [1 / value**2 for value in y]
    total = sum(weights)

    def mean(values: Sequence[float]) -> float:
        return sum(w * value for w, value in zip(weights, values, strict=True)) / total

    x_mean, y_mean = mean(x), mean(y)
    slope = mean([(a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)]) / mean(
        [(a - x_mean) ** 2 for a in x]
    )
    intercept = y_mean - slope * x_mean
    residual = mean([(slope * a + intercept - b) ** 2 for a, b in zip(x, y, strict=True)])
    return slope, intercept, 1 - residual / mean([(b - y_mean) ** 2 for b in y])


@dataclass
class Variant:
    """Something to time: `run`, under `threads` threads and inside `context()`."""

    name: str
    run: Callable[[], object]
    threads: int = 1
    isa: str = ""
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    seconds: list[float] = field(default_factory=list)

    def once(self, calls: int = 1) -> float:
        """Seconds a call, over `calls` calls in a row."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with self.context():
                start = time.perf_counter()
                for _ in range(calls):
                    self.run()
                return (time.perf_counter() - start) / calls
        finally:
            torch.set_num_threads(before)


def interleave(
    variants: Sequence[Variant],
    *,
    repeats: int = 7,
    at_least: int = 3,
    budget_s: float = math.inf,
    sample_s: float = 1e-3,
) -> None:
    """Times the variants in turn (A B A B ...) into `Variant.seconds`, after one warm-up of each.

    In turn, because a machine's speed drifts over minutes, and what is compared must see the same
    drift.
    Calls shorter than `sample_s` are timed several at once, as the clock itself costs about 0.1 us.
    Stops after `repeats` rounds, or after `at_least` once `budget_s` is spent.
    """
    calls = []
    for variant in variants:
        seconds = variant.once()
        if seconds < sample_s:  # the first call may have paid for a start-up
            seconds = variant.once()
        calls.append(max(1, math.ceil(sample_s / max(seconds, 1e-7))))
    start = time.perf_counter()
    for done in range(repeats):
        if done >= at_least and time.perf_counter() - start > budget_s:
            break
        for variant, n in zip(variants, calls, strict=True):
            variant.seconds.append(variant.once(n))


def timing(seconds: Sequence[float]) -> dict[str, float | int]:
    """The timing columns of a Row."""
    return {
        "median_s": quantile(seconds, 0.5),
        "q20_s": quantile(seconds, 0.2),
        "q80_s": quantile(seconds, 0.8),
        "repeats": len(seconds),
    }


def conditions() -> dict[str, object]:
    """The columns that say where, with what and when: the same for every row of a run."""
    clock_hz, clock_source = core_clock()
    return {
        "device": device_name(),
        "clock_hz": clock_hz,
        "clock_source": clock_source,
        "torch": torch.__version__,
        "adamezo": _version("adamezo"),
        "python": platform.python_version(),
        "compiler": compiler_name(),
        "commit": commit(),
        "command": command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


def device_name() -> str:
    """The CPU's model name, family and model, and how many cores we may use."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']} model {facts.get('model', '?')})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def compiler_name() -> str:
    """What compiled the native kernels, as they report it; empty where there are none."""
    try:
        module = importlib.import_module("adamezo_kernels._native")
    except ImportError:
        return ""
    return str(module.build_report()["compiler"])


def command_line() -> str:
    """The command that makes this run again."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    head = f"python -m {module.name}" if module else "python " + Path(sys.argv[0]).name
    return " ".join([head, *sys.argv[1:]])


def commit() -> str:
    """The short commit, with a + where the tree differs from it; empty outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        # Results are what a benchmark writes: they do not make the code measured a different one.
        changed = git("status", "--porcelain", "--", "..", ":!results", ":!../docs")
    except OSError:
        return ""
    return head + ("+" if changed else "")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""
