"""SEED-Bench: the questions about images, joined with their answers, and the exact letter."""

import json

import pytest
from support.eval_data import seed as data

from vtc.eval.files import DataError
from vtc.eval.tasks.seed import SEED

GOLD, QUESTIONS = "seed_bench/SEED-Bench.json", "seed_bench/llava-seed-bench.jsonl"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seed")
    data.write(folder)
    return SEED(folder)


@pytest.fixture
def with_gold(tmp_path):
    """A task whose file of answers has been edited."""

    def make(edit):
        data.write(tmp_path)
        content = json.loads((tmp_path / GOLD).read_text())
        edit(content)
        (tmp_path / GOLD).write_text(json.dumps(content))
        return SEED(tmp_path)

    return make


def right_answers(task):
    return {line: entry["answer"] for line, entry in task.gold.items()}


def test_the_questions_about_images_are_asked_as_they_stand_in_the_file(task):
    assert [question.id for question in task.questions] == [
        90001,
        90002,
        49914,
        90004,
        90005,
        49914,
        90007,
        90008,
        90009,
    ]
    assert [question.line for question in task.questions] == [0, 1, 2, 3, 5, 6, 7, 8, 9]  # line 4 is about a video
    assert task.questions[0].text == (
        "What is shown?\nA. one\nB. two\nC. 3\nD. None\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert task.max_new_tokens == 128
    assert "2 questions about videos are left out" in task.score({}).notes[0]


def test_images_have_no_extension_and_their_own_mode(task):
    assert task.questions[0].image.path.name == "1000000_2000000"
    modes = [(image.format, image.mode) for image in (question.image.open() for question in task.questions[:4])]
    assert modes == [("PNG", "P"), ("PNG", "RGB"), ("JPEG", "RGB"), ("PNG", "RGB")]


def test_the_last_answer_to_a_doubled_id_counts_for_both_as_in_the_official_scorer(task):
    answers = right_answers(task)
    first, last = answers[2], answers[6]
    assert first != last
    assert task.score(answers).main == (100 * 8 / 9, 9)
    assert task.score(answers | {6: first}).main == (100 * 8 / 9, 9)
    assert task.score({2: first, 6: last}).main == (50, 2)
    assert task.score({2: first}).main == (100, 1)


def test_accuracy_and_its_types(task):
    answers = right_answers(task)  # line 2 has the id of line 6, whose answer counts for both
    names = ["accuracy", "Scene Understanding", "Instances Counting", "Text Understanding"]
    assert list(task.score(answers).figures.items()) == [
        (name, (100 * right / count, count))
        for name, right, count in zip(names, (8, 3, 2, 3), (9, 3, 3, 3), strict=True)
    ]
    answers |= {3: "A", 5: "B", 9: "B"}
    assert list(task.score(answers).figures.values()) == [(100 * 5 / 9, 9), (100 * 2 / 3, 3), (0, 3), (100, 3)]


@pytest.mark.parametrize("text", ["A.", "a", "A. one", "(A)", "one", "", "B", "AB"])
def test_an_answer_is_right_only_as_the_exact_letter(task, text):
    assert task.gold[0]["answer"] == "A"
    assert task.score({1: "B", 0: text}).figures["accuracy"] == (50, 2)


def test_the_id_that_occurs_twice_has_two_answers(task):
    assert [(task.gold[line]["question"], task.gold[line]["answer"]) for line in (2, 6)] == [
        ("How many shapes are there?", "C"),
        ("Which digit is on the shape?", "B"),
    ]
    score = task.score({2: "C", 6: "C"})
    assert score.figures == {"accuracy": (50, 2), "Instances Counting": (100, 1), "Text Understanding": (0, 1)}


def test_a_score_is_over_the_given_answers(task):
    assert task.score({0: "A"}).figures == {"accuracy": (100, 1), "Scene Understanding": (100, 1)}
    assert task.score({}).figures == {"accuracy": (None, 0)}


def test_the_submission_is_llava_s_file_of_answers(task, tmp_path):
    (file,) = task.submission(right_answers(task), tmp_path, "model")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["question_id"] for line in lines][:3] == [90001, 90002, 49914]
    assert lines[0]["prompt"] == task.questions[0].text
    assert lines[0]["text"] == "A"


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda gold: gold["questions"].pop(1), "has no question 90002 about the image 1000001_2000001, which"),
        (lambda gold: gold["questions"].pop(6), "has no question 49914 about the image 1000002_2000002, which"),
        (
            lambda gold: gold["questions"][0].update(data_id="1_2"),
            "has no question 90001 about the image 1000000_2000000",
        ),
        (
            lambda gold: gold["questions"].append(gold["questions"][0]),
            "has 1 more questions about images than .* has 9;",
        ),
        (lambda gold: gold["questions"][0].update(answer="E"), "question 1 of .* has the answer 'E', no letter"),
        (lambda gold: gold["questions"][0].update(question_type_id=7), "question 1 of .* has the type 7, which"),
        (lambda gold: gold["questions"][2].pop("answer"), "question 3 of .* lacks answer"),
        (lambda gold: gold["questions"][2].pop("data_type"), "question 3 of .* lacks data_type"),
        (lambda gold: gold.pop("question_type"), "SEED-Bench.json lacks question_type"),
        (lambda gold: gold.update(question_type=[]), "question_type of .* is no JSON object"),
    ],
)
def test_answers_that_do_not_fit_are_refused(with_gold, edit, problem):
    with pytest.raises(DataError, match=problem):
        with_gold(edit)


def test_other_videos_make_no_difference(with_gold, task):
    """The file of answers was replaced in November 2023; its questions about images are the same."""
    other = with_gold(lambda gold: gold["questions"].pop(4))
    assert other.score(right_answers(task)).figures == task.score(right_answers(task)).figures
