"""HiPrune: keep what a middle layer attends to, its neighbours, and what the feature layer attends to."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, Needs, VisionOutputs
from vtc.methods.checks import check_integer, check_share

OBJECT_LAYER, DEPTH = 9, 24  # the authors' layer for LLaVA-1.5, counted from 1, of so many


@dataclasses.dataclass(frozen=True)
class HiPrune(Method):
    """Received attention in a middle and in the feature layer, and neighbours in the grid (arXiv 2508.00553).

    ::

        a_l[n]    = attention that patch n receives in layer l, mean over heads and queries
        anchors   = the round(K · alpha / 5) patches with the largest a of the object layer
        buffers   = the left, right, upper and lower neighbour of each anchor
        registers = the patches with the largest a of the feature layer among the others, up to K

    As in its authors' code, the neighbours are n - 1, n + 1, n - width and n + width, cut off at the first and the last
    patch: the left neighbour of the first patch of a row is the last of the row above. `round` takes a half to the even
    number. If there are more anchors and buffers than K, which takes an alpha near 1, the buffers with the largest a of
    the feature layer stay. The patches stay in their order. Their scores are those of the feature layer; anchors score
    2 more, and buffers 1 more.

    Each view of an image of LLaVA-NeXT is reduced alone, to `keep` // V of its V views, without newline tokens. Where
    `keep` is the number of all tokens of the image, they all stay, newlines, too.

    Parameters
    ----------
    alpha : float
        From 0 to 1. Default 0.1, as in the paper.
    object_layer : int, optional
        The middle layer, counted from 1. Default None: layer 9 of 24, as in the paper, and at this share of the depth
        of other towers, but not after the feature layer.
    """

    name: ClassVar[str] = "hiprune"
    scores: ClassVar[str] = "attention from all tokens, a middle and the feature layer; neighbours"
    paper: ClassVar[str] = "arXiv 2508.00553"
    needs: ClassVar[Needs] = Needs(received=True, grid=True)
    per_view: ClassVar[bool] = True

    alpha: float = 0.1
    object_layer: int | None = None

    def check(self) -> None:
        check_share("alpha", self.alpha)
        if self.object_layer is not None:
            check_integer("object_layer", self.object_layer, 1)

    def received_layers(self, end: int, depth: int) -> tuple[int, ...]:
        default = min(max(round(OBJECT_LAYER * depth / DEPTH), 1), end)
        layer = default if self.object_layer is None else self.object_layer
        if layer > end:
            raise ValueError(
                f"object_layer={layer} comes after the feature layer, which is layer {end} counted from 1; use 1 to "
                f"{end}"
            )
        return (layer - 1, end - 1)

    def select(self, outputs: VisionOutputs, keep: int) -> tuple[Tensor, Tensor]:
        middle, deep = self.require(outputs, "received")
        num_tokens, width = deep.shape[1], outputs.grid[1]
        level = torch.zeros_like(deep)  # 2 for anchors, 1 for buffers
        if anchors := round(keep * self.alpha / 5):
            found = ops.topk(middle, anchors, backend=self.backend)
            near = torch.cat([found - 1, found + 1, found - width, found + width], dim=1).clamp(0, num_tokens - 1)
            level = level.scatter(1, near, 1.0).scatter(1, found, 2.0)
        scores = level + deep  # attention is at most 1
        return ops.topk(scores, keep, backend=self.backend), scores
