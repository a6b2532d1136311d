"""Attacks on a run, counted in docs/reliability.md.

    python -m tests.stress              # all of them, about half an hour on one core
    python -m tests.stress logs kills   # some
    python -m benchmarks.render         # the table of docs/reliability.md, from the counts

Every attack ends the program with an error at the first thing that is not as promised. The tests
run the same functions with small counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, Row, conditions, load, settings, write

from .files import fuzz_headers, fuzz_logs, fuzz_states
from .inputs import bad_inputs, closures_that_write
from .interruptions import interrupted_by_signals, interrupted_inside
from .kills import cut_smollm2, kills, log_size, replay_speed
from .ranks import killed_ranks

ATTACKS = (
    *("interruptions", "inputs", "logs", "headers", "states", "kills", "ranks", "speed", "size"),
)
Made = Iterator[tuple[str, str, str, float, str]]
"""(what, metric, unit, value, outcome)"""


def _counted(what: str, run: Callable[[], Counter[str] | int]) -> Made:
    """How many attacks there were, how many ended in which way, and the seconds of all."""
    start = time.perf_counter()
    seen = run()
    seconds = time.perf_counter() - start
    if isinstance(seen, int):
        seen, number = Counter(), seen
    else:
        number = seen.total() - seen["not hit"]
    yield what, "count", "", number, ""
    for outcome in sorted(seen):
        yield what, "count", "", seen[outcome], outcome
    yield what, "time", "s", seconds, ""


def attack(name: str, scale: float) -> Made:
    def times(count: int) -> int:
        return max(3, int(count * scale))

    if name == "interruptions":
        for what, run in (
            ("errors raised inside the model", interrupted_inside),
            ("signals at random times", interrupted_by_signals),
        ):
            for mode in ("inplace", "exact"):
                yield from _counted(
                    f"{what}, {mode}", lambda r=run, m=mode: r(times(1000), m == "exact")
                )
    elif name == "inputs":
        what = "bad losses, closures, options, sizes, states"
        yield from _counted(what, lambda: bad_inputs(times(5000)))
        yield from _counted(
            "closures that write to weights", lambda: closures_that_write(times(500))
        )
    elif name == "logs":
        yield from _counted("damaged logs", lambda: fuzz_logs(times(1_000_000)))
    elif name == "headers":
        what = "edited headers, right checksums"
        yield from _counted(what, lambda: fuzz_headers(times(50_000)))
    elif name == "states":
        yield from _counted("edited states", lambda: fuzz_states(times(100_000)))
    elif name == "kills":
        with tempfile.TemporaryDirectory() as folder:
            model, number = cut_smollm2(Path(folder) / "base"), times(50)
            yield from _counted("SIGKILL", lambda: kills(number, model, Path(folder), 4 * number))
    elif name == "ranks":
        for kind in ("replicas", "pieces"):
            with tempfile.TemporaryDirectory() as folder:
                what = f"SIGKILL of a rank under torchrun, {kind}"
                yield from _counted(
                    what, lambda k=kind, f=folder: killed_ranks(times(20), Path(f), k)
                )
    else:
        for count in replay_speed() if name == "speed" else log_size():
            yield count.what, "count", count.unit, count.count, ""
            if count.over_training is not None:
                yield count.what, "over training", "x", count.over_training, ""


def rows(name: str, scale: float, where: dict[str, Any]) -> Iterator[Row]:
    for what, metric, unit, value, outcome in attack(name, scale):
        print(f"{what}{', ' * bool(outcome)}{outcome}: {metric} {value:,.6g} {unit}", flush=True)
        columns = settings(attack=name, outcome=outcome)
        key = ("reliability", metric, unit, what, columns)
        yield Row(*key, median=value, repeats=1, **where)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"of {', '.join(ATTACKS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts, to try it out")
    parser.add_argument("--output", type=Path, default=RESULTS / "reliability.csv")
    arguments = parser.parse_args()
    if unknown := set(arguments.attacks) - set(ATTACKS):
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(ATTACKS)}")
    if arguments.scale != 1 and arguments.output == RESULTS / "reliability.csv":
        parser.error("with another scale than 1, name another file by --output")
    torch.set_num_threads(1)
    for name in arguments.attacks or ATTACKS:
        where = conditions(command=f"python -m tests.stress {name}")
        new = list(rows(name, arguments.scale, where))
        key = f"attack={name}"
        others = [r for r in load(arguments.output) if r.settings.split("; ")[0] != key]
        order = {f"attack={a}": i for i, a in enumerate(ATTACKS)}
        made = sorted([*others, *new], key=lambda r: order[r.settings.split("; ")[0]])
        write(arguments.output, made)


if __name__ == "__main__":
    main()
