"""Tables of docs/scaling.md."""

from __future__ import annotations

import pandas

from benchmarks.render.style import NOT_YET, markdown
from benchmarks.results import pick
from benchmarks.scaling import Cluster, predicted

WORKERS = (1, 2, 4, 16, 64, 256, 1024, 4096)


def _seconds(value: float) -> str:
    """In a unit that leaves at most three digits before the point."""
    if value == 0:
        return "0"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def measured(rows: pandas.DataFrame) -> str:
    """Seconds of a step and its exchange by the number of ranks, and of a rank that catches up."""
    some = pick(rows, benchmark="scaling")
    body = [
        (
            f"{row.metric}, {row.ranks:.0f} rank{'s' * (row.ranks > 1)}",
            f"{row.elements:,.0f}",
            *(_seconds(value) for value in (row.p20, row.median, row.p80)),
        )
        for row in some.itertuples()
    ]
    return markdown(("", "weights", "p20", "median", "p80"), body) if body else NOT_YET


def network(rows: pandas.DataFrame) -> str:
    """Seconds of an exchange by the number of hosts and what the links between them do."""
    some = pick(rows, benchmark="network")
    body = []
    for (latency, loss), links in some.groupby(["latency", "loss"]):
        cells = []
        for hosts in (2, 4):
            at = links[links.ranks == hosts].set_index("metric")["median"]
            cells += [at["exchange"], at["exchange, 99 %"]]
        body.append((_seconds(latency), f"{loss:.1%}", *map(_seconds, cells)))
    header = ("latency", "lost", "2 hosts", "99 % of them", "4 hosts", "99 % of them")
    return markdown(header, body) if body else NOT_YET


def caught_up(rows: pandas.DataFrame) -> str:
    """Seconds until a lost process has so many steps again, by the way in which it gets them."""
    some = pick(rows, benchmark="recovery")
    if some.empty:
        return NOT_YET
    at = some.set_index(["metric", "variant", "steps"])["median"]
    counts = sorted(set(some[some.metric == "replayed"].steps))
    body = [("taken again", *(_seconds(n * at["step", "in place", 1]) for n in counts))]
    body += [
        (f"replayed, {variant}", *(_seconds(at["replayed", variant, n]) for n in counts))
        for variant in ("in place", "out of place")
    ]
    body += [
        (once, *[_seconds(at[once, "either", 0])] * len(counts))
        for once in ("checkpoint read", "checkpoint written", "base weights read")
    ]
    return markdown(("", *(f"{n:.0f} steps" for n in counts)), body)


def model(rows: pandas.DataFrame) -> str:
    """The predicted step, by the number of workers."""
    of = Cluster()
    body = []
    for workers in WORKERS:
        found = predicted(workers, of)
        body.append(
            (
                f"{workers:,}",
                *(_seconds(found[name]) for name in ("stragglers", "exchange, ring")),
                _seconds(found["exchange, tree"]),
                _seconds(found["step"]),
                f"{of.step / found['step']:.1%}",
            )
        )
    header = ("workers", "stragglers", "exchange, ring", "exchange, tree", "step with a ring")
    return markdown((*header, "of the speed without others"), body)


def recovery(rows: pandas.DataFrame) -> str:
    """The share of its time in which a job makes progress, by the time between its failures."""
    body = []
    for minutes in (45, 60, 75, 15, 5):
        found = predicted(256, Cluster()._replace(between_failures=60.0 * minutes))
        body.append(
            (
                f"{minutes} minutes",
                f"{found['progress, checkpoints']:.1%}",
                f"{found['progress, log']:.1%}",
            )
        )
    return markdown(("a failure every", "checkpoints alone", "checkpoints and the log"), body)
