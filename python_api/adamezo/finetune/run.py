"""The run: load a model, evaluate it, train it, evaluate it again, and report."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..adapters import adapt, check_lr, save_adapters
from ..adapters.presets import FULL
from ..engine.batched import PerturbedBatch, batched
from ..engine.check_closure import check_closure
from ..integrations import transformers as language_models
from ..methods import AdaMeZO
from ..runlog import StepLog
from . import report
from .data import Example, batches, read_examples, split
from .measure import PeakMemory, now
from .options import DTYPES, Options
from .task import Task


def finetune(options: Options) -> dict[str, Any]:
    """Does the run that ``options`` describe and returns its report (:func:`report.numbers`)."""
    began = time.perf_counter()
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype: got {options.dtype!r}, expected one of {', '.join(DTYPES)}")
    examples = read_examples(options.data, tuple(options.label_words))
    words = options.label_words or {label: label for label in sorted({e.label for e in examples})}
    training, held_out = split(examples, options.held_out)
    model, tokenizer = language_models.load(
        options.model, dtype=getattr(torch, options.dtype), device=_device(options.device)
    )
    if options.adapt != FULL:
        adapt(model, options.adapt, seed=options.seed)
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
    check_lr(optimizer, model)
    loaded = time.perf_counter()

    before = test.evaluate(2 * options.batch_size, describe="held-out, before")
    evaluated = time.perf_counter()
    with _log(optimizer, options, training) as done:
        measured = _train(optimizer, train, test, options, done)
    after = test.evaluate(2 * options.batch_size, describe="held-out, after")
    if options.save_to and options.adapt != FULL:
        save_adapters(model, options.save_to)
    elif options.save_to:
        language_models.save(model, tokenizer, options.save_to)
    seconds = {
        "load": loaded - began,
        "evaluate_held_out": evaluated - loaded,
        "all": time.perf_counter() - began,
    }
    used = replace(options, label_words=dict(words))
    return report.numbers(used, model, len(train), test, before, after, measured, seconds)


@contextmanager
def _log(optimizer: AdaMeZO, options: Options, training: Sequence[Example]) -> Iterator[int]:
    """Writes the log, if one is wanted, and yields how many steps were replayed from it."""
    if options.log is None:
        yield 0
        return
    texts = hashlib.sha256(repr([tuple(example) for example in training]).encode())
    run = options.identity() | {"training texts": texts.hexdigest()}
    if Path(options.log).exists():
        bar = partial(tqdm, desc="replaying", unit="step")
        log = StepLog.resume(options.log, optimizer, run=run, progress=bar)
    else:
        log = StepLog.create(options.log, optimizer, run=run)
    with log:
        if log.steps > options.steps:
            raise ValueError(
                f"--log: {options.log} has {log.steps} steps, expected {options.steps} at most"
            )
        yield log.steps


def _train(
    optimizer: AdaMeZO, train: Task, test: Task, options: Options, done: int
) -> report.Training:
    """Takes the steps after the first ``done``."""
    device = train.scorer.model.device
    for group in optimizer.param_groups:
        group["initial_lr"] = options.lr
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, options.lr_factor, done - 1)
    plan = batches(len(train), options.batch_size, options.steps, options.seed)
    memory = PeakMemory(device)
    forward_peak = _bare_forward_peak(train, plan, memory)
    measured = report.Training(memory.kind, forward_peak)
    if done < len(plan):  # two more forward passes, for a new run and for a resumed one
        check_closure(optimizer, lambda: train.loss(plan[done]))

    bar = tqdm(plan[done:], desc="training", unit="step", initial=done, total=len(plan))
    for number, rows in enumerate(bar, start=done + 1):

        @batched
        def closure(batch: PerturbedBatch, rows: list[int] = rows) -> Tensor:
            start = now(device)
            losses = train.losses(rows, batch)
            measured.forward_seconds += now(device) - start
            measured.forward_passes += batch.count
            return losses

        memory.reset()
        start = now(device)
        loss = optimizer.step(closure).item()
        measured.seconds += now(device) - start
        peak = memory.read()
        if peak is not None:
            measured.step_peak = max(peak, measured.step_peak or 0)
        measured.curve.append(
            {"step": number, "loss": loss, "projected_grad": optimizer.projected_grad}
        )
        scheduler.step()
        recent = [point["loss"] for point in measured.curve[-10:]]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
        if options.eval_every and number % options.eval_every == 0 and number < options.steps:
            point = {"step": number} | test.evaluate(2 * options.batch_size).summary()
            measured.held_out_curve.append(point)
            bar.write(
                f"step {number}: held-out loss {point['loss']:.3f}, "
                f"accuracy {point['accuracy']:.3f}"
            )
    return measured


def _bare_forward_peak(task: Task, plan: list[list[int]], memory: PeakMemory) -> int | None:
    """Peak memory of a forward pass on the widest batch, which also determines a step's peak."""
    widest = max(plan, key=lambda rows: max(len(task.prompts[row]) for row in rows))
    with torch.no_grad():
        task.loss(widest)  # allocates what libraries keep from the first pass on
        memory.reset()
        task.loss(widest)
    return memory.read()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
