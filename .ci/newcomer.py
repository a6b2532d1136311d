#!/usr/bin/env python3
"""`make newcomer`: follows the README in a fresh clone and environment, as somebody new would.

The commands are the README's own, in its order: each line of its shell blocks, each Python block,
and each span of its text that begins with `pip install` or `python -m adamezo_kernels`. The first
that fails ends this with an error. All that have run are listed at the end, with their seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
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

# What the README leaves to its reader, and what this repository has in its place: the weights are
# in the environment that `make demo` has made by then.
YOURS = {
    "FOLDER_OR_GGUF": "$(.venv/bin/python -c 'import examples.demo as d; print(d.smollm2())')",
    "reviews.csv": "examples/data/movie_reviews.csv",
}
# A run of thousands of steps is ended by Ctrl-C, as the README says that it may be.
LONG = "adamezo finetune "


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


def run(kind: str, code: str, clone: Path, environment: dict[str, str], patience: float) -> int:
    """The exit status of one command."""
    for theirs, ours in YOURS.items():
        code = code.replace(theirs, ours) if kind == "shell" else code
    command = ["bash", "-ec", code] if kind == "shell" else ["python", "-c", code]
    # A session of its own, so that Ctrl-C reaches what the shell has started.
    process = subprocess.Popen(command, cwd=clone, env=environment, start_new_session=True)
    try:
        return process.wait(patience if code.startswith(LONG) else None)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        return 0 if process.wait() in (0, 130, -signal.SIGINT) else 1
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", help="install this first, such as a torch without CUDA")
    parser.add_argument("--skip", action="append", default=[], help="commands that begin so")
    parser.add_argument("--patience", type=float, default=120, help="seconds until Ctrl-C")
    parser.add_argument("--list", action="store_true", help="say what would run, and end")
    options = parser.parse_args()
    todo = list(commands((ROOT / "README.md").read_text(encoding="utf-8")))
    todo = [(kind, code) for kind, code in todo if not code.startswith(tuple(options.skip))]
    if options.list:
        print("\n".join(f"{kind}: {code.splitlines()[0]}" for kind, code in todo))
        return 0

    timed: list[tuple[float, str]] = []
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
        steps = [(Path(folder), "shell", code) for code in before]
        steps += [(clone, kind, code) for kind, code in todo]
        for where, kind, code in steps:
            shown = code.replace(folder, "") if kind == "shell" else "(a Python block)"
            print(f"\n$ {shown}", flush=True)
            start = time.monotonic()
            status = run(kind, code, where, environment, options.patience)
            timed.append((time.monotonic() - start, shown))
            if status:
                break
    print("\nseconds")
    for seconds, shown in timed:
        print(f"{seconds:7.1f}  {shown}")
    if status:
        print(f"failed with exit status {status}: {timed[-1][1]}")
    return int(bool(status))


if __name__ == "__main__":
    sys.exit(main())
