"""SEED-Bench, the questions about images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vtc.eval.files import DataError, DataFile, read_json, read_jsonl, require_fields
from vtc.eval.join import EVAL_ZIP
from vtc.eval.question import ImageFile, Question
from vtc.eval.task import Figure, Score, Task

FOLDER = "SEED-Bench-image/"  # what the image of a question about an image begins with
OFFICIAL = "https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md"


class SEED(Task):
    """Accuracy over the questions about images. An answer is right if it is the letter and nothing else.

    Questions about videos are left out: their frames have to be cut from videos first, and their files have changed.
    """

    name: ClassVar[str] = "seed"
    title: ClassVar[str] = "SEED"
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(
            "questions",
            ("seed_bench/llava-seed-bench.jsonl", "eval/seed_bench/llava-seed-bench.jsonl", "llava-seed-bench.jsonl"),
            EVAL_ZIP,
        ),
        DataFile(
            "answers", ("seed_bench/SEED-Bench.json", "SEED-Bench.json"), f"download SEED-Bench.json, see {OFFICIAL}"
        ),
        DataFile(
            "image folder", ("seed_bench/SEED-Bench-image", "SEED-Bench-image"), f"download the images, see {OFFICIAL}"
        ),
    )

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        path = self.found["questions"]
        lines = read_jsonl(path, ("question_id", "image", "text"))
        gold, self.types = self._gold()
        self.questions, self.gold = [], {}
        for line, entry in enumerate(lines):
            if not str(entry["image"]).startswith(FOLDER):
                continue
            name = entry["image"].removeprefix(FOLDER)
            entries = gold[str(entry["question_id"]), name]
            if not entries:
                raise self._unfit(f"no question {entry['question_id']} about the image {name}, which {path} has")
            self.gold[line] = entries.pop(0)  # one id occurs twice
            source = ImageFile(self.found["image folder"] / name)
            self.questions.append(Question(line, entry["question_id"], entry["text"], source))
        self.videos = len(lines) - len(self.questions)
        if left := sum(map(len, gold.values())):
            raise self._unfit(f"{left} more questions about images than {path}, which has {len(self.questions)}")

    def _gold(self) -> tuple[dict[tuple[str, str], list[dict[str, Any]]], dict[int, str]]:
        """The questions about images by id and image, and the names of their types by number."""
        path = self.found["answers"]
        content = read_json(path)
        require_fields(content, ("questions", "question_type"), str(path))
        require_fields(content["question_type"], (), f"question_type of {path}")
        types = {number: name for name, number in content["question_type"].items()}
        gold = defaultdict(list)
        for number, entry in enumerate(content["questions"], start=1):
            where = f"question {number} of {path}"
            require_fields(entry, ("data_type",), where)
            if entry["data_type"] == "image":
                require_fields(entry, ("question_id", "data_id", "answer", "question_type_id"), where)
                if entry["answer"] not in tuple("ABCD"):
                    raise DataError(f"{where} has the answer {entry['answer']!r}, no letter from A to D")
                if entry["question_type_id"] not in types:
                    raise DataError(f"{where} has the type {entry['question_type_id']!r}, which the file does not name")
                gold[str(entry["question_id"]), str(entry["data_id"])].append(entry)
        return gold, types

    def _unfit(self, problem: str) -> DataError:
        path = self.found["answers"]
        return DataError(f"{path} has {problem}; the two files do not fit: {EVAL_ZIP}, and see {OFFICIAL}")

    def score(self, answers: Mapping[int, str]) -> Score:
        # Of an id that occurs twice, the last answer counts for both questions, as in the official scorer.
        last = {str(self.gold[line]["question_id"]): answers[line] for line in sorted(answers)}
        right: dict[int, list[bool]] = defaultdict(list)  # by type
        for line in answers:
            entry = self.gold[line]
            right[entry["question_type_id"]].append(last[str(entry["question_id"])] == entry["answer"])
        figures = {"accuracy": Figure.share(sum(map(sum, right.values())), len(answers))}
        for number in sorted(right):
            figures[self.types[number]] = Figure.share(sum(right[number]), len(right[number]))
        return Score(figures, (f"images alone: {self.videos} questions about videos are left out",))
