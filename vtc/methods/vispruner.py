"""VisPruner: keep what [CLS] attends to, and of the others what is left once duplicates are removed."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, Needs, VisionOutputs, scores_of
from vtc.methods.checks import check_share


@dataclasses.dataclass(frozen=True)
class VisPruner(Method):
    """[CLS] attention for the important patches, repeated removal of duplicates for the others (arXiv 2412.01818).

    ::

        s[n]      = 1/H Σ_h softmax_j(q_fh[CLS] · k_fh[j] / √d)[n]          f is the feature layer; NaN counts as -inf
        important = the T = ⌊K · r⌋ patches with the largest s
        rest      = the others, the largest s first
        while the rest has more than K - T patches:
            a, b  = those at even places of the rest, those at odd places
            drop  the d = min(8, |rest| - K + T) of a that have the largest cosine similarity to one of b
            rest  = the others of a, the most similar first, then b

    No more are dropped than a has; a has one more than b if the rest is odd, where the authors' code fails. The
    similarity is that of the rows of the feature layer. Both kinds stay, in their order. The score of the patch with
    the i-th largest s of those that stay is 1 - i / K.

    The rounds, (N - K) / 8 of them, follow each other, and each sorts. Where two similarities differ by rounding only,
    the next split depends on it: in 16 bits, or in the order of another GPU's sums, other patches of the rest stay.
    An image of LLaVA-NeXT takes the patches of all its tiles together.

    Parameters
    ----------
    important : float
        r, from 0 to 1. Default 0.5, as in the paper.
    """

    name: ClassVar[str] = "vispruner"
    scores: ClassVar[str] = "[CLS] attention, the feature layer; of the others, duplicates are removed"
    paper: ClassVar[str] = "arXiv 2412.01818"
    needs: ClassVar[Needs] = Needs(cls_probs=True)
    operations: ClassVar[tuple[str, ...]] = ("similarity", "compact")
    joint: ClassVar[bool] = True

    important: float = 0.5

    def check(self) -> None:
        check_share("important", self.important)

    def select(self, outputs: VisionOutputs, keep: int) -> tuple[Tensor, Tensor]:
        x, probs = outputs.patches, self.require(outputs, "cls_probs").mean(2).sum(0)
        probs = probs.masked_fill(probs.isnan(), float("-inf"))
        important = int(keep * self.important)
        order = probs.sort(dim=1, descending=True, stable=True).indices
        wanted = keep - important
        rest = order[:, important:] if wanted else order[:, :0]
        similarity = ops.similarity(x, x, backend=self.backend)
        while rest.shape[1] > wanted:
            a, b = rest[:, ::2], rest[:, 1::2]
            drop = min(8, rest.shape[1] - wanted, a.shape[1])
            if b.shape[1]:
                rows = similarity.gather(1, a.unsqueeze(2).expand(-1, -1, x.shape[1]))
                nearest = rows.gather(2, b.unsqueeze(1).expand(-1, a.shape[1], -1)).amax(dim=2)
                a = a.gather(1, nearest.sort(dim=1, descending=True, stable=True).indices)
            rest = torch.cat([a[:, drop:], b], dim=1)
        kept = torch.cat([order[:, :important], rest], dim=1)
        places = order.argsort(dim=1).gather(1, kept).sort(dim=1).values
        return kept.sort(dim=1).values, scores_of(order.gather(1, places), x.shape[1])
