"""Progress of a run: a bar with rate and time left on a terminal, a line each half minute elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

INTERVAL = 30.0  # seconds between lines


class Progress:
    """Counts what is done.

    Parameters
    ----------
    title : str
        What runs.
    total : int
        How many there are for this process.
    done : int
        How many of these were done before.
    quiet : bool
        Show nothing.
    unit : str
        What is counted.
    """

    def __init__(self, title: str, total: int, done: int = 0, quiet: bool = False, unit: str = "questions") -> None:
        self.title, self.total, self.done, self.first, self.unit = title, total, done, done, unit
        self.quiet, self.bar, self.task = quiet, None, None
        self.begun = self.shown = time.monotonic()
        if not quiet and sys.stderr.isatty():
            self.bar, self.task = _bar(title, total, done)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        elif not self.quiet and self.done < self.total:
            self._say(f"{self.title}: {self.total - self.done} of {self.total} {self.unit} to go")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        if self.bar is not None:
            self.bar.advance(self.task, count)
        elif not self.quiet and time.monotonic() - self.shown >= INTERVAL:
            self.shown = time.monotonic()
            self._say(self.line())

    def line(self) -> str:
        """How far it is, the rate, and the time left."""
        rate = (self.done - self.first) / max(time.monotonic() - self.begun, 1e-9)
        left = "" if rate == 0 else f", {_clock((self.total - self.done) / rate)} left"
        return f"{self.title}: {self.done} of {self.total}, {rate:.2f} {self.unit}/s{left}"

    @staticmethod
    def _say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _bar(title: str, total: int, done: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _rate_column(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True))
    return bar, bar.add_task(title, total=total, completed=done)


def _rate_column() -> Any:
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.2f}/s")

    return Rate()
