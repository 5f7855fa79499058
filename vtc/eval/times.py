"""The table of time."""

from __future__ import annotations

from collections.abc import Sequence

from vtc.eval import published
from vtc.eval.result import Result
from vtc.eval.rows import MISSING, common_and_rest, incomplete, layer_note, rows_of, tasks_of, time_conditions
from vtc.eval.setting import NONE
from vtc.eval.tables import HEADERS, Marks, Table, is_last, published_name, titled

COLUMNS = (
    "task",
    "method",
    "tokens",
    "generation ms",
    "x none",
    "preparation ms",
    "whole ms",
    "x none",
    "waiting",
    "bound by",
    "total s",
    "load s",
)
NOTES = (
    "generation: per question, from prepared inputs to the last token. The time of a batch is divided by its size.",
    "preparation: per question, reading and preparing the image and the prompt. Workers do it while the model "
    "generates; without workers the model waits for it.",
    "whole: total times processes, divided by the questions, which is how published times are given. Loading the model "
    "does not count, nor does a first batch that starts a GPU's libraries.",
    "x none: how many times faster than all tokens with the same questions, device, dtype, batch, processes and "
    "workers. Only complete runs are compared.",
    "waiting: the share of the whole time in which the model waits for prepared inputs.",
)


def time_table(results: Sequence[Result]) -> Table:
    """What the runs of one model took, per question and as a whole; published times below."""
    marks, size = Marks(), published.size_of(results[0].model)
    rows = [(task, row) for task in tasks_of(results) for row in rows_of([r for r in results if r.task == task])]
    common, rest = common_and_rest([time_conditions(row.first) for _, row in rows])
    lines = []
    theirs_shown = False
    for number, (task, row) in enumerate(rows):
        r, header = row.first, HEADERS.get(task, row.first.title)
        all_tokens = baseline(r, results)
        lines.append(
            [
                header,
                row.name + rest[number] + marks(incomplete(r)),
                row.tokens,
                _ms(r.timing.generate_seconds),
                _ratio(all_tokens.timing.generate_seconds if all_tokens else None, r.timing.generate_seconds),
                _ms(r.timing.prepare_seconds),
                _ms(whole_per_question(r)),
                _ratio(whole_per_question(all_tokens) if all_tokens else None, whole_per_question(r)),
                MISSING if (share := waiting(r)) is None else f"{100 * share:.0f} %",
                r.timing.bound or MISSING,
                _seconds(r.timing.whole_seconds),
                _seconds(r.timing.load_seconds),
            ]
        )
        below = [other for of_task, other in rows[number + 1 :] if of_task == task]
        theirs = published.time(task, row.method, row.keep, size)
        if theirs and is_last(row, below):
            theirs_shown = True
            first = published.time(task, NONE, None, size)
            name = published_name(row, published.VTC_CLS)
            faster = _ratio(first.per_question if first else None, theirs.per_question)
            missing = [MISSING] * 3
            whole = [_ms(theirs.per_question), faster, MISSING, MISSING, _seconds(theirs.seconds), MISSING]
            lines.append([header, *name, *missing, *whole])
    notes = [*marks.legend(), *layer_note([row for _, row in rows]), *NOTES]
    if any(row.first.timing.whole_seconds is None for _, row in rows):
        notes.append(
            "No whole time: a process was killed, and what it spent on unfinished answers is unknown, or the number of "
            "processes or workers changed during the run."
        )
    if theirs_shown:
        notes.append(f"Published, not measured here: {published.WHAT_TIME}.")
    return Table(titled(f"Time of {results[0].model}", common), list(COLUMNS), lines, notes)


def whole_per_question(result: Result) -> float | None:
    """Seconds of the whole run per question, as if one process had done it: published times are such."""
    timing = result.timing
    if timing.whole_seconds is None or not timing.answers:
        return None
    return timing.whole_seconds * timing.processes / timing.answers


def waiting(result: Result) -> float | None:
    """The share of the whole time in which the model waited for prepared inputs."""
    timing = result.timing
    if not timing.whole_seconds or timing.wait_seconds is None:
        return None
    return timing.wait_seconds / (timing.whole_seconds * timing.processes)


def baseline(result: Result, results: Sequence[Result]) -> Result | None:
    """The complete run with all tokens that a complete run may be compared with."""

    def key(r: Result) -> tuple[object, ...]:
        return (r.model, r.task, r.questions, r.answered, r.limit, time_conditions(r))

    same = (r for r in results if r.method == NONE and r.complete and result.complete and key(r) == key(result))
    return next(same, None)


def _ms(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{1e3 * seconds:.1f}"


def _seconds(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds:.1f}"


def _ratio(baseline: float | None, seconds: float | None) -> str:
    return f"{baseline / seconds:.2f}" if baseline and seconds else MISSING
