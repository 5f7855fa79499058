"""`vtc demo`: the bundled model with fewer and fewer visual tokens, measured. `vtc.cli.sheet` draws it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from PIL import Image

import vtc
from vtc.api import selects
from vtc.cli.output import print_json, print_table
from vtc.eval import ask
from vtc.eval.answerer import Answerer, prepare
from vtc.eval.engine import batches_of
from vtc.eval.intervals import Share, wilson
from vtc.eval.measure import RUNS, FirstToken, Times, cell, first_tokens, noise
from vtc.eval.progress import Progress
from vtc.eval.protocol import PROTOCOLS
from vtc.eval.question import Answer
from vtc.eval.setting import NONE, Setting, ignores_keep
from vtc.eval.tasks.scenes import Scenes
from vtc.files import replacing
from vtc.methods import METHODS
from vtc.tiny.scenes import FAMILIES, Question, Scene

FULL = 576
SHOWN = 64  # the budget whose kept patches are drawn
SIDE = 336  # of an image in the sheet, in pixels
SETTINGS: tuple[tuple[str, int, str], ...] = (
    ("all tokens", FULL, NONE),
    ("vtc-cls", 192, "vtc-cls"),
    ("vtc-cls", 128, "vtc-cls"),
    ("vtc-cls", 64, "vtc-cls"),
    ("vtc-cls", 32, "vtc-cls"),
    ("random", 64, "random"),
)
BATCH = 8
FEWER = (192, 128, 64, 32)
COLUMNS = ("selection", "visual tokens", "right", "accuracy", "time to first token", "per question", "KV cache")


@dataclass(frozen=True)
class Row:
    """One setting: its answers in the order of the questions, and its cost."""

    selection: str
    tokens: int
    answers: list[str]
    right: list[bool]
    families: dict[str, list[bool]]  # which are right, family by family
    first_token: FirstToken  # one question
    per_question: Times  # in batches: each time is of a batch, over the number of its questions

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.interval[0]

    @property
    def interval(self) -> Share:
        """Share of right answers, and its 95 % interval."""
        return wilson(sum(self.right), len(self.right))

    def cells(self) -> tuple[str, ...]:
        """The row under `COLUMNS`."""
        share, low, high = (100 * each for each in self.interval)
        return (
            self.selection,
            str(self.tokens),
            f"{sum(self.right)}/{len(self.right)}",
            f"{share:.1f} % ({low:.0f}-{high:.0f})",
            cell(self.first_token.record()),
            cell(self.per_question.record()),
            f"{self.first_token.kv_bytes / 2**20:.2f} MiB",
        )

    def record(self) -> dict[str, Any]:
        """The row for `--json`."""
        return {
            "selection": self.selection,
            "visual_tokens": self.tokens,
            "right": sum(self.right),
            "accuracy": round(self.accuracy, 4),
            "accuracy_interval": [round(each, 4) for each in self.interval[1:]],
            "accuracy_by_family": {f: round(sum(oks) / len(oks), 4) for f, oks in self.families.items() if oks},
            "time_to_first_token_ms": self.first_token.record(),
            "per_question_ms": self.per_question.record(),
            "kv_cache_bytes": self.first_token.kv_bytes,
        }


@dataclass(frozen=True)
class Demo:
    """Everything measured, and what the sheet needs."""

    questions: list[tuple[Scene, Question]]
    rows: list[Row]
    overlays: dict[int, Image.Image]  # by number of the question, for those in the sheet
    device: str
    threads: int
    shown: str = "vtc-cls"  # the method whose kept patches are in the sheet

    def record(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "questions": len(self.questions),
            "device": self.device,
            "cpu_threads": self.threads,
            "rows": [row.record() for row in self.rows],
            "noisy": self.noise(),
        }

    def footnotes(self) -> list[str]:
        """How the figures of the table were taken, and whether the times are noisy."""
        where = f"on {self.device}" + (f", {ask.counted(self.threads, 'thread')}" if self.device == "cpu" else "")
        lines = [
            "Accuracy: with its 95 % interval (Wilson). "
            f"Times: median (fastest-slowest), settings in turns, {where}. "
            f"To first token: one question, {RUNS} warm runs, from pixels to token. "
            f"Per question: batches of {BATCH}, whole answer. KV cache: one question, after the prompt."
        ]
        return lines + ([warning] if (warning := self.noise()) else [])

    def noise(self) -> str | None:
        """A warning if the runs of a setting differ much; None if they do not."""
        return noise({f"{row.selection} with {ask.counted(row.tokens, 'token')}": row.first_token for row in self.rows})


def settings(method: str) -> tuple[tuple[str, int, str], ...]:
    """The settings as (selection, tokens, method): `SETTINGS` with another method, or all methods at `SHOWN` tokens.

    A method that ignores the number of tokens is one of them.
    """
    if method == "all":
        return (SETTINGS[0], *((name, SHOWN, name) for name in METHODS if name != NONE))
    if method == NONE:
        return SETTINGS[:1]
    if method == "random":
        return (SETTINGS[0], SETTINGS[-1])
    fewer = (SHOWN,) if ignores_keep(method, {}) else FEWER
    return (SETTINGS[0], *((method, tokens, method) for tokens in fewer), SETTINGS[-1])


def setting_of(method: str, tokens: int) -> Setting:
    """A method that keeps so many tokens, if that is for the caller to say."""
    return Setting(method, {} if ignores_keep(method, {}) else {"keep": tokens})


def measure(model: Any, processor: Any, count: int, method: str = "vtc-cls", quiet: bool = False) -> Demo:
    """Ask the bundled model `count` held-out questions at every setting, batch by batch in turns.

    Parameters
    ----------
    count : int
        Questions; families and answers are balanced, one question a scene.
    method : str
        A method's name or "all"; see `settings`.
    quiet : bool
        Show no progress.
    """
    task, answerer, rows = Scenes(count=count), Answerer(model, processor), settings(method)
    chosen = [setting_of(name, tokens) for _, tokens, name in rows]

    def prepared(number: int) -> Any:
        scene, question = task.asked[number]
        return ask.prepare(model, processor, scene.image, question.text)

    with Progress("timing", (RUNS + 1) * len(chosen), quiet=quiet, unit="runs") as progress:
        costs = first_tokens(answerer, prepared(0), chosen, advance=progress.advance)
    with Progress(ask.counted(count, "question"), count * len(chosen), quiet=quiet, unit="answers") as progress:
        answers = _answers(answerer, task, chosen, progress)
    measured = [
        _row(selection, task, given, cost) for (selection, *_), given, cost in zip(rows, answers, costs, strict=True)
    ]
    shown = "vtc-cls" if method == "all" else method
    overlays = {}
    for number in _cards(task.asked, measured):
        image = task.asked[number][0].image
        if selects(METHODS[shown]):
            kept = vtc.select(model, prepared(number), method=shown, **setting_of(shown, SHOWN).options)
            overlays[number] = vtc.overlay(image, kept, side=SIDE)
        else:  # no patch is dropped
            overlays[number] = image.resize((SIDE, SIDE))
    return Demo(task.asked, measured, overlays, str(model.device), torch.get_num_threads(), shown)


def _answers(answerer: Answerer, task: Scenes, chosen: Sequence[Setting], progress: Progress) -> list[list[Answer]]:
    """The answers at each setting, in the order of the questions. The settings take turns at every batch."""
    protocol = PROTOCOLS[task.protocol](answerer.processor, answerer.model.config)
    answers: list[list[Answer]] = [[] for _ in chosen]
    for number, questions in enumerate(batches_of(task.questions, BATCH)):
        batch = prepare(protocol, questions)
        for place in range(len(chosen)):
            each = (number + place) % len(chosen)
            answers[each] += answerer.answer(batch, chosen[each], task.max_new_tokens)
            progress.advance(len(questions))
    return answers


def _row(selection: str, task: Scenes, answers: Sequence[Answer], cost: FirstToken) -> Row:
    texts = {answer.line: answer.text for answer in answers}
    return Row(
        selection,
        round(statistics.fmean(answer.visual_tokens or 0 for answer in answers)),
        list(texts.values()),
        list(task.right(texts).values()),
        task.families(texts),
        cost,
        Times(tuple(first.generate_seconds for first in answers[::BATCH])),  # the same for all of a batch
    )


def _cards(questions: list[tuple[Scene, Question]], rows: list[Row]) -> list[int]:
    """The questions that are drawn: the first of each family, and the first other one with different answers."""
    families = [question.family for _, question in questions]
    cards = [families.index(family) for family in FAMILIES]
    others = [n for n in range(len(questions)) if n not in cards]
    disagreed = [n for n in others if len({row.answers[n] for row in rows}) > 1]
    return cards + (disagreed or others)[:1]


def show(found: Demo, draw: Callable[[Demo], Image.Image], file: Path, begun: float, as_json: bool) -> None:
    """Print what was measured, then draw it. A JSON document names the sheet, so that it comes after it."""
    record = {**found.record(), "sheet": None}
    if not as_json:
        title = f"{len(found.questions)} held-out questions to the bundled model on {found.device}"
        print_table(title, COLUMNS, [row.cells() for row in found.rows])
        for line in found.footnotes():
            typer.echo(line)
    try:
        with replacing(file) as temporary:
            draw(found).save(temporary)
        record["sheet"] = str(file)
    finally:
        record["seconds"] = round(time.perf_counter() - begun, 1)
        if as_json:
            print_json(record)
    if not as_json:
        typer.echo(f"Sheet: {file} ({record['seconds']:.0f} s in all)")
