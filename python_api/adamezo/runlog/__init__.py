"""Run logs: a few bytes for each step, from which base weights become trained weights again.

A step is a function of the weights, the options and the few numbers that it measured. A log holds
those numbers; replaying it on the base weights gives the weights after any step, bit for bit and
without evaluating the model. docs/replay.md specifies the file. Each module uses the ones
above it only:

    format.py     the bytes of a log: header, records, checksums
    header.py     from an optimizer to a header, from a header to an optimizer, their differences
    replaying.py  the steps of a log, taken again
    files.py      a log file on disk: locked, created and extended atomically
    watch.py      changes between steps that a log cannot express
    writer.py     StepLog, which writes and resumes a log
"""

from ..engine.records import StepRecord
from .format import Entry, Header, Log, LogError, Place, parse, read
from .header import differences, digest, header_of, optimizer_for
from .replaying import Progress, replay, replay_file
from .writer import StepLog

__all__ = [
    "Entry",
    "Header",
    "Log",
    "LogError",
    "Place",
    "Progress",
    "StepLog",
    "StepRecord",
    "differences",
    "digest",
    "header_of",
    "optimizer_for",
    "parse",
    "read",
    "replay",
    "replay_file",
]
