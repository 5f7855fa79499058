"""The recipe of the bundled model: the phases of its training, and which images each of their batches has."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from vtc.tiny.scenes import CANVAS, PATCH


class ViewGroup(NamedTuple):
    """Images of one batch that can be stacked: their number, width and height in pixels, and content."""

    number: int
    size: tuple[int, int]
    zoom: float = 1.0
    blank: bool = False  # nothing but background


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one kind of data and one learning-rate cycle."""

    stage: str  # "vision" | "text" | "projector" | "language"
    size: int  # pixels
    steps: int
    batch: int
    lr: float  # the peak
    draws: int = 2  # in the language stages: rounds of questions about each scene
    mixed: str = ""  # "sizes" | "shapes" | "close-ups" | "zooms" | "albums": images vary, see `groups`
    cycle: int | None = None  # steps of the learning-rate cycle, for a phase that ends before the cycle does
    images: int = 1  # at most, in one prompt; a prompt with several asks how many objects they show together
    objects: int = 9  # at most, in all images of a prompt
    zoom: float = 1.0  # of "albums": the largest zoom of a window
    counting: float = 1.0  # weight of the answer to "how many", which is asked only once per image

    def groups(self, step: int) -> list[ViewGroup]:
        """The images of batch `step`, by group."""
        width = height = self.size
        zoom = 1.0
        if self.mixed == "albums" and step % 4:
            rng = np.random.default_rng(step)
            canvas = self.size, self.size
            window, other, close = (
                (int(across) * PATCH, int(down) * PATCH)
                for across, down in rng.integers(70 // PATCH, self.size // PATCH + 1, (3, 2))
            )
            shares = [
                (0.25, canvas, 1.0, False),
                (0.25, window, 1.0, False),
                (0.17, canvas, 1.0, True),
                (0.17, other, 1.0, True),
            ]
            if self.zoom > 1:
                shares.append((0.25, close, float(rng.uniform(1, min(self.zoom, close[0] / 70, close[1] / 70))), False))
            return [
                ViewGroup(max(1, round(share * self.batch * self.size / math.sqrt(w * h))), (w, h), zoom, blank)
                for share, (w, h), zoom, blank in shares
            ]
        if self.mixed == "sizes":
            width = height = MIXED_SIZES[step % len(MIXED_SIZES)]
        elif self.mixed == "close-ups" and step % 3 == 1:
            zoom = (1.5, 2.0)[step % 2]
        elif self.mixed == "zooms" and step % 4:
            rng = np.random.default_rng(step)
            width, height = (int(side) * PATCH for side in rng.integers(112 // PATCH, self.size // PATCH + 1, 2))
            zoom = float(rng.uniform(1, min(3, width / 112, height / 112)))
        elif self.mixed in ("shapes", "close-ups") and step % 3:
            sides = np.random.default_rng(step).integers(70 // PATCH, self.size // PATCH + 1, 2)
            width, height = (int(side) * PATCH for side in sides)
        return [ViewGroup(int(self.batch * self.size / math.sqrt(width * height)), (width, height), zoom)]

    def images_per_prompt(self, step: int) -> int:
        """The most images that a prompt of batch `step` has."""
        if self.mixed == "albums" and step % 4 == 0:
            return 1
        return 1 + int(np.random.default_rng(step).integers(self.images))


MIXED_SIZES = (112, 168, 224, 280, CANVAS)
RECIPE = (
    Phase("vision", 70, 1000, 64, 1e-3),
    Phase("vision", 112, 500, 48, 1e-3),
    Phase("vision", 224, 400, 16, 7e-4),
    Phase("vision", 336, 300, 12, 5e-4),
    Phase("text", 112, 100, 32, 1e-3),
    Phase("projector", 112, 60, 32, 1e-3),
    Phase("language", 112, 700, 32, 1e-3),
    Phase("language", 336, 400, 10, 1e-3, draws=3, mixed="sizes", cycle=1000),
    Phase("language", 336, 600, 10, 1e-3, draws=3, mixed="shapes", cycle=1100),
    Phase("language", 336, 200, 10, 7e-4, draws=3, mixed="close-ups", cycle=450),
    Phase("language", 336, 300, 10, 6e-4, draws=3, mixed="close-ups", counting=5.0),
    Phase("language", 336, 300, 10, 8e-4, draws=1, mixed="zooms", cycle=1000, counting=5.0),
    Phase("language", 336, 700, 12, 8e-4, draws=1, mixed="zooms", images=3, counting=5.0),
    Phase("language", 336, 600, 16, 8e-4, draws=1, mixed="albums", images=4, counting=5.0),
    Phase("language", 336, 100, 14, 7e-4, 1, "albums", cycle=400, images=4, objects=5, zoom=3.0, counting=5.0),
    Phase("language", 336, 60, 14, 2e-4, 1, "albums", images=4, objects=5, zoom=3.0, counting=5.0),
)
QUICK = tuple(replace(phase, steps=2, batch=2) for phase in RECIPE)  # exercises every line, learns nothing
