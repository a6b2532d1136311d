"""A log file on disk: one writer at a time, created and extended as a whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from .format import LogError

try:
    import fcntl
except ImportError:  # Windows has no fcntl, and logs are not locked there.
    fcntl = None  # type: ignore[assignment]


class LogFile:
    """A log that is open for writing, and locked."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.close()
                raise LogError(
                    f"{path}: this log is open for writing, in this process or another: "
                    "close it there first (`StepLog.close`, or the end of its `with`)"
                ) from error

    @classmethod
    def create(cls, path: Path, data: bytes) -> LogFile:
        """Creates a file that has this content from its first moment and replaces no other."""
        descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        file = cls(path, descriptor)
        try:
            os.chmod(temporary, 0o644)
            file.append(data)
            file.sync()
            os.link(temporary, path)
        except BaseException:
            file.close()
            raise
        finally:
            os.unlink(temporary)
        return file

    @classmethod
    def open(cls, path: Path) -> LogFile:
        """Opens a file that exists."""
        return cls(path, os.open(path, os.O_RDWR))

    def append(self, data: bytes) -> None:
        """Writes all of ``data`` to the end of the file, or raises OSError and writes nothing."""
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            if os.write(self._descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.truncate(end)
            raise

    def truncate(self, length: int) -> None:
        """Cuts the file off after ``length`` bytes."""
        os.ftruncate(self._descriptor, length)

    def sync(self) -> None:
        """Waits until the disk has what was written."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file, which unlocks it."""
        os.close(self._descriptor)


class NoFile(LogFile):
    """In the place of a log's file on ranks that do not write it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, data: bytes) -> None:
        pass

    def truncate(self, length: int) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass
