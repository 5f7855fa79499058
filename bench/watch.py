"""Run a suite's jobs in worker processes, which may crash or hang: each fault costs one number."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from bench import checkout, processes, record
from bench.jobs import not_done

TIME_IS_UP = "the time is up"


@dataclasses.dataclass
class Outcome:
    """The results of a suite's jobs."""

    names: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # name to reason
    left: list[str] = dataclasses.field(default_factory=list)  # not reached
    trouble: str | None = None  # why the rest was not done, unless the time was up

    @property
    def done(self) -> int:
        return len(self.names) - len(self.failed) - len(self.left)


def watch(
    arguments: list[str],
    out: Path,
    end: float,
    log: IO[str],
    *,
    environment: Mapping[str, str | None] | None = None,
    start_limit: float = 60.0,
) -> Outcome:
    """Run a suite's jobs in workers, until all are done or the clock (`time.monotonic`) shows `end`.

    Parameters
    ----------
    arguments : list of str
        `python ARGUMENTS --out OUT --journal FILE --skip N` is a worker: it calls `work`.
    out : Path
        The suite's file.
    log : file
        The workers' output goes there.
    environment : mapping
        Variables for the workers; None unsets one.
    start_limit : float
        Seconds that a worker may take before its first job.
    """
    outcome = Outcome()
    following = 0  # the next job's number
    while True:
        worker = _Worker(arguments, out, following, log)
        stopped = worker.follow(end, start_limit, environment or {})
        outcome.names = worker.names or outcome.names
        if worker.begun is None:
            outcome.trouble = f"a worker began no job: {stopped}"
            break
        following = worker.begun + 1
        if not worker.ended and stopped == TIME_IS_UP:
            following = worker.begun
        elif not worker.ended:
            name = outcome.names[worker.begun]
            not_done(out, name, stopped)
            print(f"LOST: {name}: {stopped}", file=log, flush=True)
        if following == len(outcome.names) or stopped == TIME_IS_UP:
            break
    outcome.left = outcome.names[following:]
    reasons = record.failures(out)
    outcome.failed = {name: reasons[name] for name in outcome.names if name in reasons}
    return outcome


class _Worker:
    """One worker process and what its journal says."""

    def __init__(self, arguments: list[str], out: Path, skip: int, log: IO[str]) -> None:
        self.arguments = [*arguments, "--out", str(out), "--skip", str(skip)]
        self.log = log
        self.names: list[str] = []
        self.begun: int | None = None  # the last job that it began
        self.ended = False  # whether that one has ended
        self.limit = 0.0
        self._cut_off = ""  # of the journal, a line that is being written

    def follow(self, end: float, start_limit: float, environment: Mapping[str, str | None]) -> str:
        """Start it and follow it to its end; returns why it stopped."""
        with tempfile.TemporaryDirectory() as folder, checkout.packages(environment=environment) as options:
            journal = Path(folder) / "journal"
            journal.touch()
            process = processes.Group([sys.executable, *self.arguments, "--journal", str(journal)], self.log, **options)
            try:
                with journal.open(encoding="utf-8") as lines:
                    since = time.monotonic()
                    while (status := process.wait(0.05)) is None:
                        now = time.monotonic()
                        since = now if self._read(lines) else since
                        allowed = start_limit if self.begun is None else self.limit
                        if now > end:
                            return TIME_IS_UP
                        if now > since + allowed:
                            return f"hung: nothing for {allowed:.0f} s"
                    self._read(lines)
            finally:
                process.end()
        return f"the worker died: {_exit_reason(status)}"

    def _read(self, lines: IO[str]) -> bool:
        """Read the new lines of the journal; returns whether there were any."""
        *new, self._cut_off = (self._cut_off + lines.read()).split("\n")
        for line in map(json.loads, new):
            self.names = line.get("jobs", self.names)
            if "begun" in line:
                self.begun, self.limit, self.ended = line["begun"], line["limit"], False
            self.ended |= "ended" in line
        return bool(new)


def _exit_reason(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    return f"signal {signal.Signals(-status).name}"
