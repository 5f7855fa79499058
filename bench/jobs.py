"""A suite as jobs, one number each: a fault costs one number and no other.

`run` runs them in this process; `bench.watch` runs them in workers, processes that may crash or hang. The result of
a job is on disk before the next one begins, in the suite's file of JSON lines: its records, or a line with "job" and
"failed".
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import record, timing

BROKEN = 75  # exit status of a worker that cannot use its GPU any more: another process can go on


@dataclasses.dataclass(frozen=True)
class Job:
    """One number, or a few that come together."""

    name: str
    run: Callable[[], Sequence[Any]]  # gives records
    limit: float = 40.0  # seconds, compiling included; a worker that takes longer counts as hung


def run(
    jobs: Iterable[Job], out: Path | None, note: Callable[[dict[str, Any]], None] = lambda line: None
) -> tuple[list[Any], dict[str, str]]:
    """Run the jobs; returns their records, and the reasons of those that failed, by name.

    `note` is called when a job begins and ends. If this process can run no more jobs, it raises `SystemExit` with
    status BROKEN.
    """
    records: list[Any] = []
    failed: dict[str, str] = {}
    for number, job in enumerate(jobs):
        note({"begun": number})
        try:
            made = job.run()
        except Exception as error:  # any exception costs this job its number, and no other
            failed[job.name] = timing.reason(error)
            print(f"NO NUMBER: {job.name}: {failed[job.name]}", flush=True)
            not_done(out, job.name, failed[job.name])
            memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            error.__traceback__ = None  # it holds the tensors of every frame
            del error
            if memory:
                _free()
        else:
            records += made
            if out and made:
                record.append(out, made)
        note({"ended": number})
        if timing.spoiled or (job.name in failed and not works()):
            raise SystemExit(BROKEN)
    return records, failed


def works() -> bool:
    """Whether this process can still use its GPU; after an illegal access it cannot."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return torch.ones(1, device="cuda").item() == 1
    except RuntimeError:
        return False


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # `works` is called next
            torch.cuda.empty_cache()


def not_done(out: Path | None, name: str, why: str) -> None:
    if out:
        record.append(out, [{"job": name, "failed": why}])


def work(jobs: Sequence[Job], out: Path, journal: Path, skip: int) -> None:
    """The worker's side of `watch`: run the jobs from number `skip` on."""

    def note(line: dict[str, Any]) -> None:
        if "begun" in line:
            line |= {"begun": skip + line["begun"], "limit": jobs[skip + line["begun"]].limit}
        record.append(journal, [line])

    note({"jobs": [job.name for job in jobs]})
    run(jobs[skip:], out, note)
