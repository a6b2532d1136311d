"""A run as a small file: what the weights were, and a few bytes for each step since.

A step is a function of the weights, the options, and very few numbers that were measured. So a log
of those numbers, on the base weights, gives the weights after any step again, bit for bit and
without an evaluation. docs/reliability.md has the format.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamezo_kernels import RULES, PhiloxState
from adamezo_kernels.plan import memory_of

from . import methods
from .module_buffers import BufferMarks, tracking
from .optimizer import OUTCOMES, StepRecord, ZerothOrder
from .plain import plain

try:
    import fcntl
except ImportError:  # no locks where there is no fcntl
    fcntl = None  # type: ignore[assignment]

MAGIC = b"AdaMeZO\n"
FORMAT = 1

NOT_LOGGED = (
    *("lr", "perturbation"),  # of each step, the records tell
    *("fused", "nonfinite", "max_skipped", "capturable", "differentiable"),
)
"""Options that may change while a log is written: the same records would give the same weights."""

Progress = Callable[[Sequence[StepRecord]], Iterable[StepRecord]]


class LogError(ValueError):
    """A log that cannot be read, replayed or continued. The message says which record and why."""


# --- the file -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One tensor that the steps move."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameter: int
    """The index of the parameter among all that the optimizer has."""
    group: int


@dataclass(frozen=True)
class Header:
    """What a run was when its log began.

    Attributes:
        groups: the options and the history of each parameter group, but for NOT_LOGGED.
        counts: how many parameters each group has, frozen ones included.
        manifest: the tensors that move.
        base: SHA-256 of their bytes, one after another, in the order of the manifest.
        measured: how many numbers a step measures.
        run: whatever the writer of the log wants to find again.
    """

    groups: tuple[dict[str, Any], ...]
    counts: tuple[int, ...]
    manifest: tuple[Entry, ...]
    base: str
    measured: int
    run: dict[str, Any]

    @property
    def record(self) -> struct.Struct:
        """direction, outcome, displacements, what was measured, a rate for each group, checksum."""
        return struct.Struct(f"<IBH{self.measured}d{len(self.groups)}dI")

    def to_bytes(self) -> bytes:
        """MAGIC, format, length of the text, the text, its checksum."""
        text = json.dumps(
            {
                "groups": self.groups,
                "counts": self.counts,
                "manifest": [list(vars(entry).values()) for entry in self.manifest],
                "base": self.base,
                "measured": self.measured,
                "run": self.run,
            },
            allow_nan=False,
        ).encode()
        start = MAGIC + struct.pack("<II", FORMAT, len(text)) + text
        return start + struct.pack("<I", zlib.crc32(start))


@dataclass(frozen=True)
class Log:
    """What a log file holds."""

    header: Header
    records: tuple[StepRecord, ...]
    torn: int
    """Bytes at the end of an unfinished record, as a process that was killed leaves them."""
    checksum: int
    """Of the last record. The next one's goes on from it."""

    @property
    def steps(self) -> int:
        """Steps that are over: the failed ones were taken again."""
        return sum(record.outcome in ("updated", "skipped") for record in self.records)


_LENGTH = struct.Struct("<II")


def parse(data: bytes) -> Log:
    """Reads a whole log.

    An incomplete last record, or zeros where the next one would be (a file system leaves them when
    the power fails), is what was being written at the end, and is left out.

    Raises:
        LogError: something else is not as it was written; the message says what.
    """
    start = len(MAGIC) + _LENGTH.size
    if data[: len(MAGIC)] != MAGIC:
        raise LogError(f"not a log: it begins with {data[: len(MAGIC)]!r}, expected {MAGIC!r}")
    if len(data) < start:
        raise LogError(f"the header is cut off after {len(data)} bytes")
    version, length = _LENGTH.unpack_from(data, len(MAGIC))
    if version != FORMAT:
        raise LogError(f"the log has format {version}, this version of adamezo reads {FORMAT}")
    position = start + length + 4
    if len(data) < position:
        raise LogError(f"the header is cut off after {len(data)} of {position} bytes")
    (checksum,) = struct.unpack_from("<I", data, position - 4)
    if checksum != zlib.crc32(data[: position - 4]):
        raise LogError("the header is damaged: its checksum is wrong")
    header = _header(data[start : position - 4])
    layout = header.record
    records: list[StepRecord] = []
    while len(data) - position >= layout.size:
        content = data[position : position + layout.size]
        expected = zlib.crc32(content[:-4], checksum)
        values = layout.unpack(content)
        if values[-1] != expected:
            if not any(data[position:]):
                break
            raise LogError(f"{_at(records)} is damaged: its checksum is wrong")
        if records and records[-1].outcome == "broken":
            raise LogError(f"{_at(records)} follows a step that failed half-way")
        checksum = expected
        records.append(_record(values, header.measured, _at(records)))
        position += layout.size
    return Log(header, tuple(records), len(data) - position, checksum)


def _at(records: Sequence[StepRecord]) -> str:
    return f"record {len(records) + 1}"


def _record(values: tuple[Any, ...], measured: int, where: str) -> StepRecord:
    direction, outcome, displacements = values[:3]
    if outcome >= len(OUTCOMES):
        raise LogError(f"{where} has outcome {outcome}, expected less than {len(OUTCOMES)}")
    name = OUTCOMES[outcome]
    numbers = values[3 : 3 + measured] if name in ("updated", "skipped") else ()
    return StepRecord(name, direction, displacements, numbers, values[3 + measured : -1])


def _header(text: bytes) -> Header:
    try:
        fields = json.loads(text)
        manifest = tuple(
            Entry(name, tuple(shape), dtype, parameter, group)
            for name, shape, dtype, parameter, group in fields.pop("manifest")
        )
        groups, counts = tuple(fields.pop("groups")), tuple(fields.pop("counts"))
        header = Header(groups, counts, manifest, **fields)
        _check_header(header)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise LogError(f"the header is damaged: {error}") from error
    return header


def _check_header(header: Header) -> None:
    def natural(*values: object) -> bool:
        return all(type(value) is int and 0 <= value < 2**31 for value in values)

    if not header.groups or not all(type(group) is dict for group in header.groups):
        raise ValueError("it has no groups")
    if len(header.counts) != len(header.groups) or not natural(*header.counts, header.measured):
        raise ValueError("its counts are no counts of its groups")
    if sum(header.counts) > 2**24 or header.measured > 2**16:
        raise ValueError("its counts are beyond what an optimizer can have")
    if type(header.base) is not str or type(header.run) is not dict:
        raise ValueError("its base or its run is of another type")
    seen = set()
    for entry in header.manifest:
        if type(entry.name) is not str or not natural(*entry.shape, entry.parameter, entry.group):
            raise ValueError(f"{entry} is not an entry of a manifest")
        if entry.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"{entry.name} has dtype {entry.dtype!r}")
        first = sum(header.counts[: entry.group])
        if not first <= entry.parameter < sum(header.counts[: entry.group + 1]):
            raise ValueError(f"{entry.name} is not in group {entry.group}")
        if entry.parameter in seen:
            raise ValueError(f"{entry.name} is a second parameter {entry.parameter}")
        seen.add(entry.parameter)


def read(path: str | Path) -> Log:
    """Reads the log at ``path``; see :func:`parse`."""
    try:
        return parse(Path(path).read_bytes())
    except LogError as error:
        raise LogError(f"{path}: {error}") from None


# --- a run and its header -------------------------------------------------------------------------

_Options = list[dict[str, Any]]


def header_of(optimizer: ZerothOrder, run: dict[str, Any] | None = None) -> Header:
    """What the optimizer and its weights are now, as a log that begins here has it."""
    entries, tensors = [], []
    for i, plan in enumerate(optimizer._plans()):
        for segment, name in zip(plan, plan.names, strict=True):
            tensor = segment.tensor
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append(Entry(name, tuple(tensor.shape), dtype, segment.parameter, i))
            tensors.append(tensor)
    options = optimizer._shared_options()
    first = PhiloxState(options["seed"], optimizer.param_groups[0]["next_direction"])
    probes = len(optimizer._probes(first, options))
    history = [_plain(g, _history(optimizer)) for g in optimizer.param_groups]
    return Header(
        groups=tuple(o | h for o, h in zip(_options(optimizer), history, strict=True)),
        counts=tuple(len(group["params"]) for group in optimizer.param_groups),
        manifest=tuple(entries),
        base=digest(tensors),
        measured=len(optimizer._measure([0.0] * probes, options)),
        run={} if run is None else json.loads(json.dumps(run)),
    )


def _history(optimizer: ZerothOrder | type[ZerothOrder]) -> list[str]:
    return [*optimizer.history, "steps", "next_direction"]


def _options(optimizer: ZerothOrder) -> _Options:
    """What may not change while a log is written, in JSON's own types."""
    names = [name for name in optimizer.defaults if name not in NOT_LOGGED]
    names += ["method", "stream_version"]
    return [_plain(group, names) for group in optimizer.param_groups]


def _plain(group: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    values = ((name, plain(group[name])) for name in names)
    return {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in values}


_CHUNK = 2**20


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors' bytes, row by row, one tensor after another."""
    hashed = hashlib.sha256()
    chunk = bytearray(_CHUNK)
    view = torch.frombuffer(chunk, dtype=torch.uint8)
    for tensor in tensors:
        if tensor.numel():
            elements = tensor.detach().reshape(-1)
            if elements.stride() != (1,):  # of one in each row, reshape makes no copy
                elements = elements.clone(memory_format=torch.contiguous_format)
            for piece in elements.view(torch.uint8).split(_CHUNK):
                view[: len(piece)].copy_(piece)
                hashed.update(memoryview(chunk)[: len(piece)])
    return hashed.hexdigest()


def differences(log: Header, now: Header) -> list[str]:
    """What is not as the log has it, in words."""
    found = []
    if len(log.groups) != len(now.groups) or log.counts != now.counts:
        found.append(
            f"the log has groups of {list(log.counts)} parameters, here are {list(now.counts)}"
        )
    for i, (then, here) in enumerate(zip(log.groups, now.groups, strict=False)):
        for name in then.keys() | here.keys():
            if then.get(name) != here.get(name):
                found.append(
                    f"group {i} had {name} {then.get(name)!r}, here it is {here.get(name)!r}"
                )
    for name in log.run.keys() | now.run.keys():
        if log.run.get(name) != now.run.get(name):
            found.append(f"{name} was {log.run.get(name)!r}, here it is {now.run.get(name)!r}")
    for entry, other in zip(log.manifest, now.manifest, strict=False):
        if entry != other:
            found.append(f"{_text(entry)} is here {_text(other)}")
    if len(log.manifest) != len(now.manifest):
        found.append(f"{len(log.manifest)} tensors moved, here {len(now.manifest)} do")
    if not found and log.base != now.base:
        found.append("the weights are not those that it began with: their SHA-256 differs")
    return sorted(found)


def _text(entry: Entry) -> str:
    return f"{entry.name} (parameter {entry.parameter}, {entry.dtype}, {list(entry.shape)})"


def _check_same(log: Header, now: Header) -> None:
    found = differences(log, now)
    if found:
        more = f"; and {len(found) - 3} more" * (len(found) > 3)
        raise LogError(f"the log is of another run: {'; '.join(found[:3])}{more}")


def optimizer_for(header: Header, tensors: Mapping[str, Tensor]) -> ZerothOrder:
    """An optimizer on these tensors, by the names of the manifest, as it was when the log began.

    Raises:
        LogError: a method or an option that this version does not have, or other weights; the
            message says which.
    """
    missing = [entry.name for entry in header.manifest if entry.name not in tensors]
    if missing:
        raise LogError(f"the base has no tensor {missing[0]!r}, nor {len(missing) - 1} others")
    moved = {entry.parameter: entry.name for entry in header.manifest}
    params: list[list[tuple[str, torch.nn.Parameter]]] = []
    for count in header.counts:
        first = sum(map(len, params))
        params.append(
            [
                (moved[i], torch.nn.Parameter(tensors[moved[i]]))
                if i in moved
                # A frozen one has no part in it, but counts.
                else (f"parameter {i}", torch.nn.Parameter(torch.empty(0), requires_grad=False))
                for i in range(first, first + count)
            ]
        )
    try:
        optimizer = _new(header, params)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise LogError(f"the options of the log cannot be used: {error}") from error
    _check_same(header, header_of(optimizer, header.run))
    return optimizer


def _new(header: Header, params: list[Any]) -> ZerothOrder:
    name = header.groups[0]["method"]
    if name not in methods.__all__:
        raise ValueError(f"the method is {name!r}, expected one of {methods.__all__}")
    method = getattr(methods, name)
    stored = [*_history(method), "method", "stream_version"]
    options = [{k: v for k, v in group.items() if k not in stored} for group in header.groups]
    shared = {k: v for k, v in options[0].items() if k in method.shared_options}
    groups = [{**group, "params": p} for group, p in zip(options, params, strict=True)]
    optimizer = method(groups, lr=0.0, **shared)
    state = optimizer.state_dict()
    for group, saved in zip(header.groups, state["param_groups"], strict=True):
        saved.update({k: group[k] for k in stored})
    optimizer.load_state_dict(state)
    return optimizer


# --- replaying ------------------------------------------------------------------------------------


def replay(
    log: Log,
    optimizer: ZerothOrder,
    *,
    until: int | None = None,
    progress: Progress = iter,
) -> int:
    """Takes the steps of a log again, without an evaluation.

    Args:
        log: what :func:`read` gave.
        optimizer: on the base weights, as it was when the log began: from :func:`optimizer_for`,
            or made as it was then.
        until: how many steps; None takes them all.
        progress: is given the records and yields them, for a progress bar.

    Returns:
        The number of steps taken.

    Raises:
        LogError: other weights or options than at the beginning of the log; fewer steps than
            ``until``; a record that cannot be. The message says which.
    """
    _check_same(log.header, header_of(optimizer, log.header.run))
    return _replay(log, optimizer, until, progress)


def _replay(log: Log, optimizer: ZerothOrder, until: int | None, progress: Progress) -> int:
    records, steps = [], 0
    if until is not None and not 0 <= until <= log.steps:
        raise LogError(f"the log has {log.steps} steps, there is no step {until}")
    for number, record in enumerate(log.records, start=1):
        if steps == until:
            break
        if record.outcome == "broken":
            raise LogError(
                f"record {number} is of a step that failed half-way, so that the weights after it "
                f"are not known. Those before it are at step {steps}"
            )
        records.append(record)
        steps += record.outcome != "failed"
    for number, record in enumerate(progress(records), start=1):
        try:
            optimizer.replay(record)
        except ValueError as error:
            raise LogError(f"record {number}: {error}") from error
    return steps


# --- writing --------------------------------------------------------------------------------------


class StepLog:
    """Writes a record at the end of every step of an optimizer, from now on.

    A record is handed to the system in one piece before ``step`` returns, so that nothing is lost
    when the process is killed at any moment. If the machine itself may lose power, ``sync_every``
    has to be set.

    Use :meth:`create` or :meth:`resume`; ``close`` when done, or a ``with`` block.

    Buffers of the model's modules (BatchNorm's running statistics) are not in a log: a replay has
    the weights and not those. Where the optimizer knows its model, a step whose evaluations wrote
    one ends with a LogError that names it; it is done and in the log. No other step follows, unless
    the log was made with ``module_buffers="ignore"``.

    Attributes:
        steps (int): steps in the log.
    """

    def __init__(
        self,
        file: int,
        path: Path,
        log: Log,
        optimizer: ZerothOrder,
        sync_every: int,
        module_buffers: str,
    ):
        self._file = file
        self._path = path
        self._layout, self._measured = log.header.record, log.header.measured
        self._checksum = log.checksum
        self._optimizer = optimizer
        self._sync_every = sync_every
        self._unwritten = b""
        self._broken = False
        self._records = 0
        self.steps = log.steps
        self._options = _options(optimizer)
        self._marks = _marks(optimizer)
        self._looks_at_buffers = module_buffers != "ignore"
        self._buffers: BufferMarks | None = None  # as a step found them
        self._written: list[str] = []
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        optimizer.recorder = self._record

    @classmethod
    def create(
        cls,
        path: str | Path,
        optimizer: ZerothOrder,
        *,
        run: dict[str, Any] | None = None,
        sync_every: int = 0,
        module_buffers: str = "refuse",
    ) -> StepLog:
        """Begins a log with the weights as they are now, which are not written: keep them.

        Args:
            path: of a file that does not exist.
            optimizer: whose steps are to be logged.
            run: kept in the header; :meth:`resume` asks for the same.
            sync_every: after how many records the system is told to write to the disk. 0 leaves
                that to the system.
            module_buffers: ``"refuse"`` to go on where evaluations write module buffers, or
                ``"ignore"`` them, if they are saved elsewhere or not wanted.

        Raises:
            FileExistsError: there is a file already.
            LogError: the optimizer has a recorder, or is ``capturable``, or has taken steps and
                keeps tensors for the weights; or a module is about to write running statistics.
        """
        path = Path(path)
        _check_free(optimizer)
        _check_modules(optimizer, module_buffers)
        if path.exists():
            raise FileExistsError(f"{path} is there already: resume it, or name another file")
        header = header_of(optimizer, run)
        data = header.to_bytes()
        # A log appears whole or not at all, and never in the place of another one.
        file, new = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        try:
            _lock(file, path)
            os.chmod(new, 0o644)
            _write(file, data)
            os.fsync(file)
            os.link(new, path)
        except BaseException:
            os.close(file)
            raise
        finally:
            os.unlink(new)
        return cls(file, path, parse(data), optimizer, sync_every, module_buffers)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        optimizer: ZerothOrder,
        *,
        run: dict[str, Any] | None = None,
        sync_every: int = 0,
        progress: Progress = iter,
        module_buffers: str = "refuse",
    ) -> StepLog:
        """Replays a log onto an optimizer on the base weights, and goes on with it.

        A torn record at the end is cut off, and so is one of a step that failed half-way: the
        weights are those before it.

        Args:
            optimizer: made as it was for :meth:`create`, on the same base weights.
            run: as given then.
            path, sync_every, progress: see :meth:`create` and :func:`replay`.
            module_buffers: see :meth:`create`. It is not in the log: say it again.

        Raises:
            LogError: the log is damaged, or of other weights, options, or another run; the message
                says what differs. Or a module is about to write running statistics. Nothing has
                changed then.
        """
        path = Path(path)
        _check_free(optimizer)
        _check_modules(optimizer, module_buffers)
        file = os.open(path, os.O_RDWR)
        try:
            _lock(file, path)
            try:
                data = path.read_bytes()
                log = parse(data)
                _check_same(log.header, header_of(optimizer, run))
                length = len(data) - log.torn
                if log.records and log.records[-1].outcome == "broken":
                    length -= log.header.record.size
                    log = parse(data[:length])
                _replay(log, optimizer, None, progress)
            except LogError as error:
                raise LogError(f"{path}: {error}") from error
            os.ftruncate(file, length)
        except BaseException:
            os.close(file)
            raise
        return cls(file, path, log, optimizer, sync_every, module_buffers)

    def close(self) -> None:
        """Lets go of the optimizer and of the file."""
        if self._file >= 0:
            self._hook.remove()
            self._optimizer.recorder = None
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Refuses a step that the log could not tell, before anything has happened."""
        closure = arguments[1] if len(arguments) > 1 else named.get("closure")
        if closure is None:  # the first of the arguments is the optimizer
            return
        if self._broken:
            raise LogError(
                f"{self._path}: the last step failed half-way, so that the weights are not known. "
                "Resume the log on the base weights: it gives those before that step"
            )
        if self._unwritten:
            self._flush()
        now = _options(self._optimizer)
        if now != self._options:
            found = [
                f"{name} of group {i} from {group.get(name)!r} to {value!r}"
                for i, (group, other) in enumerate(zip(self._options, now, strict=False))
                for name, value in other.items()
                if group.get(name) != value
            ]
            raise LogError(
                f"{self._path}: the log cannot tell of a change of "
                f"{', '.join(found) or 'the groups'}. Save the weights and begin a new log there"
            )
        changed = _changed(self._marks, _marks(self._optimizer))
        if changed:
            raise LogError(
                f"{self._path}: since the last step {changed} was written, replaced, moved or "
                "frozen, which the log cannot tell. Save the weights and begin a new log there"
            )
        self._look_at_buffers()  # of a step that ended without a record
        if self._written:
            raise LogError(self._buffers_message("an earlier step"))
        model = self._optimizer.model
        if self._looks_at_buffers and model is not None:
            self._buffers = BufferMarks(model)

    def _look_at_buffers(self) -> None:
        """For those that were written since a step began."""
        if self._buffers is not None:
            self._written += self._buffers.written(self._optimizer._plans)
            self._buffers = None

    def _buffers_message(self, which: str) -> str:
        return (
            f"{self._path}: the evaluations of {which} have written "
            f"{_some(self._written)}. {_BUFFERS_MATTER}"
        )

    def _record(self, record: StepRecord) -> None:
        self._broken = record.outcome == "broken"
        self.steps += record.outcome in ("updated", "skipped")
        self._records += 1
        missing = self._measured - len(record.measured)
        content = self._layout.pack(
            record.direction,
            OUTCOMES.index(record.outcome),
            record.displacements,
            *record.measured,
            *[0.0] * missing,
            *record.lrs,
            0,
        )[:-4]
        self._checksum = zlib.crc32(content, self._checksum)
        self._unwritten += content + struct.pack("<I", self._checksum)
        self._marks = _marks(self._optimizer)
        self._look_at_buffers()
        self._flush()
        if self._sync_every and self._records % self._sync_every == 0:
            os.fsync(self._file)
        # One that failed has an error of its own to tell. The next one is refused.
        if self._written and record.outcome in ("updated", "skipped"):
            raise LogError(
                f"{self._buffers_message('this step')}. The step itself is done and in the log"
            )

    def _flush(self) -> None:
        try:
            _write(self._file, self._unwritten)
        except OSError as error:
            raise LogError(
                f"{self._path}: the step is done, but its record cannot be written ({error}). The "
                "next step tries again before it does anything, so make room and go on"
            ) from error
        self._unwritten = b""


def _check_free(optimizer: ZerothOrder) -> None:
    if optimizer.recorder is not None:
        raise LogError("the optimizer has a recorder already: close the log that it writes")
    if any(group.get("capturable") for group in optimizer.param_groups):
        raise LogError(
            "with capturable=True what a step measures stays on the device, so that no log can be "
            "written. Leave one of them out"
        )
    if RULES[optimizer.rule].buffers and any(group["steps"] for group in optimizer.param_groups):
        raise LogError(
            f"{type(optimizer).__name__} keeps tensors for its weights, which a log does not "
            "hold: a log can only begin before the first step"
        )


_BUFFERS_MATTER = (
    "A log holds the weights and no module buffers: the model of a replay would have those that it "
    "began with, and evaluate otherwise. Call model.eval() before (or give the norms "
    "track_running_stats=False), and begin again from the base weights; or, where the buffers are "
    "saved elsewhere or not wanted, pass module_buffers='ignore' to StepLog.create or resume"
)


def _check_modules(optimizer: ZerothOrder, module_buffers: str) -> None:
    if module_buffers not in ("refuse", "ignore"):
        raise ValueError(
            f"Invalid module_buffers: {module_buffers!r}, expected one of ('refuse', 'ignore')"
        )
    model = optimizer.model
    names = [] if module_buffers == "ignore" or model is None else tracking(model)
    if names:
        raise LogError(
            f"in train mode evaluations write the running statistics of {_some(names)}. "
            f"{_BUFFERS_MATTER}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _lock(file: int, path: Path) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LogError(f"{path}: another process is writing this log") from error


def _write(file: int, data: bytes) -> None:
    """All or nothing, at the end of the file."""
    end = os.lseek(file, 0, os.SEEK_END)
    try:
        if os.write(file, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(file, end)
        raise


_Marks = dict[int, tuple[str, object]]


def _marks(optimizer: ZerothOrder) -> _Marks:
    """By which it is seen that somebody else has changed a weight, or what is kept for it: its
    name, then its memory and how often that was written."""
    marks: _Marks = {}
    for group in optimizer.param_groups:
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            kept = [t for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor)]
            seen = p.requires_grad and [
                (id(t), memory_of(t), t.is_inference() or t._version) for t in (p, *kept)
            ]
            marks[len(marks)] = names[i] if names else f"parameter {len(marks)}", seen
    return marks


def _changed(before: _Marks, now: _Marks) -> str:
    return ", ".join(name for i, (name, mark) in now.items() if before.get(i) != (name, mark))


# --- weights in files -----------------------------------------------------------------------------


def replay_file(
    base: str | Path,
    log: str | Path,
    out: str | Path,
    *,
    until: int | None = None,
    progress: Progress = iter,
) -> int:
    """Replays a log onto weights in a file or folder, and writes what comes out.

    Args:
        base: a ``.safetensors`` file, a ``state_dict`` by ``torch.save``, or what ``adamezo
            finetune`` takes as a model.
        log: the log.
        out: a file ending in ``.safetensors``, ``.pt``, ``.pth`` or ``.bin``; or, where the base is
            a model, a folder.
        until, progress: see :func:`replay`.

    Returns:
        The number of steps taken.

    Raises:
        LogError, OSError: see :func:`read`, :func:`optimizer_for` and :func:`replay`.
    """
    base, out = Path(base).expanduser(), Path(out).expanduser()
    contents = read(log)
    a_model = base.is_dir() or base.suffix == ".gguf"
    if out.suffix not in _FILES and (not a_model or out.suffix):
        raise LogError(
            f"{out}: expected a name ending in {', '.join(_FILES)}"
            + (", or a folder" if a_model else "")
        )
    if a_model:
        from adamezo.integrations import transformers as language_models

        dtypes = {entry.dtype for entry in contents.header.manifest}
        if len(dtypes) != 1:
            raise LogError(
                f"the log moves weights of types {sorted(dtypes)}, a model is loaded in one: pass "
                "its weights in a file"
            )
        model, tokenizer = language_models.load(base, dtype=getattr(torch, dtypes.pop()))
        tensors = dict(model.named_parameters())
    else:
        tensors = _load(base)
    optimizer = optimizer_for(contents.header, tensors)
    steps = _replay(contents, optimizer, until, progress)
    if a_model and not out.suffix:
        language_models.save(model, tokenizer, out)
    else:
        _save(model.state_dict() if a_model else tensors, out)
    return steps


_FILES = (".safetensors", ".pt", ".pth", ".bin")


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from adamezo.integrations import safetensors

        return safetensors.load(path)
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise LogError(f"{path}: expected a state_dict, tensors by their names")
    return tensors


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        from adamezo.integrations import safetensors

        safetensors.save(tensors, path)
    else:
        torch.save(tensors, path)
