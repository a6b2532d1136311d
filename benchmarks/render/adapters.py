"""Tables of docs/adapters.md."""

from __future__ import annotations

import pandas

from benchmarks.render.style import NOT_YET, markdown
from benchmarks.results import pick


def costs(rows: pandas.DataFrame) -> str:
    """Each kind of adapters: its trained weights, its time and its memory."""
    some = pick(rows, benchmark="adapters", seed=None)
    body = []
    for variant, of in some.groupby("variant", sort=False):
        table = of.set_index("metric")
        value = table["median"]

        def ratio(metric: str, table: pandas.DataFrame = table) -> str:
            if metric not in table.index:
                return ""
            low, middle, high = table.loc[metric, ["p20", "median", "p80"]]
            return f"{middle:.2f}x ({low:.2f} to {high:.2f})"

        peak = value.get("peak over the base's forward")
        cells = (
            f"{value['trained weights']:,.0f}",
            f"{value['trained weights of Llama-2-7B']:,.0f}",
            ratio("forward over the base's"),
            ratio("step over LoRA's"),
            "" if pandas.isna(peak) else f"{peak / 2**20:+.0f} MiB",
        )
        body.append((variant, *cells))
    header = ("", "trained weights", "of Llama-2-7B", "forward over the base's")
    columns = (*header, "step over LoRA's", "a step's peak over the base's forward")
    return markdown(columns, body) if body else NOT_YET


def inits(rows: pandas.DataFrame) -> str:
    """The loss before training, of each init and seed."""
    some = pick(rows, benchmark="adapters", metric="loss before training")
    names = {"none": "no adapters", "zero": 'init="zero"', "published": 'init="published"'}
    body = [
        (names[str(init)], ", ".join(f"{loss:.3f}" for loss in of["median"]))
        for init, of in some.groupby("variant", sort=False)
    ]
    return markdown(("", "loss before training, by seed"), body) if body else NOT_YET


def quantised(rows: pandas.DataFrame) -> str:
    """Each quantised base: its bytes, a step's memory, and how rough its loss is."""
    some = pick(rows, benchmark="quantised")
    body = []
    for variant, of in some.groupby("variant", sort=False):
        value = of.set_index("metric")["median"]
        above = value.get("step over forward")
        body.append(
            (
                str(variant),
                f"{value['weights'] / 2**20:,.0f} MiB",
                "" if above is None else f"{above / 2**20:+,.0f} MiB",
                f"{value['p']:.2g}",
                *(f"{value[f'error of p at zo_eps {mu:g}']:.2g}" for mu in (1e-3, 1e-2)),
            )
        )
    head = (
        *("base", "weights", "a step's peak over a forward's"),
        *("p along one direction", "its error at zo_eps=1e-3", "at 1e-2"),
    )
    return markdown(head, body) if body else NOT_YET
