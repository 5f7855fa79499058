"""What the page computes, without gradio and without a browser."""

import re
import threading

import numpy as np
import pytest
from PIL import Image
from support.cli import BYTES, LAYERS, WIDTH

import vtc
from vtc.images import ImageError
from vtc.methods import METHODS
from vtc.tiny.scenes import Scene
from vtc.ui import compare
from vtc.ui.compare import Choice
from vtc.ui.examples import EXAMPLES, Example, example_of

SCENE = Scene("test", 1)  # five objects
QUESTION = "how many objects are there ?"


def answered(comparison, *choices, image=SCENE.image, question=QUESTION, length=4, timed=False):
    return list(comparison.ask(image, question, choices, length, timed))


def api_answer(comparison, image, question, **options):
    """The answer of the public functions alone."""
    model, processor = comparison.answerer.model, comparison.answerer.processor
    inputs = processor(images=image, text=vtc.tiny.prompt(question), return_tensors="pt")
    with vtc.compress(model, **options):
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return inputs, processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


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
    if method in ("pool", "downsample"):
        assert np.array_equal(column.image, plain)
        assert column.heatmap is None
        assert column.note == f"No patches to draw: {METHODS[method].scores}."
        return
    selection = vtc.select(comparison.answerer.model, inputs, **options)
    assert np.array_equal(column.image, vtc.overlay(SCENE.image, selection))
    assert np.array_equal(column.heatmap, vtc.heatmap(SCENE.image, selection))
    patches = int(re.match(r"(\d+) of the tokens (?:is a patch|are patches), outlined below\.", column.note)[1])
    assert patches == int((selection.indices[0] >= 0).sum())
    assert ("All tokens pass the first 2 layers." in column.note) == (method in ("fastv", "dart"))


def test_one_patch_is_one(comparison):
    (columns,) = answered(comparison, Choice("vtc-cls", 1), Choice("vtc-cls", 2), timed=False)
    assert [column.note for column in columns[1:]] == [
        "1 of the tokens is a patch, outlined below.",
        "2 of the tokens are patches, outlined below.",
    ]


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


def test_a_path_from_the_browser_leads_to_uploads_only(tmp_path, monkeypatch):
    """Whatever else it leads to, and whether there is anything: the visitor reads the same."""
    uploads, secret = tmp_path / "uploads", tmp_path / "secret.png"
    uploads.mkdir()
    EXAMPLES[0].scene.image.save(secret)
    (uploads / "link.png").symlink_to(secret)
    (uploads / "own.png").write_bytes(secret.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert compare.read({"path": str(uploads / "own.png")}, uploads).size == EXAMPLES[0].scene.image.size
    links = (str(secret), "secret.png", f"{uploads}/../secret.png", f"{uploads}/link.png", f"{secret}\0", "/etc/passwd")
    for path in (*links, "/no/such.png", None, 3, ["a"]):
        with pytest.raises(ValueError, match=r"^this file was not uploaded here; upload or paste an image$"):
            compare.read({"path": path}, uploads)
    with pytest.raises(ValueError, match=r"^this file was not uploaded here"):
        compare.read(str(secret), uploads)


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
