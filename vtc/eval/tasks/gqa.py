"""GQA, the balanced test-dev questions (https://arxiv.org/abs/1902.09506)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from vtc.eval.files import DataError, DataFile, read_json, require_fields
from vtc.eval.join import EVAL_ZIP, check_join, count_note, read_questions
from vtc.eval.task import Figure, Score, Task
from vtc.files import replacing

GOLD = "take testdev_balanced_questions.json from questions1.2.zip of the GQA site, and the questions from eval.zip"


def normalised(text: str) -> str:
    """The answer as it is compared: without white space around it, without dots at its end, in lower case."""
    return text.strip().rstrip(".").lower()


class GQA(Task):
    """Exact match with the one gold answer, over 12,578 questions about 398 images."""

    name: ClassVar[str] = "gqa"
    title: ClassVar[str] = "GQA"
    official_count: ClassVar[int] = 12_578
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(
            "questions",
            (
                "gqa/llava_gqa_testdev_balanced.jsonl",
                "eval/gqa/llava_gqa_testdev_balanced.jsonl",
                "llava_gqa_testdev_balanced.jsonl",
            ),
            EVAL_ZIP,
        ),
        DataFile(
            "gold answers",
            (
                "gqa/data/testdev_balanced_questions.json",
                "gqa/testdev_balanced_questions.json",
                "gqa/eval/testdev_balanced_questions.json",
                "testdev_balanced_questions.json",
            ),
            "it is in questions1.2.zip of the GQA site",
        ),
        DataFile(
            "images",
            ("gqa/data/images", "gqa/images", "gqa_images", "images"),
            "they are in images.zip of the GQA site; only the 398 files of test-dev, n*.jpg, are read",
        ),
    )

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        asked, answers = self.found["questions"], self.found["gold answers"]
        self.questions = read_questions(asked, self.found["images"], str)
        self.gold = read_json(answers)
        if not isinstance(self.gold, dict):
            raise DataError(f"{answers} holds no JSON object but a {type(self.gold).__name__}; {GOLD}")
        check_join([question.id for question in self.questions], list(self.gold), asked, answers, GOLD)
        for key, entry in self.gold.items():
            where = f"question {key} of {answers}"
            require_fields(entry, ("answer", "isBalanced", "types"), where)
            require_fields(entry["types"], ("structural", "semantic"), f"`types` of {where}")
            if entry["isBalanced"] is not True:
                raise DataError(f"{where} is not balanced; {GOLD}")

    def score(self, answers: Mapping[int, str]) -> Score:
        """Accuracy; then over binary and open questions, and per structural and semantic type."""
        names = ("accuracy", "binary", "open")
        right: dict[str, list[bool]] = {name: [] for name in names}
        for line, text in answers.items():
            gold = self.gold[self.questions[line].id]
            structural, semantic = gold["types"]["structural"], gold["types"]["semantic"]
            kind = "open" if structural == "query" else "binary"
            for group in ("accuracy", kind, f"structural: {structural}", f"semantic: {semantic}"):
                right.setdefault(group, []).append(normalised(text) == gold["answer"])
        in_order = [*names, *sorted(right.keys() - set(names))]
        figures = {name: Figure.share(sum(right[name]), len(right[name])) for name in in_order}
        return Score(figures, count_note(len(self.questions), self.official_count))

    def submission(self, answers: Mapping[int, str], folder: Path, model: str) -> list[Path]:
        """Also `testdev_balanced_predictions.json`, which GQA's own `eval.py` reads."""
        predictions = [
            {"questionId": question.id, "prediction": normalised(answers[question.line])}
            for question in self.questions
            if question.line in answers
        ]
        file = folder / "testdev_balanced_predictions.json"
        with replacing(file) as made:
            made.write_text(json.dumps(predictions), encoding="utf-8")
        return [*super().submission(answers, folder, model), file]
