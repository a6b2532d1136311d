"""The table of benchmarks/find_lr.py in docs/find_lr.md."""

from __future__ import annotations

import pandas

from benchmarks import evidence, methods
from benchmarks.find_lr import CASES
from benchmarks.methods import at_an_edge, ended, of_finalists, validated
from benchmarks.render.style import NOT_YET, markdown
from benchmarks.results import pick

SEEDS_AND_FINALISTS = {
    "methods": (len(methods.SEEDS), 1),
    "evidence": (len(evidence.SEEDS), evidence.FINALISTS),
}
"""By benchmark, what a search that has ended has."""


def found(rows: pandas.DataFrame) -> str:
    """By case: the lr that was found, the best of its search, and the one over the other."""
    body = []
    for case in CASES:
        of = dict(job=case.job, mode=case.mode, variant=case.method)
        at = pick(rows, benchmark="find lr", metric="lr", **of)
        losses = validated(rows, case.benchmark, budget=case.budget, **of)
        if at.empty or not ended(losses, *SEEDS_AND_FINALISTS[case.benchmark]):
            continue
        best = of_finalists(losses)
        lr = at["median"].iloc[0]
        edge = " at an edge" if at_an_edge(losses, best) else ""
        body.append(
            (
                f"{case.job}, {case.mode}, {case.budget:,} forward passes, {case.method}",
                f"{at.forwards.iloc[0]:.0f}",
                f"{lr:.2g}",
                f"{best:g} (of {len(losses)}{edge})",
                f"{lr / best:.2f}",
                "" if case.seen else "yes",
            )
        )
    header = ("", "forward passes", "found", "best of a search", "over it", "a test")
    return markdown(header, body) if body else NOT_YET
