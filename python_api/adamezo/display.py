"""What a run shows while it goes: rich bars on a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

_T = TypeVar("_T")

LINE_EVERY = 15.0
"""Seconds between lines where bars cannot be drawn over each other."""


class Display:
    """Bars of the parts of a run, on the standard error. Without rich nothing is shown.

    Use as a ``with`` block.

    Args:
        shown: whether it shows anything: one of several processes does.
    """

    def __init__(self, shown: bool = True) -> None:
        self._progress: Any = None
        self._lines = False
        if not shown:
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.text import Text
        except ImportError:
            return

        class Bars(Progress):
            """With a line below that is not cut off, as a column would be on a narrow terminal."""

            line = ""

            def get_renderables(self) -> Iterator[Any]:
                yield self.make_tasks_table(self.tasks)
                if self.line:
                    yield Text(self.line)

        console = Console(stderr=True)
        self._lines = not console.is_terminal
        if self._lines:
            console = Console(stderr=True, width=200)
        self._progress = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console
        )

    def __enter__(self) -> Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def write(self, line: str) -> None:
        """Shows a line above the bars."""
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False)

    @contextmanager
    def bar(
        self, description: str, total: int, done: int = 0
    ) -> Iterator[Callable[[int, str], None]]:
        """A bar, as a function of how much is done since the last call and a text below it."""
        if self._progress is None:
            yield _nothing
            return
        task = self._progress.add_task(description, total=total, completed=done)
        last = time.perf_counter()

        def advance(more: int, text: str = "") -> None:
            nonlocal done, last
            done += more
            self._progress.line = text or self._progress.line
            self._progress.update(task, completed=done)
            if self._lines and done < total and time.perf_counter() - last > LINE_EVERY:
                last = time.perf_counter()
                self.write(f"{description} {done}/{total} {text}".rstrip())

        yield advance

    def track(self, items: Sequence[_T], description: str) -> Iterable[_T]:
        """The items, with a bar."""
        with self.bar(description, len(items)) as advance:
            for item in items:
                yield item
                advance(1, "")


def _nothing(more: int, text: str) -> None:
    """What stands for a bar where none can be drawn."""


def in_words(seconds: float) -> str:
    """A time as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
