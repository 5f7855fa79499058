"""MM-Vet: free answers, which a judge scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from vtc.eval.files import DataError, DataFile, read_jsonl
from vtc.eval.join import EVAL_ZIP
from vtc.eval.question import ImageFile, Question
from vtc.eval.task import Score, Task
from vtc.files import replacing

OFFICIAL = 218  # questions
JUDGE = "https://huggingface.co/spaces/whyu/MM-Vet_Evaluator"


class MMVet(Task):
    """Answers for the official judge, GPT-4. There is no figure without it."""

    name: ClassVar[str] = "mmvet"
    title: ClassVar[str] = "MM-Vet"
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(
            "questions",
            (
                "mm-vet/llava-mm-vet.jsonl",
                "mmvet/llava-mm-vet.jsonl",
                "eval/mm-vet/llava-mm-vet.jsonl",
                "llava-mm-vet.jsonl",
            ),
            EVAL_ZIP,
        ),
        DataFile(
            "image folder",
            ("mm-vet/images", "mmvet/images", "mm-vet/mm-vet/images", "mmvet/mm-vet/images", "images"),
            "unpack https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip",
        ),
    )
    max_new_tokens: ClassVar[int] = 1024

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        path = self.found["questions"]
        self.questions = []
        seen = set()
        for line, entry in enumerate(read_jsonl(path, ("question_id", "image", "text"))):
            identifier = entry["question_id"]
            if not isinstance(identifier, int) or identifier in seen:
                problem = "occurs twice" if isinstance(identifier, int) else "is no integer"
                raise DataError(f"{path}: the question_id {identifier!r} {problem}; {self.files[0].source}")
            seen.add(identifier)
            source = ImageFile(self.found["image folder"] / entry["image"])
            self.questions.append(Question(line, identifier, entry["text"], source))

    def score(self, answers: Mapping[int, str]) -> Score:
        notes = [
            f"GPT-4 scores it: give the .json file to {JUDGE}. The judge drifts: compare scores of the same days only"
        ]
        if len(self.questions) != OFFICIAL:
            notes.append(f"{self.found['questions']} has {len(self.questions)} questions, the official one {OFFICIAL}")
        return Score({}, tuple(notes))

    def submission(self, answers: Mapping[int, str], folder: Path, model: str) -> list[Path]:
        """Write LLaVA's file of answers and the judge's, `<model>.json`."""
        files = super().submission(answers, folder, model)
        file = folder / f"{Path(model).name or self.name}.json"
        content = {
            f"v1_{question.id}": answers[question.line] for question in self.questions if question.line in answers
        }
        with replacing(file) as made:
            made.write_text(json.dumps(content, indent=2), encoding="utf-8")
        return [*files, file]
