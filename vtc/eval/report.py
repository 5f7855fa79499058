"""Results as tables for people, as CSV, and as JSON lines. An incomplete run never gives a bare number."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vtc.eval import published
from vtc.eval.published import COLUMNS
from vtc.eval.result import Result
from vtc.eval.rows import Row, device_of, tasks_of
from vtc.eval.tables import Table, figure_table, score_table
from vtc.eval.times import time_table, waiting, whole_per_question
from vtc.files import replacing, require_writable

FILES = ("report.md", "report.csv", "results.jsonl")


def tables(results: Sequence[Result], full: bool = False) -> list[Table]:
    """The scores of the eight benchmarks, the figures of other tasks, and the time.

    Parameters
    ----------
    results
        Of any tasks, settings and models. Each model has its own tables.
    full : bool
        All figures of the eight, too. They are always shown if there is one task.
    """
    found = []
    for model in dict.fromkeys(r.model for r in results):
        mine = [r for r in results if r.model == model]
        tasks = tasks_of(mine)
        if eight := [r for r in mine if r.task in COLUMNS]:
            found.append(score_table(eight))
        for task in tasks:
            of_task = [r for r in mine if r.task == task]
            if task not in COLUMNS or ((full or len(tasks) == 1) and any(r.figures or r.notes for r in of_task)):
                found.append(figure_table(of_task))
        if timed := [r for r in mine if r.timing.generate_seconds]:  # answers from a file have no time
            found.append(time_table(timed))
    return found


def require_folder(folder: Path, inputs: Iterable[Path] = ()) -> None:
    """Raise ValueError unless `write` can write its files to the folder, and they are none of `inputs`.

    The folder need not exist, and is not made.
    """
    existing = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    if not existing.is_dir():
        raise ValueError(f"{folder} cannot be a folder, because {existing} is none; choose another --out")
    for name in FILES if existing == folder else (".vtc-out",):
        require_writable(existing / name, inputs)


def write(results: Sequence[Result], folder: Path, plots: Sequence[Path] = ()) -> list[Path]:
    """Write `report.md`, `report.csv` and `results.jsonl`, each whole or not at all; returns their paths.

    Parameters
    ----------
    plots
        Images in `folder`, which the report shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report, sheet, lines = (folder / name for name in FILES)
    parts = [table.markdown() for table in tables(results, full=True)]
    parts += [f"![{file.stem}]({file.name})\n" for file in plots]
    parts.append("\n".join(["## Provenance", "", *(f"- {line}" for line in provenance(results))]) + "\n")
    with replacing(report) as made:
        made.write_text("\n".join(parts), encoding="utf-8")
    rows = [row for result in results for row in csv_rows(result)]
    with replacing(sheet) as made, made.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with replacing(lines) as made:  # the next command reads it
        made.write_text("".join(result.to_json() + "\n" for result in results), encoding="utf-8")
    return [report, sheet, lines]


def provenance(results: Sequence[Result]) -> list[str]:
    """A line for each model and environment: device, versions, and the dates of the first and the last run."""
    dates: dict[str, list[str]] = {}
    for r in results:
        versions = [f"{k} {v}" for k, v in r.environment.items() if k not in ("device", "gpu", "date") and v]
        line = ", ".join([r.model, device_of(r), *versions])
        dates.setdefault(line, []).append(str(r.environment.get("date", "unknown date")))
    return [f"{line}; {' to '.join(dict.fromkeys((min(days), max(days))))}" for line, days in dates.items()]


def csv_rows(result: Result) -> list[dict[str, Any]]:
    """One row for each figure; one without a figure if a server or a judge scores the task."""
    timing, keep = result.timing, Row(result).keep
    theirs = published.published(result.task, result.method, keep, published.size_of(result.model))
    best = next((p for p in theirs if p.same), None)
    run = {
        "model": result.model,
        "task": result.task,
        "method": result.method,
        "label": result.label,
        "options": json.dumps(result.options),
        "keep": keep,
        "visual_tokens": result.visual_tokens,
        "token_layers": result.token_layers,
        **{name: result.fingerprint.get(name) for name in ("protocol", "dtype", "batch_size")},
    }
    rest = {
        "complete": result.complete,
        "questions": result.questions,
        "answered": result.answered,
        "skipped": result.skipped,
        "limit": result.limit,
        "generate_seconds": timing.generate_seconds,
        "prepare_seconds": timing.prepare_seconds,
        "whole_seconds_per_question": whole_per_question(result),
        "whole_seconds": timing.whole_seconds,
        "load_seconds": timing.load_seconds,
        "waiting": waiting(result),
        "bound": timing.bound,
        "new_tokens": timing.new_tokens,
        "processes": timing.processes,
        "workers": timing.workers,
        "notes": "; ".join(result.notes),
        **{f"environment_{name}": value for name, value in result.environment.items()},
    }
    rows = []
    for name in result.figures or (None,):
        figure = result.figures[name] if name is not None else None
        shown = best if name == result.main_name else None
        rows.append(
            {
                **run,
                "figure": name,
                "main": name is not None and name == result.main_name,
                "value": figure.value if figure else None,
                "figure_questions": figure.questions if figure else None,
                "published": shown.value if shown else None,
                "published_source": shown.source if shown else None,
                **rest,
            }
        )
    return rows
