"""The images of scenes: objects of flat colour on textured backgrounds, painted with Pillow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CANVAS = 336  # pixels a side
PATCH = 14
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

DIGIT_HEIGHT = 36  # pixels
_SUPERSAMPLE = 4


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


def place_objects(rng: np.random.Generator, count: int, width: int, height: int) -> list[Object]:
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
    """A greyish colour: no background may pass for an object."""
    return rng.uniform(40, 215) + rng.uniform(-16, 16, 3)


def background(rng: np.random.Generator, size: int) -> Image.Image:
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


def paint(image: Image.Image, thing: Object, rng: np.random.Generator) -> None:
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
