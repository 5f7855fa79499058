"""TextVQA, the validation questions with OCR tokens in the prompt (https://arxiv.org/abs/1904.08920)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from vtc.eval.files import DataError, DataFile, read_json, require_fields
from vtc.eval.join import EVAL_ZIP, check_join, count_note, read_questions
from vtc.eval.question import Question
from vtc.eval.task import Figure, Score, Task

OCR = "Reference OCR token:"
GOLD = "take TextVQA_0.5.1_val.json from textvqa.org and llava_textvqa_val_v051_ocr.jsonl from LLaVA's eval.zip"
PEOPLE = 10  # answers a question

PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
ARTICLES = {"a", "an", "the"}
ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
OTHERS = {
    "y'all'd've": ("yall'd've", "y'alld've", "y'all'dve"),
    "'ow's'at": ("ow's'at", "'ows'at", "'ow'sat"),
    "somebodyd": ("somebody'd",),  # the official table has it this way round
}


def _without(word: str, place: int) -> str:
    """The word without the apostrophe at `place`, from 0."""
    before = word.split("'")
    return "'".join([*before[:place], before[place] + before[place + 1], *before[place + 2 :]])


CONTRACTIONS = (
    {_without(word, 0): word for word in ONE_APOSTROPHE.split()}
    | {_without(word, place): word for word in TWO_APOSTROPHES.split() for place in (0, 1)}
    | {written: word for word, forms in OTHERS.items() for written in forms}
)


def normalised(text: str) -> str:
    """The answer as it is compared, by the rules of the official scorer, its oddities included."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    table = {ord(sign): "" if f"{sign} " in text or f" {sign}" in text else " " for sign in PUNCTUATION}
    text = re.sub(r"\.(?!\d)", "", text.translate(table), count=32)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def asked(question: Question) -> str:
    """The question itself, which the gold file is joined by, in lower case."""
    lines = question.text.split("\n")
    return lines[1 if lines[0].startswith(OCR) else 0].lower()


class TextVQA(Task):
    """Agreement with ten people's answers, over 5,000 questions about 3,166 images.

    An answer that n of the ten people gave scores min(1, 0.3 n). The prompt holds the tokens of an OCR system;
    without them a model scores about 12 points less.
    """

    name: ClassVar[str] = "textvqa"
    title: ClassVar[str] = "TextVQA"
    official_count: ClassVar[int] = 5000
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(
            "questions",
            (
                "textvqa/llava_textvqa_val_v051_ocr.jsonl",
                "eval/textvqa/llava_textvqa_val_v051_ocr.jsonl",
                "llava_textvqa_val_v051_ocr.jsonl",
            ),
            EVAL_ZIP,
        ),
        DataFile(
            "gold answers",
            ("textvqa/TextVQA_0.5.1_val.json", "TextVQA_0.5.1_val.json"),
            "download it from textvqa.org",
        ),
        DataFile(
            "images",
            ("textvqa/train_images", "train_images", "textvqa_images", "images"),
            "they are in train_val_images.zip of textvqa.org, in its folder train_images",
        ),
    )

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        questions, answers = self.found["questions"], self.found["gold answers"]
        self.questions = read_questions(questions, self.found["images"], str)
        for question in self.questions:
            if len(question.text.split("\n")) != 3 or OCR not in question.text:
                raise DataError(
                    f"question {question.line + 1} of {questions} does not have three lines with {OCR!r} in the first "
                    f"or the second; {GOLD}"
                )
        content = read_json(answers)
        require_fields(content, ("data",), str(answers))
        people: dict[tuple[str, str], list[str]] = {}
        keys = []
        for number, entry in enumerate(content["data"], start=1):
            where = f"entry {number} of {answers}"
            require_fields(entry, ("image_id", "question", "answers"), where)
            if len(entry["answers"]) != PEOPLE:
                raise DataError(f"{where} has {len(entry['answers'])} answers, not {PEOPLE}; {GOLD}")
            keys.append((entry["image_id"], entry["question"].lower()))
            people[keys[-1]] = entry["answers"]
        wanted = [(str(question.id), asked(question)) for question in self.questions]
        check_join(wanted, keys, questions, answers, GOLD)
        self.gold = [people[key] for key in wanted]  # by line

    def score(self, answers: Mapping[int, str]) -> Score:
        tenths = 0
        for line, text in answers.items():
            agreeing = Counter(map(normalised, self.gold[line]))[normalised(text)]
            tenths += min(10, 3 * agreeing)  # the mean over all choices of nine people of min(1, agreeing / 3)
        figure = Figure.share(tenths / 10, len(answers))
        notes = count_note(len(self.questions), self.official_count)
        return Score({"accuracy, OCR tokens in the prompt": figure}, notes)
