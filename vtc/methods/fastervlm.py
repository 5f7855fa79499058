"""FasterVLM: the patches that the [CLS] token attends to in one layer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, Needs, Tower


@dataclasses.dataclass(frozen=True)
class FasterVLM(Method):
    """[CLS] attention in the feature layer f, mean over heads (arXiv 2412.01818).

    ::

        s[n] = 1/H Σ_h softmax_j(q_fh[CLS] · k_fh[j] / √d)[n]      j over all 1 + N keys

    The K patches with the largest s stay, in their order.
    """

    name: ClassVar[str] = "fastervlm"
    scores: ClassVar[str] = "[CLS] attention, the feature layer"
    paper: ClassVar[str] = "arXiv 2412.01818"
    needs: ClassVar[Needs] = Needs(rows="feature")

    def select(self, tower: Tower, keep: int) -> tuple[Tensor, Tensor]:
        rows = self.needed(tower, "rows")
        total = torch.empty(rows[0, :, 0].shape, dtype=torch.float32, device=rows.device)
        return ops.topk(rows, keep, total=total, backend=self.backend), total
