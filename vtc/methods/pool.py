"""Average pooling of the grid: the control that does not look at the image."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from vtc.methods.base import Method, Needs, Tokens, VisionOutputs


@dataclasses.dataclass(frozen=True)
class Pool(Method):
    """Adaptive average pooling of the grid of patches to ⌊√K⌋ x ⌊√K⌋ tokens, row by row.

    The number of tokens is the largest square that is at most K: 121 for K = 128. It has no options.
    """

    name: ClassVar[str] = "pool"
    scores: ClassVar[str] = "nothing: the grid is averaged"
    paper: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs(grid=True)
    operations: ClassVar[tuple[str, ...]] = ()
    selects: ClassVar[bool] = False

    def num_outputs(self, num_tokens: int, keep: int) -> int:
        return math.isqrt(keep) ** 2

    def reduce(self, outputs: VisionOutputs, keep: int) -> Tokens:
        grid = outputs.patches.mT.unflatten(2, outputs.grid)  # [B, C, rows, columns]
        side = math.isqrt(keep)
        # Contiguous: else PyTorch's memory format, and with it the order of the sums, would depend on B.
        pooled = torch.nn.functional.adaptive_avg_pool2d(grid.float().contiguous(), side).to(grid.dtype)
        return Tokens(pooled.flatten(2).mT.contiguous())
