"""POPE on COCO: is there such an object in the image? (https://arxiv.org/abs/2305.10355)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from vtc.eval.files import DataError, DataFile, read_jsonl
from vtc.eval.join import EVAL_ZIP, check_join, count_note, read_questions
from vtc.eval.question import ImageFile, Question
from vtc.eval.task import Figure, Score, Task

SPLITS = {"adversarial": 3000, "random": 2910, "popular": 3000}  # in the order of LLaVA's ids
ID_RANGE = 10_000_000  # LLaVA's ids of the second split start behind it
GOLD = (
    "take the three files in output/coco of github.com/AoiDragon/POPE as of commit e3e3926, which have 3,000 lines "
    "(adversarial), 2,910 (random) and 3,000 (popular): the random file of later commits has 3,000 lines about other "
    "questions"
)


def says_yes(text: str) -> bool:
    """How the official scorer reads an answer: what does not say no means yes, even if it says nothing."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def split_of(question: Question) -> str:
    """The split that the question's id belongs to."""
    return list(SPLITS)[int(question.id) // ID_RANGE]


class Pope(Task):
    """The mean F1 of three splits with yes as the positive answer, over 8,910 questions about 500 images."""

    name: ClassVar[str] = "pope"
    title: ClassVar[str] = "POPE"
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(
            "questions",
            ("pope/llava_pope_test.jsonl", "eval/pope/llava_pope_test.jsonl", "llava_pope_test.jsonl"),
            EVAL_ZIP,
        ),
        *(
            DataFile(
                f"gold answers ({split})",
                tuple(
                    f"{folder}coco_pope_{split}.json"
                    for folder in ("pope/coco/", "pope/output/coco/", "output/coco/", "coco/", "pope/", "")
                ),
                GOLD,
            )
            for split in SPLITS
        ),
        DataFile(
            "images",
            ("pope/val2014", "coco2014/val2014", "coco/val2014", "val2014", "pope_images", "images"),
            "they are in val2014.zip of cocodataset.org",
        ),
    )

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        path = self.found["questions"]
        self.questions = read_questions(path, self.found["images"], int)
        for question in self.questions:
            if not 0 < int(question.id) < len(SPLITS) * ID_RANGE:
                raise DataError(f"{path} has a question {question.id}, which is in no split; take it from eval.zip")
        self.gold: dict[int, bool] = {}  # by line
        for split in SPLITS:
            self._join(split, [question for question in self.questions if split_of(question) == split])

    def _join(self, split: str, questions: list[Question]) -> None:
        """Read the gold file of a split into `self.gold`."""
        path, file = self.found["questions"], self.found[f"gold answers ({split})"]
        entries = read_jsonl(file, ("question_id", "image", "text", "label"))
        ids = [int(question.id) % ID_RANGE for question in questions]
        check_join(ids, [entry["question_id"] for entry in entries], path, file, GOLD)
        gold = {entry["question_id"]: entry for entry in entries}
        for key, question in zip(ids, questions, strict=True):
            entry = gold[key]
            if entry["label"] not in ("yes", "no"):
                raise DataError(f"question {key} of {file} has the label {entry['label']!r}, not yes or no; {GOLD}")
            # the first version of the files writes "imange" where a word begins with a vowel
            same = question.text.split("\n")[0].replace("imange", "image") == entry["text"].replace("imange", "image")
            if not same or question.image != ImageFile(self.found["images"] / str(entry["image"])):
                raise DataError(f"question {question.id} of {path} is not question {key} of {file}; {GOLD}")
            self.gold[question.line] = entry["label"] == "yes"

    def score(self, answers: Mapping[int, str]) -> Score:
        """The mean F1; per split F1, accuracy, precision, recall and the share of yes; the pooled accuracy."""
        pairs: dict[str, list[tuple[bool, bool]]] = {split: [] for split in SPLITS}
        for line, text in answers.items():
            pairs[split_of(self.questions[line])].append((says_yes(text), self.gold[line]))
        notes: tuple[str, ...] = ()
        for split, official in SPLITS.items():
            notes += count_note(
                sum(split_of(question) == split for question in self.questions), official, f"{split} questions"
            )
        if neither := sum(says_yes(text) and "yes" not in text.lower() for text in answers.values()):
            notes += (f"{neither:,} answers hold neither yes nor no and count as yes, as in the official scorer",)
        figures: dict[str, Figure] = {}
        for split, of_split in pairs.items():
            figures |= {f"{split}, {name}": figure for name, figure in _figures(of_split).items()}
        f1 = [value for split in SPLITS if (value := figures[f"{split}, F1"].value) is not None]
        mean = Figure(sum(f1) / len(f1) if len(f1) == len(SPLITS) else None, len(answers))
        if mean.value is None:
            notes += ("a split has no answers, so the mean F1 of the three is not defined",)
        every = [pair for of_split in pairs.values() for pair in of_split]
        pooled = Figure.share(sum(said == true for said, true in every), len(every))
        return Score({"mean F1 of the three splits": mean} | figures | {"accuracy, pooled": pooled}, notes)


def _figures(pairs: list[tuple[bool, bool]]) -> dict[str, Figure]:
    """F1 and its parts, from what was said and what is true. A figure whose denominator is 0 is 0."""
    said = sum(said for said, _ in pairs)
    true = sum(true for _, true in pairs)
    both = sum(said and true for said, true in pairs)
    right = sum(said == true for said, true in pairs)
    shares = {
        "F1": (2 * both, said + true),
        "accuracy": (right, len(pairs)),
        "precision": (both, said),
        "recall": (both, true),
        "yes-ratio": (said, len(pairs)),
    }
    return {
        name: Figure(100 * part / max(whole, 1) if pairs else None, len(pairs))
        for name, (part, whole) in shares.items()
    }
