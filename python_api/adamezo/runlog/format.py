"""The bytes of a log: a header, then a record for each step. Every checksum continues the last."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.records import OUTCOMES, StepRecord

MAGIC = b"AdaMeZO\n"
FORMAT = 1

_PREFIX = struct.Struct("<II")  # the format, the length of the header's text
_CHECKSUM = struct.Struct("<I")
_COMPLETED = ("updated", "skipped")


class LogError(ValueError):
    """A log cannot be read, replayed or continued. The message names the record and the reason."""


@dataclass(frozen=True)
class Entry:
    """One trained tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameter: int
    """Its index among all parameters of the optimizer."""
    group: int


@dataclass(frozen=True)
class Header:
    """The state of a run at the beginning of its log.

    Attributes:
        groups: options and history of each parameter group, without header.NOT_LOGGED.
        counts: number of parameters in each group, frozen ones included.
        manifest: the trained tensors.
        base: SHA-256 of their bytes, concatenated in the order of the manifest.
        measured: how many numbers a step measures.
        run: data of the caller, which must be equal when the log is resumed.
    """

    groups: tuple[dict[str, Any], ...]
    counts: tuple[int, ...]
    manifest: tuple[Entry, ...]
    base: str
    measured: int
    run: dict[str, Any]

    @property
    def record(self) -> struct.Struct:
        """Layout: direction, outcome, perturbations, measured numbers, rates, checksum."""
        return struct.Struct(f"<IBH{self.measured}d{len(self.groups)}dI")

    def to_bytes(self) -> bytes:
        """The header as it stands in the file, checksum included."""
        fields = {**vars(self), "manifest": [astuple(entry) for entry in self.manifest]}
        text = json.dumps(fields, allow_nan=False).encode()
        content = MAGIC + _PREFIX.pack(FORMAT, len(text)) + text
        return content + _CHECKSUM.pack(zlib.crc32(content))


@dataclass(frozen=True)
class Log:
    """The contents of a log file."""

    header: Header
    records: tuple[StepRecord, ...]
    torn: int
    """Bytes of an incomplete record at the end, such as a killed process leaves."""
    checksum: int
    """Checksum of the last record, which the next one continues."""

    @property
    def steps(self) -> int:
        """The number of completed steps. A failed step is not one: it was taken again."""
        return sum(map(is_completed, self.records))


class Place(NamedTuple):
    """A place in a log: behind this many records, the last of which has this checksum. As checksums
    continue each other, no other log has the same place."""

    records: int
    checksum: int


def has_place(log: Log, data: bytes, place: Place) -> bool:
    """Whether a log, of these bytes without a torn end, has a place."""
    if not 0 < place.records <= len(log.records):
        return False
    end = len(data) - (len(log.records) - place.records) * log.header.record.size
    found: int = _CHECKSUM.unpack_from(data, end - _CHECKSUM.size)[0]
    return found == place.checksum


def is_completed(record: StepRecord) -> bool:
    """Whether this is the record of a completed step, which counts as one."""
    return record.outcome in _COMPLETED


def encode(header: Header, record: StepRecord, checksum: int) -> tuple[bytes, int]:
    """The bytes of a record and its checksum, which continues that of the record before it."""
    measured = (*record.measured, *[0.0] * (header.measured - len(record.measured)))
    outcome = OUTCOMES.index(record.outcome)
    content = header.record.pack(
        record.direction, outcome, record.perturbations, *measured, *record.lrs, 0
    )[: -_CHECKSUM.size]
    checksum = zlib.crc32(content, checksum)
    return content + _CHECKSUM.pack(checksum), checksum


def _decode(header: Header, content: bytes, where: str) -> StepRecord:
    direction, number, perturbations, *values, _ = header.record.unpack(content)
    if number >= len(OUTCOMES):
        raise LogError(f"{where} has outcome {number}, expected less than {len(OUTCOMES)}")
    outcome, lrs = OUTCOMES[number], tuple(values[header.measured :])
    measured = tuple(values[: header.measured]) if outcome in _COMPLETED else ()
    return StepRecord(outcome, direction, perturbations, measured, lrs)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Puts the path of a log in front of the message of a LogError."""
    try:
        yield
    except LogError as error:
        raise LogError(f"{path}: {error}") from error


def read(path: str | Path) -> Log:
    """Reads the log at ``path``; see :func:`parse`."""
    with naming(path):
        return parse(Path(path).read_bytes())


def parse(data: bytes) -> Log:
    """Reads a whole log.

    The record that was being written when the process or the machine died is left out: an
    incomplete one at the end, or zeros there, which a file system leaves after a power failure.

    Raises:
        LogError: anything else differs from what was written; the message says what.
    """
    header, position = _parse_header(data)
    (checksum,) = _CHECKSUM.unpack_from(data, position - _CHECKSUM.size)
    size = header.record.size
    records: list[StepRecord] = []
    while len(data) - position >= size:
        content = data[position : position + size]
        where = f"record {len(records) + 1}"
        expected = zlib.crc32(content[: -_CHECKSUM.size], checksum)
        if content[-_CHECKSUM.size :] != _CHECKSUM.pack(expected):
            if not any(data[position:]):
                break
            raise LogError(f"{where} is damaged: its checksum is wrong")
        if records and records[-1].outcome == "broken":
            raise LogError(f"{where} follows a step that failed half-way")
        records.append(_decode(header, content, where))
        checksum = expected
        position += size
    return Log(header, tuple(records), len(data) - position, checksum)


def _parse_header(data: bytes) -> tuple[Header, int]:
    """The header, and where the first record begins."""
    magic, start = data[: len(MAGIC)], len(MAGIC) + _PREFIX.size
    if magic != MAGIC:
        raise LogError(f"not a log: it begins with {magic!r}, expected {MAGIC!r}")
    if len(data) < start:
        raise LogError(f"the header is cut off after {len(data)} bytes")
    version, length = _PREFIX.unpack_from(data, len(MAGIC))
    if version != FORMAT:
        raise LogError(f"the log has format {version}, this version of adamezo reads {FORMAT}")
    end = start + length
    if len(data) < end + _CHECKSUM.size:
        raise LogError(f"the header is cut off after {len(data)} of {end + _CHECKSUM.size} bytes")
    if _CHECKSUM.unpack_from(data, end) != (zlib.crc32(data[:end]),):
        raise LogError("the header is damaged: its checksum is wrong")
    try:
        fields = json.loads(data[start:end])
        manifest = tuple(
            Entry(name, tuple(shape), dtype, parameter, group)
            for name, shape, dtype, parameter, group in fields.pop("manifest")
        )
        groups, counts = tuple(fields.pop("groups")), tuple(fields.pop("counts"))
        header = Header(groups, counts, manifest, **fields)
        _check_header(header)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise LogError(f"the header is damaged: {error}") from error
    return header, end + _CHECKSUM.size


def _check_header(header: Header) -> None:
    """Checks types and ranges: a header with a right checksum may still have been edited."""
    if not header.groups or not all(type(group) is dict for group in header.groups):
        raise ValueError("it has no groups")
    if len(header.counts) != len(header.groups) or not _natural(*header.counts, header.measured):
        raise ValueError("its counts do not match its groups")
    if sum(header.counts) > 2**24 or header.measured > 2**16:
        raise ValueError("its counts are larger than an optimizer can have")
    if type(header.base) is not str or type(header.run) is not dict:
        raise ValueError("its base or its run has the wrong type")
    seen = set()
    for entry in header.manifest:
        if type(entry.name) is not str or not _natural(*entry.shape, entry.parameter, entry.group):
            raise ValueError(f"{entry} is not an entry of a manifest")
        if entry.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"{entry.name} has dtype {entry.dtype!r}")
        first = sum(header.counts[: entry.group])
        if not first <= entry.parameter < sum(header.counts[: entry.group + 1]):
            raise ValueError(f"{entry.name} is not in group {entry.group}")
        if entry.parameter in seen:
            raise ValueError(f"{entry.name} is a second parameter {entry.parameter}")
        seen.add(entry.parameter)


def _natural(*values: object) -> bool:
    return all(type(value) is int and 0 <= value < 2**31 for value in values)
