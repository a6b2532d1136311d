"""Attacks on a run: interruptions, bad input, damaged files, SIGKILL. docs/reliability.md counts.

python -m benchmarks.attacks            # all of them, about half an hour on one core
python -m benchmarks.attacks logs kills # some
python -m benchmarks.attacks --tables   # only rewrite the table of docs/reliability.md

Every attack ends the program with an error at the first thing that is not as promised. The tests
run the same functions with small counts.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import gc
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamezo import AdaMeZO
from adamezo.engine.optimizer import StepRecord, ZerothOrder
from adamezo.runlog import Log, LogError, StepLog, optimizer_for, parse, read, replay
from adamezo_kernels import PhiloxState, sample_
from benchmarks.rows import RESULTS, conditions, markdown
from benchmarks.tables import rewrite

ROOT = Path(__file__).parent.parent
OUTPUT = RESULTS / "reliability.csv"
DOCUMENT = ROOT / "docs" / "reliability.md"

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The largest relative error of one store to the type, to nearest."""


@dataclass(frozen=True)
class Count:
    """One attack: how many times, and what came of it."""

    what: str
    count: float
    unit: str = ""
    outcome: str = ""
    seconds: float = 0.0


def expect(condition: object, message: object) -> None:
    if not condition:
        raise SystemExit(f"attack: {message}")


# --- a small run ----------------------------------------------------------------------------------


class Small(nn.Module):
    """A few kinds of modules, in two types."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.norm = nn.LayerNorm(12)
        self.middle = nn.Linear(12, 33, dtype=torch.bfloat16)
        self.act = nn.GELU()
        self.out = nn.Linear(33, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.act(self.middle(self.norm(self.embed(tokens)).bfloat16()))
        return self.out(hidden.float())


TOKENS = torch.arange(40).view(8, 5) % 20
OPTIONS: dict[str, Any] = {
    "lr": 1e-3,
    "zo_eps": 1e-2,
    "horizon": 4,
    "seed": 7,
    "max_skipped": 10**9,
}


def small() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model(TOKENS).square().mean()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(x, y) and torch.equal(x.signbit(), y.signbit())
        for x, y in zip(a, b, strict=True)
    )


def history(optimizer: ZerothOrder) -> list[dict[str, Any]]:
    names = [*optimizer.history, "steps", "next_direction"]
    return [copy.deepcopy({name: g[name] for name in names}) for g in optimizer.param_groups]


def came_back(
    before: Sequence[Tensor], after: Sequence[Tensor], direction: int, exact: bool
) -> bool:
    """Whether weights are where they were: to the bit, or within three stores to nearest and one
    of twice that error (stochastic), as they were displaced in place. Numbers stored are at most
    |theta| + zo_eps |z|; the last 1 % is for the products of errors."""
    if exact:
        return same_bits(before, after)
    for index, (x, y) in enumerate(zip(before, after, strict=True)):
        z = sample_(
            torch.empty(x.numel()), PhiloxState(OPTIONS["seed"], direction), parameter=index
        )
        reach = x.double().abs() + OPTIONS["zo_eps"] * z.double().abs().view(x.shape)
        if ((x.double() - y.double()).abs() > 4.04 * UNIT[x.dtype] * reach).any():
            return False
    return True


def make_optimizer(model: nn.Module, exact: bool) -> AdaMeZO:
    options = {**OPTIONS, "perturbation": "exact" if exact else "inplace"}
    return AdaMeZO(model.named_parameters(), model=model, **options)


def check_log(path: Path, model: nn.Module) -> None:
    """The log alone gives the model's weights, to the bit, from those of :func:`small`."""
    log, base = read(path), dict(small().named_parameters())
    tensors = {name: p.detach() for name, p in base.items()}
    replay(log, optimizer_for(log.header, tensors))
    expect(same_bits(list(tensors.values()), values(model)), "the replay has other bits")


# --- interruptions --------------------------------------------------------------------------------


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


# --- bad input ------------------------------------------------------------------------------------

BAD_LOSSES: tuple[Any, ...] = (
    None,
    "1.0",
    True,
    1j,
    (1.0,),
    [torch.tensor(1.0)],
    {"logits": 1.0},
    torch.ones(3),
    torch.ones(0),
    torch.ones(2, 2),
    torch.tensor(1j),
    torch.tensor(1.0).to_sparse(),
    torch.tensor(1.0).to(torch.float8_e5m2),
    10**400,
    torch.tensor(True),
    torch.ones((), device="meta"),
)
BAD_OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": (-1.0, math.nan, math.inf, "a", None, torch.ones(2)),
    "betas": ((), (0.5,), (1.0, 0.5), (0.5, -0.1), (0.5, math.nan), None, 0.5, ("a", "b")),
    "eps": (0.0, -1.0, math.nan, math.inf, "a", None),
    "zo_eps": (0.0, -1.0, math.nan, math.inf, "a", None),
    "horizon": (0, -1, 1.5, True, "a", None),
    "weight_decay": (-1.0, math.nan, math.inf, "a", None),
    "normalization": ("adam", None, 3),
    "warmup_lr": (-1.0, math.nan, math.inf, "a"),
    "distribution": ("cauchy", None, 3),
    "rounding": ("up", None, 3),
    "perturbation": ("outplace", None, 3),
    "nonfinite": ("ignore", None, 3),
    "max_skipped": (0, -1, 1.5, True, None),
    "seed": (-1, 2**64, 0.5, True, "a"),
    "no_such_option": (1,),
}


def _writes(model: nn.Module, chosen: random.Random) -> None:
    p = chosen.choice(list(model.parameters()))
    chosen.choice([lambda: p.add_(1), lambda: p.zero_(), lambda: p.mul_(2)])()


def _replaces(model: nn.Module, chosen: random.Random) -> None:
    p = chosen.choice(list(model.parameters()))
    p.data = chosen.choice([p.clone(), p.double(), p.flatten()[:3].clone(), p.half()])


def bad_inputs(count: int, seed: int = 0) -> Counter[str]:
    """Random bad losses, closures that touch the weights, options, states and sizes. Every one has
    to be a TypeError, ValueError or RuntimeError with a message, and to leave the run as it was."""
    chosen = random.Random(seed)
    seen: Counter[str] = Counter()
    exact = False
    for number in range(count):
        if number % 50 == 0:
            exact = not exact
            model = small()
            optimizer = make_optimizer(model, exact)
            optimizer.step(loss_of(model))
        kind = chosen.choice(["loss", "closure that replaces", "option", "size", "state"])
        before, kept = values(model), history(optimizer)
        kept_options = copy.deepcopy(optimizer.state_dict())
        try:
            if kind == "loss":
                losses = [1.0] * chosen.randrange(2) + [chosen.choice(BAD_LOSSES)]
                optimizer.step(lambda losses=losses: losses.pop(0))
            elif kind == "closure that replaces":
                optimizer.step(lambda model=model: (_replaces(model, chosen), 1.0)[1])
            elif kind == "option":
                name = chosen.choice(list(BAD_OPTIONS))
                AdaMeZO(model.parameters(), **{name: chosen.choice(BAD_OPTIONS[name])})
            elif kind == "size":
                p = chosen.choice(list(model.parameters()))
                data = p.data
                p.data = torch.zeros(7, dtype=p.dtype)
                try:
                    optimizer.step(loss_of(model))
                finally:
                    p.data = data
            else:
                optimizer.load_state_dict(_bad_state(optimizer, chosen))
        except (TypeError, ValueError, RuntimeError) as error:
            expect(len(str(error)) > 10, f"{kind}: {error!r} says nothing")
        else:
            expect(False, f"a bad {kind} was accepted")
        expect(history(optimizer) == kept, f"{kind}: the history advanced")
        expect(optimizer.state_dict() == kept_options, f"{kind}: options have changed")
        after = values(model)
        expect(came_back(before, after, kept[0]["next_direction"], exact), f"{kind}: weights lost")
        seen[kind] += 1
    return seen


def _bad_state(optimizer: ZerothOrder, chosen: random.Random) -> Any:
    state = copy.deepcopy(optimizer.state_dict())
    group = state["param_groups"][0]
    way = chosen.randrange(6)
    if way == 0:
        del group[chosen.choice([k for k in group if k != "param_names"])]
    elif way == 1:
        name = chosen.choice(["distribution", "normalization", "method", "stream_version"])
        group[name] = chosen.choice(["fast", "official", "Adam", 2, None])
    elif way == 2:
        group["projected_grads"] = chosen.choice([[math.nan], [1.0] * 9, None, ["a"], [[]], "abcd"])
    elif way == 3:
        group["directions"] = chosen.choice([[-1], [5], [0, 0], None, ["0"], [0.0], {}])
    elif way == 4:
        group["params"] = group["params"][1:]
    else:
        return chosen.choice([None, [], {}, 3, {"state": {}}, {"param_groups": []}, {"state": 1}])
    return state


def closures_that_write(count: int, seed: int = 0) -> int:
    """Closures that write to weights: seen each time, by name."""
    chosen = random.Random(seed)
    for number in range(count):
        model = small()
        optimizer = make_optimizer(model, exact=number % 2 == 0)
        kept = history(optimizer)
        try:
            with torch.no_grad():
                optimizer.step(lambda model=model: (_writes(model, chosen), 1.0)[1])
        except RuntimeError as error:
            # What reads and writes outside of all modules is refused before that, if exact.
            told = "the closure has written to" in str(error) or "outside of all" in str(error)
            expect(told, f"unexpected: {error}")
        else:
            expect(False, "a closure wrote to the weights unseen")
        expect(history(optimizer) == kept, "the history advanced")
    return count


# --- damaged files --------------------------------------------------------------------------------


def small_log(folder: Path, steps: int = 6) -> bytes:
    """Of a run with a step that was skipped and one that failed."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).view(2, 3))
        model.bias.zero_()
    optimizer = AdaMeZO(model.named_parameters(), **OPTIONS)
    inputs = torch.ones(2, 3)
    path = folder / "small.log"
    with warnings.catch_warnings(), StepLog.create(path, optimizer):
        warnings.simplefilter("ignore")
        for step in range(steps):
            optimizer.step(lambda: model(inputs).square().mean())
            if step == 1:
                optimizer.step(lambda: math.nan)
            if step == 3:
                try:
                    optimizer.step(lambda: None)  # type: ignore[arg-type, return-value]
                except TypeError:
                    pass
    return path.read_bytes()


def mutated(data: bytes, other: bytes, chosen: random.Random) -> bytes:
    """One to three of: flipped bits, bytes overwritten, cut out, doubled, cut off, appended, two
    pieces exchanged, another log spliced in."""
    out = bytearray(data)
    for _ in range(chosen.choice((1, 1, 1, 2, 3))):
        size = len(out)
        at = chosen.randrange(size + 1)
        length = chosen.choice((1, 1, 2, 4, 27, chosen.randrange(1, 60)))
        way = chosen.randrange(9)
        if way <= 1 and size:
            out[chosen.randrange(size)] ^= 1 << chosen.randrange(8)
        elif way == 2:
            out[at : at + length] = chosen.randbytes(min(length, size - at))
        elif way == 3:
            del out[at : at + length]
        elif way == 4:
            out[at:at] = out[at : at + length]
        elif way == 5:
            del out[at:]
        elif way == 6:
            out += chosen.choice((bytes(length), chosen.randbytes(length)))
        elif way == 7:
            to = chosen.randrange(size + 1)
            piece = out[at : at + length]
            out[at : at + length] = out[to : to + length]
            out[to : to + length] = piece
        else:
            start = chosen.randrange(len(other))
            out[at:] = other[start:]
    return bytes(out)


def fuzz_logs(count: int, seed: int = 0) -> Counter[str]:
    """Each damaged log is refused with a LogError, or is read as the beginning of the true one."""
    chosen = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        data = small_log(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        other = small_log(Path(folder), steps=7)
    truth = parse(data)
    seen: Counter[str] = Counter()
    for _ in range(count):
        attempt = mutated(data, other, chosen)
        try:
            log = parse(attempt)
        except LogError:
            seen["refused"] += 1
        else:
            if attempt[: len(other) - 1] == other[:-1]:
                seen["another log"] += 1
                continue
            expect(_begins(truth, log), f"a wrong log was read: {attempt.hex()}")
            seen["whole" if len(log.records) == len(truth.records) else "a beginning"] += 1
    return seen


def _begins(truth: Log, log: Log) -> bool:
    def text(records: Sequence[StepRecord]) -> str:  # in which NaN equals NaN
        return repr(list(records))

    return log.header == truth.header and text(log.records) == text(
        truth.records[: len(log.records)]
    )


VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        2**31,
        2**32,
        2**63,
        2**64,
        10**400,
        0.0,
        -1.0,
        0.5,
        1e300,
    ),
    *(
        math.nan,
        math.inf,
        "",
        "exact",
        "AdaMeZO",
        "a" * 100,
        [],
        [0],
        [0.5, 0.5],
        [[]],
        {},
        {"a": 1},
    ),
)


def edited(value: Any, chosen: random.Random) -> Any:
    """``value`` with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and chosen.random() < 0.9:
        key = chosen.choice(list(value))
        if chosen.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: edited(value[key], chosen)}
    if isinstance(value, list) and value and chosen.random() < 0.9:
        at = chosen.randrange(len(value))
        if chosen.random() < 0.2:
            return value[:at] + value[at + chosen.randrange(2) :] + value[at : at + 1]
        return [*value[:at], edited(value[at], chosen), *value[at + 1 :]]
    return chosen.choice(VALUES)


def fuzz_headers(count: int, seed: int = 0) -> Counter[str]:
    """Headers that were edited and given a right checksum, then read, and if that went well
    replayed: a LogError, or a run of its own."""
    chosen = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        data = small_log(Path(folder))
    version, length = struct.unpack_from("<II", data, 8)
    header = json.loads(data[16 : 16 + length])
    layout = parse(data).header.record
    records = [
        data[at : at + layout.size - 4]
        for at in range(20 + length, len(data) - layout.size + 1, layout.size)
    ]
    seen: Counter[str] = Counter()
    for _ in range(count):
        changed = json.dumps(edited(header, chosen)).encode()
        out = data[:8] + struct.pack("<II", version, len(changed)) + changed
        checksum = zlib.crc32(out)
        out += struct.pack("<I", checksum)
        for record in records:
            if chosen.random() < 0.1:
                record = mutated(record, record, chosen)[: len(record)].ljust(len(record), b"\1")
            checksum = zlib.crc32(record, checksum)
            out += record + struct.pack("<I", checksum)
        tensors = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2)}
        try:
            log = parse(out)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                replay(log, optimizer_for(log.header, tensors))
        except LogError as error:
            expect(str(error), "an error that says nothing")
            seen["refused"] += 1
        else:
            seen["replayed"] += 1
    return seen


def fuzz_states(count: int, seed: int = 0) -> Counter[str]:
    """Edited states: a ValueError that changes nothing, or a state with which a step is possible
    or a ValueError."""
    chosen = random.Random(seed)
    parameter = nn.Parameter(torch.arange(6.0))
    optimizer = AdaMeZO([parameter], **OPTIONS)
    for step in range(6):
        optimizer.step(lambda step=step: math.sin(step) * parameter.sum())
    good = json.loads(json.dumps(optimizer.state_dict()))
    seen: Counter[str] = Counter()
    for _ in range(count):
        optimizer.load_state_dict(copy.deepcopy(good))
        state = edited(copy.deepcopy(good), chosen)
        try:
            optimizer.load_state_dict(state)
        except ValueError as error:
            expect(str(error), "an error that says nothing")
            expect(json.loads(json.dumps(optimizer.state_dict())) == good, "a half-loaded state")
            seen["refused"] += 1
            continue
        before = parameter.detach().clone()
        try:
            optimizer.step(lambda: parameter.sum())
        except (ValueError, RuntimeError) as error:
            expect(str(error), "an error that says nothing")
            seen["refused at the step"] += 1
        else:
            seen["loaded"] += 1
        with torch.no_grad():
            parameter.copy_(before)
    return seen


# --- SIGKILL --------------------------------------------------------------------------------------

RUN = "import sys; from adamezo.cli import main; sys.exit(main())"


def command(model: Path, log: Path, save_to: Path, steps: int) -> list[str]:
    data = ROOT / "examples" / "data" / "movie_reviews.csv"
    return [
        *(sys.executable, "-c", RUN, "finetune", "--model", str(model), "--data", str(data)),
        *("--template", "{text} It was {label}"),
        *("--label-words", "negative=terrible", "positive=great"),
        *("--held-out", "4", "--steps", str(steps), "--batch-size", "2", "--lr", "1e-4"),
        *("--lr-schedule", "linear", "--device", "cpu", "--log", str(log)),
        *("--save-to", str(save_to), "--output", str(save_to.parent / "report")),
    ]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python_api"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def kills(count: int, model: Path, folder: Path, steps: int, seed: int = 0) -> Counter[str]:
    """Starts `adamezo finetune --log`, kills it at a random moment, starts it again, and so on, and
    lets it finish. The weights and the log have to be those of a run that nobody killed, and the
    log alone has to give the weights."""
    chosen = random.Random(seed)
    whole, log = folder / "whole.log", folder / "killed.log"

    def start(log: Path, save_to: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command(model, log, save_to, steps),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def finish(process: subprocess.Popen[bytes]) -> None:
        _, said = process.communicate()
        expect(process.returncode == 0, f"the run failed: {said.decode()[-2000:]}")

    finish(start(whole, folder / "whole"))
    record = read(whole).header.record.size
    head = whole.stat().st_size - record * steps

    def compare() -> None:
        expect(log.read_bytes() == whole.read_bytes(), "the killed run has another log")
        files = [(folder / name / "model.safetensors") for name in ("whole", "killed")]
        expect(files[0].read_bytes() == files[1].read_bytes(), "the killed run has other weights")

    seen: Counter[str] = Counter()
    per_kill = max(1, (steps - 1) // (count + 1))
    while seen.total() < count:
        had = log.stat().st_size if log.exists() else 0
        wanted = max(had, head) + record * chosen.randrange(per_kill + 1)
        process = start(log, folder / "killed")
        began = time.perf_counter()
        while not (log.exists() and log.stat().st_size >= wanted and time.perf_counter() > began):
            if process.poll() is not None:
                break
            time.sleep(0.001)
        # The moment within what is going on: reading, replaying, or one of the next two steps.
        time.sleep(chosen.uniform(0, 0.3) if wanted > had else chosen.uniform(0, 12))
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode == 0:  # it was at its end before it could be hit: another run
            compare()
            log.unlink()
            continue
        expect(process.returncode == -signal.SIGKILL, f"the run failed: {said.decode()[-2000:]}")
        grown = (log.stat().st_size if log.exists() else 0) > max(had, head)
        seen["while training" if grown else "before its first step"] += 1
    finish(start(log, folder / "killed"))
    compare()
    done = subprocess.run(
        [sys.executable, "-c", RUN, "replay", str(model), str(log), "--out", str(folder / "out")],
        env=environment(),
        capture_output=True,
    )
    expect(done.returncode == 0, done.stderr.decode()[-2000:])
    weights = (folder / "whole" / "model.safetensors").read_bytes()
    expect((folder / "out" / "model.safetensors").read_bytes() == weights, "another replay")
    return seen


def cut_smollm2(folder: Path, layers: int = 2) -> Path:
    """SmolLM2-135M's first layers as a folder: real weights and words, and quick."""
    from adamezo.integrations import transformers as language_models
    from examples import demo

    model, tokenizer = language_models.load(demo.smollm2())
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    language_models.save(model, tokenizer, folder)
    return folder


# --- replay speed ---------------------------------------------------------------------------------


def replay_speed(steps: int = 6) -> list[Count]:
    """SmolLM2-135M in float32, 16 x 32 tokens: seconds of a step of training and of its replay."""
    from adamezo.integrations import transformers as language_models
    from examples import demo

    found = []
    for perturbation in ("inplace", "exact"):
        model, _ = language_models.load(demo.smollm2())
        tokens = torch.arange(16 * 32).view(16, 32) * 37 % 40000
        optimizer = AdaMeZO.for_model(model, seed=1, perturbation=perturbation)
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "log"
            with StepLog.create(path, optimizer), _no_collection():
                loss = lambda: model(tokens, labels=tokens, use_cache=False).loss  # noqa: E731, B023
                optimizer.step(loss)
                start = time.perf_counter()
                for _ in range(steps):
                    optimizer.step(loss)
                train = (time.perf_counter() - start) / steps
            log = read(path)
        again = optimizer_for(log.header, base)
        times = []

        def timed(
            records: Sequence[StepRecord], times: list[float] = times
        ) -> Iterator[StepRecord]:
            for record in records:
                times.append(time.perf_counter())
                yield record
            times.append(time.perf_counter())

        replay(log, again, progress=timed)
        expect(
            same_bits(list(base.values()), [p.detach() for p in model.parameters()]),
            "the replay has other bits",
        )
        replayed = (times[-1] - times[1]) / steps
        found += [
            Count(f"training, {perturbation}", 1 / train, "steps/s"),
            Count(f"replay, {perturbation}", 1 / replayed, "steps/s", f"{train / replayed:.3g}x"),
        ]
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def log_size() -> list[Count]:
    """Bytes of 20,000 steps, written."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdaMeZO([parameter], **OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        with StepLog.create(path, optimizer):
            for step in range(20000):
                optimizer.step(lambda step=step: math.sin(step) + parameter[0])
        size = path.stat().st_size
        expect(read(path).steps == 20000, "steps are missing")
        record = read(path).header.record.size
    return [Count("a record", record, "bytes"), Count("a log of 20,000 steps", size, "bytes")]


# --- the program ----------------------------------------------------------------------------------


def attack(name: str, scale: float) -> list[Count]:
    def times(count: int) -> int:
        return max(3, int(count * scale))

    start = time.perf_counter()

    def counted(what: str, seen: Counter[str] | int, leave: Sequence[str] = ()) -> Count:
        nonlocal start
        seconds, start = time.perf_counter() - start, time.perf_counter()
        if isinstance(seen, int):
            return Count(what, seen, "", "", seconds)
        text = ", ".join(f"{key} {seen[key]}" for key in sorted(seen))
        return Count(what, seen.total() - sum(seen[key] for key in leave), "", text, seconds)

    def both(what: str, run: Callable[[int, bool], Counter[str]], count: int) -> list[Count]:
        return [
            counted(f"{what}, {mode}", run(times(count), mode == "exact"), ["not hit"])
            for mode in ("inplace", "exact")
        ]

    if name == "interruptions":
        return [
            *both("errors raised inside the model", interrupted_inside, 1000),
            *both("signals at random times", interrupted_by_signals, 1000),
        ]
    if name == "inputs":
        return [
            counted("bad losses, closures, options, sizes, states", bad_inputs(times(5000))),
            counted("closures that write to weights", closures_that_write(times(500))),
        ]
    if name == "logs":
        return [counted("damaged logs", fuzz_logs(times(1_000_000)))]
    if name == "headers":
        return [counted("edited headers, right checksums", fuzz_headers(times(50_000)))]
    if name == "states":
        return [counted("edited states", fuzz_states(times(100_000)))]
    if name == "kills":
        with tempfile.TemporaryDirectory() as folder:
            model = cut_smollm2(Path(folder) / "base")
            number = times(50)
            return [counted("SIGKILL", kills(number, model, Path(folder), 4 * number))]
    if name == "speed":
        return replay_speed()
    if name == "size":
        return log_size()
    raise ValueError(f"unknown attack {name!r}, expected one of {', '.join(ATTACKS)}")


ATTACKS = ("interruptions", "inputs", "logs", "headers", "states", "kills", "speed", "size")


def write(counts: Sequence[Count], attack: str) -> None:
    """Puts the rows of one attack into the CSV file, in the place of its earlier ones."""
    rows = read_counts() if OUTPUT.exists() else []
    told = conditions() | {"command": f"python -m benchmarks.attacks {attack}"}
    new = [{"attack": attack, **dataclasses.asdict(c), **told} for c in counts]
    rows = [row for row in rows if row["attack"] != attack] + [
        {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in new
    ]
    rows.sort(key=lambda row: ATTACKS.index(row["attack"]))
    with OUTPUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_counts() -> list[dict[str, str]]:
    with OUTPUT.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table() -> str:
    body = []
    for row in read_counts():
        count = float(row["count"])
        shown = f"{count:,.0f}" if count >= 10 or count == int(count) else f"{count:.3g}"
        body.append((row["what"], f"{shown} {row['unit']}".strip(), row["outcome"], row["command"]))
    return markdown(("", "count", "outcome", "command"), body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"of {', '.join(ATTACKS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts, to try it out")
    parser.add_argument("--tables", action="store_true", help="only rewrite docs/reliability.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.tables:
        for name in arguments.attacks or ATTACKS:
            counts = attack(name, arguments.scale)
            for count in counts:
                print(f"{count.what}: {count.count:,.6g} {count.unit} {count.outcome}", flush=True)
            if arguments.scale == 1:
                write(counts, name)
    if arguments.scale == 1:
        DOCUMENT.write_text(rewrite(DOCUMENT.read_text(), {"counts": table()}), encoding="utf-8")


if __name__ == "__main__":
    main()
