"""POPE: three splits joined by id, yes and no as the official scorer reads them, figures that are always defined."""

from __future__ import annotations

import json

import pytest
from support.eval_data import pope
from support.eval_data.llava_files import edit

from vtc.eval.files import DataError
from vtc.eval.tasks import pope as module
from vtc.eval.tasks.pope import Pope, says_yes

QUESTIONS, GOLD, IMAGES = pope.PLACES["llava"]
RANDOM = f"{GOLD}/coco_pope_random.json"


@pytest.fixture
def data(tmp_path):
    pope.write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("layout", ["llava", "paper", "flat"])
def test_the_files_are_found_in_three_layouts(tmp_path, layout):
    pope.write(tmp_path, layout)
    task = Pope(tmp_path)
    ids = [*range(1, 7), *range(10000001, 10000006), *range(20000001, 20000007)]
    assert [question.id for question in task.questions] == ids
    assert task.questions[2].text == (
        "Is there an object in the imange?\nAnswer the question using a single word or phrase."
    )
    assert all(question.image.open().mode == "RGB" for question in task.questions)


def test_the_gold_files_are_found_where_the_papers_readme_puts_them(data):
    (data / GOLD).rename(data / "coco")
    assert len(Pope(data).gold) == 17


@pytest.mark.parametrize("text", ["No, there is not", "Yes, no doubt", "No.5", "not sure", "no", "No"])
def test_these_answers_say_no(text):
    assert not says_yes(text)


@pytest.mark.parametrize(
    "text", ["NO", "nope", "Not sure", "There isn't", "Sorry. No", "No,there is", "No!", "Yes\nNo", "", "yes", "Yes."]
)
def test_these_answers_count_as_yes(text):
    assert says_yes(text)


def test_labels_are_joined_by_id(data):
    labels = [json.loads(line) for line in (data / RANDOM).read_text().splitlines()]
    assert [entry["question_id"] for entry in labels] != [1, 2, 3, 4, 5]
    assert [Pope(data).gold[line] for line in range(17)] == [True, False] * 3 + [True, False] * 2 + [True] + [
        True,
        False,
    ] * 3


def test_figures_by_hand(data):
    # adversarial: labels yno yno; random: y n y n y; popular: y n y n y n
    said = ["Yes", "Yes", "Yes", "No", "No", "no"] + ["no"] * 5 + ["Yes", "No", "Yes", "No", "Yes", "no"]
    figures = Pope(data).score(dict(enumerate(said))).figures
    adversarial_f1 = 2 * 2 / (2 * 2 + 1 + 1)  # two hits, one false yes, one miss
    assert next(iter(figures)) == "mean F1 of the three splits"
    assert figures["mean F1 of the three splits"] == (pytest.approx(100 * (adversarial_f1 + 0 + 1) / 3), 17)
    assert figures["adversarial, F1"] == (pytest.approx(100 * adversarial_f1), 6)
    assert figures["adversarial, accuracy"] == (pytest.approx(100 * 4 / 6), 6)
    assert figures["adversarial, precision"] == (pytest.approx(100 * 2 / 3), 6)
    assert figures["adversarial, recall"] == (pytest.approx(100 * 2 / 3), 6)
    assert figures["adversarial, yes-ratio"] == (50.0, 6)
    assert figures["random, F1"] == figures["random, precision"] == figures["random, recall"] == (0.0, 5)
    assert figures["random, accuracy"] == (40.0, 5)
    assert figures["random, yes-ratio"] == (0.0, 5)
    assert figures["popular, F1"] == figures["popular, accuracy"] == (100.0, 6)
    assert figures["accuracy, pooled"] == (pytest.approx(100 * 12 / 17), 17)
    assert len(figures) == 1 + 3 * 5 + 1


def test_precision_and_recall_are_not_the_same(data):
    figures = Pope(data).score(dict.fromkeys(range(6), "yes")).figures
    assert figures["adversarial, precision"] == (50.0, 6)
    assert figures["adversarial, recall"] == (100.0, 6)
    assert figures["adversarial, F1"] == (pytest.approx(200 / 3), 6)


def test_the_mean_is_undefined_while_a_split_has_no_answers(data):
    score = Pope(data).score(dict.fromkeys(range(7), "yes"))
    assert score.main == (None, 7)
    assert score.figures["random, F1"] == (100.0, 1)
    assert score.figures["popular, F1"] == (None, 0)
    assert "a split has no answers, so the mean F1 of the three is not defined" in score.notes
    assert score.figures["accuracy, pooled"] == (pytest.approx(100 * 4 / 7), 7)


def test_answers_that_say_neither_are_counted(data):
    score = Pope(data).score(dict(enumerate(["Yes", "yes, it is", "no", "", "NO", "maybe"])))
    assert "3 answers hold neither yes nor no and count as yes, as in the official scorer" in score.notes


def test_counts_are_noted_unless_they_are_the_official_ones(data, monkeypatch):
    task = Pope(data)
    answers = dict.fromkeys(range(17), "yes")
    assert task.score(answers).notes == (
        "6 adversarial questions, the official file has 3,000",
        "5 random questions, the official file has 2,910",
        "6 popular questions, the official file has 3,000",
    )
    monkeypatch.setattr(module, "SPLITS", pope.COUNTS)
    assert task.score(answers).notes == ()


def test_answers_are_written_as_llava_writes_them(data, tmp_path):
    (file,) = Pope(data).submission(dict.fromkeys(range(17), "Yes"), tmp_path, "llava")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["question_id"] for line in lines][5:8] == [6, 10000001, 10000002]
    assert list(lines[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]


def newer_random(lines):
    """More lines, numbered from 0, about other questions."""
    return [{**lines[0], "question_id": i, "image_id": 1, "text": f"Is there a kettle {i}?"} for i in range(7)]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (RANDOM, newer_random, r"has 5 questions, but .*random\.json has answers to 7; .*e3e3926"),
        (RANDOM, lambda lines: newer_random(lines)[1:6], "question 10000001 .* is not question 1 .*e3e3926.*2,910"),
        (RANDOM, lambda lines: lines[1:], "1 of the 5 questions .* have no answer .*e3e3926"),
        (RANDOM, lambda lines: lines[0].update(image="COCO_val2014_000000000009.jpg"), "is not question .*e3e3926"),
        (RANDOM, lambda lines: lines[0].update(text="Is there a kettle in the image?"), "is not question .*e3e3926"),
        (RANDOM, lambda lines: lines[0].update(label="maybe"), "has the label 'maybe', not yes or no; .*e3e3926"),
        (RANDOM, lambda lines: [*lines, lines[0]], "more than once, .*e3e3926"),
        (RANDOM, lambda lines: lines[0].pop("label") and None, "lacks label"),
        (QUESTIONS, lambda lines: lines[0].update(question_id=30000001), "a question 30000001, which is in no split"),
        (QUESTIONS, lambda lines: lines[0].update(question_id=0), "a question 0, which is in no split"),
        (QUESTIONS, lambda lines: lines[0].update(question_id="1"), "question_id of question 1 .* type str, not int"),
        (QUESTIONS, lambda lines: lines[:-1], "has 5 questions, but .*popular.json has answers to 6"),
    ],
)
def test_gold_files_of_another_version_are_named(data, file, change, message):
    edit(data / file, change)
    with pytest.raises(DataError, match=message):
        Pope(data)


def test_a_corrected_spelling_in_the_gold_file_is_no_difference(data):
    file = data / RANDOM
    assert file.read_text().count("imange") == 1
    file.write_text(file.read_text().replace("imange", "image"))
    assert len(Pope(data).gold) == 17


def test_a_missing_gold_file_is_named_with_the_right_version(data):
    (data / RANDOM).unlink()
    with pytest.raises(DataError, match=r"no gold answers \(random\) at .*pope/output/coco/.*; .*e3e3926"):
        Pope(data)


def test_a_missing_image_folder_is_named_with_its_places(data):
    (data / IMAGES).rename(data / "elsewhere")
    with pytest.raises(DataError, match=r"pope/val2014, .*coco2014/val2014.*val2014\.zip"):
        Pope(data)
