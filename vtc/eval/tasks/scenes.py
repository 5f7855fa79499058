"""Held-out questions about the scenes of the bundled model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from vtc.eval.question import Question
from vtc.eval.task import Figure, Score, Task
from vtc.tiny.scenes import FAMILIES, Scene, balanced_questions

COUNT = 1000


@dataclass(frozen=True)
class SceneImage:
    """The image of a scene, drawn when it is needed."""

    scene: Scene

    def open(self) -> Image.Image:
        return self.scene.image


class Scenes(Task):
    """Accuracy over questions that the bundled model has not seen; families and answers are balanced.

    It needs no files. An answer is right if it is the expected one, letter by letter.
    """

    name: ClassVar[str] = "scenes"
    title: ClassVar[str] = "scenes"
    max_new_tokens: ClassVar[int] = 3
    protocol: ClassVar[str] = "hf"

    def __init__(self, data: Path | None = None, count: int = COUNT, split: str = "test") -> None:
        self.asked = balanced_questions(split, count)
        self.count, self.split = count, split
        self.questions = [
            Question(line, line, question.text, SceneImage(scene)) for line, (scene, question) in enumerate(self.asked)
        ]

    def fingerprint(self) -> dict[str, str]:
        return {"questions": f"{self.count} of {self.split}"}

    def right(self, answers: Mapping[int, str]) -> dict[int, bool]:
        """Whether each answer is the expected one, by the question's line."""
        return {line: text == self.asked[line][1].answer for line, text in answers.items()}

    def families(self, answers: Mapping[int, str]) -> dict[str, list[bool]]:
        """`right`, family by family."""
        found: dict[str, list[bool]] = {family: [] for family in FAMILIES}
        for line, ok in self.right(answers).items():
            found[self.asked[line][1].family].append(ok)
        return found

    def score(self, answers: Mapping[int, str]) -> Score:
        families = self.families(answers)
        figures = {"accuracy": Figure.share(sum(map(sum, families.values())), len(answers))}
        return Score(figures | {family: Figure.share(sum(oks), len(oks)) for family, oks in families.items()})
