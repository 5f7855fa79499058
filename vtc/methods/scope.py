"""SCOPE: keep the patches that cover the image, each gain weighted by the patch's saliency."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, Needs, VisionOutputs, scores_of
from vtc.methods.checks import check_integer, check_one_of

SALIENCIES = ("cls", "received")


@dataclasses.dataclass(frozen=True)
class Scope(Method):
    """Greedy coverage by cosine similarity, each gain times the patch's saliency (arXiv 2510.24214).

    ::

        covered[r] = 0
        K times:   keep the n with the largest w[n] · Σ_r max(0, cos(x[r], x[n]) - covered[r])
                   covered[r] = max(covered[r], cos(x[r], x[n]))

    with x the rows of the feature layer, before the projector. The saliency w is the attention of [CLS], mean over
    heads, summed over the scored layers. On a tower without [CLS] it is the attention that a patch receives from all
    others. The patches stay in their order. They can be selected before the projector, or after a layer of the language
    model. The score of the i-th patch that is chosen is 1 - i / K.

    Two things differ from its published code:

    - An image of LLaVA-NeXT covers the patches of all its tiles together, without newline tokens. The authors give each
      of its V crops ⌊K / V⌋ tokens, and the published figures for LLaVA-NeXT are of that rule.
    - On towers without [CLS] its port compares the tokens after the projector, and takes the attention of the
      tower's last block. VTC takes the rows and the received attention of the feature layer.

    Parameters
    ----------
    saliency : {"cls", "received"}, optional
        Default None: "cls" where the tower has a [CLS] token, else "received".
    ensemble_layers : int
        Number of layers whose saliencies are added. They end at the feature layer. Default 1, as in the paper.
    """

    name: ClassVar[str] = "scope"
    scores: ClassVar[str] = "coverage of the image, times [CLS] attention or received attention"
    paper: ClassVar[str] = "arXiv 2510.24214"
    prunes: ClassVar[tuple[str, ...]] = ("tower", "language")
    operations: ClassVar[tuple[str, ...]] = ("similarity", "coverage", "compact")
    joint: ClassVar[bool] = True

    saliency: str | None = None
    ensemble_layers: int = 1

    def check(self) -> None:
        if self.saliency is not None:
            check_one_of("saliency", self.saliency, SALIENCIES)
        check_integer("ensemble_layers", self.ensemble_layers, 1)

    def for_tower(self, cls: bool) -> Scope:
        if self.saliency == "cls" and not cls:
            raise ValueError(
                'saliency="cls" needs a vision tower with a [CLS] token, and this one has none; use '
                'saliency="received", or leave it out'
            )
        if self.saliency is not None:
            return self
        return dataclasses.replace(self, saliency="cls" if cls else "received")

    @property
    def required(self) -> Needs:
        return Needs(received=True) if self.saliency == "received" else Needs(cls_probs=True)

    def scored_layers(self, end: int, depth: int) -> range:
        return self._layers(end) if self.required.cls_probs else range(0)

    def received_layers(self, end: int, depth: int) -> tuple[int, ...]:
        return tuple(self._layers(end)) if self.required.received else ()

    def _layers(self, end: int) -> range:
        if self.ensemble_layers > end:
            raise ValueError(
                f"ensemble_layers={self.ensemble_layers}, but only {end} vision layers end at the feature layer; use "
                f"1 to {end}"
            )
        return range(end - self.ensemble_layers, end)

    def select(self, outputs: VisionOutputs, keep: int) -> tuple[Tensor, Tensor]:
        x = outputs.patches
        if self.required.received:
            weight = self.require(outputs, "received").sum(0)
        else:
            weight = self.require(outputs, "cls_probs").mean(2).sum(0)
        cover = ops.similarity(x, x, backend=self.backend)
        indices, order = ops.coverage(cover, keep, weight=weight.to(torch.float32), backend=self.backend)
        return indices, scores_of(order, x.shape[1])
