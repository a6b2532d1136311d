"""Damaged logs, edited headers and edited states."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adamezo import AdaMeZO
from adamezo.engine.records import StepRecord
from adamezo.runlog import Log, LogError, StepLog, optimizer_for, parse, replay

from .small import OPTIONS, expect


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
