"""The sheet of `vtc demo`: scenes beside their kept patches, questions, and answers at every setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vtc.api import selects
from vtc.cli.demo import FULL, SHOWN, SIDE, Demo, Row
from vtc.config import VTCConfig
from vtc.eval.ask import counted
from vtc.methods import METHODS
from vtc.tiny.scenes import FAMILIES

MARGIN, GAP, HEAD, FOOT = 36, 16, 168, 40
LINE = 24  # of the shares of right answers in the head
CARD = (2 * SIDE + GAP, SIDE + 112)
CHIP = 66  # height of a line of answers, with its gap
ACROSS = 2  # cards
CHIPS = 6  # answers in a line, at most
PAPER, INK, FAINT = (255, 255, 255), (24, 28, 36), (104, 112, 124)
RIGHT, WRONG = (26, 127, 55), (207, 34, 46)


def draw(demo: Demo) -> Image.Image:
    """The demo as one image: scenes, kept patches, questions, and the answer at every setting."""
    down = -(-len(demo.overlays) // ACROSS)
    width = 2 * MARGIN + ACROSS * CARD[0] + (ACROSS - 1) * MARGIN
    shares = [f"{_label(demo, row)}: {100 * row.accuracy:.0f} %" for row in demo.rows]
    lines = _wrapped(f"Right answers to {len(demo.questions)} held-out questions:", shares, 19, width - 2 * MARGIN)
    head = HEAD + LINE * (len(lines) - 1)
    height = CARD[1] + CHIP * (_count_lines(demo) - 1)
    sheet = Image.new("RGB", (width, head + down * (height + MARGIN) + FOOT), PAPER)
    pen = ImageDraw.Draw(sheet)
    title, right = _texts(demo)
    names = "method and " if len({row.selection for row in demo.rows}) > 3 else ""
    subtitle = f"Left: the scene. Right: {right} Below: answers by {names}number of visual tokens."
    for y, text, colour, size in ((28, title, INK, 36), (80, subtitle, FAINT, 19)):
        pen.text((MARGIN, y), text, colour, _fitting(text, size, width - 2 * MARGIN))
    for number, line in enumerate(lines):
        pen.text((MARGIN, 114 + LINE * number), line, INK, _font(19))
    for place, number in enumerate(demo.overlays):
        x = MARGIN + place % ACROSS * (CARD[0] + MARGIN)
        y = head + place // ACROSS * (height + MARGIN)
        _draw_card(sheet, demo, number, x, y)
    pen.text((MARGIN, sheet.height - FOOT - 10), _chosen(demo), FAINT, _font(16))
    return sheet


def _texts(demo: Demo) -> tuple[str, str]:
    """The title, and what the right image of a card shows."""
    name, method = demo.shown, METHODS[demo.shown]
    own = [row.tokens for row in demo.rows if row.selection == name]
    tokens = min(own, key=lambda number: abs(number - SHOWN), default=FULL)  # some methods choose the number
    if tokens == FULL:
        return f"All {FULL} visual tokens", "the same, for no patch is dropped."
    if not selects(method):
        return (
            f"{counted(tokens, 'visual token')} instead of {FULL}, by {name}",
            f"the same, for {name} chooses no patches.",
        )
    if any("merge" in operation for operation in method.operations):
        mean = "on average " if method.adaptive else ""
        title = f"{counted(tokens, 'visual token')} {mean}instead of {FULL}, by {name}"
        return title, f"the patches that {name} keeps; the dark ones go into merged tokens."
    by = {"vtc-cls": "by the [CLS] token", "random": "at random"}.get(name, f"by {name}")
    title = f"{tokens} of {FULL} visual tokens, chosen {by}"
    if method.prunes_only_language():
        layers = VTCConfig(method=name).prune_after
        return title, f"what {name} keeps for this question; dark patches end after {layers} layers."
    of = "for this question" if method.needs.question else "of it"
    return title, f"what {name} keeps {of}; the language model never sees the dark patches."


def _chosen(demo: Demo) -> str:
    """Which questions are drawn."""
    *_, last = demo.overlays
    text = "Shown: the first question of each family"
    if len(demo.overlays) <= len(FAMILIES):
        return f"{text}."
    disagreed = len({row.answers[last] for row in demo.rows}) > 1
    return f"{text}, and {'the first other that the settings disagree on' if disagreed else 'one more'}."


def _draw_card(sheet: Image.Image, demo: Demo, number: int, x: int, y: int) -> None:
    pen = ImageDraw.Draw(sheet)
    scene, question = demo.questions[number]
    sheet.paste(scene.image.resize((SIDE, SIDE)), (x, y))
    sheet.paste(demo.overlays[number], (x + SIDE + GAP, y))
    y += SIDE + 10
    answer = f"answer: {question.answer}"
    space = CARD[0] - _font(18).getlength(answer) - GAP
    pen.text((x, y), question.text, INK, _fitting(question.text, 21, space))
    pen.text((x + CARD[0], y + 2), answer, FAINT, _font(18), anchor="ra")
    y += 40
    across = -(-len(demo.rows) // _count_lines(demo))
    step = (CARD[0] + 8) / across
    for i, row in enumerate(demo.rows):
        left, top = x + i % across * step, y + i // across * CHIP
        _draw_answer(pen, demo, row, number, (round(left), top, round(left + step) - 8, top + CHIP - 8))


def _draw_answer(pen: Any, demo: Demo, row: Row, number: int, box: tuple[int, int, int, int]) -> None:
    left, top, end, _ = box
    middle, space, is_right = (left + end) // 2, end - left - 12, row.right[number]
    label, answer = _label(demo, row), _shortened(row.answers[number] or "(none)", space)
    font = _fitting(answer, 20, space)
    pen.rounded_rectangle(box, 8, fill=RIGHT if is_right else WRONG)
    pen.text((middle, top + 15), label, PAPER, _fitting(label, 14, space), anchor="mm")
    pen.text((middle, top + 39), answer, PAPER, font, anchor="mm")
    if not is_right:  # crossed out as well, for those who do not tell red from green
        half = font.getlength(answer) / 2 + 4
        pen.line((middle - half, top + 40, middle + half, top + 40), PAPER, 2)


def _label(demo: Demo, row: Row) -> str:
    once = sum(other.selection == row.selection for other in demo.rows) == 1
    return f"{row.selection} {row.tokens}" if once and row.tokens != FULL else str(row.tokens)


def _count_lines(demo: Demo) -> int:
    """Lines of answers on a card."""
    return -(-len(demo.rows) // CHIPS)


def _wrapped(begin: str, items: Sequence[str], size: int, width: int) -> list[str]:
    """`begin` and the items as lines that are not wider than `width`."""
    lines = [begin]
    for item in items:
        longer = f"{lines[-1]}     {item}"
        if _font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(item)
    return lines


def _fitting(text: str, size: int, width: float, smallest: int = 12) -> Any:
    """The font of `size`, or of a smaller one in which `text` is not wider than `width`."""
    return next((_font(n) for n in range(size, smallest, -1) if _font(n).getlength(text) <= width), _font(smallest))


def _shortened(text: str, width: float, smallest: int = 12) -> str:
    """`text`, or as much of its begin as is not wider than `width` in the smallest font."""
    while _font(smallest).getlength(text) > width:
        text = text.removesuffix("..")[:-1] + ".."
    return text


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
