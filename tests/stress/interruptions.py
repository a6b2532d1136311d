"""Errors inside the model, and signals at random times."""

from __future__ import annotations

import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch

from adamezo.runlog import StepLog, read

from .small import came_back, check_log, expect, history, loss_of, make_optimizer, small, values


class Interrupted(BaseException):
    """Raised by a signal's handler."""


ERRORS: tuple[type[BaseException], ...] = (
    RuntimeError,
    MemoryError,
    torch.OutOfMemoryError,
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    AssertionError,
    Interrupted,
)


def interrupted_inside(count: int, exact: bool, seed: int = 0) -> Counter[str]:
    """A random error at a random call of a random module, in the first or second evaluation; a
    whole step after each."""
    chosen = random.Random(seed)
    model = small()
    optimizer = make_optimizer(model, exact)
    calls_left = [0]
    error: list[BaseException] = []

    def strike(*arguments: object) -> None:
        calls_left[0] -= 1
        if calls_left[0] == 0:
            raise error[0]

    for module in model.modules():
        module.register_forward_pre_hook(strike)
        module.register_forward_hook(strike)
    calls = 2 * sum(1 for _ in model.modules())  # of an evaluation
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        with StepLog.create(path, optimizer):
            for _ in range(count):
                kind = chosen.choice(ERRORS)
                error[:] = [kind("struck")]
                calls_left[0] = chosen.randint(1, 2 * calls)
                before, kept = values(model), history(optimizer)
                direction = kept[0]["next_direction"]
                try:
                    optimizer.step(loss_of(model))
                except BaseException as raised:
                    expect(raised is error[0], f"{raised!r} came out, {kind} went in")
                else:
                    expect(False, f"{kind} did not come out")
                expect(came_back(before, values(model), direction, exact), "weights are lost")
                expect(history(optimizer) == kept, "the history advanced")
                seen[kind.__name__] += 1
                optimizer.step(loss_of(model))
        check_log(path, model)
    return seen


def interrupted_by_signals(count: int, exact: bool, seed: int = 0) -> Counter[str]:
    """A thread sends a signal whose handler raises, at a random time in a step."""
    chosen = random.Random(seed)
    model = small()
    optimizer = make_optimizer(model, exact)
    inside = [False]

    def handler(*arguments: object) -> None:
        if inside[0]:
            inside[0] = False
            raise Interrupted

    asked, done = threading.Semaphore(0), threading.Semaphore(0)
    wait = [0.0]
    main = threading.main_thread().ident
    assert main is not None

    def sender() -> None:
        while True:
            asked.acquire()
            if wait[0] < 0:
                return
            time.sleep(wait[0])
            signal.pthread_kill(main, signal.SIGUSR1)
            done.release()

    thread = threading.Thread(target=sender)
    before_handler = signal.signal(signal.SIGUSR1, handler)
    thread.start()
    seen: Counter[str] = Counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "log"
            with StepLog.create(path, optimizer):
                start = time.perf_counter()
                for _ in range(20):
                    optimizer.step(loss_of(model))
                length = (time.perf_counter() - start) / 20
                while seen.total() - seen["not hit"] < count:
                    before, kept = values(model), history(optimizer)
                    direction = kept[0]["next_direction"]
                    records = read(path).steps
                    wait[0] = chosen.uniform(0, 1.2 * length)
                    asked.release()
                    raised = False
                    try:
                        inside[0] = True
                        optimizer.step(loss_of(model))
                    except Interrupted:
                        raised = True
                    finally:
                        inside[0] = False
                    done.acquire()
                    expect(signal.getsignal(signal.SIGUSR1) == handler, "the handler is lost")
                    if history(optimizer) == kept:
                        expect(raised, "a step did nothing")
                        expect(came_back(before, values(model), direction, exact), "weights lost")
                        expect(read(path).steps == records, "the log has a step that was not")
                        seen["step undone"] += 1
                    else:
                        expect(
                            history(optimizer)[0]["steps"] == kept[0]["steps"] + 1, "half a step"
                        )
                        expect(read(path).steps == records + 1, "the log lacks a step")
                        seen["step complete" if raised else "not hit"] += 1
            check_log(path, model)
    finally:
        wait[0] = -1
        asked.release()
        thread.join()
        signal.signal(signal.SIGUSR1, before_handler)
    return seen
