"""Received attention: keep the patches that all others attend to."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vtc.methods.base import Method, Needs, Ranking, VisionOutputs


@dataclasses.dataclass(frozen=True)
class Received(Method):
    """The attention that a patch receives from all tokens, in the feature layer f, mean over heads and queries.

    ::

        s[n] = 1/H Σ_h 1/M Σ_m softmax_j(q_fh[m] · k_fh[j] / √d)[n]      m and j over all M tokens of the tower

    The K patches with the largest s stay, in their order. It is what ports of [CLS] methods take on towers without
    [CLS]. It is here for comparison: on the bundled model it is no better than random. It has no options.
    """

    name: ClassVar[str] = "received"
    scores: ClassVar[str] = "attention from all tokens, the feature layer"
    needs: ClassVar[Needs] = Needs(received=True)

    def ranking(self, outputs: VisionOutputs) -> Ranking:
        return Ranking(self.require(outputs, "received"))
