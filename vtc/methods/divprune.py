"""DivPrune: keep the patches that are least like each other."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, Needs, VisionOutputs, scores_of


@dataclasses.dataclass(frozen=True)
class DivPrune(Method):
    """Greedy max-min distance of the projected tokens, 1 - cosine similarity (arXiv 2503.02175).

    ::

        first:      keep the n that is farthest from its nearest other
        K-1 times:  keep the n that is farthest from the nearest of those that are kept

    The published rule. All tiles of an image are compared together, as its authors do; they compute the similarity in
    the model's dtype. The tokens stay in their order. The score of the i-th that is chosen is 1 - i / K. It needs all
    tokens after the projector, so that one runs for all, and for the kept ones again. It has no options.
    """

    name: ClassVar[str] = "divprune"
    scores: ClassVar[str] = "distance to the nearest kept token"
    paper: ClassVar[str] = "arXiv 2503.02175"
    needs: ClassVar[Needs] = Needs(projected=True)
    operations: ClassVar[tuple[str, ...]] = ("similarity", "maxmin", "compact")
    joint: ClassVar[bool] = True

    def select(self, outputs: VisionOutputs, keep: int) -> tuple[Tensor, Tensor]:
        tokens = self.require(outputs, "projected")
        similarity = ops.similarity(tokens, tokens, backend=self.backend)
        indices, order = ops.maxmin(similarity, keep, backend=self.backend)
        return indices, scores_of(order, tokens.shape[1])
