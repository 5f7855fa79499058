"""Images with a known truth: a few of the bundled model's held-out scenes, each with a question about it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property

from PIL import Image

from vtc.tiny.drawing import Object
from vtc.tiny.scenes import CANVAS, COLUMNS, ROWS, Scene

DRAWS = 32  # of questions about a scene; further draws hardly find a new one


@dataclass(frozen=True)
class Example:
    """A scene and a question about it."""

    scene: Scene
    question: str

    @property
    def name(self) -> str:
        """For a file."""
        return f"scene-{self.scene.index}.png"

    @property
    def truth(self) -> str:
        """What there is to see, as a sentence."""
        things = self.scene.objects
        return f"The scene has {len(things)} objects: {', '.join(map(_described, things))}."

    @cached_property
    def _answers(self) -> dict[str, str]:
        return {q.text: q.answer for draw in range(DRAWS) for q in self.scene.ask(draw)}

    def answer_to(self, question: str) -> str | None:
        """The right answer, or None for a question that the scene does not ask."""
        return self._answers.get(_plain(question))

    def is_right(self, question: str, answer: str) -> bool | None:
        """Whether the answer is right, or None if that is not known."""
        right = self.answer_to(question)
        return None if right is None else answer.strip() == right


EXAMPLES = tuple(
    Example(Scene("test", index), question)
    for index, question in (
        (1, "how many objects are there ?"),
        (22, "what digit is on the red object ?"),
        (12, "what shape is the blue object ?"),
        (13, "is the blue cross left or right of the pink triangle ?"),
        (18, "is there a yellow heart ?"),
        (10, "how many objects are there ?"),
    )
)


def example_of(image: Image.Image) -> Example | None:
    """The example whose image this is, pixel by pixel."""
    return _by_pixels().get(_digest(image))


@cache
def _by_pixels() -> dict[str, Example]:
    return {_digest(example.scene.image): example for example in EXAMPLES}


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def _described(thing: Object) -> str:
    digit = "" if thing.digit is None else f" with the digit {thing.digit}"
    row, column = ROWS[3 * thing.y // CANVAS], COLUMNS[3 * thing.x // CANVAS]
    return f"a {thing.size} {thing.colour} {thing.shape}{digit} ({row} {column})"


def _plain(question: str) -> str:
    """The question as scenes write it: lower case, single spaces, one of them before the question mark."""
    return " ".join(question.lower().replace("?", " ?").split())
