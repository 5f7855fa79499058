"""TextVQA: the join on image and question, the official normaliser, and agreement with ten people."""

from __future__ import annotations

import json

import pytest
from support.eval_data import textvqa
from support.eval_data.llava_files import SHORT, edit

from vtc.eval.files import DataError
from vtc.eval.tasks.textvqa import CONTRACTIONS, TextVQA, normalised

QUESTIONS, GOLD, IMAGES = textvqa.PLACES["llava"]
FIGURE = "accuracy, OCR tokens in the prompt"


@pytest.fixture
def data(tmp_path):
    textvqa.write(tmp_path)
    return tmp_path


def oracle(predicted, people):
    """Leave each of the ten out once: the mean over the ten subsets of min(1, matches / 3)."""
    people = [normalised(answer) for answer in people]
    kept = [people[:i] + people[i + 1 :] for i in range(10)]
    return sum(min(1, subset.count(normalised(predicted)) / 3) for subset in kept) / 10


@pytest.mark.parametrize("layout", ["llava", "paper", "flat"])
def test_the_files_are_found_in_three_layouts(tmp_path, layout):
    textvqa.write(tmp_path, layout)
    task = TextVQA(tmp_path)
    assert [question.id for question in task.questions] == [f"0f00aa00bb00cc0{i // 2}" for i in range(8)]
    assert task.questions[1].text == (
        "what is on the sign?\nReference OCR token: OPEN, 24h, Café\nAnswer the question using a single word or phrase."
    )
    assert task.questions[2].text.split("\n")[1] == "Reference OCR token: "
    assert task.questions[7].image.open().size == (196, 84)


@pytest.mark.parametrize(
    ("text", "compared"),
    [
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("it's", "it 's"),
        ("dont", "don't"),
        ("3,000 km", "3000 km"),
        ("3.14", "3.14"),
        ("No.", "no"),
        ("U.S.A.", "usa"),
        ("Coca-Cola", "coca cola"),
        ("coca -cola", "coca cola"),
        ("coca - cola", "coca cola"),
        ("e-mail re- do", "email re do"),  # one hyphen beside a space: all are deleted
        ("a/b", "b"),
        ("$5.00", "$5.00"),
        ("50%", "50%"),
        ("10:30", "10:30"),
        ("x ,y", "x y"),
        ("...", ""),
        ("the", ""),
        ("it's 5 o'clock", "it 's 5 o'clock"),
        ("v1.2.", "v1.2"),
        ("5.", "5"),
        ("a.b", "ab"),
        ("What?!", "what"),
        ("one\ttwo\nthree", "1 2 3"),
        ("." * 33, "."),  # at most 32 are deleted
        ("somebody'd", "somebodyd"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("ow's'at", "ow 's'at"),  # its apostrophe is parted from it before contractions are looked up
        ("shouldnt've", "shouldn't've"),
        ("shouldn'tve", "shouldn't've"),
        ("twas", "'twas"),
        ("Im", "im"),
        ("its ill", "its ill"),
        ("Café", "café"),
    ],
)
def test_answers_are_normalised_as_the_official_scorer_does(text, compared):
    assert normalised(text) == compared


def test_the_contractions_are_those_of_the_official_table_that_change_a_word_in_lower_case():
    # it has 120: four begin with a capital, and "let's" and "she's" map to themselves
    assert len(CONTRACTIONS) == 114
    for written in ("its", "id", "ill", "well", "were", "shell", "hell", "shes", "im", "ive"):
        assert written not in CONTRACTIONS
    given = {"maam": "ma'am", "oclock": "o'clock", "wed've": "we'd've", "y'allll": "y'all'll", "yall'll": "y'all'll"}
    assert given.items() <= CONTRACTIONS.items()
    assert {key for key, word in CONTRACTIONS.items() if word == "'ow's'at"} == {"ow's'at", "'ows'at", "'ow'sat"}
    assert all(key.replace("'", "") == word.replace("'", "") for key, word in CONTRACTIONS.items())


def test_an_answer_scores_by_the_number_of_people_who_gave_it(data):
    task = TextVQA(data)
    for same, expected in [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (5, 100), (10, 100)]:
        task.gold[0] = ["Yes."] * same + [f"other{i}" for i in range(10 - same)]
        assert task.score({0: "yes"}).main == (expected, 1)
        assert oracle("yes", task.gold[0]) == pytest.approx(expected / 100)


def test_every_line_is_scored_by_its_own_answers(data):
    task = TextVQA(data)
    answers = dict(enumerate(["7", "open", "3", "Coca cola!", "5", "", "5 o'clock.", "Yes"]))
    # of ten people: 9 said 7 ("seven" is 7), 3 open, 4 three, 6 coca cola, 1 five, 4 nothing, 2 "5 o'clock", 10 yes
    scores = [100, 90, 100, 100, 30, 100, 60, 100]
    for line, expected in enumerate(scores):
        assert task.score({line: answers[line]}).main == (pytest.approx(expected), 1), line
        assert oracle(answers[line], task.gold[line]) == pytest.approx(expected / 100)
    assert task.score(answers).figures == {FIGURE: (pytest.approx(sum(scores) / 8), 8)}


def test_lines_of_one_image_keep_their_answers_apart(data, tmp_path):
    task = TextVQA(data)
    (file,) = task.submission(dict(enumerate("abcdefgh")), tmp_path, "llava")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == list("abcdefgh")
    assert [line["question_id"] for line in lines][:3] == ["0f00aa00bb00cc00"] * 2 + ["0f00aa00bb00cc01"]


def test_the_number_of_questions_is_noted_unless_it_is_the_official_one(data, monkeypatch):
    task = TextVQA(data)
    assert task.score({}).notes == ("8 questions, the official file has 5,000",)
    assert task.score({}).main == (None, 0)
    monkeypatch.setattr(TextVQA, "official_count", 8)
    assert task.score({}).notes == ()


def test_the_question_may_stand_after_the_tokens(data):
    def swap(lines):
        for line in lines:
            question, tokens, last = line["text"].split("\n")
            line["text"] = "\n".join((tokens, question, last))

    before = TextVQA(data).gold
    edit(data / QUESTIONS, swap)
    assert TextVQA(data).gold == before


def without_tokens(lines):
    for line in lines:
        line["text"] = line["text"].split("\n")[0] + SHORT


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (QUESTIONS, without_tokens, "question 1 .* does not have three lines with 'Reference OCR token:'"),
        (QUESTIONS, lambda lines: lines[0].update(question_id="0f"), r"1 of the 8 questions .*the first is \('0f'"),
        (QUESTIONS, lambda lines: [*lines, lines[3]], "what is the brand.* more than once"),
        (QUESTIONS, lambda lines: lines[1:], "has 7 questions, but .* answers to 8"),
        (GOLD, lambda gold: gold["data"].pop() and None, "1 of the 8 questions .* have no answer"),
        (GOLD, lambda gold: gold["data"][2]["answers"].pop() and None, "entry 3 .* has 9 answers, not 10"),
        (GOLD, lambda gold: gold["data"][2].pop("image_id") and None, "entry 3 .* lacks image_id"),
        (GOLD, lambda gold: gold.pop("data") and None, r"TextVQA_0\.5\.1_val\.json lacks data"),
    ],
)
def test_files_of_another_form_and_files_that_do_not_fit_are_refused(data, file, change, message):
    edit(data / file, change)
    with pytest.raises(DataError, match=message):
        TextVQA(data)


def test_a_missing_image_folder_is_named_with_its_places(data):
    (data / IMAGES).rename(data / "elsewhere")
    with pytest.raises(DataError, match=r"textvqa/train_images, .*train_val_images\.zip"):
        TextVQA(data)
