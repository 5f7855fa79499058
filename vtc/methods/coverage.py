"""Coverage: keep the patches that together are most like all patches."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, VisionOutputs, scores_of
from vtc.methods.checks import check_positive


@dataclasses.dataclass(frozen=True)
class Coverage(Method):
    """Greedy maximum coverage of the patches by the patches: the vision half of MMTok (arXiv 2508.18264).

    ::

        q[r, n]    = softmax_n(cos(x[r], x[n]) / τ)              x: rows of the feature layer, before the projector
        covered[r] = 0
        K times:   keep the n with the largest Σ_r max(0, q[r, n] - covered[r])
                   covered[r] = max(covered[r], q[r, n])

    It needs no [CLS] token, no attention weights and no text, so an image's tokens do not depend on the question. The
    patches stay in their order. They can be selected before the projector, or after a layer of the language model. The
    score of the i-th patch that is chosen is 1 - i / K.

    An image of LLaVA-NeXT covers the patches of all its tiles together, without newline tokens.

    Parameters
    ----------
    temperature : float
        τ, positive. Default 0.2, as in the paper.
    """

    name: ClassVar[str] = "coverage"
    scores: ClassVar[str] = "how much of the image it covers that no other kept patch does"
    paper: ClassVar[str] = "arXiv 2508.18264"
    prunes: ClassVar[tuple[str, ...]] = ("tower", "language")
    operations: ClassVar[tuple[str, ...]] = ("similarity", "coverage", "compact")
    joint: ClassVar[bool] = True

    temperature: float = 0.2

    def check(self) -> None:
        check_positive("temperature", self.temperature)

    def select(self, outputs: VisionOutputs, keep: int) -> tuple[Tensor, Tensor]:
        x = outputs.patches
        cover = ops.similarity(x, x, temperature=self.temperature, backend=self.backend)
        indices, order = ops.coverage(cover, keep, backend=self.backend)
        return indices, scores_of(order, x.shape[1])
