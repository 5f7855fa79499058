"""GQA: what is asked, how answers are compared, and which files are refused."""

from __future__ import annotations

import json

import pytest
from support.eval_data import gqa
from support.eval_data.llava_files import edit

from vtc.eval.files import DataError
from vtc.eval.tasks.gqa import GQA, normalised
from vtc.images import ImageError

LAYOUTS = ("llava", "paper", "flat")
QUESTIONS, GOLD, IMAGES = gqa.PLACES["llava"]


@pytest.fixture
def data(tmp_path):
    gqa.write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_are_found_in_three_layouts(tmp_path, layout):
    gqa.write(tmp_path, layout)
    task = GQA(tmp_path)
    assert [question.id for question in task.questions] == [str(900000001 + i) for i in range(12)]
    assert [question.line for question in task.questions] == list(range(12))
    first = task.questions[0]
    assert first.text == "is there a purple cross ?\nAnswer the question using a single word or phrase."
    assert first.image.path == tmp_path / gqa.PLACES[layout][2] / "n990001.jpg"
    assert first.image.open().size == (168, 112)
    assert task.max_new_tokens == 128


@pytest.mark.parametrize(
    ("text", "compared"),
    [
        ("Yes.", "yes"),
        ("N.Y.", "n.y"),
        ("The car", "the car"),
        ("no!", "no!"),
        (" left \n", "left"),
        ("Stop...", "stop"),
        ("", ""),
    ],
)
def test_answers_are_compared_as_the_official_scorer_compares_them(text, compared):
    assert normalised(text) == compared


def test_gold_answers_are_joined_by_id(data):
    entries = json.loads((data / GOLD).read_text())
    assert list(entries) != sorted(entries)
    score = GQA(data).score({i: entries[str(900000001 + i)]["answer"] for i in range(12)})
    assert score.main == (100.0, 12)


def test_accuracy_and_its_parts_by_hand(data):
    task = GQA(data)
    gold = [task.gold[question.id]["answer"] for question in task.questions]
    assert gold == [
        "no", "blue", "right", "no", "triangle", "left", "no", "square", "no", "yes", "circle", "left",
    ]  # fmt: skip
    answers = {0: "No.", 1: "Blue", 2: "left", 3: "no", 4: "a triangle", 11: "left"}
    figures = task.score(answers).figures
    assert list(figures)[:3] == ["accuracy", "binary", "open"]
    assert figures["accuracy"] == (pytest.approx(100 * 4 / 6), 6)
    assert figures["binary"] == (75.0, 4)
    assert figures["open"] == (50.0, 2)
    assert figures["structural: verify"] == (100.0, 2)
    assert figures["structural: query"] == (50.0, 2)
    assert figures["structural: choose"] == (50.0, 2)
    assert figures["semantic: rel"] == (50.0, 2)
    assert len(figures) == 3 + 3 + 3


def test_a_score_without_answers_is_undefined(data):
    assert GQA(data).score({}).main == (None, 0)


def test_the_number_of_questions_is_noted_unless_it_is_the_official_one(data, monkeypatch):
    task = GQA(data)
    assert task.score({}).notes == ("12 questions, the official file has 12,578",)
    monkeypatch.setattr(GQA, "official_count", 12)
    assert task.score({}).notes == ()


def test_predictions_are_written_for_the_official_scorer(data, tmp_path):
    task = GQA(data)
    written = task.submission({0: "No.", 1: " Café."}, tmp_path, "llava")
    assert [file.name for file in written] == ["answers.jsonl", "testdev_balanced_predictions.json"]
    expected = (
        '[{"questionId": "900000001", "prediction": "no"}, {"questionId": "900000002", "prediction": "caf\\u00e9"}]'
    )
    assert written[1].read_text(encoding="utf-8") == expected
    line = json.loads(written[0].read_text(encoding="utf-8").splitlines()[1])
    assert line == {
        "question_id": "900000002",
        "prompt": task.questions[1].text,
        "text": " Café.",
        "answer_id": line["answer_id"],
        "model_id": "llava",
        "metadata": {},
    }
    assert len(line["answer_id"]) == 22


def test_a_missing_file_is_named_with_its_places_and_its_source(data):
    (data / GOLD).unlink()
    with pytest.raises(DataError, match=r"gqa/data/testdev_balanced_questions\.json.*questions1\.2\.zip"):
        GQA(data)


def test_a_missing_image_folder_is_an_error_and_a_missing_image_is_not(data):
    image = data / IMAGES / "n990001.jpg"
    image.unlink()
    with pytest.raises(ImageError, match="does not exist"):
        GQA(data).questions[0].image.open()
    (data / IMAGES).rename(data / "elsewhere")
    with pytest.raises(DataError, match=r"found no images at .*gqa/data/images.*n\*\.jpg"):
        GQA(data)


def test_gold_answers_that_lack_a_question_are_refused(data):
    edit(data / GOLD, lambda gold: gold.pop("900000003") and None)
    with pytest.raises(DataError, match=r"1 of the 12 questions .* have no answer .* has 11; the first is '900000003'"):
        GQA(data)


def test_a_cut_question_file_is_refused(data):
    edit(data / QUESTIONS, lambda lines: lines[:-2])
    with pytest.raises(DataError, match=r"has 10 questions, but .* has answers to 12"):
        GQA(data)


def test_a_repeated_question_is_refused(data):
    edit(data / QUESTIONS, lambda lines: [*lines, lines[0]])
    with pytest.raises(DataError, match="holds '900000001' more than once"):
        GQA(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.update(question_id=5), "question_id of question 1 .* is of type int, not str"),
        (lambda line: line.update(image=None), "image of question 1 .* is of type NoneType, not str"),
        (lambda line: line.update(text="is it red ?"), "question 1 .* does not end with"),
        (lambda line: line.pop("text"), "line 1 .* lacks text"),
    ],
)
def test_a_malformed_question_is_refused(data, change, message):
    edit(data / QUESTIONS, lambda lines: change(lines[0]) and None)
    with pytest.raises(DataError, match=message):
        GQA(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gold: list(gold.values()), "holds no JSON object but a list"),
        (lambda gold: gold["900000002"].update(isBalanced=False), "question 900000002 .* is not balanced"),
        (lambda gold: gold["900000002"].pop("answer") and None, "question 900000002 .* lacks answer"),
        (lambda gold: gold["900000002"]["types"].pop("semantic") and None, "`types` of question 900000002 .* lacks"),
    ],
)
def test_malformed_gold_answers_are_refused(data, change, message):
    edit(data / GOLD, change)
    with pytest.raises(DataError, match=message):
        GQA(data)
