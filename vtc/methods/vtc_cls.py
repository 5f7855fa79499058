"""VTC-CLS: the patches that the [CLS] token attends to, over several layers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, Needs, Tower


@dataclasses.dataclass(frozen=True)
class VTCCLS(Method):
    """[CLS] attention, mean over heads, combined over layers that end at the feature layer (arXiv 2412.05819).

    ::

        s[n] = ensemble_l  1/H Σ_h softmax_j(q_lh[CLS] · k_lh[j] / √d)[n]      j over all 1 + N keys

    The K patches with the largest s stay, in their order. The same selection can be made after a layer of the language
    model.

    Parameters
    ----------
    ensemble : {"sum", "mean", "max", "min"}
        How the layers are combined. The paper finds sum (or mean) better than max or min.
    """

    name: ClassVar[str] = "vtc-cls"
    scores: ClassVar[str] = "[CLS] attention, several vision layers"
    paper: ClassVar[str] = "arXiv 2412.05819"
    needs: ClassVar[Needs] = Needs(rows="ensemble")
    prunes: ClassVar[tuple[str, ...]] = ("tower", "language")

    ensemble: str = "sum"

    def select(self, tower: Tower, keep: int) -> tuple[Tensor, Tensor]:
        rows = self.needed(tower, "rows")
        total = torch.empty(rows[0, :, 0].shape, dtype=torch.float32, device=rows.device)
        return ops.topk(rows, keep, ensemble=self.ensemble, total=total, backend=self.backend), total
