"""VisionZip: keep dominant tokens, and merge the others into a few contextual tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from vtc import ops
from vtc.methods.base import Method, Needs, Tokens, VisionOutputs
from vtc.methods.checks import check_integer


@dataclasses.dataclass(frozen=True)
class VisionZip(Method):
    """Dominant tokens by [CLS] attention in the feature layer f, contextual tokens by similar keys (arXiv 2412.04467).

    ::

        s[n]      = Σ_h softmax_j(q_fh[CLS] · k_fh[j] / √d)[n]                 j over all 1 + N keys
        dominant  = [CLS] and the D - 1 patches with the largest s, D = K - C
        metric[n] = 1/H Σ_h k_fh[n]
        targets   = every ⌊M / C⌋-th of the M tokens that are not dominant, the first C of them
        context_c = x[target] + mean of x over the tokens whose metric has its largest cosine with this target's

    The dominant tokens come first, in their order, then the contextual ones. K is `keep` and counts the [CLS] token.
    Its authors take features, scores and keys from one layer, the last but one, which is LLaVA's feature layer.
    The reported scores are means over heads, which have the same order.

    An image of LLaVA-NeXT has `keep` // V tokens of each of its V views, which are the base image and the tiles, but at
    most N. Each view is reduced alone. The tokens follow each other, the base image's first, without newline tokens.

    Parameters
    ----------
    contextual : int, optional
        C, the number of contextual tokens, from 0 to K - 2. Default None: ⌊10·K / 64⌋, which gives the published
        54 + 10, 108 + 20 and 162 + 30.
    """

    name: ClassVar[str] = "visionzip"
    scores: ClassVar[str] = "[CLS] attention, the feature layer; similar keys merge"
    paper: ClassVar[str] = "arXiv 2412.04467"
    needs: ClassVar[Needs] = Needs(cls_probs=True, keys="feature")
    operations: ClassVar[tuple[str, ...]] = ("select", "topk", "merge_nearest")
    per_view: ClassVar[bool] = True

    contextual: int | None = None

    def check(self) -> None:
        if self.contextual is not None:
            check_integer("contextual", self.contextual, 0)

    def num_outputs(self, num_tokens: int, keep: int) -> int:
        return sum(self._split(keep))

    def _split(self, keep: int) -> tuple[int, int]:
        """D and C."""
        contextual = 10 * keep // 64 if self.contextual is None else self.contextual
        dominant = keep - contextual
        if dominant < 2:
            raise ValueError(
                f"visionzip keeps [CLS], at least one patch, and {contextual} contextual tokens, got keep={keep}; use "
                "keep=2 or more, and contextual from 0 to keep - 2"
            )
        return dominant, contextual

    def reduce(self, outputs: VisionOutputs, keep: int) -> Tokens:
        cls_probs, keys = self.require(outputs, "cls_probs"), self.require(outputs, "keys")
        dominant, contextual = self._split(keep)
        features, patches, scores = ops.select(cls_probs, outputs.patches, dominant - 1, backend=self.backend)
        kept = torch.nn.functional.pad(patches + 1, (1, 0))  # [B, D], [CLS] is 0
        merged = [outputs.hidden[:, :1], features]
        if contextual:
            left = torch.ones(outputs.hidden.shape[:2], dtype=torch.float32, device=keys.device).scatter(1, kept, 0.0)
            num_left = left.shape[1] - dominant
            remaining = ops.topk(left, num_left, backend=self.backend)  # [B, M], ascending
            targets = remaining[:, :: num_left // contextual][:, :contextual]
            metric = keys.mean(dim=1, dtype=torch.float32)  # [B, 1 + N, D]
            merged.append(ops.merge_nearest(outputs.hidden, metric, targets, left, backend=self.backend)[0])
        return Tokens(torch.cat(merged, dim=1), None, patches, scores)
