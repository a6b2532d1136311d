"""Tables and plots of whole steps: README.md, performance_steps.md, paper.md and horizon.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas

from adamezo.plots import figure, save
from benchmarks.render.style import COLOURS, NOT_YET, markdown, over
from benchmarks.results import pick
from benchmarks.step import PARTS
from benchmarks.step_jobs import SHORT, Method

JOB = ["benchmark", "type", "tokens"]
METHOD = ["method", "variant", "horizon"]
DEVICES = {"float32": "CPU", "bfloat16": "GPU", "float16": "GPU"}


def of(method: Method) -> dict[str, Any]:
    """The columns of a method's rows."""
    return dict(method=method.method, variant=method.variant, horizon=method.horizon)


def name(row: Any) -> str:
    return str(Method(row.variant, row.method, int(row.horizon))).replace(" H=", " H = ")


def split(rows: pandas.DataFrame, benchmark: str) -> pandas.DataFrame:
    """Median seconds of a step's parts, a column each, and the optimizer's share, by job and method
    in the order of the file."""
    timed = pick(rows, benchmark=benchmark, metric="time")
    key = [*JOB, *METHOD]
    wide = timed.pivot(index=key, columns="part", values="median")
    wide = wide.reindex(pandas.MultiIndex.from_frame(timed[key].drop_duplicates()))
    wide = wide.reindex(columns=["step", *PARTS])
    optimizer = wide["perturbation"] + wide["update"]
    return wide.assign(share=optimizer / (optimizer + wide["forwards"])).reset_index()


def parts(rows: pandas.DataFrame, benchmark: str) -> str:
    """Seconds of a step and its parts."""
    found = split(rows, benchmark)
    if found.empty:
        return NOT_YET
    whole = pick(rows, benchmark=benchmark, metric="time", part="step")
    whole = whole.assign(ratio=over(whole, [*JOB, "method", "horizon"], variant="torch"))
    body = []
    for row, split_of in zip(whole.itertuples(), found.itertuples(), strict=True):
        head = (name(row), f"{row.type}, {row.tokens}")
        digits = 3 if row.median > 0.5 else 4
        cells = [f"{getattr(split_of, part):.{digits}f}" for part in PARTS]
        step = f"{row.median:.{digits}f} [{row.p20:.{digits}f}, {row.p80:.{digits}f}]"
        share = "" if row.method == "AdamW" else f"{split_of.share:.1%}"
        ratio = f"{row.ratio:.2f}x" if row.ratio > 0 else ""
        body.append((*head, *cells, step, row.repeats, share, ratio))
    header = ("seconds, medians", "job", "forwards", "perturbation", "update")
    return markdown(
        (*header, "step [20 %, 80 %]", "repeats", "optimizer", "step over pure torch's"), body
    )


def by_job(
    rows: pandas.DataFrame, reference: Method | str, benchmark: str | list[str], **wanted: Any
) -> str:
    """The wanted rows, a line for each method and a column for each job; in brackets the multiple
    of a reference in the same column: a method, or the same method by another variant."""
    some = pick(rows, benchmark=benchmark, **wanted)
    if some.empty:
        return NOT_YET
    if isinstance(reference, str):
        some = some.assign(ratio=1 / over(some, [*JOB, "method", "horizon"], variant=reference))
    else:
        some = some.assign(ratio=1 / over(some, JOB, **of(reference)))
    jobs = list(some[JOB].drop_duplicates().itertuples(index=False))
    body = []
    for method in some[METHOD].drop_duplicates().itertuples(index=False):
        cells = []
        for job in jobs:
            at = pick(some, **job._asdict(), **method._asdict())[:1]
            cell = [
                f"{r.median:.3g} s" if r.unit == "s" else f"{r.median / 2**20:,.0f} MiB"
                for r in at.itertuples()
            ]
            ratio = [f" ({value:.3g}x)" for value in at.ratio if value > 0]
            cells.append("".join(cell + ratio))
        bare = method.method == "bare" and some.metric.iloc[0] == "peak memory"
        body.append(("a bare forward" if bare else name(method), *cells))
    header = [f"{DEVICES[job.type]}, {job.type}, {job.tokens}" for job in jobs]
    return markdown(("", *header), body)


def horizons(rows: pandas.DataFrame) -> str:
    """What a step costs over one with H = 1, and by pair of betas the cosine of the update with the
    untruncated one: the median, and in brackets the worst."""
    some = pick(rows, benchmark="horizon")
    pairs = list(some.betas.dropna().unique())
    body = []
    for h in sorted(pick(some, metric="cosine").horizon.unique()):
        cells = []
        for betas in pairs:
            at = pick(some, horizon=h, betas=betas).set_index("metric")["median"]
            cells.append(f"{at['cosine']:.3f} ({at['cosine, worst']:.3f})")
        steps = [pick(some, part="step", type=SHORT.type, horizon=x)["median"] for x in (h, 1)]
        price = f"{steps[0].iloc[0] / steps[1].iloc[0]:.2f}x" if len(steps[0]) else ""
        body.append((f"{h:.0f}", price, *cells))
    return markdown(("H", "a step over H = 1", *(f"betas {b}" for b in pairs)), body)


def plot_steps(rows: pandas.DataFrame, folder: Path) -> None:
    """The parts of a step as stacked bars, a panel for each job, with their sums."""
    found = split(rows, "step").dropna(subset="step")
    jobs = list(found.groupby("tokens", sort=False))
    device = pick(rows, benchmark="step").iloc[0].device
    height = 1.2 + 0.28 * max(len(some) for _, some in jobs)
    made, axes = figure(len(jobs), f"A step of SmolLM2-135M, float32 ({device})", 6.0, height)
    for axis, (tokens, some) in zip(axes, jobs, strict=True):
        bars = some.set_index(some.apply(name, axis=1))[list(PARTS)]
        bars.plot.barh(stacked=True, ax=axis, color=COLOURS, width=0.8, legend=False, fontsize=8)
        for i, row in enumerate(some.itertuples()):
            # A backward pass stands in the update.
            told = row.update > 0 and row.method != "AdamW"
            text = f" {row.step:.2f} s" + (f", {row.share:.0%} optimizer" if told else "")
            axis.text(row.step, i, text, va="center", fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel="seconds a step", title=f"{tokens} tokens", xlim=(0, 1.5 * some.step.max()))
    save(made, folder / "step.png")


def plot_horizon(rows: pandas.DataFrame, folder: Path) -> None:
    """Time and cosine against the horizon."""
    some = pick(rows, benchmark="horizon")
    timed = pick(some, metric="time", part=["step", "update"])
    panels = [
        (f"seconds on {device}", "part", at) for device, at in timed.groupby("device", sort=False)
    ]
    panels.append(("cosine with the untruncated update", "betas", pick(some, metric="cosine")))
    made, axes = figure(len(panels), "AdaMeZO against its horizon H")
    for axis, (title, column, at) in zip(axes, panels, strict=True):
        at.pivot(index="horizon", columns=column, values="median").plot(ax=axis, style="o-")
        axis.set_title(title, fontsize=8)
        axis.set(xlabel="horizon H", ylim=(0, None))
    save(made, folder / "horizon.png")
