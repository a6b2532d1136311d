"""Fine-tune a causal language model on a CSV of labelled texts, with forward passes only."""

from __future__ import annotations

import csv
import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from adamezo.closures import check_closure
from adamezo.integrations import transformers as language_models
from adamezo.measure import PeakMemory, now
from adamezo.methods import AdaMeZO
from adamezo.optimizer import StepRecord
from adamezo.replay import StepLog


class Example(NamedTuple):
    text: str
    label: str


@dataclass(frozen=True)
class Options:
    """Everything that decides a run. The defaults are those of the command line."""

    model: str
    data: str
    template: str = "{text} It was {label}"
    label_words: Mapping[str, str] = field(default_factory=dict)  # empty: the labels themselves
    held_out: int = 500
    steps: int = 100
    batch_size: int = 16
    max_tokens: int = 256
    lr: float = 1e-5
    lr_schedule: str = "constant"  # or "linear", down to zero
    zo_eps: float = 1e-3
    horizon: int = 10
    betas: tuple[float, float] = (0.7, 0.9)
    normalization: str = "paper"
    warmup_lr: float | None = None
    weight_decay: float = 0.0
    distribution: str = "exact"
    perturbation: str = "inplace"  # or "exact"
    rounding: str = "stochastic"  # of 16-bit weights, or "nearest"
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    eval_every: int = 0  # 0: the held-out set is scored before and after only
    show: int = 5  # held-out texts in the report
    save_to: str | None = None
    log: str | None = None  # if the file is there, the run goes on where it ended


def read_examples(path: str | Path, labels: Sequence[str] = ()) -> list[Example]:
    """Rows of a UTF-8 CSV file with the columns ``text`` and ``label`` (others are ignored).

    ``labels``: what a label may be; empty accepts any. Raises ValueError for a missing column, an
    empty text, a label outside ``labels``, a file without rows.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        for column in ("text", "label"):
            if column not in columns:
                raise ValueError(
                    f"{path}: got the columns {list(columns)}, expected one named {column!r}; "
                    "the first line of the file names the columns"
                )
        examples = []
        for row in reader:
            text, label = (row["text"] or "").strip(), (row["label"] or "").strip()
            where = f"{path}, line {reader.line_num}"
            if not text:
                raise ValueError(f"{where}: the text is empty; remove the row")
            if labels and label not in labels:
                raise ValueError(
                    f"{where}: got the label {label!r}, expected one of {', '.join(labels)}; "
                    "correct the row, or give the label a word with --label-words"
                )
            examples.append(Example(text, label))
    if not examples:
        raise ValueError(f"{path}: no rows, expected at least two")
    return examples


def split(examples: Sequence[Example], held_out: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; held out are the texts with the smallest SHA-256.

    So the split depends on the texts alone: not on their order, a seed or a library's version.
    """
    if not 0 < held_out < len(examples):
        raise ValueError(
            f"--held-out: got {held_out} of {len(examples)} rows, expected between 1 and "
            f"{len(examples) - 1}"
        )
    ordered = sorted(examples, key=lambda e: hashlib.sha256(e.text.encode()).digest())
    return ordered[held_out:], ordered[:held_out]


class Task:
    """Examples encoded for a scorer, with the loss that training follows."""

    def __init__(self, scorer: language_models.LabelScorer, examples: Sequence[Example]) -> None:
        self.scorer = scorer
        self.examples = examples
        self.prompts = scorer.encode([example.text for example in examples])
        self.targets = torch.tensor([scorer.labels.index(e.label) for e in examples])

    def __len__(self) -> int:
        return len(self.examples)

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Mean cross entropy over the label words, in nats."""
        scores = self.scorer([self.prompts[row] for row in rows])
        return cross_entropy(scores, self.targets[list(rows)].to(scores.device))

    @torch.inference_mode()
    def evaluate(self, batch_size: int, *, describe: str = "held-out") -> Evaluation:
        """Score every example, without gradients, in batches of ``batch_size``."""
        # Prompts of one length together: next to no padding.
        order = sorted(range(len(self)), key=lambda row: len(self.prompts[row]))
        scores = torch.empty(len(self), len(self.scorer.labels))
        with tqdm(total=len(self), desc=describe, unit="text", leave=False) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                scores[rows] = self.scorer([self.prompts[row] for row in rows]).cpu()
                bar.update(len(rows))
        return Evaluation(scores, self.targets)


class Evaluation:
    """Scores of held-out examples, ``(examples, labels)``, against their labels."""

    def __init__(self, scores: Tensor, targets: Tensor) -> None:
        self.scores = scores
        self.losses = cross_entropy(scores, targets, reduction="none")
        self.right = (scores.argmax(dim=1) == targets).float()

    def summary(self) -> dict[str, float]:
        return {"loss": self.losses.mean().item(), "accuracy": self.right.mean().item()}


def batches(rows: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Row numbers of each step's batch: a new random order for each pass over the rows."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, rows)
    chosen: list[list[int]] = []
    while len(chosen) < steps:
        order = torch.randperm(rows, generator=generator).tolist()
        chosen += [order[i : i + size] for i in range(0, rows - size + 1, size)]
    return chosen[:steps]


def finetune(options: Options) -> dict[str, Any]:
    """Run the job that ``options`` describes and return its report (plain, JSON-ready values)."""
    began = time.perf_counter()
    examples = read_examples(options.data, tuple(options.label_words))
    words = options.label_words or {label: label for label in sorted({e.label for e in examples})}
    training, held_out = split(examples, options.held_out)
    device = _device(options.device)
    model, tokenizer = language_models.load(
        options.model, dtype=_dtype(options.dtype), device=device
    )
    scorer = language_models.LabelScorer(
        model, tokenizer, options.template, words, max_tokens=options.max_tokens
    )
    train, test = Task(scorer, training), Task(scorer, held_out)
    optimizer = AdaMeZO(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad],
        lr=options.lr,
        betas=options.betas,
        zo_eps=options.zo_eps,
        horizon=options.horizon,
        weight_decay=options.weight_decay,
        normalization=options.normalization,
        warmup_lr=options.warmup_lr,
        distribution=options.distribution,
        perturbation=options.perturbation,
        rounding=options.rounding,
        model=model,
        seed=options.seed,
    )
    loaded = time.perf_counter()

    before = test.evaluate(2 * options.batch_size, describe="held-out, before")
    evaluated = time.perf_counter()
    with _log(optimizer, options, training) as done:
        run = _train(optimizer, train, test, options, done)
    taken = len(run.curve)
    after = test.evaluate(2 * options.batch_size, describe="held-out, after")
    if options.save_to:
        language_models.save(model, tokenizer, options.save_to)

    return {
        "options": asdict(options) | {"label_words": dict(words)},
        "versions": _versions(),
        "device": _name(device),
        "threads": torch.get_num_threads(),
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "data": {
            "training": len(train),
            "held_out": len(test),
            "labels": {label: int((test.targets == i).sum()) for i, label in enumerate(words)},
        },
        "before": before.summary(),
        "after": after.summary(),
        "change": {
            "loss": _difference(before.losses, after.losses),
            "accuracy": _difference(before.right, after.right),
        },
        "training": {
            "steps": options.steps,
            "replayed": options.steps - taken,
            "forward_passes": run.forward_passes,
            "seconds": run.seconds,
            "seconds_per_step": run.seconds / max(taken, 1),
            "optimizer_seconds_per_step": (run.seconds - run.forward_seconds) / max(taken, 1),
            "optimizer_share": 1 - run.forward_seconds / run.seconds if taken else 0.0,
        },
        "memory": {
            "kind": run.memory_kind,
            "bare_forward_peak_bytes": run.forward_peak,
            "step_peak_bytes": run.step_peak,
            "step_over_forward": run.step_peak / run.forward_peak
            if run.step_peak and run.forward_peak
            else None,
        },
        "seconds": {
            "load": loaded - began,
            "evaluate_held_out": evaluated - loaded,
            "all": time.perf_counter() - began,
        },
        "curve": run.curve,
        "held_out_curve": [
            {"step": 0} | before.summary(),
            *run.held_out_curve,
            {"step": options.steps} | after.summary(),
        ],
        "examples": _answers(test, before, after, options.show),
    }


@dataclass
class _Run:
    """What is counted while training; ``seconds`` is the steps' time alone."""

    memory_kind: str
    forward_peak: int | None
    step_peak: int | None = None
    forward_passes: int = 0
    forward_seconds: float = 0.0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    held_out_curve: list[dict[str, float]] = field(default_factory=list)


# What a resumed run may have otherwise: it does not change the weights.
_FREE = ("model", "data", "device", "eval_every", "show", "save_to", "log")


@contextmanager
def _log(optimizer: AdaMeZO, options: Options, training: Sequence[Example]) -> Iterator[int]:
    """Writes the log inside, if one is wanted; yields the steps that it gave back."""
    if options.log is None:
        yield 0
        return
    texts = hashlib.sha256(repr([tuple(example) for example in training]).encode())
    run = {name: value for name, value in asdict(options).items() if name not in _FREE}
    if options.lr_schedule == "constant":
        del run["steps"]  # more of them may follow
    run["training texts"] = texts.hexdigest()

    def bar(records: Sequence[StepRecord]) -> Iterable[StepRecord]:
        return tqdm(records, desc="replaying", unit="step")

    if Path(options.log).exists():
        log = StepLog.resume(options.log, optimizer, run=run, progress=bar)
    else:
        log = StepLog.create(options.log, optimizer, run=run)
    with log:
        if log.steps > options.steps:
            raise ValueError(
                f"--log: {options.log} has {log.steps} steps, expected {options.steps} at most"
            )
        yield log.steps


def _train(optimizer: AdaMeZO, train: Task, test: Task, options: Options, done: int = 0) -> _Run:
    """Takes the steps after the first ``done``."""
    device = train.scorer.model.device
    for group in optimizer.param_groups:
        group["initial_lr"] = options.lr
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(options), done - 1)
    plan = batches(len(train), options.batch_size, options.steps, options.seed)
    memory = PeakMemory(device)
    forward_peak = _bare_forward_peak(train, plan, memory)
    run = _Run(memory.kind, forward_peak)
    if done < len(plan):  # two forwards for each start, whether the run is new or goes on
        check_closure(optimizer, lambda: train.loss(plan[done]))

    bar = tqdm(plan[done:], desc="training", unit="step", initial=done, total=len(plan))
    for number, rows in enumerate(bar, start=done + 1):

        def closure(rows: list[int] = rows) -> Tensor:
            start = now(device)
            loss = train.loss(rows)
            run.forward_seconds += now(device) - start
            run.forward_passes += 1
            return loss

        memory.reset()
        start = now(device)
        loss = optimizer.step(closure).item()
        run.seconds += now(device) - start
        peak = memory.read()
        if peak is not None:
            run.step_peak = max(peak, run.step_peak or 0)
        run.curve.append({"step": number, "loss": loss, "projected_grad": optimizer.projected_grad})
        scheduler.step()
        recent = [point["loss"] for point in run.curve[-10:]]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
        if options.eval_every and number % options.eval_every == 0 and number < options.steps:
            point = {"step": number} | test.evaluate(2 * options.batch_size).summary()
            run.held_out_curve.append(point)
            bar.write(
                f"step {number}: held-out loss {point['loss']:.3f}, "
                f"accuracy {point['accuracy']:.3f}"
            )
    return run


def _bare_forward_peak(task: Task, plan: list[list[int]], memory: PeakMemory) -> int | None:
    """Peak memory of a plain forward pass on the widest batch, which decides a step's peak too."""
    widest = max(plan, key=lambda rows: max(len(task.prompts[row]) for row in rows))
    with torch.no_grad():
        task.loss(widest)  # the first pass also pays for what libraries keep
        memory.reset()
        task.loss(widest)
    return memory.read()


def _difference(before: Tensor, after: Tensor) -> dict[str, float]:
    """Mean change over the held-out examples, and its standard error as paired differences."""
    change = (after - before).double()
    return {
        "mean": change.mean().item(),
        "standard_error": change.std().item() / len(change) ** 0.5,
    }


def _answers(test: Task, before: Evaluation, after: Evaluation, count: int) -> list[dict[str, Any]]:
    """The model's answers to the first held-out examples: the split's order is random."""

    def answer(evaluation: Evaluation, row: int) -> dict[str, Any]:
        probabilities = evaluation.scores[row].softmax(dim=0)
        best = int(probabilities.argmax())
        return {"label": test.scorer.labels[best], "probability": probabilities[best].item()}

    return [
        {
            "text": example.text,
            "label": example.label,
            "before": answer(before, row),
            "after": answer(after, row),
        }
        for row, example in enumerate(test.examples[:count])
    ]


def _schedule(options: Options) -> Callable[[int], float]:
    if options.lr_schedule == "constant":
        return lambda step: 1.0
    if options.lr_schedule == "linear":
        return lambda step: max(0.0, 1 - step / options.steps)
    raise ValueError(f"--lr-schedule: got {options.lr_schedule!r}, expected constant or linear")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(name: str) -> torch.dtype:
    names = {"float32", "bfloat16", "float16"}
    if name not in names:
        raise ValueError(f"--dtype: got {name!r}, expected one of {', '.join(sorted(names))}")
    return getattr(torch, name)


def _versions() -> dict[str, str]:
    names = ("adamezo", "torch", "transformers", "tokenizers")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"
