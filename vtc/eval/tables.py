"""The tables of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vtc.eval import published
from vtc.eval.published import COLUMNS
from vtc.eval.result import Result
from vtc.eval.rows import MISSING, Row, caveats, common_and_rest, conditions, layer_note, rows_of
from vtc.eval.setting import FLOOR, NONE

HEADERS = dict(zip(COLUMNS, ("SciQA", "GQA", "TextVQA", "POPE", "MMB", "MMB-CN", "MMVet", "SEED"), strict=True))
FULL_TOKENS = 576  # of LLaVA-1.5, uncompressed


class Table(NamedTuple):
    """A table, and the notes without which it is not to be read."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """A heading, a table with aligned columns, and a list of notes."""
        lines = [[cell.replace("|", "\\|") for cell in line] for line in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
        return "\n".join([f"## {self.title}", "", *text, "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"


class Marks:
    """Numbered notes for cells. The same note has the same number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, notes: Sequence[str]) -> str:
        """What is appended to a cell, " [1,2]" for instance."""
        numbers = sorted({self._numbers.setdefault(note, len(self._numbers) + 1) for note in notes})
        return f" [{','.join(map(str, numbers))}]" if numbers else ""

    def legend(self) -> list[str]:
        """The notes by their numbers."""
        return [f"[{number}] {note}." for note, number in self._numbers.items()]


def score_table(results: Sequence[Result]) -> Table:
    """The eight benchmarks of one model like the published table, published figures below each setting.

    The last row has the number of questions behind the figures.
    """
    rows, marks = rows_of(results), Marks()
    tasks = [task for task in COLUMNS if any(r.task == task for r in results)]
    model = results[0].model
    size = published.size_of(model)
    common, rest = common_and_rest([conditions(row.first) for row in rows])
    lines, sources, others = [], set(), []
    for number, row in enumerate(rows):
        cells = [cell(row.results.get(task), marks) for task in tasks]
        lines.append([row.name + rest[number], row.tokens, *cells, _average(row, tasks, marks)])
        if not is_last(row, rows[number + 1 :]):
            continue
        theirs = [p for task in tasks for p in published.published(task, row.method, row.keep, size)]
        others += [p for p in theirs if not p.same]
        for source in published.SOURCES:
            values = {p.task: str(p.value) for p in theirs if p.same and p.source == source}
            if values:
                sources.add(source)
                average = published.average(row.method, row.keep, size) if source == published.VTC_CLS else None
                last = MISSING if average is None or len(tasks) < len(COLUMNS) else str(average)
                cells = [values.get(task, MISSING) for task in tasks]
                lines.append([*published_name(row, source), *cells, last])
    counts = [questions([r for r in results if r.task == task]) for task in tasks]
    lines.append(["questions", "", *counts, ""])
    columns = ["method", "tokens", *(HEADERS[task] for task in tasks), "Avg"]
    notes = marks.legend() + layer_note(rows)
    for task in tasks:
        names = dict.fromkeys(r.main_name for r in results if r.task == task and r.main_name)
        notes.append(f"{HEADERS[task]}: {' or '.join(names) or 'no figure here'}.")
        if sources:
            notes[-1] += f" Published: {published.WHAT[task]}."
    if all(line[-1] in (MISSING, "") for line in lines):
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    else:
        eight = "" if len(tasks) == len(COLUMNS) else "; the published average is over eight"
        notes.append(f"Avg: the mean of the {len(tasks)} tasks, if each has a figure{eight}.")
    notes += [
        f"{HEADERS[p.task]}, {p.method}: {p.value}, published by {p.source}, is another figure: {p.what}."
        for p in others
    ]
    if sources:
        origins = "; ".join(text for name, text in published.SOURCES.items() if name in sources)
        notes.append(f"Published figures are not measured here. {origins}.")
    if sources and (own := {str(r.fingerprint.get("protocol")) for r in results} - {"llava"}):
        notes.append(
            f"Published figures are with LLaVA's prompts and padded images, not with protocol {', '.join(own)}."
        )
    return Table(titled(f"Scores of {model}", common), columns, lines, notes)


def figure_table(results: Sequence[Result]) -> Table:
    """All figures of one task. The longer of the two sides, settings or figures, runs down."""
    rows, marks = rows_of(results), Marks()
    task, title = results[0].task, results[0].title
    common, rest = common_and_rest([conditions(row.first) for row in rows])
    figures = list(dict.fromkeys(name for r in results for name in r.figures))
    lines = [
        [row.name + end, row.tokens, *(cell(row.results[task], marks, name) for name in figures)]
        for row, end in zip(rows, rest, strict=True)
    ]
    lines.append(["questions", "", *(questions(results, name) for name in figures)])
    columns = ["method", "tokens", *figures]
    if len(figures) > len(rows):
        columns, *lines = map(list, zip(columns, *lines, strict=True))
    notes = []
    labels = {r.label for r in results}
    for note in dict.fromkeys(note for r in results for note in r.notes):
        owners = list(dict.fromkeys(r.label for r in results if note in r.notes))
        notes.append(f"{note}." if len(owners) == len(labels) else f"{', '.join(owners)}: {note}.")
    notes = marks.legend() + layer_note(rows) + notes
    return Table(titled(f"{title}, all figures of {results[0].model}", common), columns, lines, notes)


def titled(title: str, common: str) -> str:
    """The title with the conditions that all rows share, if there are any."""
    return f"{title} ({common})" if common else title


def cell(result: Result | None, marks: Marks, name: str | None = None) -> str:
    """The figure of that name, by default the main one, with one decimal and its marks."""
    if result is None:
        return MISSING
    figure = result.main if name is None else result.figures.get(name)
    value = None if figure is None else figure.value
    return (MISSING if value is None else f"{value:.1f}") + marks(caveats(result))


def questions(results: Sequence[Result], name: str | None = None) -> str:
    """The number of questions behind a figure; the least and the most if it differs between the results."""
    figures = [r.main if name is None else r.figures.get(name) for r in results]
    counts = [figure.questions for figure in figures if figure is not None]
    return " to ".join(f"{count:,}" for count in dict.fromkeys((min(counts), max(counts)))) if counts else MISSING


def is_last(row: Row, below: Sequence[Row]) -> bool:
    """Whether no row below has the method and the number of tokens: published figures then follow."""
    return (row.method, row.keep) not in [(other.method, other.keep) for other in below]


def published_name(row: Row, source: str) -> list[str]:
    """The first two cells of a published row."""
    tokens = {NONE: FULL_TOKENS, FLOOR: 0}.get(row.method, row.keep)
    return [f"{row.method}, published by {source}", str(tokens)]


def _average(row: Row, tasks: Sequence[str], marks: Marks) -> str:
    """The mean over all tasks, with the marks of all; missing if a task has no figure."""
    figures = [row.results[task].main for task in tasks if task in row.results]
    values = [figure.value for figure in figures if figure is not None and figure.value is not None]
    if len(tasks) < 2 or len(values) < len(tasks):
        return MISSING
    return f"{sum(values) / len(values):.1f}" + marks([note for task in tasks for note in caveats(row.results[task])])
