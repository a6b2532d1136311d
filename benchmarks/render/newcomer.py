"""Tables of docs/command_line.md: what somebody new runs, and how long it takes."""

from __future__ import annotations

import pandas

from benchmarks.render.style import NOT_YET, markdown
from benchmarks.results import pick


def seconds(rows: pandas.DataFrame, page: str) -> str:
    """Each command of a page in its order, and how busy the machine was before the first."""
    some = pick(rows, benchmark=f"newcomer {page}")
    timed = pick(some, metric="time")
    if timed.empty:
        return NOT_YET
    body = [(f"`{row.variant}`", f"{row.median:.1f}") for row in timed.itertuples()]
    body += [("all of it", f"{timed['median'].sum():.1f}")]
    load = pick(some, metric="load")["median"].item()
    return f"{markdown((page, 'seconds'), body)}\n\nLoad average before the first: {load:.1f}."
