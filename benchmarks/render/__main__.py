"""Writes the tables of the documents and draws the plots, from the files of results alone.

python -m benchmarks.render            all of them
python -m benchmarks.render --check    writes nothing; fails if a table is out of date
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas

from benchmarks.render import demands, kernels, steps, training
from benchmarks.render.style import conditions, markdown, rewrite
from benchmarks.results import RESULTS, pick, read

ROOT = Path(__file__).parent.parent.parent
Block = Callable[[pandas.DataFrame], str]


def summary(rows: pandas.DataFrame) -> str:
    """The few numbers of the README: one core's kernels, then the main job's step."""
    body: list[tuple[object, ...]] = []
    some = pick(kernels.table_of(rows), type="bfloat16", elements=1e7, threads=1)
    for title, what, horizon in [
        ("theta += c z, one core", "perturb", 1),
        ("AdaMeZO update, H = 10, one core", "update", 10),
        ("AdaMeZO update, H = 20, one core", "update", 20),
    ]:
        found = pick(some, what=what, horizon=horizon)
        ours = pick(found, variant="native").speed.max()
        others = [pick(found, variant=v).speed.iloc[0] for v in ("torch", "torch plain")]
        cells = [f"{speed:,.0f} M/s ({ours / speed:.1f}x)" for speed in others]
        body.append((f"{title}, bfloat16", f"{ours:,.0f} M/s", *cells))
    timed = pick(rows, benchmark="step", part="step").dropna(subset="median")
    for tokens in ("16x32", "16x128"):
        for method, horizon in (("MeZO", 1), ("AdaMeZO", 10)):
            found = pick(timed, tokens=tokens, method=method, horizon=horizon)
            seconds = found.set_index("variant")["median"]
            ours, fast = seconds["ours"], seconds["torch"]
            of_h = "" if method == "MeZO" else f", H = {horizon}"
            title = f"{method} step{of_h}, {tokens.replace('x', ' x ')} tokens"
            body.append((title, f"{ours:.2f} s", f"{fast:.2f} s ({fast / ours:.1f}x)", ""))
    return markdown(("", "adamezo", "torch at its fastest", "torch as one writes it"), body)


def conditions_of(*benchmarks: str) -> Block:
    return lambda rows: conditions(rows, *benchmarks)


PAGES: dict[str, dict[str, Block]] = {
    "README.md": {"numbers": summary},
    "docs/performance.md": {
        "conditions": conditions_of("kernels", "step"),
        "demands": partial(demands.table, demands=demands.KERNELS_AND_STEP),
        "kernels": kernels.speeds,
        "baselines": kernels.baselines,
        "kinds": kernels.kinds,
        "threads": kernels.threads,
        "fits": kernels.fits,
        "step": partial(steps.parts, benchmark="step"),
        "memory": steps.memory,
        "budget": kernels.budget,
    },
    "docs/paper.md": {
        "paper_conditions": conditions_of("step", "paper"),
        "paper_gpu": partial(
            steps.on_a_gpu, benchmark="paper", command="python -m benchmarks.paper"
        ),
        "paper_time": partial(steps.beside_the_paper, what="step"),
        "paper_memory": partial(steps.beside_the_paper, what="peak"),
        "paper_demands": partial(demands.table, demands=demands.PAPER),
        "paper_split": partial(steps.parts, benchmark="paper"),
    },
    "docs/horizon.md": {
        "horizon_conditions": conditions_of("horizon"),
        "horizon_gpu": partial(
            steps.on_a_gpu,
            benchmark="horizon",
            command="python -m benchmarks.horizon --device cuda",
        ),
        "horizon_advice": steps.advice,
        "horizon_cost": steps.cost,
        "horizon_distance": steps.distance,
    },
    "docs/perturbation.md": {
        "drift-cycles": training.cycles,
        "drift-update": training.update,
        "drift-steps": training.steps,
        "faithful": training.large,
        "small-steps": training.small,
    },
    "docs/methods.md": {
        "methods_conditions": training.method_conditions,
        **{
            f"methods_{job}_{mode}": partial(training.compared, job=job, mode=mode)
            for job in training.BUDGETS
            for mode in training.MODES
        },
    },
    "docs/reliability.md": {"counts": training.attacks},
}
PLOTS = {
    "kernels": kernels.plot,
    "step": steps.plot_steps,
    "horizon": steps.plot_horizon,
    "still": training.plot_sixteen_bit,
    "methods": training.plot_methods,
}


def page(name: str, rows: pandas.DataFrame) -> tuple[str, str]:
    """A document as it is, and as it should be."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return text, rewrite(text, {block: make(rows) for block, make in PAGES[name].items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    parser.add_argument("--plots", type=Path, help="draw what is in this folder of results there")
    arguments = parser.parse_args()
    folder = arguments.plots or RESULTS
    rows = read(*sorted(folder.glob("*.csv")))
    for name in PAGES if arguments.plots is None else ():
        text, new = page(name, rows)
        if arguments.check and new != text:
            raise SystemExit(f"{name} is out of date: run `python -m benchmarks.render`")
        if new != text:
            (ROOT / name).write_text(new, encoding="utf-8")
    for benchmark, draw in PLOTS.items() if not arguments.check else ():
        if len(pick(rows, benchmark=benchmark)):
            draw(rows, folder)


if __name__ == "__main__":
    main()
