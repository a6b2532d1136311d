"""One look for all plots, of runs, examples and benchmarks. Needs matplotlib, which is imported
where something is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#7a7a7a", "#000000"),
)
"""Colours that readers with any kind of colour blindness tell apart: those of Okabe and Ito (2008)
but for their yellow, which is lost on white, and a grey."""
PALE = "#b8bec5"
"""Of what is in the background."""
_LOOK = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def figure(
    columns: int, title: str = "", width: float = 4.2, height: float = 3.6, rows: int = 1
) -> tuple[Any, list[Any]]:
    """A figure of matplotlib and its axes, row by row, of so many inches each."""
    import matplotlib
    from matplotlib.figure import Figure  # unlike pyplot, needs no display and has no global state
    from matplotlib.rcsetup import cycler

    with matplotlib.rc_context({**_LOOK, "axes.prop_cycle": cycler(color=PALETTE)}):
        made = Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = made.subplots(rows, columns, squeeze=False)
        if title:
            made.suptitle(title, fontsize=10)
    return made, list(axes.flat)


def save(made: Any, path: Path) -> None:
    """Writes it with grids behind its lines, and with one legend of all panels beside them unless
    some have legends of their own."""
    for axis in made.axes:
        if axis.lines and not axis.containers:
            axis.grid(True, which="major", color="#eeeeee")
            axis.set_axisbelow(True)
    if not any(axis.get_legend() for axis in made.axes):
        found = [axis.get_legend_handles_labels() for axis in made.axes]
        by_label = {
            name: of for handles, names in found for of, name in zip(handles, names, strict=True)
        }
        if by_label:
            entries = list(by_label.values()), list(by_label)
            made.legend(*entries, loc="outside right upper", frameon=False, fontsize=8)
    # No date or version inside, so that the same numbers give the same file.
    made.savefig(path, dpi=150, metadata={"Software": None})
