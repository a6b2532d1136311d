"""Tables and plots of whole steps: docs/performance.md, paper.md and horizon.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas

from benchmarks.paper import METHODS, TYPES
from benchmarks.render.style import COLOURS, NOT_YET, figure, markdown, over, save
from benchmarks.results import pick
from benchmarks.step import PARTS, SHORT
from benchmarks.step_jobs import MEZO, RELEASED, Method

# Seconds a step and peak megabytes, as the paper's Tables 7 and 4 give them.
PUBLISHED = {"MeZO": (0.21, 5016), "AdaMeZO": (0.31, 5410)}
JOB = ["benchmark", "type", "tokens"]
METHOD = ["method", "variant", "horizon"]


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
    whole = whole.assign(
        ratio=over(whole, [*JOB, "method", "horizon"], variant="torch"),
        job=whole.tokens + (" " + whole.type if whole.type.nunique() > 1 else ""),
    )
    body = []
    for row, split_of in zip(whole.itertuples(), found.itertuples(), strict=True):
        if row.median != row.median:
            body.append((name(row), row.job, *[""] * 3, "did not fit into memory", *[""] * 3))
            continue
        digits = 3 if row.median > 0.5 else 4
        cells = [f"{getattr(split_of, part):.{digits}f}" for part in PARTS]
        step = f"{row.median:.{digits}f} [{row.p20:.{digits}f}, {row.p80:.{digits}f}]"
        share = "" if row.method == "AdamW" else f"{split_of.share:.1%}"
        ratio = f"{row.ratio:.2f}x" if row.ratio > 0 else ""
        body.append((name(row), row.job, *cells, step, row.repeats, share, ratio))
    header = ("seconds, medians", "tokens", "forwards", "perturbation", "update")
    return markdown(
        (*header, "step [20 %, 80 %]", "repeats", "optimizer", "step over pure torch's"), body
    )


def memory(rows: pandas.DataFrame) -> str:
    """Peaks of resident memory, and what the largest module's weights are of that."""
    some = pick(rows, benchmark="step", metric="peak memory")
    ratios = 1 / over(some, JOB, variant="forward") if len(some) else []
    body = []
    for row, ratio in zip(some.itertuples(), ratios, strict=True):
        what = "a bare forward" if row.method == "bare" else name(row)
        body.append((what, row.tokens, f"{row.median / 2**20:.0f}", f"{ratio:.3f}x"))
    for size in pick(rows, benchmark="step", metric="largest module")["median"][:1]:
        body.append(("the largest module's weights", "", f"{size / 2**20:.0f}", ""))
    return markdown(("", "tokens", "peak MiB", "over a bare forward"), body)


def on_a_gpu(rows: pandas.DataFrame, benchmark: str, command: str) -> str:
    """What GPU its rows are from, or that there are none."""
    for row in pick(rows, benchmark=benchmark, type=TYPES)[:1].itertuples():
        return f"The GPU columns are from one {row.device}: `{row.command}`, {row.date}."
    return (
        "The GPU columns are empty: this has not been measured on a GPU. "
        f"`{command}` on a machine with one fills them."
    )


def beside_the_paper(rows: pandas.DataFrame, what: str) -> str:
    """Steps or peaks of every job in a column; in brackets the multiple of MeZO's with library
    calls in the same column."""
    step = what == "step"
    wanted = dict(metric="time", part="step") if step else dict(metric="peak memory")
    some = pick(rows, **wanted)
    jobs = [("step", SHORT.type, tokens) for tokens in ("16x32", "16x128")]
    types = TYPES if step else TYPES[:1]
    jobs += [("paper", kind, tokens) for kind in types for tokens in ("16x64", "16x256")]

    def text(value: float, base: float) -> str:
        if value != value:
            return "did not fit"
        number = f"{value:.3g} s" if step else f"{value:,.0f} MB"
        return f"{number} ({value / base:.2f}x)" if base else number

    def cell(method: Method, job: tuple[str, ...]) -> str:
        columns = dict(zip(JOB, job, strict=True))
        own, base = (
            pick(some, **columns, **of(m))["median"].to_list() for m in (method, RELEASED[MEZO])
        )
        scale = 1.0 if step else 1e-6
        return text(own[0] * scale, base[0] * scale if base else 0.0) if own else ""

    published = {method: values[0 if step else 1] for method, values in PUBLISHED.items()}
    body = [
        (f"{method}, in the paper", text(value, published["MeZO"]), *[""] * len(jobs))
        for method, value in published.items()
    ]
    for method in METHODS:
        cells = [cell(method, job) for job in jobs]
        bare = method.method == "bare" and not step
        title = "a bare forward" if bare else str(method).replace(" H=", " H = ")
        if any(cells):
            body.append((title, "", *cells))
    devices = {"step": "CPU", "paper": "GPU"}
    header = [f"{devices[benchmark]}, {kind}, {tokens}" for benchmark, kind, tokens in jobs]
    return markdown(("", "the paper", *header), body)


# The horizon -------------------------------------------------------------------------------------

COSINES = (0.9, 0.95, 0.99)


def pairs_of_betas(some: pandas.DataFrame) -> list[str]:
    return list(dict.fromkeys(some.betas.dropna()))


def advice(rows: pandas.DataFrame) -> str:
    """The smallest horizon that brings the update so near to the untruncated one, and its price."""
    some = pick(rows, benchmark="horizon")
    step = pick(some, type=SHORT.type, part="step").set_index("horizon")["median"]
    body = []
    for betas in pairs_of_betas(some):
        cosines = pick(some, metric="cosine", betas=betas).set_index("horizon")["median"]
        cells = []
        for wanted in COSINES:
            enough = cosines[cosines >= wanted].index
            price = f" ({step[min(enough)] / step[1]:.2f}x)" if len(enough) else ""
            limit = f"above {max(cosines.index):.0f}"
            cells.append(f"{min(enough):.0f}{price}" if len(enough) else limit)
        body.append((betas, *cells))
    return markdown(("betas", *(f"cosine {c} at H =" for c in COSINES)), body) if body else NOT_YET


def cost(rows: pandas.DataFrame) -> str:
    """Time and memory against the horizon."""
    some = pick(rows, benchmark="horizon", method="AdaMeZO")
    if some.empty:
        return NOT_YET
    bare = pick(rows, benchmark="horizon", method="bare", metric="peak memory").set_index("type")
    body = []
    for horizon in sorted(set(some.horizon)):
        cells = []
        for types in ([SHORT.type], list(TYPES)):
            at = pick(some, horizon=horizon, type=types)
            for part in ("update", "step"):
                seconds = pick(at, part=part)["median"].to_list()
                cells.append(f"{seconds[0]:.3g} s" if seconds else "")
                if part == "step" and types == [SHORT.type]:
                    first = pick(some, horizon=1, type=types, part="step")["median"].iloc[0]
                    cells.append(f"{seconds[0] / first:.2f}x")
            peaks = pick(at, metric="peak memory")
            ratios = [r.median / bare["median"][r.type] for r in peaks.itertuples()]
            cells.append(f"{ratios[0]:.3f}x" if ratios else "")
        body.append((f"{horizon:.0f}", *cells))
    header = ("H", "CPU: update", "step", "over H = 1", "peak memory over a bare forward's")
    return markdown((*header, "GPU: update", "step", "peak memory"), body)


def distance(rows: pandas.DataFrame) -> str:
    """What truncation leaves out, for each pair of betas."""
    some = pick(rows, benchmark="horizon")
    tables = []
    for betas in pairs_of_betas(some):
        at = pick(some, betas=betas)
        columns = [
            *(pick(some, metric="kept", beta=float(beta)) for beta in betas.split(", ")),
            *(pick(at, metric=metric) for metric in ("cosine", "cosine, worst")),
            *(pick(at, metric="error", normalization=n) for n in ("paper", "bias_corrected")),
        ]
        wide = pandas.concat([c.set_index("horizon")["median"] for c in columns], axis=1)
        body = [
            (f"{h:.0f}", *(f"{v:.1%}" for v in values[:2]), *(f"{v:.3f}" for v in values[2:]))
            for h, *values in wide.itertuples()
        ]
        header = (f"H, betas {betas}", "of m kept", "of v kept", "cosine", "the worst")
        tables.append(markdown((*header, 'error, "paper"', '"bias_corrected"'), body))
    return "\n\n".join(tables) or NOT_YET


# Plots -------------------------------------------------------------------------------------------


def bars(axis: Any, found: pandas.DataFrame, unit: float, symbol: str) -> None:
    """The parts of steps as stacked bars, in multiples of `unit` seconds, with their sums."""
    left = 0.0 * found["forwards"]
    for part in PARTS:
        width = found[part] / unit
        axis.barh(range(len(found)), width, left=left, color=COLOURS[part], label=part)
        left += width
    for i, (row, total) in enumerate(zip(found.itertuples(), left, strict=True)):
        # A backward pass stands in the update.
        told = row.update > 0 and row.method != "AdamW"
        text = f" {total:.2f} {symbol}" + (f", {row.share:.0%} optimizer" if told else "")
        axis.text(total, i, text, va="center", fontsize=8)
    axis.set_yticks(range(len(found)), [name(row) for row in found.itertuples()], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.5 * left.max())


def plot_steps(rows: pandas.DataFrame, folder: Path) -> None:
    """The parts of a step in seconds; and over MeZO's step as released, beside the two bars that
    the paper has."""
    seconds = split(rows, "step").dropna(subset="step")
    jobs = [(job[-1], some) for job, some in seconds.groupby(JOB, sort=False)]
    device = pick(rows, benchmark="step").iloc[0].device
    height = 1.2 + 0.28 * max(len(some) for _, some in jobs)
    title = f"A step of SmolLM2-135M, float32 ({device})"
    made, axes = figure(len(jobs), title, 6.0, height)
    for axis, (tokens, some) in zip(axes, jobs, strict=True):
        bars(axis, some, 1.0, "s")
        axis.set(xlabel="seconds a step", title=f"{tokens} tokens")
    legend = dict(frameon=False, loc="outside lower center", ncols=3)
    made.legend(*axes[0].get_legend_handles_labels(), **legend)
    save(made, folder / "step.png")

    columns = dict(variant="in the paper", horizon=1, perturbation=0.0, update=0.0, share=0.0)
    told = [dict(columns, method=m, forwards=s) for m, (s, _) in PUBLISHED.items()]
    panels = [("the paper's Table 7 (no split)", pandas.DataFrame(told), PUBLISHED["MeZO"][0])]
    for benchmark, where in (("step", "CPU"), ("paper", "GPU")):
        found = split(rows, benchmark)
        for (_, kind, tokens), some in found.groupby(JOB, sort=False) if len(found) else []:
            base = pick(some, **of(RELEASED[MEZO]))["step"].to_list()
            if base and base[0] > 0:
                title = f"{where}, {kind}, {tokens} tokens"
                panels.append((title, some.dropna(subset="step"), base[0]))
    made, axes = figure(len(panels), "A step over MeZO's with library calls", 5.5, height)
    for axis, (title, some, unit) in zip(axes, panels, strict=True):
        bars(axis, some, unit, "x")
        axis.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
        axis.set(xlabel="times a MeZO step as released", title=title)
    made.legend(*axes[-1].get_legend_handles_labels(), **legend)
    save(made, folder / "paper.png")


def plot_horizon(rows: pandas.DataFrame, folder: Path) -> None:
    """Time, the shares kept and the cosine against the horizon."""
    some = pick(rows, benchmark="horizon")
    devices = [d for _, d in pick(some, metric="time").groupby("device", sort=False)]
    made, axes = figure(2 + len(devices), "AdaMeZO against its horizon H")
    for axis, timed in zip(axes, devices, strict=False):
        for part in ("step", "update"):
            line = pick(timed, part=part)
            axis.plot(line.horizon, line["median"], "o-", color=COLOURS[part], label=part)
        axis.set(ylabel="seconds", ylim=(0, None))
        axis.set_title(timed.iloc[0].device, fontsize=8)
    titles = ("share of an average that is kept", "update's cosine with the untruncated one")
    shown = (("kept", "beta"), ("cosine", "betas"))
    for axis, (metric, column), title in zip(axes[-2:], shown, titles, strict=True):
        for value, line in pick(some, metric=metric).groupby(column, sort=False):
            axis.plot(line.horizon, line["median"], "o-", label=f"{column} {value}")
        axis.set(title=title, ylim=(0, 1.02), xscale="log")
        axis.set_xticks(line.horizon, [f"{h:.0f}" for h in line.horizon])
        axis.minorticks_off()
    for axis in axes:
        axis.set_xlabel("horizon H")
        axis.legend(frameon=False, fontsize=8)
    save(made, folder / "horizon.png")
