"""Down-sampling: the control that makes the image itself smaller."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from vtc.methods.base import Method, Needs, Tokens, VisionOutputs


@dataclasses.dataclass(frozen=True)
class Downsample(Method):
    """The image is made smaller, so that the vision tower sees ⌊√K⌋ x ⌊√K⌋ patches, and all of them stay.

    Pixels are resized by antialiased bicubic interpolation, and the tower interpolates its position embeddings. The
    number of tokens is the largest square that is at most K: 121 for K = 128. Of an image with tiles, and of a video,
    every tile and every frame is made smaller, and newline tokens are left out. An image that keeps all of its tokens
    stays as it is. The tower gets cheaper, too, by as many patches. It has no options.
    """

    name: ClassVar[str] = "downsample"
    scores: ClassVar[str] = "nothing: the image is made smaller"
    paper: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs(grid=True)
    per_view: ClassVar[bool] = True
    operations: ClassVar[tuple[str, ...]] = ()
    selects: ClassVar[bool] = False

    def num_outputs(self, num_tokens: int, keep: int) -> int:
        return math.isqrt(keep) ** 2

    def view_grid(self, grid: tuple[int, int], keep: int) -> tuple[int, int]:
        return math.isqrt(keep), math.isqrt(keep)

    def reduce(self, outputs: VisionOutputs, keep: int) -> Tokens:
        return Tokens(outputs.patches)
