"""The base class of benchmarks: questions from files, answers to scores and to the files that servers take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from vtc.eval.files import DataFile, sha256
from vtc.eval.question import Question
from vtc.files import replacing


class Figure(NamedTuple):
    """One number: a percentage, and the number of questions behind it. `value` is None if no question counts."""

    value: float | None
    questions: int

    @classmethod
    def share(cls, right: int | float, questions: int) -> Figure:
        """`right` of `questions`, in percent."""
        return cls(100 * right / questions if questions else None, questions)


@dataclass(frozen=True)
class Score:
    """The figures of one task.

    Attributes
    ----------
    figures : dict of str to Figure
        The first is the one that tables show. Its name says what it is, such as "accuracy" or "mean F1". Empty if
        only a server or a judge can tell.
    notes : tuple of str
        What a reader has to know, such as how many answers could not be read as a choice.
    """

    figures: dict[str, Figure]
    notes: tuple[str, ...] = ()

    @property
    def main(self) -> Figure | None:
        """The figure that tables show."""
        return next(iter(self.figures.values()), None)


class Task:
    """One benchmark. The constructor finds, reads and checks all of its files, so that a long run does not fail late.

    A subclass fills `self.questions` in its constructor and defines `score`.

    Attributes
    ----------
    questions : list of Question
        In the order of the question file.

    Class attributes
    ----------------
    name : str
        On the command line.
    title : str
        In tables.
    files : tuple of DataFile
        What is read. The constructor puts the paths that were found into `self.found`, by name.
    fingerprinted : tuple of str
        The names of the files that decide what is asked.
    max_new_tokens : int
        The longest answer, in tokens, as LLaVA's scripts set it.
    protocol : str
        The protocol that it is asked with by default.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    files: ClassVar[tuple[DataFile, ...]] = ()
    fingerprinted: ClassVar[tuple[str, ...]] = ("questions",)
    max_new_tokens: ClassVar[int] = 128
    protocol: ClassVar[str] = "llava"

    questions: list[Question]

    def __init__(self, data: Path) -> None:
        """Find the files below `data`.

        Raises
        ------
        DataError
            If a file is missing, malformed, or does not fit the others.
        """
        self.found = {file.name: file.find(data) for file in self.files}

    def fingerprint(self) -> dict[str, str]:
        """What decides the questions: the SHA-256 of their files."""
        return {name: sha256(self.found[name]) for name in self.fingerprinted}

    def score(self, answers: Mapping[int, str]) -> Score:
        """Score the answers, given by the question's line. The score is over exactly these questions.

        Whoever calls it has made sure that the answers are complete, or says that they are not.
        """
        raise NotImplementedError

    def submission(self, answers: Mapping[int, str], folder: Path, model: str) -> list[Path]:
        """Write the files that the official scorers, servers and judges take, each whole or not at all.

        The base class writes `answers.jsonl`, LLaVA's file of answers. A subclass adds its own.

        Parameters
        ----------
        answers : mapping of int to str
            By the question's line; all of them.
        folder : Path
            An existing folder.
        model : str
            The model's name, for the files that state it.
        """
        file = folder / "answers.jsonl"
        with replacing(file) as made, made.open("w", encoding="utf-8") as out:
            for question in self.questions:
                if question.line in answers:
                    out.write(json.dumps(self.llava_line(question, answers[question.line], model)) + "\n")
        return [file]

    def llava_line(self, question: Question, text: str, model: str) -> dict[str, Any]:
        """One line of LLaVA's file of answers."""
        key = f"{self.name} {question.line} {text} {model}"
        return {
            "question_id": question.id,
            "prompt": question.text,
            "text": text,
            "answer_id": hashlib.sha256(key.encode()).hexdigest()[:22],  # random in LLaVA, reproducible here
            "model_id": model,
            "metadata": {},
        }
