"""What do the methods reach in thousands of forward passes, and what should a user take?

    python -m benchmarks.evidence methods                          on the main job's last layer
    python -m benchmarks.evidence horizon warm-up --modes full     two questions, in one mode
    python -m benchmarks.evidence methods --job tweets             another job
    python -m benchmarks.evidence long --modes lora                few methods, five times as long
    python -m benchmarks.evidence references                       a fitted bias, a linear probe

The protocol is that of benchmarks/methods.py, but for these: a run has 2,000 forward passes; lr is
searched with two seeds, on a grid by factors of sqrt(10) that grows until the best is inside of it,
and then on both sides of the best, at a factor of 10^(1/4) = 1.78; the two best are run with five
seeds, which choose one of them; the test rows are scored at twenty places, so that the forward
passes *to reach* a loss can be read. The validation rows choose lr and nothing else. Runs resume,
and several processes may work on other modes or questions at once.

QUESTIONS says which methods and options a question compares, JOBS on what: another one is an entry
there. A table has a method when its search has ended and its two best lrs have five seeds. Writes
benchmarks/results/evidence.csv, or another file with --output; `python -m benchmarks.render` makes
the tables and figures of docs/long_runs.md. With --quick a run has 180 forward passes, which no
table has.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy

from benchmarks.method_entries import ENTRIES, Entry
from benchmarks.method_jobs import Job, Layer, Probed
from benchmarks.methods import MODES, Search
from benchmarks.results import Point, Row, conditions, parser, run_once, settings

SEEDS = range(5)
SEARCHING = 2
FINALISTS = 2
POINTS = 20
BUDGET = 2000
LONG = 10_000
QUICK = 180
PLACES = (-1, 0, 1)


def _bert(name: str, budget: int) -> Job:
    from benchmarks.long_jobs import REVIEWS, TWEETS, Bert

    return Bert(budget, name, {"reviews": REVIEWS, "tweets": TWEETS}[name])


def _text(budget: int) -> Job:
    from benchmarks.long_jobs import Text

    return Text(budget)


_IN_16_BITS = functools.partial(Layer, dtype=torch.bfloat16)
IN_16_BITS: dict[str, Callable[[int], Job]] = {
    "layer in bfloat16": _IN_16_BITS,
    "layer in bfloat16, scores in float32": functools.partial(_IN_16_BITS, scores=torch.float32),
}
JOBS: dict[str, Callable[[int], Job]] = {
    "layer": Layer,
    "4 layers": functools.partial(Layer, layers=4),
    **IN_16_BITS,
    "reviews": functools.partial(_bert, "reviews"),
    "tweets": functools.partial(_bert, "tweets"),
    "text": _text,
}

BY_NAME = {entry.name: entry for entry in ENTRIES}


def with_constant_lr(of: str) -> Entry:
    """A method of ENTRIES whose lr does not fall."""
    return replace(BY_NAME[of].varied("constant lr"), constant=True)


HORIZONS = {h: BY_NAME["AdaMeZO"].varied(f"H = {h}", horizon=h) for h in (1, 5, 20, 50)}
# Its steps are proportional to lr / zo_eps, and its default is 1e-4.
FZOO_AT = {
    size: BY_NAME["FZOO"].varied(f"zo_eps = {size:g}", scale=size / 1e-4, zo_eps=size)
    for size in (1e-3, 1e-2)
}
FEW = ("MeZO", "AdaMeZO", "FZOO")
OUT_OF_PLACE = {"perturbation": "out_of_place"}
METHODS = ("MeZO", "momentum", "AdaMeZO", "ScalarAdaMeZO", "MEAZO", "FZOO", "GRZO")
QUESTIONS: dict[str, list[Entry]] = {
    "methods": [
        *(BY_NAME[name] for name in METHODS),
        FZOO_AT[1e-3],
        BY_NAME["AdamW, by backpropagation"],
    ],
    "long": [BY_NAME[name] for name in FEW],
    "schedule": [
        *(BY_NAME[name] for name in FEW),
        *(with_constant_lr(name) for name in FEW),
    ],
    "horizon": [BY_NAME["AdaMeZO"], *HORIZONS.values()],
    "warm-up": [
        BY_NAME["AdaMeZO"],
        # The released code's first steps are MeZO's, at an lr of their own. Here that is the centre
        # of MeZO's grid with all weights, and MeZO's best with LoRA.
        BY_NAME["AdaMeZO"].varied("warm-up", warmup_lr=1e-3),
        BY_NAME["AdaMeZO"].varied("warm-up at 0.0178", warmup_lr=0.0178),
    ],
    "directions": [
        *(BY_NAME[name] for name in FEW),
        *(
            BY_NAME[name].along(kind)
            for name in ("MeZO", "AdaMeZO")
            for kind in ("lowrank", "lowrank:4", "rademacher")
        ),
        *(BY_NAME["FZOO"].along(kind) for kind in ("exact", "lowrank")),
    ],
    "directions a step": [BY_NAME["MeZO"], BY_NAME["MeZO, n = 4"]],
    # Of weights in bfloat16, which a perturbation in place would round.
    "bfloat16": [
        *(BY_NAME[name].varied("16 bits", **OUT_OF_PLACE) for name in ("MeZO", "AdaMeZO")),
        # Its own 1e-4 is lost in the weights' last bits.
        BY_NAME["FZOO"].varied("16 bits", scale=10, zo_eps=1e-3, **OUT_OF_PLACE),
        BY_NAME["AdaMeZO"].varied("16 bits, to nearest", rounding="nearest", **OUT_OF_PLACE),
        *(
            BY_NAME[name].varied(
                "16 bits, zo_eps = 0.01", 100 if name == "FZOO" else 1, zo_eps=1e-2, **OUT_OF_PLACE
            )
            for name in FEW
        ),
    ],
    "perturbation size": [
        *(BY_NAME[name] for name in FEW),
        *(
            BY_NAME[name].varied(f"zo_eps = {size:g}", zo_eps=size)
            for name in ("MeZO", "AdaMeZO")
            for size in (1e-4, 1e-2)
        ),
        *FZOO_AT.values(),
    ],
}
"""By name: the methods, and the options of some, that answer it together."""
EVERY = {entry.name: entry for entries in QUESTIONS.values() for entry in entries}


def budget_of(question: str) -> int:
    """Forward passes of a run."""
    return LONG if question == "long" else BUDGET


# References ---------------------------------------------------------------------------------------


def fitted(training: Probed, weight: float, biased_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(matrix, bias) that added to an untouched model's scores have the lowest mean loss on the
    training rows, with half the matrix's squares times ``weight`` added."""
    classes, width = training.scores.shape[1], training.features.shape[1]
    matrix = torch.zeros(classes, width, requires_grad=not biased_only)
    bias = torch.zeros(classes, requires_grad=True)
    fitted_ones = [bias] if biased_only else [matrix, bias]
    solver = torch.optim.LBFGS(fitted_ones, max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        scores = training.scores + training.features @ matrix.T + bias
        value = cross_entropy(scores, training.labels) + 0.5 * weight * matrix.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return matrix.detach(), bias.detach()


def scored(rows: Probed, matrix: torch.Tensor, bias: torch.Tensor) -> tuple[float, float]:
    scores = rows.scores + rows.features @ matrix.T + bias
    right = (scores.argmax(dim=1) == rows.labels).float().mean()
    return cross_entropy(scores, rows.labels).item(), right.item()


def reference(job: Job, probe: bool) -> Iterator[Point]:
    """The points of a fitted bias, or of a linear probe whose decay the validation rows choose."""
    parts = [job.probed(part) for part in ("training", "validation", "test")]
    if None in parts:
        raise SystemExit(f"evidence: the job {job.name!r} has no references: it has no classes")
    training, validation, test = (part for part in parts if part is not None)
    if probe:
        spread = training.features.std(dim=0)
        training, validation, test = (
            part._replace(features=part.features / spread) for part in (training, validation, test)
        )
    weights = [10.0**k for k in range(-4, 2)] if probe else [0.0]
    fits = [fitted(training, weight, not probe) for weight in weights]
    best = min(fits, key=lambda fit: scored(validation, *fit)[0])
    for part, rows in (("validation", validation), ("test", test)):
        loss, accuracy = scored(rows, *best)
        yield f"{part} loss", "1", 0, loss, 1
        yield f"{part} accuracy", "1", 0, accuracy, 1


def main() -> None:
    options = parser(__doc__, "evidence.csv")
    options.add_argument("questions", nargs="+", choices=(*QUESTIONS, "references"))
    options.add_argument("--job", default="layer", choices=tuple(JOBS))
    options.add_argument("--modes", nargs="+", choices=MODES, default=["full", "lora"])
    options.add_argument("--methods", nargs="+", metavar="METHOD", help="only these of a question")
    options.add_argument("--seeds", type=int, default=len(SEEDS), help="tables need all five")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    asked = [name for name in arguments.questions if name in QUESTIONS]
    entries = {entry.name for name in asked for entry in QUESTIONS[name]}
    if unknown := set(arguments.methods or ()) - entries:
        raise SystemExit(f"evidence: got {sorted(unknown)}, expected some of {sorted(entries)}")
    if "bfloat16" in asked and arguments.job not in IN_16_BITS:
        raise SystemExit(
            f"evidence: got --job {arguments.job!r}, expected one of {list(IN_16_BITS)} with the "
            "question 'bfloat16': its options are for weights in 16 bits"
        )
    where = conditions()
    job = JOBS[arguments.job](BUDGET)
    job.points = POINTS
    if "references" in arguments.questions:
        for name, probe in (("fitted bias", False), ("linear probe", True)):
            columns = settings(job=job.name, threads=1)
            row = Row("evidence", "", "", name, columns, "forwards", **where)
            run_once(arguments.output, row, functools.partial(reference, job, probe))
    search = Search(
        job, arguments.output, range(arguments.seeds), SEARCHING, where,
        places=PLACES, fine=True, finalists=FINALISTS, benchmark="evidence",
    )  # fmt: skip
    for question, mode in itertools.product(asked, arguments.modes):
        job.budget = QUICK if arguments.quick else budget_of(question)
        for entry in QUESTIONS[question]:
            if not arguments.methods or entry.name in arguments.methods:
                search.run(entry, mode)


if __name__ == "__main__":
    main()
