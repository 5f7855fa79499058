"""FasterVLM: keep the patches that the [CLS] token attends to in one layer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vtc.methods.base import Method, Needs, Ranking, VisionOutputs


@dataclasses.dataclass(frozen=True)
class FasterVLM(Method):
    """[CLS] attention in the feature layer f, mean over heads (arXiv 2412.01818).

    ::

        s[n] = 1/H Σ_h softmax_j(q_fh[CLS] · k_fh[j] / √d)[n]      j over all 1 + N keys

    The K patches with the largest s stay, in their order. f may be the tower's last layer. It has no options.
    """

    name: ClassVar[str] = "fastervlm"
    scores: ClassVar[str] = "[CLS] attention, the feature layer"
    paper: ClassVar[str] = "arXiv 2412.01818"
    needs: ClassVar[Needs] = Needs(cls_probs=True)

    def ranking(self, outputs: VisionOutputs) -> Ranking:
        return Ranking(self.require(outputs, "cls_probs"))
