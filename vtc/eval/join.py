"""Questions and their gold answers, joined by id. A join that is not complete is an error, never a smaller score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

from vtc.eval.files import DataError, read_jsonl
from vtc.eval.question import ImageFile, Question

SHORT_ANSWER = "Answer the question using a single word or phrase."
EVAL_ZIP = "unpack LLaVA's eval.zip, https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy/view"
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."


def read_questions(path: Path, images: Path, id_type: type[str] | type[int]) -> list[Question]:
    """LLaVA's question file of GQA, TextVQA or POPE, whose `text` is the whole prompt.

    Raises
    ------
    DataError
        If a line is malformed, its id has another type, or its text does not end with `SHORT_ANSWER`.
    """
    questions = []
    for line, entry in enumerate(read_jsonl(path, ("question_id", "image", "text"))):
        for field, expected in (("question_id", id_type), ("image", str), ("text", str)):
            if type(entry[field]) is not expected:
                got = type(entry[field]).__name__
                raise DataError(
                    f"{field} of question {line + 1} of {path} is of type {got}, not {expected.__name__}; "
                    "this is not LLaVA's file"
                )
        if not entry["text"].endswith("\n" + SHORT_ANSWER):
            raise DataError(
                f"question {line + 1} of {path} does not end with {SHORT_ANSWER!r} on a line of its own; "
                "take LLaVA's file from eval.zip"
            )
        questions.append(Question(line, entry["question_id"], entry["text"], ImageFile(images / entry["image"])))
    return questions


def check_join(
    asked: Sequence[Hashable], gold: Sequence[Hashable], asked_file: Path, gold_file: Path, advice: str
) -> None:
    """Raise DataError unless each question has exactly one gold answer and the other way round.

    Parameters
    ----------
    asked, gold : sequence of hashable
        What the two are joined by, one entry a question.
    asked_file, gold_file : Path
        Where they stand.
    advice : str
        What to download, one clause.
    """
    for keys, file in ((asked, asked_file), (gold, gold_file)):
        repeated = [key for key, count in Counter(keys).items() if count > 1]
        if repeated:
            raise DataError(f"{file} holds {repeated[0]!r} more than once, and {len(repeated)} in all; {advice}")
    answered = set(gold)
    without = [key for key in asked if key not in answered]
    if without:
        raise DataError(
            f"{len(without)} of the {len(asked)} questions of {asked_file} have no answer in {gold_file}, which has "
            f"{len(gold)}; the first is {without[0]!r}; {advice}"
        )
    if len(gold) > len(asked):
        raise DataError(
            f"{asked_file} has {len(asked)} questions, but {gold_file} has answers to {len(gold)}; "
            f"one of the files was cut or is of another version; {advice}"
        )


def count_note(count: int, official: int, what: str = "questions") -> tuple[str, ...]:
    """A note for `Score.notes` if the file is not the official one."""
    return () if count == official else (f"{count:,} {what}, the official file has {official:,}",)
