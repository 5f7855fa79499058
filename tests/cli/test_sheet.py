"""The sheet of `vtc demo`: nothing on it is cut or overlaps, and what it says is true of the method."""

import pytest
from PIL import Image, ImageDraw

from vtc.cli import demo, sheet
from vtc.eval.measure import FirstToken, Times
from vtc.methods import METHODS
from vtc.tiny.scenes import balanced_questions

SHOWN = [*METHODS, "all"]
QUESTIONS = balanced_questions("test", 6)
LONG = "the object is a triangle"


def made_up(method, count=6, answer="triangle", tokens=None):
    """A demo whose first setting answers otherwise than the others if `count` > 5."""
    asked = QUESTIONS[:count]
    rows = [
        demo.Row(
            selection,
            tokens if tokens and name == method else number,
            [("above" if count > 5 and i == 0 else answer)] * count,
            [i % 2 == 0] * count,
            {},
            FirstToken((0.1,), 2**20),
            Times((0.1,)),
        )
        for i, (selection, number, name) in enumerate(demo.settings(method))
    ]
    pictures = {n: Image.new("RGB", (demo.SIDE, demo.SIDE), "grey") for n in range(count)}
    return demo.Demo(asked, rows, pictures, "cpu", 1, "vtc-cls" if method == "all" else method)


@pytest.fixture
def written(monkeypatch):
    """All texts that are drawn, with their boxes."""
    found, stock = [], ImageDraw.ImageDraw.text

    def text(self, xy, text, fill=None, font=None, anchor=None, **others):
        if not others:  # else the digit of a scene
            found.append((text, self.textbbox(xy, text, font, anchor)))
        stock(self, xy, text, fill, font, anchor, **others)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@pytest.mark.parametrize("method", SHOWN)
@pytest.mark.parametrize("answer", ["triangle", LONG])
def test_no_text_is_cut_or_lies_on_another(written, method, answer):
    drawn = sheet.draw(made_up(method, answer=answer))
    for number, (text, box) in enumerate(written):
        assert box[0] >= sheet.MARGIN - 2, text
        assert box[2] <= drawn.width - sheet.MARGIN + 2, text
        assert box[3] <= drawn.height, text
        for other, place in written[:number]:
            assert not overlap(box, place), (text, other)
    if answer != LONG:
        assert not [text for text, _ in written if ".." in text]
    labels = [text for text, _ in written]
    for row in made_up(method).rows:
        assert labels.count(sheet._label(made_up(method), row)) == 6


def test_labels_and_answers_stay_in_their_boxes(written, monkeypatch):
    boxes = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "rounded_rectangle", lambda self, box, *_, **__: boxes.append(box))
    sheet.draw(made_up("all", answer=LONG))
    assert len(boxes) == 6 * len(METHODS)
    for box in boxes:
        inside = [at for _, at in written if overlap(at, box)]
        assert len(inside) == 2  # the label and the answer
        for at in inside:
            assert box[0] <= at[0] < at[2] <= box[2]
            assert box[1] <= at[1] < at[3] <= box[3]


@pytest.mark.parametrize(
    ("method", "tokens", "title", "right"),
    [
        ("vtc-cls", None, "64 of 576 visual tokens, chosen by the [CLS] token", "never sees the dark patches"),
        ("all", None, "64 of 576 visual tokens, chosen by the [CLS] token", "what vtc-cls keeps of it"),
        ("fastervlm", None, "64 of 576 visual tokens, chosen by fastervlm", "never sees the dark patches"),
        ("random", None, "64 of 576 visual tokens, chosen at random", "what random keeps of it"),
        ("visionzip", None, "64 visual tokens instead of 576, by visionzip", "the dark ones go into merged tokens"),
        ("prumerge", 55, "55 visual tokens on average instead of 576, by prumerge", "go into merged tokens"),
        (
            "fastv",
            None,
            "64 of 576 visual tokens, chosen by fastv",
            "for this question; dark patches end after 2 layers",
        ),
        ("pool", None, "64 visual tokens instead of 576, by pool", "the same, for pool chooses no patches"),
        ("none", None, "All 576 visual tokens", "the same, for no patch is dropped"),
    ],
)
def test_the_head_is_true_of_the_method(written, method, tokens, title, right):
    sheet.draw(made_up(method, tokens=tokens))
    texts = [text for text, _ in written]
    assert texts[0] == title
    assert right in texts[1]
    assert ("question" in texts[1]) is (method == "fastv")
    assert ("by method and number" in texts[1]) is (method == "all")


@pytest.mark.parametrize(
    ("method", "count", "says"),
    [
        ("vtc-cls", 5, "Shown: the first question of each family."),
        ("vtc-cls", 6, "each family, and the first other that the settings disagree on."),
        ("none", 6, "each family, and one more."),
    ],
)
def test_it_says_which_questions_are_drawn(written, method, count, says):
    sheet.draw(made_up(method, count))
    assert written[-1][0].endswith(says)
