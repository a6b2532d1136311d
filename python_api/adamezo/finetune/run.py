"""The run: load a model, evaluate it, train it, evaluate it again, and report."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import adapt, save_adapters
from ..display import Display, in_words
from ..distributed import connect
from ..engine.batched import PerturbedBatch, batched
from ..engine.check_closure import check_closure
from ..engine.find_lr import find_lr
from ..engine.optimizer import ZerothOrder
from ..integrations import transformers as language_models
from ..presets import FULL, check_lr
from ..runlog import StepLog, read
from . import checkpoint, launch, report
from .data import batches, split
from .measure import PeakMemory, now
from .optimizer import make_optimizer, with_defaults
from .options import DTYPES, HELD_OUT, Options
from .table import read_table
from .tasks import TASKS, Evaluation, Task

FINDING = 4
"""With how many batches an lr is found."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, after this many steps, which are in the log if there is one."""

    def __init__(self, steps: int, of: int) -> None:
        super().__init__(f"stopped after {steps} of {of} steps")
        self.steps = steps


def finetune(options: Options) -> dict[str, Any]:
    """Does the run that ``options`` describe and returns its report (:func:`report.numbers`).

    Raises:
        ValueError, RuntimeError, OSError, ImportError: what was given cannot be used; the message
            says what was got, what was expected and what to do.
        Stopped: Ctrl-C. With a log the same options go on.
    """
    _check(options)
    device = launch.device(options.device)
    with launch.joined(device), Display(shown=launch.rank() == 0) as display:
        return _finetune(options, device, display)


def _finetune(options: Options, device: torch.device, display: Display) -> dict[str, Any]:
    began = time.perf_counter()
    kind = TASKS[options.task]
    table = read_table(
        options.data,
        separator=options.separator,
        encoding=options.encoding,
        part=options.split,
    )
    examples = kind.read(options, table)
    options = replace(options, held_out=_held_out(options, len(examples)))
    training, held_out = split(examples, options.held_out or 0)
    model, tokenizer = language_models.load(
        options.model, dtype=getattr(torch, options.dtype), device=device
    )
    if options.adapt != FULL:
        adapt(model, options.adapt, seed=options.seed)
    make = kind.make(kind.resolved(options, examples), model, tokenizer)
    train, test = make(training), make(held_out)
    optimizer = make_optimizer(options, model, max(1, len(train) // options.batch_size))
    finding = 0
    made = time.perf_counter()
    if options.find_lr:
        lr, finding = launch.of_the_first(partial(_lr, optimizer, options, train, display))
        for group in (*optimizer.param_groups, optimizer.defaults):
            group["lr"] = lr
    options = with_defaults(options, optimizer)
    check_lr(optimizer, model)
    if launch.size() > 1:
        connect(optimizer)
    loaded = time.perf_counter()

    before, answers = _evaluate(test, options, display, "held-out, before")
    evaluated = time.perf_counter()
    with _log(optimizer, options, train, display) as (log, done):
        measured = _train(optimizer, train, test, options, log, done, display)
    measured.finding_forwards = finding
    after, more = _evaluate(test, options, display, "held-out, after")
    if launch.rank() != 0:
        pass
    elif options.save_to and options.adapt != FULL:
        save_adapters(model, options.save_to)
    elif options.save_to:
        language_models.save(model, tokenizer, options.save_to)
    seconds = {
        "load": made - began,
        "find_lr": loaded - made if finding else 0.0,
        "evaluate_held_out": evaluated - loaded,
        "all": time.perf_counter() - began,
    }
    used = kind.resolved(options, examples)
    samples = list(zip(answers, more, strict=True))
    return report.numbers(
        used, optimizer, model, train, test, before, after, samples, measured, seconds
    )


def _check(options: Options) -> None:
    for name, choices in (("dtype", DTYPES), ("task", TASKS)):
        if getattr(options, name) not in choices:
            raise ValueError(
                f"--{name}: got {getattr(options, name)!r}, expected one of {', '.join(choices)}"
            )
    for name, least in (("steps", 1), ("batch_size", 1), ("max_tokens", 2), ("show", 0)):
        if getattr(options, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected an integer of "
                f"at least {least}"
            )
    if options.batch_size % launch.size():
        raise ValueError(
            f"--batch-size: got {options.batch_size}, expected a multiple of the {launch.size()} "
            "processes, each of which takes as many rows of every batch"
        )
    lr = options.method_option.get("lr", options.lr)
    if options.find_lr and lr is not None:
        raise ValueError(f"--find-lr: there is an lr, {lr}: expected one of the two")
    if options.checkpoint_every and not options.log:
        raise ValueError("--checkpoint-every needs --log: a checkpoint is a place in a log")


def _in_the_log(options: Options, name: str) -> Any:
    """What an option was in the run that this one goes on with; None if there is none."""
    if options.log and Path(options.log).exists():
        return read(options.log).header.run.get(name)
    return None


def _held_out(options: Options, rows: int) -> int:
    """How many rows are held out. A log of a time when the default was 500 goes on with 500."""
    if options.held_out is not None:
        return options.held_out
    kept = _in_the_log(options, "held_out")
    return kept if isinstance(kept, int) else min(HELD_OUT, max(1, rows // 5))


def _lr(
    optimizer: ZerothOrder, options: Options, train: Task, display: Display
) -> tuple[float, int]:
    """The lr of a run that is to find it, on the batches of its first steps; of one that goes on,
    what was found when it began. And the forward passes that it took."""
    kept = _in_the_log(options, "lr")
    if isinstance(kept, float):
        display.write(f"lr: {kept:.3g}, that of the run in {options.log}")
        return kept, 0
    plan = batches(len(train), options.batch_size, FINDING, options.seed)
    try:
        found = find_lr(optimizer, [batched(partial(train.losses, rows)) for rows in plan])
    except (TypeError, ValueError) as error:
        raise ValueError(f"--find-lr: {error}. Or give an --lr") from error
    display.write(f"lr: {found.lr:.3g}, found in {found.forwards} forward passes")
    return found.lr, found.forwards


def _evaluate(
    test: Task, options: Options, display: Display, describe: str
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Measurements of the held-out rows, and the model's answers to the first ones."""
    with display.bar(describe, len(test)) as advance:
        found = test.evaluate(2 * options.batch_size, advance=lambda rows: advance(rows, ""))
    return found, test.answers(found, options.show)


@contextmanager
def _log(
    optimizer: ZerothOrder, options: Options, train: Task, display: Display
) -> Iterator[tuple[StepLog | None, int]]:
    """The log, if one is wanted, and how many steps are in it. The weights are those after them."""
    if options.log is None:
        yield None, 0
        return
    texts = hashlib.sha256(repr(train.identity()).encode())
    run = options.identity() | {"training texts": texts.hexdigest()}
    Path(options.log).parent.mkdir(parents=True, exist_ok=True)
    with StepLog.open(
        options.log,
        optimizer,
        run=run,
        progress=partial(display.track, description="replaying"),
        checkpoint=checkpoint.at(checkpoint.beside(options.log), optimizer),
    ) as log:
        if log.steps > options.steps:
            raise ValueError(
                f"--log: {options.log} has {log.steps} steps, expected {options.steps} at most"
            )
        yield log, log.steps


def _train(
    optimizer: ZerothOrder,
    train: Task,
    test: Task,
    options: Options,
    log: StepLog | None,
    done: int,
    display: Display,
) -> report.Training:
    """Takes the steps after the first ``done``."""
    device = train.model.device
    lr = optimizer.defaults["lr"]
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, options.lr_factor, done - 1)
    plan = batches(len(train), options.batch_size, options.steps, options.seed)
    memory = PeakMemory(device)
    forward_peak = _bare_forward_peak(train, plan, memory)
    measured = report.Training(memory.kind, forward_peak)
    if done < len(plan):  # two more forward passes, for a new run and for a resumed one
        check_closure(optimizer, lambda: train.loss(plan[done]))

    def step(number: int, batch_rows: list[int]) -> None:
        rows = batch_rows[launch.rank() :: launch.size()]

        @batched
        def closure(batch: PerturbedBatch) -> Tensor:
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
            {"step": number, "loss": loss, "projected_grad": float(optimizer.measured[0])}
        )
        scheduler.step()

    taken = done
    try:
        with display.bar("training", len(plan), done) as advance:
            for number, rows in enumerate(plan[done:], start=done + 1):
                step(number, rows)
                taken = number
                advance(1, _progress(measured, len(plan) - number))
                if log and options.checkpoint_every and number % options.checkpoint_every == 0:
                    checkpoint.save(optimizer, log)
                if options.eval_every and number % options.eval_every == 0 < len(plan) - number:
                    found = test.evaluate(2 * options.batch_size).summary()
                    measured.held_out_curve.append({"step": number} | found)
                    display.write(
                        f"step {number}: held-out loss {found['loss']:.3f}, accuracy "
                        f"{found['accuracy']:.3f}"
                    )
    except KeyboardInterrupt:
        if log and options.checkpoint_every and taken > done:
            checkpoint.save(optimizer, log)
        # The signal may have come when the step was done.
        raise Stopped(taken if log is None else log.steps, options.steps) from None
    return measured


def _progress(measured: report.Training, left: int) -> str:
    """The text beside the bar of the training steps."""
    recent = [point["loss"] for point in measured.curve[-10:]]
    each = measured.seconds / len(measured.curve)
    share = 1 - measured.forward_seconds / measured.seconds
    return (
        f"loss={sum(recent) / len(recent):.3f} "
        f"projected gradient={measured.curve[-1]['projected_grad']:+.1e} "
        f"{measured.forward_passes / measured.seconds:.2g} forwards/s "
        f"optimizer {share:.0%} left {in_words(left * each)}"
    )


def _bare_forward_peak(task: Task, plan: list[list[int]], memory: PeakMemory) -> int | None:
    """Peak memory of a forward pass on the widest batch, which also determines a step's peak."""
    widest = max(plan, key=lambda rows: max(task.width(row) for row in rows))
    with torch.no_grad():
        task.loss(widest)  # allocates what libraries keep from the first pass on
        memory.reset()
        task.loss(widest)
    return memory.read()
