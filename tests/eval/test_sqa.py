"""ScienceQA: what is asked, which letter an answer names, and which files are refused."""

from __future__ import annotations

import json

import pytest
from support.eval_data import sqa
from support.eval_data.llava_files import edit

from vtc.eval.files import DataError
from vtc.eval.tasks.sqa import ScienceQA, read_letter

QUESTIONS, GOLD, IMAGES = sqa.PLACES["llava"]
LETTER = "\nAnswer with the option's letter from the given choices directly."
RIGHT = "BACBAEBC"


@pytest.fixture
def data(tmp_path):
    sqa.write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("layout", ["llava", "paper", "flat"])
def test_the_files_are_found_in_three_layouts(tmp_path, layout):
    sqa.write(tmp_path, layout)
    task = ScienceQA(tmp_path)
    assert [question.id for question in task.questions] == [key for key, *_ in sqa.PROBLEMS]
    images = [question.image and question.image.open().mode for question in task.questions]
    assert images == ["RGB", None, "P", "RGBA", None, "L", None, None]
    assert task.max_new_tokens == 1024


def test_the_letter_sentence_is_added_and_the_image_token_is_not_part_of_the_text(data):
    questions = ScienceQA(data).questions
    assert questions[0].text == (
        "Context: Figure: a made-up moss.\nWhich part holds water?\nA. the stem\nB. the cup" + LETTER
    )
    assert questions[5].text == "What is the ratio?\nA. 0:4\nB. 4:0\nC. 2:2\nD. 1:3\nE. 3:1" + LETTER


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. a fox", "B"),
        ("B. ", "B"),
        ("The answer is C.", "C"),
        ("So: The answer is C, I think", "C"),
        ("The answer is Z.", "Z"),
        ("B.", None),
        ("B) a fox", None),
        ("b", None),
        ("(B)", None),
        ("F", None),
        ("AB", None),
        ("Answer: B", None),
        ("B is right", None),
        ("The answer is C", None),
        ("The answer is C. The answer is C.", None),
        ("", None),
    ],
)
def test_letters_are_read_as_the_official_scorer_reads_them(text, letter):
    assert read_letter(text) == letter


def test_all_questions_those_with_image_and_those_without_are_scored_apart(data):
    task = ScienceQA(data)
    assert task.score(dict(enumerate(RIGHT))).main == (100.0, 8)
    # right: 0, 1, 2, 4; wrong: a letter beyond the two choices of 3, unreadable answers to 5 and 6, another one to 7
    answers = dict(enumerate(["B", "A. kettle", "The answer is C.", "E", "A", "E.", "b", "A"]))
    score = task.score(answers)
    assert score.figures == {
        "accuracy, all questions": (50.0, 8),
        "accuracy, with image": (50.0, 4),
        "accuracy, text only": (50.0, 4),
    }
    assert next(iter(score.figures)) == "accuracy, all questions"
    assert "2 answers name no choice and count as wrong" in score.notes
    assert task.score({0: "B", 3: "A"}).figures["accuracy, text only"] == (None, 0)
    assert task.score({0: "B", 3: "A"}).figures["accuracy, with image"] == (50.0, 2)


def test_counts_are_noted_unless_they_are_the_official_ones(data, monkeypatch):
    task = ScienceQA(data)
    assert task.score({}).notes == (
        "8 questions, the official file has 4,241",
        "4 questions with image, the official file has 2,017",
    )
    monkeypatch.setattr(ScienceQA, "official_count", 8)
    monkeypatch.setattr(ScienceQA, "official_images", 4)
    assert task.score({}).notes == ()


def test_the_recorded_prompt_tells_which_questions_have_an_image(data, tmp_path):
    task = ScienceQA(data)
    (file,) = task.submission(dict(enumerate(RIGHT)), tmp_path, "llava")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines[0]["prompt"] == "<image>\n" + task.questions[0].text
    assert lines[1]["prompt"] == task.questions[1].text
    assert [line["text"] for line in lines] == list(RIGHT)
    assert [line["question_id"] for line in lines] == [key for key, *_ in sqa.PROBLEMS]


def long_answers(entries):
    for entry in entries:
        entry["conversations"][1]["value"] = "The answer is A. BECAUSE: it is."


def parenthesised(entries):
    for entry in entries:
        turn = entry["conversations"][0]
        turn["value"] = turn["value"].replace("\nA. ", "\nOptions: (A) ").replace("\nB. ", " (B) ")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (QUESTIONS, long_answers, "question 7001 .* QCM-LEA.*llava_test_CQM-A.json"),
        (QUESTIONS, parenthesised, "question 7001 .* QCM-LEA"),
        (QUESTIONS, lambda entries: entries[1].update(conversations=[]), "question 7002 .* QCM-LEA"),
        (QUESTIONS, lambda entries: entries[1].pop("id") and None, "question 2 .* lacks id"),
        (QUESTIONS, lambda entries: {"data": entries}, "holds no list of questions"),
        (QUESTIONS, lambda entries: entries[:-1], "has 7 questions, but .*pid_splits.json has answers to 8"),
        (QUESTIONS, lambda entries: [*entries, entries[0]], "holds '7001' more than once"),
        (f"{GOLD}/problems.json", lambda found: found["7002"].update(answer=1), "has the answer A, but .* number 1"),
        (f"{GOLD}/problems.json", lambda found: found.pop("7002") and None, "question 7002 .* is not in .*problems"),
        (f"{GOLD}/problems.json", lambda found: found["7002"].pop("choices") and None, "problem 7002 .* lacks choices"),
        (f"{GOLD}/problems.json", lambda found: list(found), "problems.json is no JSON object, got list"),
        (f"{GOLD}/pid_splits.json", lambda splits: splits.pop("test") and None, "lacks test"),
        (f"{GOLD}/pid_splits.json", lambda splits: splits["test"].remove("7005"), "1 of the 8 questions .*'7005'"),
    ],
)
def test_files_of_another_form_and_files_that_do_not_fit_are_refused(data, file, change, message):
    edit(data / file, change)
    with pytest.raises(DataError, match=message):
        ScienceQA(data)


def test_a_missing_image_folder_is_named_with_its_places(data):
    (data / IMAGES).rename(data / "elsewhere")
    with pytest.raises(DataError, match=r"scienceqa/images/test, .*scienceqa/test.*test\.zip"):
        ScienceQA(data)
