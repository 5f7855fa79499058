"""Average pooling of the grid: the control that looks at nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from vtc.methods.base import Method, Needs, Tokens, Tower


@dataclasses.dataclass(frozen=True)
class Pool(Method):
    """Adaptive average pooling of the grid of patches to ⌊√K⌋ x ⌊√K⌋ rows, row by row.

    With fewer rows than asked for unless K is a square: 121 for 128.
    """

    name: ClassVar[str] = "pool"
    scores: ClassVar[str] = "nothing: the grid is averaged"
    paper: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs(grid=True)
    operations: ClassVar[tuple[str, ...]] = ()
    chooses: ClassVar[bool] = False

    def capacity(self, num_tokens: int, keep: int) -> int:
        return math.isqrt(keep) ** 2

    def compress(self, tower: Tower, keep: int) -> Tokens:
        grid = tower.patches.mT.unflatten(2, tower.grid)  # [B, C, rows, columns]
        side = math.isqrt(keep)
        # Contiguous, or PyTorch's choice of a memory format, and with it the order of sums, would depend on B.
        pooled = torch.nn.functional.adaptive_avg_pool2d(grid.float().contiguous(), side).to(grid.dtype)
        return Tokens(pooled.flatten(2).mT.contiguous())
