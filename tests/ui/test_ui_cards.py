"""What the page says, without gradio and without a browser."""

import re
from html import unescape

from PIL import Image

from vtc.eval.measure import FirstToken
from vtc.ui import cards, compare
from vtc.ui.compare import Column
from vtc.ui.examples import EXAMPLES

QUESTION = "how many objects are there ?"
GREY = Image.new("RGB", (8, 8), "grey")


def text_of(html):
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_a_card_says_what_is_gained_and_nothing_that_the_spread_does_not_show():
    full = Column("all tokens", "5", True, 576, GREY, cost=FirstToken((0.2, 0.21, 0.25), 4 * 2**20))
    fast = Column("vtc-cls", "4", False, 64, GREY, GREY, "note", FirstToken((0.1, 0.105, 0.19), 2**20))
    same = Column("pool", "4", None, 64, GREY, None, "note", FirstToken((0.1, 0.105, 0.2), 2**20))
    slow = Column("random", "", None, 64, GREY, cost=FirstToken((0.42, 0.42, 0.42), 2**20))
    assert text_of(cards.card(full, 576, full)) == (
        "all tokens 5 ✓ right tokens 576 of 576 first token 210 ms (200 to 250) KV cache 4.00 MiB"
    )
    assert text_of(cards.card(fast, 576, full)) == (
        "vtc-cls 4 ✗ wrong tokens 64 of 576 (11 %) first token 105 ms (100 to 190) 2.0 times as fast "
        "KV cache 1.00 MiB (25 %) note"
    )
    assert "105 ms (100 to 200) no clear difference" in text_of(cards.card(same, 576, full))
    assert "(nothing) tokens 64" in text_of(cards.card(slow, 576, full))
    assert "0.5 times as fast" in text_of(cards.card(slow, 576, full))
    waiting = Column("vtc-cls", "5", None, 64, GREY)
    assert "first token measuring … KV cache …" in text_of(cards.card(waiting, 576, full))
    assert "first token" not in cards.card(waiting, 576, full, timed=False)


def test_nothing_that_was_said_becomes_html():
    evil = '<img src=x onerror="alert(1)">'
    column = Column(evil, evil, None, 1, GREY, note=evil)
    for html in (
        cards.card(column, 576, column),
        cards.error(evil),
        cards.hint(evil),
        cards.header(evil, False, 576),
    ):
        assert "<img" not in html
        assert "&lt;img" in html


def test_the_head_of_the_page_says_what_the_model_knows(comparison):
    assert "It knows its own scenes only: for photographs, start vtc ui --model" in text_of(
        cards.header("bundled", True, 576)
    )
    assert "scenes" not in cards.header("llava-1.5-7b-hf", False, 576)
    model, processor = comparison.answerer.model, comparison.answerer.processor
    assert compare.Comparison(model, processor, "/home/me/models/llava").name == "llava"


def test_the_truth_is_told_with_the_answer_to_this_question():
    assert text_of(cards.truth(EXAMPLES[0], QUESTION)).endswith("Right answer: 5 .")
    assert "Right answer" not in cards.truth(EXAMPLES[0], "is this art ?")
    assert cards.truth(None, QUESTION) == ""
