#!/usr/bin/env python3
"""`make newcomer`: follows a page in a fresh clone and environment, as somebody new would.

The commands are the page's own, in its order: each line of its shell blocks, each Python block, and
each span of its text that begins with `pip install` or `python -m adamezo_kernels`. The first that
fails ends this with an error. All that have run are listed at the end, with their seconds, and with
--output in a file of results, from which `python -m benchmarks.render` makes tables.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPAN = re.compile(r"(?<!`)`((?:pip install|python -m adamezo_kernels)[^`]*)`(?!`)")
SHELLS = ("sh", "bash", "shell", "console")

# What the README leaves to its reader, and what this repository has in its place.
YOURS = {
    "FOLDER_OR_GGUF": '"$(python -m examples.demo --path)"',
    "reviews.csv": "examples/data/movie_reviews.csv",
    "instructions.jsonl": "examples/data/opposites.jsonl",
}


def commands(text: str) -> Iterator[tuple[str, str]]:
    """What a page has its reader run, in order: ("shell", a command) or ("python", a block)."""
    lines = iter([*text.splitlines(), ""])
    blank, indented = True, list[str]()
    for line in lines:
        if line.startswith("    ") and line.strip() and (blank or indented):
            indented.append(line)
            continue
        yield from of_shell(indented)
        indented = []
        blank = not line.strip()
        if fence := re.match(r"( *)```(\w*)", line):
            fenced = []
            while not (inner := next(lines, "```")).lstrip().startswith("```"):
                fenced.append(inner)
            if fence[2] == "python":
                yield "python", textwrap.dedent("\n".join(fenced)) + "\n"
            elif fence[2] in SHELLS:
                yield from of_shell(fenced)
        else:
            yield from (("shell", span) for span in SPAN.findall(line))


def of_shell(lines: list[str]) -> Iterator[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    for line in joined.splitlines():
        if command := re.sub(r"(^|\s)#.*", "", line).strip():
            yield "shell", command


def filled(command: str) -> str:
    """With the files of this repository where a word stands for the reader's own."""
    return "".join(YOURS.get(word, word) for word in re.split(r"(\s+)", command))


def run(kind: str, code: str, where: Path, environment: dict[str, str]) -> int:
    """The exit status of one command."""
    command = ["bash", "-ec", filled(code)] if kind == "shell" else ["python", "-c", code]
    return subprocess.run(command, cwd=where, env=environment).returncode


def said(command: list[str]) -> str:
    """What a command prints; nothing if it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def used() -> float:
    """The processor time of all commands until now; other work lengthens it less than seconds."""
    of = resource.getrusage(resource.RUSAGE_CHILDREN)
    return of.ru_utime + of.ru_stime


Timed = list[tuple[str, float, float]]
"""Of each command its text, its seconds and its processor time."""


def record(file: Path, name: str, load: float, timed: Timed, has: dict[str, str]) -> None:
    """Puts a page's rows in the place of those that a file has of it."""
    from benchmarks.results import Row, command_line, conditions, write
    from benchmarks.results import load as read

    switches = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("ADAMEZO_"))
    command = " ".join([*switches, command_line()])
    known = {"benchmark": name, **conditions(command=command, **has)}
    rows = [row for row in read(file) if row.benchmark != name]
    rows += [Row(metric="load", unit="1", variant="before", median=load, **known)]
    rows += [
        Row(metric=metric, unit="s", variant=shown, median=median, repeats=1, **known)
        for shown, seconds, busy in timed
        for metric, median in (("time", seconds), ("processor time", busy))
    ]
    write(file, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", default="README.md", help="which to follow, from the root")
    parser.add_argument("--torch", help="install this first, such as a torch without CUDA")
    parser.add_argument("--skip", action="append", default=[], help="commands that begin so")
    parser.add_argument("--output", type=Path, help="a CSV file for the page's seconds")
    parser.add_argument("--list", action="store_true", help="say what would run, and end")
    options = parser.parse_args()
    if not (ROOT / options.page).is_file():
        parser.error(f"there is no {options.page} in {ROOT}")
    todo = list(commands((ROOT / options.page).read_text(encoding="utf-8")))
    todo = [(kind, code) for kind, code in todo if not code.startswith(tuple(options.skip))]
    if options.list:
        print("\n".join(f"{kind}: {code.splitlines()[0]}" for kind, code in todo))
        return 0
    if options.output:
        sys.path.insert(0, str(ROOT))
        try:
            import benchmarks.results  # noqa: F401
        except ImportError as error:
            parser.error(f"{error}: --output needs the Python that `make setup` has made")

    load = os.getloadavg()[0]
    timed: Timed = []
    status = 0
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        clone, home = Path(folder) / "adamezo", Path(folder) / "environment"
        before = [f"git clone -q {shlex.quote(str(ROOT))} {clone}"]
        before += [f"{shlex.quote(sys.executable)} -m venv {home}"]
        before += [f"pip install -q {shlex.quote(options.torch)}"] if options.torch else []
        environment = os.environ | {
            "VIRTUAL_ENV": str(home),
            "PATH": f"{home}/bin{os.pathsep}{os.environ['PATH']}",
        }
        # Of the make that has called this: the newcomer's own make must not have them.
        for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHONPATH"):
            environment.pop(name, None)
        here = (sys.executable, str(ROOT), f"{folder}/")
        steps = [(Path(folder), "shell", code) for code in before]
        steps += [(clone, kind, code) for kind, code in todo]
        for where, kind, code in steps:
            shown = code if kind == "shell" else "(a Python block)"
            # In this order: the interpreter may be inside of the checkout.
            for ours, theirs in zip(here, ("python", "URL", ""), strict=True):
                shown = shown.replace(ours, theirs)
            print(f"\n$ {shown}", flush=True)
            start, busy = time.monotonic(), used()
            status = run(kind, code, where, environment)
            timed.append((shown, time.monotonic() - start, used() - busy))
            if status:
                break
        if options.output and not status:
            # Of what the newcomer has, which may not be what this program runs with.
            version = "from importlib.metadata import version; print(version('torch'))"
            has = {
                "torch": said([f"{home}/bin/python", "-c", version]),
                "commit": said(["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]),
            }
            record(options.output, f"newcomer {options.page}", load, timed, has)
    print("\nseconds, and those of processors")
    for shown, seconds, busy in timed:
        print(f"{seconds:7.1f} {busy:7.1f}  {shown}")
    if status:
        print(f"failed with exit status {status}: {timed[-1][0]}")
    return int(bool(status))


if __name__ == "__main__":
    sys.exit(main())
