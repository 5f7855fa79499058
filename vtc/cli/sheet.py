"""The sheet of `vtc demo`: scenes beside their kept patches, questions, and answers at every setting."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vtc.cli.demo import FULL, SHOWN, SIDE, Demo, Row
from vtc.methods import METHODS

MARGIN, GAP, HEAD, FOOT = 36, 16, 168, 40
CARD = (2 * SIDE + GAP, SIDE + 112)
ACROSS = 2
PAPER, INK, FAINT = (255, 255, 255), (24, 28, 36), (104, 112, 124)
RIGHT, WRONG = (26, 127, 55), (207, 34, 46)


def draw(demo: Demo) -> Image.Image:
    """The demo as one image: scenes, kept patches, questions, and the answer at every setting."""
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
    elif any("merge" in operation for operation in METHODS[demo.shown].operations):
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
    pen.text(
        (MARGIN, 114), f"Right answers to {len(demo.questions)} held-out questions:     {shares}", INK, _font(size)
    )
    for place, number in enumerate(demo.overlays):
        x = MARGIN + place % ACROSS * (CARD[0] + MARGIN)
        y = HEAD + place // ACROSS * (CARD[1] + MARGIN)
        _draw_card(sheet, demo, number, x, y)
    chosen = "Shown: the first question of each family, and the first other that the settings disagree on."
    pen.text((MARGIN, sheet.height - FOOT - 10), chosen, FAINT, _font(16))
    return sheet


def _draw_card(sheet: Image.Image, demo: Demo, number: int, x: int, y: int) -> None:
    pen = ImageDraw.Draw(sheet)
    scene, question = demo.questions[number]
    sheet.paste(scene.image.resize((SIDE, SIDE)), (x, y))
    sheet.paste(demo.overlays[number], (x + SIDE + GAP, y))
    y += SIDE + 10
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
