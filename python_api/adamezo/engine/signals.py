"""Signals whose handlers may raise, such as Ctrl-C, wait until the weights are in order."""

from __future__ import annotations

import threading

# The functions under those of `signal`, which makes enums of all that it is given and returns: a
# step would spend 150 us in them, and spends 2.
from _signal import getsignal, signal  # type: ignore[import-not-found]
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import valid_signals
from types import FrameType
from typing import Any

_NUMBERS = tuple(map(int, valid_signals()))

Handler = Callable[[int, FrameType | None], Any]


class HeldSignals:
    """Inside, handlers of Python's run where they are let through, and else on leaving.

    A handler may raise: Ctrl-C does, and so do those of time limits or of a scheduler that wants
    the machine back. Held are all that this process has set; outside the main thread, where
    handlers never run, there is nothing to hold.
    """

    def __init__(self) -> None:
        self._before: dict[int, Handler] = {}
        self._waiting: dict[int, FrameType | None] = {}
        self._open = False
        self._left = False

    def __enter__(self) -> HeldSignals:
        try:
            if threading.current_thread() is threading.main_thread():
                for number in _NUMBERS:
                    handler = getsignal(number)
                    if callable(handler):
                        self._before[number] = handler
                        signal(number, self._arrived)
        except BaseException:  # of a handler that was not held yet
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            for number, handler in self._before.items():
                if getsignal(number) == self._arrived:
                    signal(number, handler)
        finally:
            self._left = True  # one that could not be put back passes all signals on
            self._run_waiting()

    @contextmanager
    def through(self) -> Iterator[None]:
        """Inside, handlers run at once. After the first that raises they wait again."""
        self._open = True
        try:
            self._run_waiting()
            yield
        finally:
            self._open = False

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._left:
            self._before[number](number, frame)
        elif self._open:
            self._open = False
            self._before[number](number, frame)
            self._open = True
        else:
            self._waiting[number] = frame

    def _run_waiting(self) -> None:
        if self._waiting:
            number = next(iter(self._waiting))
            frame = self._waiting.pop(number)
            try:
                self._arrived(number, frame)
            finally:
                self._run_waiting()  # the others too, whatever this one raises
