"""Images with known content: objects on textured backgrounds, with captions, questions and answers.

A scene is a pure function of `(split, index, size)`: nothing is stored and nothing is downloaded. Splits draw from
disjoint seeds. The five question families mirror what the usual LLaVA benchmarks ask:

========== =========================== ========================================
family     mirrors                     example
========== =========================== ========================================
existence  POPE                        is there a red circle ?  -> yes
attribute  GQA                         what shape is the red object ?  -> circle
relation   GQA                         is the red circle left or right of the blue star ?  -> left
counting   VQAv2                       how many objects are there ?  -> 3
digit      TextVQA                     what digit is on the red object ?  -> 7
========== =========================== ========================================

No two objects of a scene share a colour, so that a colour names one object.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from vtc.tiny.drawing import CANVAS, COLOURS, PATCH, SHAPES, SIZES, Object, background, paint, place_objects

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
NUMBERS = ("one", "two", "three", "four", "five")
FAMILIES = ("existence", "attribute", "relation", "counting", "digit")
SPLITS = ("train", "val", "test")

MAX_OBJECTS = 5
COUNTING = "how many objects are there ?"


def _a(word: str) -> str:
    return f"an {word}" if word[0] == "o" else f"a {word}"


@dataclass(frozen=True)
class Question:
    """A question with a one-word answer; `family` is one of `FAMILIES`."""

    family: str
    text: str
    answer: str


class Scene:
    """An image and everything there is to know about it.

    An image smaller than `CANVAS` is a window on it, with its upper left corner at `origin`: objects keep their size
    in pixels, and "top left" means top left of the canvas.

    Parameters
    ----------
    split : "train", "val" or "test"
        Which of the disjoint seed ranges to draw from.
    index : int
        Which scene of the split; any non-negative number.
    size : int or (int, int)
        Side of the image in pixels, or its width and height, 70 to 336; smaller images show fewer objects.
    zoom : float
        How much larger than usual everything appears, at least 1: a close-up has less background. Objects keep the
        coordinates and sizes they have without it.
    blank : bool
        Nothing but background. Such a scene has no phrases, and the only question is how many objects there are.

    Raises
    ------
    ValueError
        For an unknown split, a negative index, or a size out of range.
    """

    def __init__(
        self, split: str, index: int, size: int | tuple[int, int] = CANVAS, zoom: float = 1.0, blank: bool = False
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        if index < 0:
            raise ValueError(f"index is {index}; scenes are numbered from 0")
        self.split, self.index = split, index
        self.width, self.height = (size, size) if isinstance(size, int) else size
        if not 70 <= min(self.width, self.height) <= max(self.width, self.height) <= CANVAS:
            raise ValueError(f"size is {size}; it must be from 70 to {CANVAS} pixels")
        self.zoom = zoom
        self._shown = round(self.width / zoom), round(self.height / zoom)  # pixels before the zoom
        if zoom < 1 or min(self._shown) < 70:
            raise ValueError(f"zoom is {zoom}; it must be at least 1 and leave 70 of {size} pixels")
        rng = self._rng(0)
        across, down = self._shown
        if zoom != 1:
            most = (across // 56) * (down // 56)  # as many small ones as can always be placed
        elif across == down:
            most = across // 56
        else:
            most = across * down // 56**2
        self.objects: list[Object] = []
        if not blank:
            self.objects = place_objects(rng, int(rng.integers(1, min(max(1, most), MAX_OBJECTS) + 1)), across, down)
        rooms = ((CANVAS - side) // PATCH for side in (self.width, self.height))
        self.origin = tuple(int(rng.integers(room + 1)) * PATCH for room in rooms)  # x, y

    def _rng(self, purpose: int) -> np.random.Generator:
        """Independent randomness for layout, image and questions."""
        form = [self.width] if self.width == self.height else [self.width, self.height]
        form += [] if self.zoom == 1 else [round(1000 * self.zoom)]
        return np.random.default_rng([SPLITS.index(self.split), self.index, *form, purpose])

    @cached_property
    def image(self) -> Image.Image:
        """The image, RGB, `width` x `height`."""
        rng = self._rng(1)
        image = background(rng, max(self._shown)).crop((0, 0, *self._shown))
        for thing in self.objects:
            paint(image, thing, rng)
        image = image.resize((self.width, self.height), Image.Resampling.BICUBIC)
        grain = rng.normal(0, rng.uniform(2, 7), (self.height, self.width, 1)).astype(np.float32)
        return Image.fromarray((np.asarray(image, np.float32) + grain).clip(0, 255).astype(np.uint8))

    @cached_property
    def phrases(self) -> list[str]:
        """Everything true of the scene that `PHRASES` can say; the caption is these phrases."""
        if not self.objects:
            return []
        true = [f"{NUMBERS[len(self.objects) - 1]} object" + "s" * (len(self.objects) > 1)]
        for thing in self.objects:
            at = (start + self.zoom * place for start, place in zip(self.origin, (thing.x, thing.y), strict=True))
            column, row = (int(3 * place / CANVAS) for place in at)
            true += [
                f"a {thing.shape}",
                f"{_a(thing.colour)} {thing.shape}",
                f"a {thing.size} {thing.colour} object",
                f"{_a(thing.colour)} object at the {ROWS[row]} {COLUMNS[column]}",
            ]
            if thing.digit is not None:
                true += [f"the digit {thing.digit}", f"{_a(thing.colour)} object with the digit {thing.digit}"]
        return list(dict.fromkeys(true))

    @property
    def caption(self) -> str:
        """The phrases as one sentence."""
        return ", ".join(self.phrases)

    @cached_property
    def questions(self) -> list[Question]:
        """Up to two questions a family, in an order that says nothing about the answers."""
        return self.ask(0)

    def ask(self, draw: int) -> list[Question]:
        """Another draw of questions about the same image; `questions` is draw 0."""
        rng = self._rng(2 + draw)
        if not self.objects:
            return _counting(rng, self.objects)
        drawn = [*_existence(rng, self.objects), *_attribute(rng, self.objects), *_relation(rng, self.objects)]
        drawn += [*_counting(rng, self.objects), *_digit(rng, self.objects)]
        return [drawn[i] for i in rng.permutation(len(drawn))]


def balanced_questions(split: str, count: int, size: int = CANVAS) -> list[tuple[Scene, Question]]:
    """`count` questions, one a scene, an equal number from each family and its answers as equal as can be.

    Scenes are visited in order. Each gets the question whose answer has been used least so far. Deterministic.
    """
    seen: dict[tuple[str, str], int] = {}
    quota = {family: count // len(FAMILIES) + (i < count % len(FAMILIES)) for i, family in enumerate(FAMILIES)}
    chosen: list[tuple[Scene, Question]] = []
    index = 0
    while len(chosen) < count:
        scene = Scene(split, index, size)
        index += 1
        # Compare shares, not counts: a family with many answers must take a rare one when it is on offer.
        open_ = [q for q in scene.questions if quota[q.family] > 0]
        if not open_:
            continue
        question = min(open_, key=lambda q: seen.get((q.family, q.answer), 0) * ANSWER_COUNT[q.family])
        seen[question.family, question.answer] = seen.get((question.family, question.answer), 0) + 1
        quota[question.family] -= 1
        chosen.append((scene, question))
    return chosen


ANSWER_COUNT = {
    "existence": 2,
    "attribute": len(SHAPES) + len(COLOURS),
    "relation": 4,
    "counting": MAX_OBJECTS,
    "digit": 10,
}

PHRASES = (
    *(f"{number} object" + "s" * (number != "one") for number in NUMBERS),
    *(f"a {shape}" for shape in SHAPES),
    *(f"the digit {digit}" for digit in range(10)),
    *(f"{_a(colour)} {shape}" for colour in COLOURS for shape in SHAPES),
    *(f"a {size} {colour} object" for size in SIZES for colour in COLOURS),
    *(f"{_a(colour)} object at the {row} {column}" for colour in COLOURS for row in ROWS for column in COLUMNS),
    *(f"{_a(colour)} object with the digit {digit}" for colour in COLOURS for digit in range(10)),
)

_QUESTION_WORDS = """
    user : assistant . , ? is there a an what shape colour is the object how many objects are there digit on
    left or right above below of yes no
"""
WORDS = sorted({*" ".join(PHRASES).split(), *_QUESTION_WORDS.split(), *map(str, range(10))})


def _existence(rng: np.random.Generator, objects: list[Object]) -> list[Question]:
    """One object that is there; one that is not, but shares its colour or its shape with one that is."""
    thing = objects[rng.integers(len(objects))]
    present = {(o.colour, o.shape) for o in objects}
    near = [(o.colour, s) for o in objects for s in SHAPES] + [(c, o.shape) for o in objects for c in COLOURS]
    near = [pair for pair in near if pair not in present]
    colour, shape = near[rng.integers(len(near))]
    return [
        Question("existence", f"is there {_a(thing.colour)} {thing.shape} ?", "yes"),
        Question("existence", f"is there {_a(colour)} {shape} ?", "no"),
    ]


def _attribute(rng: np.random.Generator, objects: list[Object]) -> list[Question]:
    """The shape of a colour; the colour of a shape that occurs once."""
    thing = objects[rng.integers(len(objects))]
    questions = [Question("attribute", f"what shape is the {thing.colour} object ?", thing.shape)]
    shapes = [o.shape for o in objects]
    single = [o for o in objects if shapes.count(o.shape) == 1]
    if single:
        thing = single[rng.integers(len(single))]
        questions.append(Question("attribute", f"what colour is the {thing.shape} ?", thing.colour))
    return questions


def _relation(rng: np.random.Generator, objects: list[Object]) -> list[Question]:
    """Left or right, above or below, for a pair that is clearly apart on that axis."""
    questions = []
    for axis, words in (("x", ("left", "right")), ("y", ("above", "below"))):
        pairs = [(a, b) for a in objects for b in objects if abs(getattr(a, axis) - getattr(b, axis)) >= 42]
        if pairs:
            a, b = pairs[rng.integers(len(pairs))]
            tail = f"of the {b.colour} {b.shape} ?" if axis == "x" else f"the {b.colour} {b.shape} ?"
            answer = words[getattr(a, axis) > getattr(b, axis)]
            questions.append(
                Question("relation", f"is the {a.colour} {a.shape} {words[0]} or {words[1]} {tail}", answer),
            )
    return questions


def _counting(rng: np.random.Generator, objects: list[Object]) -> list[Question]:
    return [Question("counting", COUNTING, str(len(objects)))]


def _digit(rng: np.random.Generator, objects: list[Object]) -> list[Question]:
    carriers = [o for o in objects if o.digit is not None]
    if not carriers:
        return []
    thing = carriers[rng.integers(len(carriers))]
    return [Question("digit", f"what digit is on the {thing.colour} object ?", str(thing.digit))]
