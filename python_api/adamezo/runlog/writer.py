"""StepLog: writes a record after each step of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adamezo_kernels import RULES

from ..engine.optimizer import ZerothOrder
from ..engine.ranks import Alone
from ..engine.records import StepRecord
from .files import LogFile, NoFile
from .format import Log, LogError, Place, encode, has_place, is_completed, naming, parse
from .header import check_same, check_state_after, header_of
from .replaying import Progress, take_steps
from .watch import Watch, check_modules


class StepLog:
    """Writes a record at the end of every step of an optimizer, until it is closed.

    A record is handed to the operating system in one piece before ``step`` returns, so a process
    that is killed loses nothing. Against a power failure, set ``sync_every``.

    Use :meth:`open`, :meth:`create`, :meth:`resume` or :meth:`follow`, and :meth:`close` or a
    ``with`` block. On several ranks (:func:`adamezo.distributed.connect`) all call these together;
    the first one reads and writes the file, and the others get what it has read.

    A log does not hold buffers of the model's modules, such as BatchNorm's running statistics, so
    a replay does not restore them. If the optimizer knows its model, a step whose evaluations
    wrote one raises a LogError that names it; that step is complete and in the log. Further steps
    are refused, unless the log was opened with ``module_buffers="ignore"``.

    Attributes:
        path (Path): of the file.
        steps (int): number of steps in the log.
    """

    def __init__(
        self, file: LogFile, log: Log, optimizer: ZerothOrder, sync_every: int, module_buffers: str
    ) -> None:
        self.path = file.path
        self.steps = log.steps
        self._file = file
        self._header, self._checksum = log.header, log.checksum
        self._optimizer = optimizer
        self._sync_every = sync_every
        self._begin = len(log.records)
        self._watch = Watch(optimizer, module_buffers)
        self._records = 0
        self._unwritten = b""
        self._broken = self._closed = False
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
        """Begins a log at the present weights. They are not in the log: keep a copy of them.

        Args:
            path: of a file that does not exist.
            optimizer: the optimizer whose steps are to be logged.
            run: stored in the header; :meth:`resume` requires the same.
            sync_every: after how many records to wait until the disk has them. With 0 the
                operating system decides when they are written there.
            module_buffers: ``"refuse"`` to go on when an evaluation has written module buffers,
                or ``"ignore"`` it, if these are saved elsewhere or not wanted.

        Raises:
            FileExistsError: the file exists.
            LogError: the optimizer has a recorder, or is ``capturable``, or has taken steps and
                keeps tensors for the weights; or a module would write running statistics.
        """
        path = Path(path)
        ranks = optimizer.ranks or Alone()
        ranks.together(lambda: _check(optimizer, module_buffers))
        data = ranks.together(lambda: header_of(optimizer, run).to_bytes())
        created: list[LogFile] = [NoFile(path)]

        def create() -> None:
            if path.exists():
                raise FileExistsError(f"{path} is there already: resume it, or name another file")
            created[0] = LogFile.create(path, data)

        ranks.from_first(create)
        return cls(created[0], parse(data), optimizer, sync_every, module_buffers)

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
        checkpoint: tuple[Place, Callable[[], None]] | None = None,
    ) -> StepLog:
        """Replays a log onto an optimizer on the base weights, and continues it.

        An incomplete record at the end is removed, and so is that of a step that failed half-way:
        the weights are then those before that step.

        Args:
            optimizer: on the base weights, made with the arguments that it had for :meth:`create`.
            run: as it was for :meth:`create`.
            progress: see :func:`replay`.
            checkpoint: a :attr:`place` of this log, and a function that brings the weights and the
                optimizer to where they were there, so that only later steps are replayed. The
                function is called once everything has been compared. It is left out, and all steps
                are replayed, if the log has no such place: it may have lost its end.
            path, sync_every, module_buffers: see :meth:`create`. A log does not hold them.

        Raises:
            LogError: the log is damaged, or of other weights, options, or another run; the message
                says what differs. Or a module would write running statistics. Nothing has changed
                then.
        """
        ranks = optimizer.ranks or Alone()
        ranks.together(lambda: _check(optimizer, module_buffers))
        opened: list[LogFile] = [NoFile(Path(path))]

        def read() -> bytes:
            opened[0] = LogFile.open(Path(path))
            return opened[0].path.read_bytes()

        def take() -> tuple[Log, int]:
            with naming(path):
                log = parse(data)
                check_same(log.header, header_of(optimizer, run))
                length = len(data) - log.torn
                if log.records and log.records[-1].outcome == "broken":
                    length -= log.header.record.size
                    log = parse(data[:length])
                begin = 0
                if checkpoint is not None and has_place(log, data[:length], checkpoint[0]):
                    checkpoint[1]()
                    begin = checkpoint[0].records
                take_steps(log, optimizer, None, progress, begin=begin)
            return log, length

        try:
            data = ranks.from_first(read)
            log, length = ranks.together(take)
            opened[0].truncate(length)
        except BaseException:
            opened[0].close()
            raise
        return cls(opened[0], log, optimizer, sync_every, module_buffers)

    @classmethod
    def open(cls, path: str | Path, optimizer: ZerothOrder, **options: Any) -> StepLog:
        """Resumes a log if there is a file, and creates it if there is none: what a job does that
        is started again after a failure, on one rank or on several.

        Args:
            path, optimizer, options: of :meth:`resume` and :meth:`create`.
        """
        ranks = optimizer.ranks or Alone()
        if ranks.from_first(Path(path).exists):
            return cls.resume(path, optimizer, **options)
        for of_resume in ("progress", "checkpoint"):
            options.pop(of_resume, None)
        return cls.create(path, optimizer, **options)

    @classmethod
    def follow(
        cls,
        path: str | Path,
        optimizer: ZerothOrder,
        *,
        sync_every: int = 0,
        module_buffers: str = "refuse",
    ) -> StepLog:
        """Continues a log on an optimizer that was loaded from a checkpoint of its last step.

        Nothing is replayed, so the base weights are not needed. That the weights are those after
        the last step is not known here: keep a copy of the log with each checkpoint.

        Args:
            optimizer: on the weights and with the state that were saved after the last step.
            path, sync_every, module_buffers: see :meth:`resume`.

        Raises:
            LogError: the log is damaged, or the optimizer is not in its last state, as far as its
                options, parameters and counts of steps tell. Nothing has changed then.
        """
        ranks = optimizer.ranks or Alone()
        ranks.together(lambda: _check_watched(optimizer, module_buffers))
        opened: list[LogFile] = [NoFile(Path(path))]

        def read() -> bytes:
            opened[0] = LogFile.open(Path(path))
            return opened[0].path.read_bytes()

        def take() -> Log:
            with naming(path):
                log = parse(data)
                check_state_after(log, optimizer)
            return log

        try:
            data = ranks.from_first(read)
            log = ranks.together(take)
            opened[0].truncate(len(data) - log.torn)
        except BaseException:
            opened[0].close()
            raise
        return cls(opened[0], log, optimizer, sync_every, module_buffers)

    @property
    def place(self) -> Place:
        """The end of the log as it is now, for a checkpoint of weights and optimizer."""
        if self._broken:
            raise LogError("the last step failed half-way, so the weights are unknown")
        return Place(self._begin + self._records, self._checksum)

    def close(self) -> None:
        """Stops writing: releases the optimizer and the file."""
        if not self._closed:
            self._closed = True
            self._hook.remove()
            self._optimizer.recorder = None
            self._file.sync()
            self._file.close()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Refuses a step that the log could not express, before anything has happened."""
        closure = arguments[1] if len(arguments) > 1 else named.get("closure")
        if closure is None:  # arguments[0] is the optimizer
            return
        with naming(self._file.path):
            if self._broken:
                raise LogError(
                    "the last step failed half-way, so the weights are unknown. Resume the log on "
                    "the base weights: it gives those before that step"
                )
            if self._unwritten:
                self._write()
            self._watch.before_step()

    def _record(self, record: StepRecord) -> None:
        self._broken = record.outcome == "broken"
        self.steps += is_completed(record)
        self._records += 1
        content, self._checksum = encode(self._header, record, self._checksum)
        self._unwritten += content
        self._watch.after_step()
        with naming(self._file.path):
            self._write()
            if self._sync_every and self._records % self._sync_every == 0:
                self._file.sync()
            if is_completed(record):  # a failed step has an error of its own; the next is refused
                self._watch.check_buffers("this step", ". The step itself is done and in the log")

    def _write(self) -> None:
        try:
            self._file.append(self._unwritten)
        except OSError as error:
            raise LogError(
                f"the step is done, but its record cannot be written ({error}). The next step "
                "tries again before it does anything, so make room and go on"
            ) from error
        self._unwritten = b""


def _check(optimizer: ZerothOrder, module_buffers: str) -> None:
    _check_optimizer(optimizer)
    check_modules(optimizer, module_buffers)


def _check_watched(optimizer: ZerothOrder, module_buffers: str) -> None:
    _check_recorder(optimizer)
    check_modules(optimizer, module_buffers)


def _check_optimizer(optimizer: ZerothOrder) -> None:
    """Raises LogError for an optimizer with which no log can begin."""
    _check_recorder(optimizer)
    if RULES[optimizer.rule].buffers and any(group["steps"] for group in optimizer.param_groups):
        raise LogError(
            f"{type(optimizer).__name__} keeps tensors for its weights, which a log does not "
            "hold: a log can only begin before the first step"
        )


def _check_recorder(optimizer: ZerothOrder) -> None:
    """Raises LogError for an optimizer whose steps cannot be logged."""
    if optimizer.recorder is not None:
        raise LogError("the optimizer has a recorder already: close the log that it writes")
    if any(group.get("capturable") for group in optimizer.param_groups):
        raise LogError(
            "with capturable=True the numbers that a step measures stay on the device, so no log "
            "can be written. Use only one of them"
        )
