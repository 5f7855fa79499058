"""`python -m bench compare REV`: the packages of two git revisions, timed by one harness in one run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bench import checkout, record, table
from bench.record import Record

ORDER = ("old", "new", "new", "old")  # so that a drift of the machine affects both equally


def run(revision: str, arguments: list[str], say: Callable[[str], None] = print) -> int:
    """Time `revision` against the working tree with `bench micro ARGUMENTS`; returns the exit status.

    Raises
    ------
    ValueError
        If there is no such revision.
    """
    timed: dict[str, list[Record]] = {"old": [], "new": []}
    status = 0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        roots = {"old": stack.enter_context(checkout.revision(revision)), "new": checkout.ROOT}
        for number, which in enumerate(ORDER):
            out = folder / str(number)
            command = ["-m", "bench", "micro", "--no-plot", "--out", str(out), *arguments]
            code, output = checkout.run(command, roots[which])
            if code:
                status = 1
                say(f"{which}, round {number // 2 + 1}: exit status {code}\n{output[-2000:]}")
            if (out / "micro.jsonl").exists():
                timed[which] += record.read(out / "micro.jsonl")
    rows = compare(timed["old"], timed["new"])
    if not rows:
        say("nothing was timed on both sides")
        return 1
    columns = ["op", "model", "dtype", "shape", "backend", "old us", "new us", "old / new"]
    say(table.markdown(columns, rows))
    for which, records in timed.items():
        say(f"{which}: {table.provenance_line(records[-1])}")
    return status


def compare(old: list[Record], new: list[Record]) -> list[list[str]]:
    """Rows of the table for all that was timed on both sides: the median of the rounds' medians, and their ratio."""

    def medians(records: list[Record]) -> dict[tuple[str, ...], float]:
        found: dict[tuple[str, ...], list[float]] = {}
        for r in records:
            found.setdefault((r.op, r.model, r.dtype, table.shape_text(r.shape), r.backend), []).append(r.ms)
        return {key: median(times) for key, times in found.items()}

    before, after = medians(old), medians(new)
    return [
        [*key, f"{1e3 * before[key]:.1f}", f"{1e3 * after[key]:.1f}", f"{before[key] / after[key]:.2f}"]
        for key in before
        if key in after
    ]
