"""Tables of docs/command_line.md: what somebody new runs, and how long it takes."""

from __future__ import annotations

import pandas

from benchmarks.render.style import NOT_YET, markdown
from benchmarks.results import pick


def seconds(rows: pandas.DataFrame, page: str) -> str:
    """Each command of a page in its order, and how busy the machine was before the first."""
    some = pick(rows, benchmark=f"newcomer {page}")
    timed, busy = (pick(some, metric=m) for m in ("time", "processor time"))
    if timed.empty:
        return NOT_YET
    both = zip(timed.variant, timed["median"], busy["median"], strict=True)
    body = [(f"`{said}`", f"{took:.1f}", f"{of:.1f}") for said, took, of in both]
    body += [("all of it", *(f"{of['median'].sum():.1f}" for of in (timed, busy)))]
    table = markdown((page, "seconds", "of processors"), body)
    load = pick(some, metric="load")["median"].item()
    return f"{table}\n\nLoad average before the first: {load:.1f}."
