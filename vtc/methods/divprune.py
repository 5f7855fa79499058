"""DivPrune: keep the patches that are least like each other."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, Needs, VisionOutputs, scores_of


@dataclasses.dataclass(frozen=True)
class DivPrune(Method):
    """Greedy max-min distance of the projected tokens, 1 - cosine similarity (arXiv 2503.02175).

    ::

        first:      keep the n that is farthest from its nearest other
        K-1 times:  keep the n that is farthest from the nearest of those that are kept

    This is the published rule. The similarity is computed in float32; its authors compute it in the model's dtype. All
    tiles of an image are compared together, as theirs are. The tokens stay in their order. The score of the i-th that
    is chosen is 1 - i / K.

    It compares all tokens after the projector. So the projector runs twice: for all of them, and for those that stay.
    `ratio` rounds to the nearest number of tokens, as theirs does: 0.098 of 576 is 56. It has no options.
    """

    name: ClassVar[str] = "divprune"
    scores: ClassVar[str] = "distance to the nearest kept token"
    paper: ClassVar[str] = "arXiv 2503.02175"
    needs: ClassVar[Needs] = Needs(projected=True)
    operations: ClassVar[tuple[str, ...]] = ("similarity", "maxmin", "compact")
    joint: ClassVar[bool] = True
    rounds_up: ClassVar[bool] = False

    def select(self, outputs: VisionOutputs, keep: int) -> tuple[Tensor, Tensor]:
        tokens = self.require(outputs, "projected")
        similarity = ops.similarity(tokens, tokens, backend=self.backend)
        # Its two halves may differ by rounding, which would decide between two tokens that are each other's nearest.
        # The transpose, whose rows are contiguous, comes first: so are those of the result, which `maxmin` reads.
        similarity = torch.maximum(similarity.mT, similarity)
        indices, order = ops.maxmin(similarity, keep, backend=self.backend)
        return indices, scores_of(order, tokens.shape[1])
