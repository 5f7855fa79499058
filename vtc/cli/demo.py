"""What `vtc demo` shows: the bundled model with fewer and fewer visual tokens, measured and drawn."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import vtc
from vtc import tiny
from vtc.cli import ask
from vtc.methods import METHODS
from vtc.tiny.questions import answer, batches, prepare
from vtc.tiny.scenes import FAMILIES, Question, Scene, balanced_questions

FULL = 576
SHOWN = 64  # the budget whose kept patches are drawn
SETTINGS: tuple[tuple[str, int, str | None], ...] = (
    ("all tokens", FULL, None),
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

    def record(self, families: list[str]) -> dict[str, Any]:
        """The row for `--json`; `families` are those of the questions."""
        asked = {f: [ok for ok, family in zip(self.right, families, strict=True) if family == f] for f in FAMILIES}
        return {
            "selection": self.selection,
            "visual_tokens": self.tokens,
            "right": sum(self.right),
            "accuracy": round(self.accuracy, 4),
            "accuracy_by_family": {f: round(sum(oks) / len(oks), 4) for f, oks in asked.items() if oks},
            "time_to_first_token_ms": round(1000 * self.first_token, 2),
            "per_question_ms": round(1000 * self.per_question, 2),
            "kv_cache_bytes": self.kv_bytes,
        }


@dataclass(frozen=True)
class Demo:
    """Everything measured, and what the picture needs."""

    asked: list[tuple[Scene, Question]]
    rows: list[Row]
    overlays: dict[int, Image.Image]  # by number of the question, for those in the picture
    device: str
    threads: int
    shown: str = "vtc-cls"  # the method whose kept patches are in the picture

    def record(self) -> dict[str, Any]:
        """The JSON document."""
        families = [question.family for _, question in self.asked]
        rows = [row.record(families) for row in self.rows]
        return {"questions": len(self.asked), "device": self.device, "cpu_threads": self.threads, "rows": rows}

    def footnote(self) -> str:
        """How the figures of the table were taken."""
        return (
            f"Time to first token: one question, median of {ask.WARM_RUNS} warm runs, from pixels to token. "
            f"Per question: in batches of {BATCH}, whole answer. KV cache: one question, after the prompt. "
            f"Accuracies are good to about {self.half_width():.0f} points (95 %)."
        )

    def half_width(self) -> float:
        """Half the widest 95 % interval of the accuracies, in percentage points."""
        return max(196 * math.sqrt(row.accuracy * (1 - row.accuracy) / len(self.asked)) for row in self.rows)


def settings(method: str) -> tuple[tuple[str, int, str | None], ...]:
    """What is measured, as (selection, tokens, method): `SETTINGS` with another method, or "all" of them at `SHOWN`."""
    if method == "all":
        return (SETTINGS[0], *((name, SHOWN, name) for name in METHODS if name != "none"))
    fewer = () if method == "random" else tuple((method, tokens, method) for tokens in FEWER)
    return (SETTINGS[0], *fewer, SETTINGS[-1]) if method != "none" else (SETTINGS[0], ("none", FULL, "none"))


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

    where = ask.pick_device(device)
    model, processor = tiny.load()
    model.to(where)
    asked = balanced_questions("test", count)
    prepared = batches(model, processor, asked, BATCH)
    single = prepare(model, processor, asked[:1])
    rows = []
    for selection, tokens, name in settings(method):
        note(f"{count} questions with {tokens} visual tokens ({selection}) …")
        setting = {"keep": tokens, "method": name} if name else {}
        with vtc.compress(model, **setting) if name else contextlib.nullcontext():
            first_token, kv_bytes = ask.first_token(model, single)
        said = answer(model, processor, prepared, **setting)
        tokens = round(said.tokens or tokens)  # not every method keeps as many as it is asked for
        right = [given == question.answer for given, (_, question) in zip(said.texts, asked, strict=True)]
        rows.append(Row(selection, tokens, said.texts, right, first_token, said.seconds / count, kv_bytes))
    shown = "vtc-cls" if method == "all" else method
    overlays = {}
    for number in _cards(asked, rows):
        scene = asked[number][0]
        pixels = prepare(model, processor, asked[number : number + 1])["pixel_values"]
        if METHODS[shown].selects:
            kept = vtc.select(model, pixels, keep=SHOWN, method=shown)
            overlays[number] = vtc.overlay(scene.image, kept, side=PICTURE)
        else:  # nothing is dropped that could be dimmed
            overlays[number] = scene.image.resize((PICTURE, PICTURE))
    return Demo(asked, rows, overlays, str(where), torch.get_num_threads(), shown)


def _cards(asked: list[tuple[Scene, Question]], rows: list[Row]) -> list[int]:
    """Which questions are drawn: the first of each family, and the first other that the settings disagree on."""
    families = [question.family for _, question in asked]
    cards = [families.index(family) for family in FAMILIES]
    others = [n for n in range(len(asked)) if n not in cards]
    disagreed = [n for n in others if len({row.answers[n] for row in rows}) > 1]
    return cards + (disagreed or others)[:1]


# ---- the picture

PICTURE = 336  # pixels a side
MARGIN, GAP, HEAD, FOOT = 36, 16, 168, 40
CARD = (2 * PICTURE + GAP, PICTURE + 112)
ACROSS = 2
PAPER, INK, FAINT = (255, 255, 255), (24, 28, 36), (104, 112, 124)
RIGHT, WRONG = (26, 127, 55), (207, 34, 46)


def draw(demo: Demo) -> Image.Image:
    """The demo as one picture: scenes, kept patches, questions, and the answer at every setting."""
    down = -(-len(demo.overlays) // ACROSS)
    width = 2 * MARGIN + ACROSS * CARD[0] + (ACROSS - 1) * MARGIN
    sheet = Image.new("RGB", (width, HEAD + down * (CARD[1] + MARGIN) + FOOT), PAPER)
    pen = ImageDraw.Draw(sheet)
    by = "the [CLS] token" if demo.shown == "vtc-cls" else demo.shown
    title = f"{SHOWN} of {FULL} visual tokens, chosen by {by}"
    right = f"what {demo.shown} keeps of it; the language model never sees the dark patches."
    if not METHODS[demo.shown].selects:
        title, right = f"{demo.shown}: {METHODS[demo.shown].scores}", "the same, for no patch is chosen."
        if "tower" not in METHODS[demo.shown].prunes:
            right = "the same, for what is kept depends on the question."
    elif "merge" in METHODS[demo.shown].operations:
        right = f"the patches that {demo.shown} keeps; the dark ones go into merged tokens."
    pen.text((MARGIN, 28), title, INK, _font(36))
    pen.text(
        (MARGIN, 80),
        f"Left: the scene. Right: {right} Below: answers by number of visual tokens.",
        FAINT,
        _font(19),
    )
    size = 19 if len(demo.rows) < 7 else 15  # all methods are a long line
    shares = "     ".join(f"{_label(demo, row)}: {100 * row.accuracy:.0f} %" for row in demo.rows)
    pen.text((MARGIN, 114), f"Right answers to {len(demo.asked)} held-out questions:     {shares}", INK, _font(size))
    for place, number in enumerate(demo.overlays):
        x = MARGIN + place % ACROSS * (CARD[0] + MARGIN)
        y = HEAD + place // ACROSS * (CARD[1] + MARGIN)
        _draw_card(sheet, demo, number, x, y)
    chosen = "Shown: the first question of each family, and the first other that the settings disagree on."
    pen.text((MARGIN, sheet.height - FOOT - 10), chosen, FAINT, _font(16))
    return sheet


def _draw_card(sheet: Image.Image, demo: Demo, number: int, x: int, y: int) -> None:
    pen = ImageDraw.Draw(sheet)
    scene, question = demo.asked[number]
    sheet.paste(scene.image.resize((PICTURE, PICTURE)), (x, y))
    sheet.paste(demo.overlays[number], (x + PICTURE + GAP, y))
    y += PICTURE + 10
    pen.text((x, y), question.text, INK, _font(21))
    pen.text((x + CARD[0], y + 2), f"answer: {question.answer}", FAINT, _font(18), anchor="ra")
    y += 40
    step = (CARD[0] + 8) / len(demo.rows)
    for i, row in enumerate(demo.rows):
        right = row.right[number]
        box = (round(x + i * step), y, round(x + (i + 1) * step) - 8, y + 58)
        middle = (box[0] + box[2]) // 2
        answer = _shortened(row.answers[number] or "(none)", box[2] - box[0] - 16)
        pen.rounded_rectangle(box, 8, fill=RIGHT if right else WRONG)
        pen.text((middle, y + 15), _label(demo, row), PAPER, _font(14 if len(demo.rows) < 7 else 11), anchor="mm")
        pen.text((middle, y + 39), answer, PAPER, _font(20), anchor="mm")
        if not right:  # crossed out as well, for those who do not tell red from green
            half = _font(20).getlength(answer) / 2 + 4
            pen.line((middle - half, y + 40, middle + half, y + 40), PAPER, 2)


def _label(demo: Demo, row: Row) -> str:
    once = sum(other.selection == row.selection for other in demo.rows) == 1
    return f"{row.selection} {row.tokens}" if once and row.tokens != FULL else str(row.tokens)


def _shortened(text: str, width: int) -> str:
    while _font(20).getlength(text) > width:
        text = text.removesuffix("..")[:-1] + ".."
    return text


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
