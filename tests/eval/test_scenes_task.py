"""The task "scenes": which answers are right, all of them and family by family."""

from vtc.eval.tasks.scenes import Scenes
from vtc.tiny.scenes import FAMILIES, balanced_questions


def test_an_answer_is_right_letter_by_letter():
    task = Scenes(count=10, split="val")
    asked = balanced_questions("val", 10)
    assert [question.text for question in task.questions] == [question.text for _, question in asked]
    lines = {family: [n for n, (_, q) in enumerate(asked) if q.family == family] for family in FAMILIES}
    assert all(len(numbers) == 2 for numbers in lines.values())
    answers = {line: question.answer for line, (_, question) in enumerate(asked)}
    assert set(task.score(answers).figures.values()) == {(100.0, 10), (100.0, 2)}

    answers[lines["digit"][1]] += "."
    answers[lines["attribute"][0]] = answers[lines["attribute"][0]].upper()
    answers |= dict.fromkeys(lines["counting"], "")
    wrong = {lines["digit"][1], lines["attribute"][0], *lines["counting"]}
    assert task.right(answers) == {line: line not in wrong for line in range(10)}
    figures = task.score(answers).figures
    assert list(figures) == ["accuracy", *FAMILIES]
    shares = {"digit": 50.0, "attribute": 50.0, "counting": 0.0}
    assert figures == {"accuracy": (60.0, 10), **{family: (shares.get(family, 100.0), 2) for family in FAMILIES}}

    some = {line: answers[line] for line in lines["digit"]}  # a part of the answers
    assert task.families(some) == {family: [True, False] if family == "digit" else [] for family in FAMILIES}
    assert task.score(some).figures["relation"] == (None, 0)
