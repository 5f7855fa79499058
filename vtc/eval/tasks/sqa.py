"""ScienceQA, the test questions (https://arxiv.org/abs/2209.09513)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vtc.eval.files import DataError, DataFile, read_json, require_fields
from vtc.eval.join import EVAL_ZIP, LETTER_ANSWER, check_join, count_note
from vtc.eval.question import ImageFile, Question
from vtc.eval.task import Figure, Score, Task

LETTERS = "ABCDE"
IMAGE = "<image>\n"
LLAVA = "take llava_test_CQM-A.json from LLaVA's eval.zip"
SCIENCEQA = "take problems.json and pid_splits.json from data/scienceqa of github.com/lupantech/ScienceQA"


def read_letter(text: str) -> str | None:
    """The letter that the answer names, None if it cannot be read. "B.", "b" and "(B)" cannot."""
    if len(text) == 1 and text in LETTERS:
        return text
    if text[:1] in LETTERS and text[1:3] == ". ":
        return text[0]
    named = re.findall(r"The answer is ([A-Z]).", text)
    return named[0] if len(named) == 1 else None


class ScienceQA(Task):
    """Accuracy over 4,241 questions, of which 2,017 have an image.

    The others reach the model without an image, and no compression changes their answers.
    """

    name: ClassVar[str] = "sqa"
    title: ClassVar[str] = "ScienceQA"
    official_count: ClassVar[int] = 4241
    official_images: ClassVar[int] = 2017
    max_new_tokens: ClassVar[int] = 1024
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(
            "questions",
            (
                "scienceqa/llava_test_CQM-A.json",
                "eval/scienceqa/llava_test_CQM-A.json",
                "llava_test_CQM-A.json",
            ),
            EVAL_ZIP,
        ),
        DataFile(
            "problems",
            ("scienceqa/problems.json", "problems.json"),
            "it is in data/scienceqa of github.com/lupantech/ScienceQA",
        ),
        DataFile(
            "splits",
            ("scienceqa/pid_splits.json", "pid_splits.json"),
            "it is in data/scienceqa of github.com/lupantech/ScienceQA",
        ),
        DataFile(
            "images",
            ("scienceqa/images/test", "scienceqa/test", "scienceqa_images", "images/test", "test"),
            "they are in ScienceQA's test.zip, as <id>/image.png",
        ),
    )

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        asked, problems, splits = (self.found[name] for name in ("questions", "problems", "splits"))
        self.problems = read_json(problems)
        split = read_json(splits)
        require_fields(self.problems, (), str(problems))
        require_fields(split, ("test",), str(splits))
        entries = read_json(asked)
        if not isinstance(entries, list) or not entries:
            raise DataError(f"{asked} holds no list of questions; {LLAVA}")
        for number, entry in enumerate(entries, start=1):
            require_fields(entry, ("id", "conversations"), f"question {number} of {asked}")
        ids = [entry["id"] for entry in entries]
        check_join(ids, split["test"], asked, splits, f"{LLAVA}; {SCIENCEQA}")
        self.questions = []
        for line, entry in enumerate(entries):
            self._check(entry)
            text = entry["conversations"][0]["value"].replace("<image>", "").strip() + "\n" + LETTER_ANSWER
            image = ImageFile(self.found["images"] / entry["image"]) if entry.get("image") else None
            self.questions.append(Question(line, entry["id"], text, image))

    def _check(self, entry: dict[str, Any]) -> None:
        """Raise DataError unless the question has the form of LLaVA's file and fits `problems.json`."""
        where = f"question {entry['id']} of {self.found['questions']}"
        problem = self.problems.get(entry["id"])
        if problem is None:
            raise DataError(f"{where} is not in {self.found['problems']}; {SCIENCEQA}")
        require_fields(problem, ("choices", "answer"), f"problem {entry['id']} of {self.found['problems']}")
        try:
            asked, told = (turn["value"] for turn in entry["conversations"])
            choices = all(f"\n{LETTERS[i]}. " in asked for i in range(len(problem["choices"])))
            known = told in LETTERS and len(told) == 1
        except (TypeError, KeyError, ValueError, IndexError):
            choices = known = False
        if not (choices and known):
            raise DataError(
                f"{where} is not of the form context, question, choices 'A. ...' and a letter as the answer; "
                f"QCM-LEA and other forms give far lower scores: {LLAVA}"
            )
        if LETTERS.index(told) != problem["answer"]:
            raise DataError(
                f"{where} has the answer {told}, but {self.found['problems']} has number {problem['answer']}, from 0; "
                f"{SCIENCEQA}"
            )

    def score(self, answers: Mapping[int, str]) -> Score:
        """Accuracy over all questions, as in the table of VTC-CLS; with image, as in LLaVA's; and without."""
        names = ("accuracy, all questions", "accuracy, with image", "accuracy, text only")
        right: dict[str, list[bool]] = {name: [] for name in names}
        failed = 0
        for line, text in answers.items():
            question = self.questions[line]
            letter = read_letter(text)
            failed += letter is None
            ok = letter == LETTERS[self.problems[question.id]["answer"]]
            right[names[0]].append(ok)
            right[names[2 if question.image is None else 1]].append(ok)
        figures = {name: Figure.share(sum(oks), len(oks)) for name, oks in right.items()}
        with_image = sum(question.image is not None for question in self.questions)
        notes = count_note(len(self.questions), self.official_count)
        notes += count_note(with_image, self.official_images, "questions with image")
        if failed:
            notes += (f"{failed:,} answers name no choice and count as wrong",)
        return Score(figures, notes)

    def llava_line(self, question: Question, text: str, model: str) -> dict[str, Any]:
        """LLaVA's scorer tells from the prompt whether the question has an image."""
        line = super().llava_line(question, text, model)
        return line if question.image is None else line | {"prompt": IMAGE + question.text}
