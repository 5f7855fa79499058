"""MM-Vet: questions as they stand, no figure, and the file for the judge to the byte."""

import json

import pytest
from support.eval_data import mmvet as data

from vtc.eval.files import DataError
from vtc.eval.tasks.mmvet import MMVet

QUESTIONS = "mm-vet/llava-mm-vet.jsonl"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmvet")
    data.write(folder)
    return MMVet(folder)


def test_the_questions_are_asked_as_they_stand_in_the_file(task):
    assert [question.id for question in task.questions] == list(range(7))
    assert task.questions[0].text == "What is the sum on the note?"
    assert task.questions[1].text == "Which shapes are there?\nName them all.\nBegin at the top."
    assert task.max_new_tokens == 1024


def test_questions_share_images_of_several_types(task):
    assert task.questions[0].image == task.questions[3].image
    modes = [(image.format, image.mode) for image in (question.image.open() for question in task.questions[:3])]
    assert modes == [("PNG", "P"), ("JPEG", "RGB"), ("PNG", "RGB")]


def test_there_is_no_figure_without_the_judge(task):
    score = task.score(dict.fromkeys(range(7), "12"))
    assert score.figures == {}
    assert score.main is None
    assert "https://huggingface.co/spaces/whyu/MM-Vet_Evaluator" in score.notes[0]
    assert "has 7 questions, the official one 218" in score.notes[1]


def test_the_official_number_of_questions_needs_no_note(tmp_path):
    data.write(tmp_path)
    line = {"image": "v1_0.png", "text": "What?", "category": "conv"}
    text = "".join(json.dumps(line | {"question_id": number}) + "\n" for number in range(218))
    (tmp_path / QUESTIONS).write_text(text)
    assert len(MMVet(tmp_path).score({}).notes) == 1


def test_the_judge_s_file_to_the_byte(task, tmp_path):
    answers = {0: "The sum is 12.", 1: 'A "star".\nA circle.', 2: "", 3: "你好", 4: "far", 5: "a\tb", 6: "x"}
    files = task.submission(answers, tmp_path, "made/model-7b")
    assert files == [tmp_path / "answers.jsonl", tmp_path / "model-7b.json"]
    assert files[1].read_bytes() == (
        b'{\n  "v1_0": "The sum is 12.",\n  "v1_1": "A \\"star\\".\\nA circle.",\n  "v1_2": "",\n'
        b'  "v1_3": "\\u4f60\\u597d",\n  "v1_4": "far",\n  "v1_5": "a\\tb",\n  "v1_6": "x"\n}'
    )
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert [(line["question_id"], line["text"]) for line in lines] == list(answers.items())
    assert task.submission(answers, tmp_path, "/")[1].name == "mmvet.json"


@pytest.mark.parametrize(("identifier", "problem"), [(0, "0 occurs twice"), ("v1_1", "'v1_1' is no integer")])
def test_ids_are_checked(tmp_path, identifier, problem):
    data.write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / QUESTIONS).read_text().splitlines()]
    lines[1]["question_id"] = identifier
    (tmp_path / QUESTIONS).write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=f"the question_id {problem}; unpack LLaVA's eval.zip"):
        MMVet(tmp_path)
