"""`python -m bench gpu --out DIR`: on a machine with a GPU, everything at once: tests, `micro`, `e2e`, plots."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path

from bench import checkout, plots, record

# Shares of the time: what a part leaves over goes to those after it.
PARTS = {"tests": 0.45, "micro": 0.6, "e2e": 1.0}


def run(out: Path, minutes: float, say: Callable[[str], None] = print) -> int:
    """Run the parts one after the other; at most 8 files in `out`. Returns the exit status: 1 if a part failed.

    tests.txt, micro.txt, e2e.txt: what each printed. micro.jsonl, e2e.jsonl: the records. Two plots. summary.txt.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    summary, failed = [], False
    for part, share in PARTS.items():
        start = time.monotonic()
        seconds = share * (end - start)
        code, output = checkout.run(_arguments(part, out.resolve(), seconds), timeout=seconds)
        (out / f"{part}.txt").write_text(output, encoding="utf-8")
        failed |= code != 0
        summary += [f"{part}: exit status {code}, {time.monotonic() - start:.0f} s", *_said(part, output)]
    if (out / "micro.jsonl").exists():
        try:
            plots.draw(record.read(out / "micro.jsonl"), out / "micro")
        except ValueError as error:
            summary.append(f"no plot: {error}")
    (out / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")
    say("\n".join(summary))
    return 1 if failed else 0


def _arguments(part: str, out: Path, seconds: float) -> list[str]:
    if part == "tests":
        workers = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        where = ["--rootdir", str(checkout.ROOT), str(checkout.ROOT / "tests")]
        return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *workers, *where]
    budget = ["--budget", str(0.8 * seconds)] if part == "micro" else []
    return ["-m", "bench", part, "--out", str(out), "--no-plot", *budget]


def _said(part: str, output: str) -> list[str]:
    """The lines of a part's output that matter most."""
    lines = output.splitlines()
    if part == "tests":
        return [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40] + lines[-1:]
    return [line for line in lines if line.startswith(("copy:", "NO NUMBER", "left out", "B="))][:40] + lines[-1:]
