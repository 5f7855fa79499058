"""Results by setting: the rows of tables and the points of plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vtc.eval.published import COLUMNS
from vtc.eval.result import Result
from vtc.eval.setting import FLOOR, NONE, ignores_keep

MISSING = "-"  # in a cell


@dataclass
class Row:
    """The results of one setting under the same conditions, by task."""

    first: Result
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.first.method

    @property
    def name(self) -> str:
        """The method and its options, without the number of tokens."""
        rest = (f"{name}={value}" for name, value in self.first.options.items() if name not in ("keep", "ratio"))
        return " ".join([self.method, *rest])

    @property
    def keep(self) -> int | None:
        """The number of tokens that was asked for, if it is the method's to keep."""
        keep = self.first.options.get("keep")
        return keep if isinstance(keep, int) and not ignores_keep(self.method, self.first.options) else None

    @property
    def measured(self) -> list[int]:
        """The numbers of tokens that were kept, over the tasks."""
        return sorted({round(r.visual_tokens) for r in self.results.values() if r.visual_tokens is not None})

    @property
    def token_layers(self) -> list[int]:
        """Visual tokens, averaged over the layers of the language model, over the tasks: where not what was kept."""
        results = (r for r in self.results.values() if r.token_layers is not None)
        return sorted({round(r.token_layers or 0) for r in results if r.token_layers != r.visual_tokens})

    @property
    def tokens(self) -> str:
        """What was asked for, in brackets what was kept if that differs, and the mean over the layers likewise."""
        if self.method == FLOOR:
            return "0"
        kept = _range(self.measured)
        if self.keep is None:
            text = kept or MISSING
        else:
            text = f"{self.keep} ({kept})" if self.measured and self.measured != [self.keep] else str(self.keep)
        return f"{text}; {_range(self.token_layers)} a layer" if self.token_layers else text


def _range(numbers: Sequence[int]) -> str:
    """ "64", or "53 to 66": the least and the most of sorted numbers."""
    return " to ".join(map(str, dict.fromkeys((*numbers[:1], *numbers[-1:]))))


def layer_note(rows: Sequence[Row]) -> list[str]:
    """The note of a table in which tokens differ between the layers of the language model."""
    text = "a layer: visual tokens of an image, averaged over the layers of the language model."
    return [text] if any(row.token_layers for row in rows) else []


def rows_of(results: Sequence[Result]) -> list[Row]:
    """The results by setting and conditions. "none" is first, "floor" last; between them, more tokens come first.

    A second result of the same task, setting and conditions has a second row.
    """
    rows: list[Row] = []
    for r in results:
        for row in rows:
            if identity(row.first) == identity(r) and r.task not in row.results:
                row.results[r.task] = r
                break
        else:
            rows.append(Row(r, {r.task: r}))
    methods = list(dict.fromkeys(row.method for row in rows))
    ends = {NONE: 0, FLOOR: 2}

    def key(row: Row) -> tuple[int, int, int]:
        tokens = max(row.measured, default=0) if row.keep is None else row.keep
        return ends.get(row.method, 1), -tokens, methods.index(row.method)

    return sorted(rows, key=key)


def tasks_of(results: Sequence[Result]) -> list[str]:
    """The tasks in the order of the published table, others after them."""
    tasks = dict.fromkeys(r.task for r in results)
    return [*(task for task in COLUMNS if task in tasks), *(task for task in tasks if task not in COLUMNS)]


def caveats(result: Result) -> list[str]:
    """Why its figure is missing or not that of the whole task. Empty for a whole run."""
    notes = []
    if not result.figures:
        notes.append("a server or a judge scores this task; the run wrote the file for it")
    elif result.main is not None and result.main.value is None:
        notes.append("no question counts for this figure")
    return notes + incomplete(result)


def incomplete(result: Result) -> list[str]:
    """Which questions of the task are not in it. Empty for a whole run."""
    notes = []
    if not result.complete:
        notes.append(f"partial: {result.answered:,} of {result.questions:,} questions have an answer")
    if result.limit is not None:
        notes.append(f"a sample of {result.questions:,} questions (--limit {result.limit})")
    if result.skipped:
        notes.append(f"without {result.skipped:,} of {result.questions:,} questions: their images cannot be read")
    return notes


def device_of(result: Result) -> str:
    """The GPU, or the device."""
    return str(result.environment.get("gpu") or result.environment.get("device") or "unknown device")


def conditions(result: Result) -> dict[str, str]:
    """What can change answers besides the model and the setting. Empty texts: unknown, as of answers from a file."""
    texts = {"protocol": "protocol {}", "dtype": "{}", "batch_size": "batch {}"}
    known = result.fingerprint
    return {name: text.format(known[name]) if name in known else "" for name, text in texts.items()}


def time_conditions(result: Result) -> dict[str, str]:
    """What can change times besides the model, the task and the setting."""
    timing = result.timing
    counts = {"processes": f"processes {timing.processes}", "workers": f"workers {timing.workers}"}
    return {"device": device_of(result), **conditions(result), **counts}


def common_and_rest(all_conditions: Sequence[dict[str, str]]) -> tuple[str, list[str]]:
    """The conditions that all share, for a title; and for each the others, to be appended to a name."""
    first = all_conditions[0]
    common = [name for name in first if len({c[name] for c in all_conditions}) == 1]
    rest = ["".join(f", {c[name]}" for name in c if name not in common and c[name]) for c in all_conditions]
    return ", ".join(first[name] for name in common if first[name]), rest


def identity(result: Result) -> tuple[object, ...]:
    """What tells the rows of a table apart; hashable."""
    return (result.model, result.label, *conditions(result).items())
