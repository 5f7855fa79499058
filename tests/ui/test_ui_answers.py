"""What the page computes and says, without gradio and without a browser."""

import asyncio
import json
import re
import socket
import sys
import threading
from html import unescape

import numpy as np
import pytest
from PIL import Image
from support.cli import BYTES, LAYERS, WIDTH, refused

import vtc
from vtc.eval.measure import FirstToken
from vtc.images import ImageError
from vtc.methods import METHODS
from vtc.tiny.scenes import Scene
from vtc.ui import cards, compare, server
from vtc.ui.compare import Choice, Column
from vtc.ui.examples import EXAMPLES, Example, example_of

SCENE = Scene("test", 1)  # five objects
QUESTION = "how many objects are there ?"
GREY = Image.new("RGB", (8, 8), "grey")


def answered(comparison, *choices, image=SCENE.image, question=QUESTION, length=4, timed=False):
    return list(comparison.ask(image, question, choices, length, timed))


def api_answer(comparison, image, question, **options):
    """The answer of the public functions alone."""
    model, processor = comparison.answerer.model, comparison.answerer.processor
    inputs = processor(images=image, text=vtc.tiny.prompt(question), return_tensors="pt")
    with vtc.compress(model, **options):
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return inputs, processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# Answers.


@pytest.mark.parametrize("method", compare.CHOICES)
def test_each_method_answers_and_draws_as_the_api_does(comparison, method):
    keep = 84 if method == "prumerge+" else 36
    ((everything, column),) = answered(comparison, Choice(method, keep))
    options = {"method": method} | ({} if method == "prumerge" else {"keep": keep})
    inputs, text = api_answer(comparison, SCENE.image, QUESTION, **options)
    assert (everything.name, everything.answer, everything.right, everything.tokens) == ("all tokens", "5", True, 576)
    assert (column.name, column.answer) == (method, text)
    assert column.right is (text == "5")
    with vtc.compress(comparison.answerer.model, **options) as run:
        comparison.answerer.model.generate(**inputs, max_new_tokens=1)
    assert column.tokens == run.tokens_after
    plain = SCENE.image.resize((672, 672), Image.Resampling.BICUBIC)
    assert np.array_equal(everything.image, plain)
    if method == "pool":
        assert np.array_equal(column.image, plain)
        assert column.heatmap is None
        assert column.note == "No patches to draw: nothing: the grid is averaged."
        return
    selection = vtc.select(comparison.answerer.model, inputs, **options)
    assert np.array_equal(column.image, vtc.overlay(SCENE.image, selection))
    assert np.array_equal(column.heatmap, vtc.heatmap(SCENE.image, selection))
    patches = int(re.match(r"(\d+) of the tokens are patches, outlined below\.", column.note)[1])
    assert patches == int((selection.indices[0] >= 0).sum())
    assert ("All tokens pass the first 2 layers." in column.note) == (method == "fastv")


def test_two_methods_stand_beside_all_tokens_and_costs_come_last(comparison):
    first, last = answered(comparison, Choice("vtc-cls", 36), Choice("random", 20), timed=True)
    assert [column.name for column in first] == ["all tokens", "vtc-cls", "random"]
    assert [column.cost for column in first] == [None, None, None]
    assert [column.answer for column in first] == [column.answer for column in last]
    assert [column.tokens for column in last] == [576, 36, 20]
    row = LAYERS * 2 * WIDTH * BYTES  # of one token
    text = last[0].cost.kv_bytes // row - 576  # tokens of the prompt that are no image
    assert [column.cost.kv_bytes for column in last] == [(tokens + text) * row for tokens in (576, 36, 20)]
    assert all(len(column.cost.seconds) == 5 and min(column.cost.seconds) > 0 for column in last)
    assert comparison.footnote() == (
        "First token: median (fastest to slowest) of 5 warm runs that take turns, on cpu, float32, 1 thread, from "
        "pixels to token. KV cache: after the prompt, all layers."
    )


def test_visitors_in_threads_do_not_see_each_other(comparison):
    scenes = [Scene("test", number) for number in (1, 22, 13)]
    choices = [Choice("vtc-cls", 40), Choice("fastervlm", 24), Choice("random", 90)]
    alone = [answered(comparison, choice, image=scene.image)[0] for scene, choice in zip(scenes, choices, strict=True)]
    together = [None] * 3

    def visit(number):
        (together[number],) = answered(comparison, choices[number], image=scenes[number].image)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert [(c.answer, c.tokens) for c in one] == [(c.answer, c.tokens) for c in other]
        assert all(np.array_equal(c.image, d.image) for c, d in zip(one, other, strict=True))
    assert not vtc.is_enabled(comparison.answerer.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " \n"}, "the question is empty; ask something about the image"),
        ({"question": "a" * 501}, "the question has 501 characters; shorten it to 500"),
        ({"question": "what is <image> ?"}, "the text 'what is <image> ?' holds <image>"),
        ({"length": 257}, "the longest answer in tokens is 257; take a whole number from 1 to 256"),
        ({"length": 0}, "the longest answer in tokens is 0; take"),
        ({"keep": 577}, "the number of tokens to keep is 577; take a whole number from 1 to 576"),
        ({"keep": 0}, "the number of tokens to keep is 0"),
        ({"keep": 2.5}, "the number of tokens to keep is 2.5; take"),
        ({"keep": None}, "the number of tokens to keep is None; take"),
        ({"keep": float("inf")}, "the number of tokens to keep is inf; take"),
        ({"keep": "x" * 99}, f"the number of tokens to keep is '{'x' * 39}; take"),
        ({"length": "abc"}, "the longest answer in tokens is 'abc'; take"),
        ({"length": float("nan")}, "the longest answer in tokens is nan; take"),
        ({"method": "none"}, "there is no method 'none'; take one of vtc-cls, "),
    ],
)
def test_what_is_not_accepted_is_one_line(comparison, changes, message):
    asked = {"method": "vtc-cls", "keep": 9, "question": QUESTION, "length": 4} | changes
    choice = Choice(asked.pop("method"), asked.pop("keep"))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        answered(comparison, choice, **asked)
    assert "\n" not in str(error.value)


def test_keep_begins_as_in_python_and_some_methods_take_none(comparison):
    assert (comparison.num_tokens, comparison.default_keep) == (576, 128)
    assert [name for name in compare.CHOICES if compare.ignores_keep(name, {})] == ["prumerge"]
    assert comparison.setting(Choice("prumerge", 9999)).options == {}
    assert set(compare.CHOICES) == set(METHODS) - {"none"}
    assert compare.described("fastv") == (
        f"Scores: {METHODS['fastv'].scores}. Drops tokens in the language model. arXiv 2403.06764."
    )


def test_a_file_is_known_by_its_name(tmp_path):
    file = tmp_path / "holiday.png"
    file.write_text("no image")
    with pytest.raises(ImageError, match=r"^holiday\.png is not an image") as error:
        compare.read({"path": str(file)}, tmp_path)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(ValueError, match="there is no image; upload or paste one"):
        compare.read(None, tmp_path)


# Examples.


def test_examples_are_known_by_their_pixels_and_their_truth_is_told():
    assert len({_bytes(example.scene.image) for example in EXAMPLES}) == len(EXAMPLES)
    for example in EXAMPLES:
        assert example_of(example.scene.image.copy()) is example
        assert example.answer_to(example.question) is not None
        assert example.truth.startswith(f"The scene has {len(example.scene.objects)} objects: a ")
        for thing in example.scene.objects:
            assert f"a {thing.size} {thing.colour} {thing.shape}" in example.truth
    changed = EXAMPLES[0].scene.image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert example_of(changed) is None


def _bytes(image):
    return image.tobytes()


def test_an_answer_is_judged_only_if_the_truth_is_known():
    example = Example(SCENE, QUESTION)
    assert example.answer_to(" How many objects are there?") == "5"
    assert example.is_right(QUESTION, " 5 ") is True
    assert example.is_right(QUESTION, "4") is False
    assert example.is_right("is this art ?", "yes") is None


# Cards.


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


# The server's gate.


def passed(path, *, method="GET", body=b"", local=True, **headers):
    """The status that the gate answers with; 200 if it lets the request through."""
    sent = []
    given = {"host": "127.0.0.1:7860"} | ({"content-length": str(len(body))} if method == "POST" else {})
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    given = {name: value for name, value in given.items() if value is not None}
    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in given.items()]
    parts = [{"body": body[:10], "more_body": True}, {"body": body[10:], "more_body": False}]
    received = []

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            received.append(message["body"])
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", **parts.pop(0)}

    async def send(message):
        sent.append(message)

    asyncio.run(server.Gate(app, local)(scope, receive, send))
    assert b"".join(received) in (b"", body)
    if sent[0]["status"] == 200:
        assert b"".join(received) == body
        assert b"default-src 'self' " in dict(sent[0]["headers"])[b"content-security-policy"]
    return sent[0]["status"]


def test_the_gate_lets_through_what_the_page_needs():
    for path in ("/", "/config", "/theme.css", "/assets/index.js", "/gradio_api/file=/tmp/x/a.png"):
        assert passed(path) == 200
    for path in ("/gradio_api/info", "/gradio_api/run/look", "/gradio_api/call/look", "/login", "/monitoring", "/x"):
        assert passed(path) == 404
    assert passed("/gradio_api/file=http://example.com/a.png") == 404
    assert passed("/gradio_api/proxy=http://example.com/") == 404


def test_the_gate_knows_this_machine_by_its_own_names():
    for host in ("localhost", "localhost:7860", "127.0.0.1", "[::1]:7860"):
        assert passed("/", host=host) == 200
    for host in ("example.com", "localhost.example.com:7860", "10.0.0.1", "", None):
        assert passed("/", host=host) == 403
        assert passed("/", host=host, local=False) == 200


def test_the_gate_bounds_what_is_sent():
    upload = "/gradio_api/upload"
    assert passed(upload, method="POST", content_length=str(20 * 2**20)) == 200
    assert passed(upload, method="POST", content_length=str(22 * 2**20)) == 413
    assert passed(upload, method="POST", content_length=None) == 411
    assert passed(upload, method="POST", content_length="-1") == 411
    assert passed("/gradio_api/queue/join", method="POST", content_length=str(2 * 2**20)) == 413


@pytest.mark.parametrize(("path", "status"), [("https://example.com/a.png", 403), ("/tmp/x/a.png", 200)])
def test_the_gate_refuses_files_that_gradio_would_fetch(path, status):
    file = {"path": path, "url": "http://127.0.0.1:7860/gradio_api/file=x", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [file, "http://this.is/a question ?"]}).encode()
    assert passed("/gradio_api/queue/join", method="POST", body=body) == status
    escaped = body.replace(b"https:", b"\\u0068ttps:")
    assert passed("/gradio_api/queue/join", method="POST", body=escaped) == status


# The command.


def test_a_port_in_use_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"cannot listen on port {port} of 127.0.0.1 (Address already in use)" in refused("ui", "--port", port)


def test_a_host_that_does_not_exist_is_one_line():
    assert "cannot listen on port 7860 of no.such.host.invalid" in refused("ui", "--host", "no.such.host.invalid")


def test_missing_gradio_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(server, "require_port", lambda host, port: None)
    assert refused("ui") == "vtc: the page needs gradio, which is not installed; pip install 'vtc-cls[ui]'\n"
