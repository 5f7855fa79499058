"""Pictures with known content: objects on textured backgrounds, with captions, questions and answers.

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

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 38, 42),
    "orange": (244, 136, 26),
    "yellow": (248, 222, 52),
    "green": (40, 158, 62),
    "cyan": (58, 204, 222),
    "blue": (44, 76, 214),
    "purple": (136, 56, 178),
    "pink": (250, 130, 188),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = {"small": 42, "medium": 56, "large": 70}  # pixels across
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
NUMBERS = ("one", "two", "three", "four", "five")
FAMILIES = ("existence", "attribute", "relation", "counting", "digit")
SPLITS = ("train", "val", "test")

CANVAS = 336  # pixels a side
PATCH = 14
MAX_OBJECTS = 5
COUNTING = "how many objects are there ?"
DIGIT_HEIGHT = 36  # pixels
_SUPERSAMPLE = 4


def _a(word: str) -> str:
    return f"an {word}" if word[0] == "o" else f"a {word}"


@dataclass(frozen=True)
class Object:
    """One object; `x`, `y` is its centre in pixels, `digit` is None where it carries none."""

    colour: str
    shape: str
    size: str
    digit: int | None
    x: int
    y: int

    @property
    def radius(self) -> float:
        """Half its extent, in pixels."""
        return SIZES[self.size] / 2


@dataclass(frozen=True)
class Question:
    """A question with a one-word answer; `family` is one of `FAMILIES`."""

    family: str
    text: str
    answer: str


class Scene:
    """A picture and everything there is to know about it.

    A picture smaller than `CANVAS` is a window on it, with its upper left corner at `origin`: objects keep their size
    in pixels, and "top left" means top left of the canvas.

    Parameters
    ----------
    split : "train", "val" or "test"
        Which of the disjoint seed ranges to draw from.
    index : int
        Which scene of the split; any non-negative number.
    size : int or (int, int)
        Side of the picture in pixels, or its width and height, 70 to 336; smaller pictures show fewer objects.
    zoom : float
        How much larger than usual everything appears, at least 1: a close-up has less background. Objects keep the
        coordinates and sizes they have without it.
    blank : bool
        Nothing but background: there is nothing to say of it, and nothing to ask but how many objects there are.

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
            self.objects = _place(rng, int(rng.integers(1, min(max(1, most), MAX_OBJECTS) + 1)), across, down)
        rooms = ((CANVAS - side) // PATCH for side in (self.width, self.height))
        self.origin = tuple(int(rng.integers(room + 1)) * PATCH for room in rooms)  # x, y

    def _rng(self, purpose: int) -> np.random.Generator:
        """Independent randomness for layout, picture and questions."""
        form = [self.width] if self.width == self.height else [self.width, self.height]
        form += [] if self.zoom == 1 else [round(1000 * self.zoom)]
        return np.random.default_rng([SPLITS.index(self.split), self.index, *form, purpose])

    @cached_property
    def image(self) -> Image.Image:
        """The picture, RGB, `width` x `height`."""
        rng = self._rng(1)
        image = _background(rng, max(self._shown)).crop((0, 0, *self._shown))
        for thing in self.objects:
            _draw(image, thing, rng)
        image = image.resize((self.width, self.height), Image.Resampling.BICUBIC)
        grain = rng.normal(0, rng.uniform(2, 7), (self.height, self.width, 1)).astype(np.float32)
        return Image.fromarray((np.asarray(image, np.float32) + grain).clip(0, 255).astype(np.uint8))

    @cached_property
    def phrases(self) -> list[str]:
        """Everything true of the scene that `PHRASES` can say; the caption is these phrases."""
        if not self.objects:
            return []
        said = [f"{NUMBERS[len(self.objects) - 1]} object" + "s" * (len(self.objects) > 1)]
        for thing in self.objects:
            at = (start + self.zoom * place for start, place in zip(self.origin, (thing.x, thing.y), strict=True))
            column, row = (int(3 * place / CANVAS) for place in at)
            said += [
                f"a {thing.shape}",
                f"{_a(thing.colour)} {thing.shape}",
                f"a {thing.size} {thing.colour} object",
                f"{_a(thing.colour)} object at the {ROWS[row]} {COLUMNS[column]}",
            ]
            if thing.digit is not None:
                said += [f"the digit {thing.digit}", f"{_a(thing.colour)} object with the digit {thing.digit}"]
        return list(dict.fromkeys(said))

    @property
    def caption(self) -> str:
        """The phrases as one sentence."""
        return ", ".join(self.phrases)

    @cached_property
    def questions(self) -> list[Question]:
        """Up to two questions a family, in an order that says nothing about the answers."""
        return self.ask(0)

    def ask(self, draw: int) -> list[Question]:
        """Another draw of questions about the same picture; `questions` is draw 0."""
        rng = self._rng(2 + draw)
        if not self.objects:
            return _counting(rng, self.objects)
        asked = [*_existence(rng, self.objects), *_attribute(rng, self.objects), *_relation(rng, self.objects)]
        asked += [*_counting(rng, self.objects), *_digit(rng, self.objects)]
        return [asked[i] for i in rng.permutation(len(asked))]


def balanced_questions(split: str, count: int, size: int = CANVAS) -> list[tuple[Scene, Question]]:
    """`count` questions, one a scene, an equal number from each family and its answers as equal as can be.

    Scenes are visited in order; one is asked the question whose answer has been seen least so far. Deterministic.
    """
    seen: dict[tuple[str, str], int] = {}
    quota = {family: count // len(FAMILIES) + (i < count % len(FAMILIES)) for i, family in enumerate(FAMILIES)}
    chosen: list[tuple[Scene, Question]] = []
    index = 0
    while len(chosen) < count:
        scene = Scene(split, index, size)
        index += 1
        # An answer a family gives rarely must be taken when it is on offer: compare its share, not only its count.
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


# --- questions ---------------------------------------------------------------------------------------------------


def _existence(rng: np.random.Generator, objects: list[Object]) -> list[Question]:
    """One that is there; one that is not, but shares its colour or its shape with one that is."""
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
    asked = [Question("attribute", f"what shape is the {thing.colour} object ?", thing.shape)]
    shapes = [o.shape for o in objects]
    single = [o for o in objects if shapes.count(o.shape) == 1]
    if single:
        thing = single[rng.integers(len(single))]
        asked.append(Question("attribute", f"what colour is the {thing.shape} ?", thing.colour))
    return asked


def _relation(rng: np.random.Generator, objects: list[Object]) -> list[Question]:
    """Left or right, above or below, for a pair that is clearly apart on that axis."""
    asked = []
    for axis, words in (("x", ("left", "right")), ("y", ("above", "below"))):
        pairs = [(a, b) for a in objects for b in objects if abs(getattr(a, axis) - getattr(b, axis)) >= 42]
        if pairs:
            a, b = pairs[rng.integers(len(pairs))]
            tail = f"of the {b.colour} {b.shape} ?" if axis == "x" else f"the {b.colour} {b.shape} ?"
            answer = words[getattr(a, axis) > getattr(b, axis)]
            asked.append(
                Question("relation", f"is the {a.colour} {a.shape} {words[0]} or {words[1]} {tail}", answer),
            )
    return asked


def _counting(rng: np.random.Generator, objects: list[Object]) -> list[Question]:
    return [Question("counting", COUNTING, str(len(objects)))]


def _digit(rng: np.random.Generator, objects: list[Object]) -> list[Question]:
    carriers = [o for o in objects if o.digit is not None]
    if not carriers:
        return []
    thing = carriers[rng.integers(len(carriers))]
    return [Question("digit", f"what digit is on the {thing.colour} object ?", str(thing.digit))]


# --- pictures ----------------------------------------------------------------------------------------------------


def _place(rng: np.random.Generator, count: int, width: int, height: int) -> list[Object]:
    """`count` objects of different colours that do not touch.

    Their bounding boxes lie on the patch grid. A vision transformer has no notion of shift and would have to see every
    shape at every offset; on the grid it learns to recognise them within minutes on a CPU.
    """
    colours = rng.permutation(list(COLOURS))
    objects: list[Object] = []
    while len(objects) < count:
        for _ in range(60):
            name = str(rng.choice(list(SIZES)))
            extent = SIZES[name]
            radius = extent / 2
            places = ((side - extent) // PATCH + 1 for side in (width, height))
            x, y = (int(rng.integers(0, count)) * PATCH + extent // 2 for count in places)
            if all(math.hypot(x - o.x, y - o.y) >= radius + o.radius + 6 for o in objects):
                break
        else:  # no room left: start over
            objects = []
            continue
        digit = int(rng.integers(10)) if name != "small" and rng.random() < 0.75 else None
        colour = str(colours[len(objects)])
        objects.append(Object(colour, str(rng.choice(SHAPES)), name, digit, x, y))
    return objects


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A colour without much colour: no background may pass for an object."""
    return rng.uniform(40, 215) + rng.uniform(-16, 16, 3)


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Two muted colours mixed by one of five textures, with faint strokes on top."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / 112
    kind = rng.integers(5)
    if kind == 0:  # clouds
        cells = int(rng.integers(3, 12)) * size // 112
        mix = _noise(rng, cells, size)
    elif kind == 1:  # gradient
        angle = rng.uniform(0, 2 * math.pi)
        mix = (math.cos(angle) * x + math.sin(angle) * y) * 112 / size
        mix = (mix - mix.min()) / (mix.max() - mix.min())
    elif kind == 2:  # stripes
        angle, frequency = rng.uniform(0, math.pi), rng.uniform(15, 60)
        mix = 0.5 + 0.5 * np.sin(frequency * (math.cos(angle) * x + math.sin(angle) * y))
    elif kind == 3:  # checks
        cell = rng.uniform(0.12, 0.5)
        mix = ((x // cell + y // cell) % 2).astype(np.float32)
    else:  # blotches
        mix = (_noise(rng, int(rng.integers(4, 14)) * size // 112, size) > 0.5).astype(np.float32)
    first = _muted(rng)
    second = np.clip(first + rng.uniform(-45, 45) + rng.uniform(-10, 10, 3), 20, 235)
    pixels = first + (second - first) * mix[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 6)) * size // 112):
        tone = np.clip(first + rng.uniform(-40, 40), 20, 235).astype(int)
        ends = [tuple(map(int, rng.uniform(0, size, 2))) for _ in range(2)]
        pen.line(ends, fill=tuple(int(v) for v in tone), width=int(rng.integers(1, 5)))
    return image


def _noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Smooth noise in [0, 1], `[size, size]`, with about `cells` bumps a side."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255


def _draw(image: Image.Image, thing: Object, rng: np.random.Generator) -> None:
    """Paint one object, a little tilted and tinted, with its digit upright in black or white."""
    extent = SIZES[thing.size]
    mask = _outline(thing.shape, extent, math.radians(rng.uniform(-5, 5)))
    colour = np.clip(np.array(COLOURS[thing.colour]) + rng.uniform(-12, 12, 3), 0, 255)
    corner = (thing.x - extent // 2, thing.y - extent // 2)
    image.paste(tuple(int(v) for v in colour), corner, mask)
    if thing.digit is not None:
        glyph = _glyph(thing.digit)
        ink = (0, 0, 0) if colour @ (0.299, 0.587, 0.114) > 130 else (255, 255, 255)
        # Each shape's widest part is where a digit fits.
        drop = {"triangle": 0.12, "heart": -0.04}.get(thing.shape, 0.0) * extent
        left, top = thing.x - glyph.width // 2, thing.y - glyph.height // 2 + round(drop)
        image.paste(ink, (left, top), glyph)


def _outline(shape: str, extent: int, tilt: float) -> Image.Image:
    """The anti-aliased mask of a shape, mode L, `extent` pixels a side."""
    side = extent * _SUPERSAMPLE
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    middle = side / 2
    if shape == "circle":
        pen.ellipse((0.04 * side, 0.04 * side, 0.96 * side, 0.96 * side), fill=255)
    else:
        cos, sin = math.cos(tilt), math.sin(tilt)
        turned = [
            (middle + middle * 0.94 * (cos * x - sin * y), middle + middle * 0.94 * (sin * x + cos * y))
            for x, y in _polygon(shape)
        ]
        pen.polygon(turned, fill=255)
    return mask.resize((extent, extent), Image.Resampling.BOX)


@cache
def _polygon(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape in the square [-1, 1], y pointing down."""
    if shape == "square":
        return ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))
    if shape == "triangle":
        return ((0.0, -1.0), (1.0, 0.8), (-1.0, 0.8))
    if shape == "cross":
        a = 0.36
        corners = ((-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a))
        return (*corners, (-a, -a))
    if shape == "star":
        spokes = ((1.0 if i % 2 == 0 else 0.5, math.pi * (i / 5 - 0.5)) for i in range(10))
        return tuple((r * math.cos(t), r * math.sin(t)) for r, t in spokes)
    turns = (2 * math.pi * i / 48 for i in range(48))  # heart: the classic parametric curve
    return tuple(
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
        )
        for t in turns
    )


@cache
def _glyph(digit: int) -> Image.Image:
    """A digit as a mask, mode L, cropped to its ink."""
    font = ImageFont.load_default(size=DIGIT_HEIGHT * 1.3)
    canvas = Image.new("L", (2 * DIGIT_HEIGHT, 2 * DIGIT_HEIGHT))
    ImageDraw.Draw(canvas).text(
        (DIGIT_HEIGHT, DIGIT_HEIGHT), str(digit), font=font, fill=255, anchor="mm", stroke_width=1
    )
    return canvas.crop(canvas.getbbox())
