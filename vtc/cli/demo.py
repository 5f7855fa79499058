"""`vtc demo`: the bundled model with fewer and fewer visual tokens, measured. `vtc.cli.sheet` draws it."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

import vtc
from vtc.cli import ask
from vtc.eval.engine import answer_all
from vtc.eval.local import LocalEngine
from vtc.eval.model import ModelSpec, pick_device
from vtc.eval.setting import NONE, Setting
from vtc.eval.tasks.scenes import Scenes
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
    first_token: float  # seconds, one question
    per_question: float  # seconds, in batches
    kv_bytes: int  # one question

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)

    def cells(self) -> tuple[str, ...]:
        """The row under `COLUMNS`."""
        return (
            self.selection,
            str(self.tokens),
            f"{sum(self.right)}/{len(self.right)}",
            f"{100 * self.accuracy:.1f} %",
            f"{1000 * self.first_token:.1f} ms",
            f"{1000 * self.per_question:.1f} ms",
            f"{self.kv_bytes / 2**20:.2f} MiB",
        )

    def record(self) -> dict[str, Any]:
        """The row for `--json`."""
        return {
            "selection": self.selection,
            "visual_tokens": self.tokens,
            "right": sum(self.right),
            "accuracy": round(self.accuracy, 4),
            "accuracy_by_family": {f: round(sum(oks) / len(oks), 4) for f, oks in self.families.items() if oks},
            "time_to_first_token_ms": round(1000 * self.first_token, 2),
            "per_question_ms": round(1000 * self.per_question, 2),
            "kv_cache_bytes": self.kv_bytes,
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
        rows = [row.record() for row in self.rows]
        return {"questions": len(self.questions), "device": self.device, "cpu_threads": self.threads, "rows": rows}

    def footnote(self) -> str:
        """How the figures of the table were taken."""
        return (
            f"Time to first token: one question, median of {ask.WARM_RUNS} warm runs, from pixels to token. "
            f"Per question: in batches of {BATCH}, whole answer. KV cache: one question, after the prompt. "
            f"Accuracies are good to about {self.half_width():.0f} points (95 %)."
        )

    def half_width(self) -> float:
        """Half the widest 95 % interval of the accuracies, in percentage points."""
        return max(196 * math.sqrt(row.accuracy * (1 - row.accuracy) / len(self.questions)) for row in self.rows)


def settings(method: str) -> tuple[tuple[str, int, str], ...]:
    """The settings as (selection, tokens, method): `SETTINGS` with another method, or all methods at `SHOWN` tokens."""
    if method == "all":
        return (SETTINGS[0], *((name, SHOWN, name) for name in METHODS if name != NONE))
    fewer = () if method == "random" else tuple((method, tokens, method) for tokens in FEWER)
    return (SETTINGS[0], *fewer, SETTINGS[-1]) if method != NONE else (SETTINGS[0], (NONE, FULL, NONE))


def measure(
    count: int, device: str | None = None, note: Callable[[str], None] = lambda line: None, method: str = "vtc-cls"
) -> Demo:
    """Ask the bundled model `count` held-out questions at every setting.

    Parameters
    ----------
    count : int
        Questions; families and answers are balanced, one question a scene.
    device : str, optional
        By default the first GPU, else the CPU. The model runs in float32.
    note : callable
        Gets a line of progress before each setting.
    method : str
        A method's name or "all"; see `settings`.
    """
    import torch

    task, engine, spec = Scenes(count=count), LocalEngine(), ModelSpec(device=str(pick_device(device)))
    answerer = engine.answerer(spec)
    model, processor = answerer.model, answerer.processor

    def prepared(number: int) -> Any:
        scene, question = task.asked[number]
        return ask.prepare(model, processor, scene.image, question.text)

    first, rows = prepared(0), []
    for selection, tokens, name in settings(method):
        note(f"{count} questions with {tokens} visual tokens ({selection}) …")
        setting = Setting(name, {} if name == NONE else {"keep": tokens})
        with vtc.compress(model, method=name, **setting.options) if setting.compresses else contextlib.nullcontext():
            first_token, kv_bytes = ask.first_token(model, first)
        answers = answer_all(engine, spec, task, setting, BATCH)
        texts = {answer.line: answer.text for answer in answers}
        rows.append(
            Row(
                selection,
                round(statistics.fmean(answer.visual_tokens or 0 for answer in answers)),
                list(texts.values()),
                list(task.right(texts).values()),
                task.families(texts),
                first_token,
                statistics.fmean(answer.generate_seconds for answer in answers),
                kv_bytes,
            )
        )
    shown = "vtc-cls" if method == "all" else method
    overlays = {}
    for number in _cards(task.asked, rows):
        image = task.asked[number][0].image
        if METHODS[shown].selects:
            kept = vtc.select(model, prepared(number)["pixel_values"], keep=SHOWN, method=shown)
            overlays[number] = vtc.overlay(image, kept, side=SIDE)
        else:  # no patch is dropped
            overlays[number] = image.resize((SIDE, SIDE))
    return Demo(task.asked, rows, overlays, spec.device, torch.get_num_threads(), shown)


def _cards(questions: list[tuple[Scene, Question]], rows: list[Row]) -> list[int]:
    """The questions that are drawn: the first of each family, and the first other one with different answers."""
    families = [question.family for _, question in questions]
    cards = [families.index(family) for family in FAMILIES]
    others = [n for n in range(len(questions)) if n not in cards]
    disagreed = [n for n in others if len({row.answers[n] for row in rows}) > 1]
    return cards + (disagreed or others)[:1]
