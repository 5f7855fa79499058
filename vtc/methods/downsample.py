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
    number of tokens is the largest square that is at most K: 121 for K = 128. With K of all tokens the image stays as
    it is. Of an image with tiles, and of a video, every tile and every frame is made smaller, and newline tokens are
    left out. They have to be square. The tower gets cheaper, too, by as many patches. It has no options.
    """

    name: ClassVar[str] = "downsample"
    scores: ClassVar[str] = "nothing: the image is made smaller"
    paper: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs(grid=True)
    per_view: ClassVar[bool] = True
    operations: ClassVar[tuple[str, ...]] = ()
    selects: ClassVar[bool] = False

    def num_outputs(self, num_tokens: int, keep: int) -> int:
        return num_tokens if keep >= num_tokens else math.isqrt(keep) ** 2

    def view_grid(self, grid: tuple[int, int], keep: int) -> tuple[int, int]:
        """A square of at most `keep` patches; `grid` itself if `keep` is all of them.

        Raises
        ------
        ValueError
            If the grid is not square: a square view would be larger on one side.
        """
        rows, columns = grid
        if keep >= rows * columns:
            return grid
        if rows != columns:
            raise ValueError(
                f"downsample makes square views smaller, got views of {rows} x {columns} patches; resize the images to "
                f'squares, use keep={rows * columns} (all of them), or method="pool"'
            )
        return math.isqrt(keep), math.isqrt(keep)

    def reduce(self, outputs: VisionOutputs, keep: int) -> Tokens:
        return Tokens(outputs.patches)
