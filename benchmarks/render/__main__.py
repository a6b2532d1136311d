"""Writes the tables of the documents and draws the plots, from the files of results alone.

python -m benchmarks.render                   all of them
python -m benchmarks.render --check           writes nothing; fails if a table is out of date
python -m benchmarks.render --plots FOLDER    plots what is in another folder of results, there
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas

from benchmarks.evidence import IN_16_BITS
from benchmarks.render import (
    adapters,
    evidence,
    kernels,
    learning_rates,
    memory,
    newcomer,
    scaling,
    steps,
    stream_2,
    training,
)
from benchmarks.render.style import conditions, rewrite
from benchmarks.results import RESULTS, pick, read
from benchmarks.step_jobs import BARE, BY_HORIZON, MEZO, RELEASED

ROOT = Path(__file__).parent.parent.parent
Block = Callable[[pandas.DataFrame], str]
BOTH_OPERATIONS = [("perturb", 1), ("update", 10)]
BASELINES = partial(
    kernels.speeds,
    columns=kernels.BASELINES,
    cases=[*BOTH_OPERATIONS, ("update", 20)],
    types=["bfloat16"],
)
STEP = partial(steps.by_job, metric="time", part="step")
MEMORY = partial(steps.by_job, metric="peak memory")
BOTH = ["step", "paper"]


def compared(job: str) -> dict[str, Block]:
    return {
        f"methods_{job}_{mode}": partial(training.compared, job=job, mode=mode)
        for mode in training.MODES
    }


def answers(question: str, *where: tuple[str, str]) -> dict[str, Block]:
    """By name: the answers to a question of benchmarks/evidence.py, each of a job and a mode."""
    return {
        evidence.slug(f"long {question} {job} {mode}"): partial(
            evidence.answer, question=question, job=job, mode=mode
        )
        for job, mode in where
    }


PAGES: dict[str, dict[str, Block]] = {
    "README.md": {
        "steps": partial(
            STEP, benchmark="step", reference="torch", variant=["ours", "torch"], horizon=[1, 10]
        ),
    },
    "docs/command_line.md": {
        "newcomer_conditions": partial(
            conditions, benchmarks=["newcomer docs/command_line.md", "newcomer README.md"]
        ),
        "newcomer_here": partial(newcomer.seconds, page="docs/command_line.md"),
        "newcomer_readme": partial(newcomer.seconds, page="README.md"),
    },
    "docs/performance.md": {
        "conditions": partial(
            conditions,
            benchmarks=["kernels", "low_rank", "normals", "step", "regenerated", "budget"],
        ),
    },
    "docs/performance_kernels.md": {
        "kernels": partial(kernels.speeds, columns=kernels.ISAS, cases=kernels.ALL),
        "baselines": BASELINES,
        "kinds": partial(
            kernels.speeds, columns=kernels.KINDS, cases=BOTH_OPERATIONS, types=kernels.TYPES[1:]
        ),
        "threads": partial(
            kernels.speeds, columns=kernels.THREADS, cases=BOTH_OPERATIONS, sizes=[1e6, 1e7, 1e8]
        ),
        "fits": kernels.fits,
        "low_rank": kernels.low_rank,
        "normals": kernels.normals,
    },
    "docs/performance_steps.md": {
        "step": partial(steps.parts, benchmark="step"),
        "regenerated": partial(STEP, benchmark="regenerated", reference=BARE),
        "regenerated_split": partial(steps.parts, benchmark="regenerated"),
        "regenerated_memory": partial(MEMORY, benchmark="regenerated", reference=BARE),
        "memory": partial(MEMORY, benchmark="step", reference=BARE),
    },
    "docs/performance_gpu.md": {
        "budget": kernels.budget,
        "gpu": kernels.gpu,
    },
    "docs/paper.md": {
        "paper_conditions": partial(conditions, benchmarks=BOTH),
        "paper_time": partial(STEP, benchmark=BOTH, reference=RELEASED[MEZO]),
        "paper_memory": partial(MEMORY, benchmark=BOTH, reference=RELEASED[MEZO]),
        "paper_split": partial(steps.parts, benchmark="paper"),
    },
    "docs/stream_2.md": {
        "stream_2_conditions": partial(conditions, benchmarks=["stream 2"]),
        "stream_2_times": stream_2.times,
        "stream_2_words": stream_2.words,
        "stream_2_sass": stream_2.sass,
    },
    "docs/horizon.md": {
        "horizon_conditions": partial(conditions, benchmarks=["horizon"]),
        "horizons": steps.horizons,
        "horizon_cost": partial(STEP, benchmark="horizon", reference=BY_HORIZON[1]),
        "horizon_memory": partial(MEMORY, benchmark="horizon", reference=BARE),
    },
    "docs/perturbation.md": {
        "drift-cycles": training.cycles,
        "drift-update": training.update,
        "faithful": partial(training.ends, kind="large", second="held-out accuracy"),
        "small-steps": partial(training.ends, kind="small", second="distance from the start"),
    },
    "docs/comparison.md": {
        "methods_conditions": partial(conditions, benchmarks=["methods", "methods costs"]),
        **compared("layer"),
        "methods_directions": partial(training.by_directions, job="layer", modes=["full", "lora"]),
    },
    "docs/comparison_whole.md": compared("main"),
    "docs/find_lr.md": {
        "find_lr": learning_rates.found,
        "find_lr_conditions": partial(conditions, benchmarks=["find lr"]),
    },
    "docs/long_runs.md": {
        "long_references": evidence.references,
        **answers("methods", ("layer", "full"), ("layer", "lora"), ("layer", "tensor-train")),
        **answers("long", ("layer", "lora")),
        "long_wrong_lr": evidence.wrong_lr,
        "long_spent": evidence.spent,
        "long_conditions": partial(conditions, benchmarks=["evidence"]),
    },
    "docs/long_jobs.md": {
        **answers("methods", ("4 layers", "full"), ("text", "lora")),
        **answers("methods", ("reviews", "lora"), ("reviews", "full"), ("tweets", "lora")),
    },
    "docs/long_options.md": {
        **answers("horizon", ("layer", "lora")),
        **answers("warm-up", ("layer", "lora")),
        **answers("schedule", ("layer", "lora")),
        **answers("perturbation size", ("layer", "full"), ("layer", "lora")),
        **answers("perturbation size", ("layer", "tensor-train")),
        **answers("perturbation size", ("4 layers", "full"), ("reviews", "lora")),
        **answers("bfloat16", *((job, "full") for job in IN_16_BITS)),
        **answers("directions", ("layer", "lora")),
        **answers("directions a step", ("layer", "lora")),
    },
    "docs/adapters.md": {
        "adapters_conditions": partial(conditions, benchmarks=["adapters"]),
        "adapters_costs": adapters.costs,
        "adapters_inits": adapters.inits,
    },
    "docs/quantised.md": {
        "quantised_conditions": partial(conditions, benchmarks=["quantised"]),
        "quantised": adapters.quantised,
    },
    "docs/memory.md": {
        "memory_conditions": partial(conditions, benchmarks=["needs"]),
        "memory_cards": memory.cards,
    },
    "docs/reliability.md": {"counts": training.attacks},
    "docs/scaling.md": {
        "scaling_conditions": partial(conditions, benchmarks=["scaling"]),
        "scaling_measured": scaling.measured,
        "network_conditions": partial(conditions, benchmarks=["network"]),
        "network": scaling.network,
        "recovery_conditions": partial(conditions, benchmarks=["recovery"]),
        "recovery_measured": scaling.caught_up,
        "scaling_model": scaling.model,
        "scaling_recovery": scaling.recovery,
    },
}
PLOTS = {
    "kernels": kernels.plot,
    "step": steps.plot_steps,
    "horizon": steps.plot_horizon,
    "still": training.plot_sixteen_bit,
    "methods": training.plot_methods,
    "evidence": evidence.plot,
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
    parser.add_argument("--plots", type=Path, help="a folder of results, and of plots")
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
