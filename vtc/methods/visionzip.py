"""VisionZip: dominant tokens stay, the others merge into a few contextual ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from vtc import ops
from vtc.methods.base import Method, Needs, Tokens, Tower


@dataclasses.dataclass(frozen=True)
class VisionZip(Method):
    """Dominant rows by [CLS] attention in the feature layer f, contextual rows by similar keys (arXiv 2412.04467).

    ::

        s[n]      = Σ_h softmax_j(q_fh[CLS] · k_fh[j] / √d)[n]                 j over all 1 + N keys
        dominant  = [CLS] and the D - 1 patches with the largest s, D = K - C
        metric[n] = 1/H Σ_h k_fh[n]
        targets   = every ⌊M / C⌋-th of the M rows that are not dominant, the first C of them
        context_c = x[target] + mean of x over the rows whose metric is most similar, by its cosine, to this target's

    The dominant rows come first, in their order, then the contextual ones. (Scores are reported as means over heads,
    which puts them in the same order.)

    Parameters
    ----------
    contextual : int, optional
        C. ⌊10·K / 64⌋ when not given: the published 54 + 10, 108 + 20 and 162 + 30.
    """

    name: ClassVar[str] = "visionzip"
    scores: ClassVar[str] = "[CLS] attention, the feature layer; similar keys merge"
    paper: ClassVar[str] = "arXiv 2412.04467"
    needs: ClassVar[Needs] = Needs(rows="feature", keys="feature")
    operations: ClassVar[tuple[str, ...]] = ("topk", "compact", "merge")

    contextual: int | None = None

    def capacity(self, num_tokens: int, keep: int) -> int:
        return sum(self._split(keep))

    def _split(self, keep: int) -> tuple[int, int]:
        """D and C."""
        contextual = 10 * keep // 64 if self.contextual is None else self.contextual
        dominant = keep - contextual
        if dominant < 2 or contextual < 0:
            raise ValueError(
                f"visionzip keeps [CLS], a patch at least, and {contextual} contextual tokens, got keep={keep}; use "
                "keep=2 or more, and contextual from 0 to keep - 2"
            )
        return dominant, contextual

    def compress(self, tower: Tower, keep: int) -> Tokens:
        rows, keys = self.needed(tower, "rows"), self.needed(tower, "keys")
        dominant, contextual = self._split(keep)
        scores = torch.empty(rows[0, :, 0].shape, dtype=torch.float32, device=rows.device)
        patches = ops.topk(rows, dominant - 1, total=scores, backend=self.backend)
        kept = torch.nn.functional.pad(patches + 1, (1, 0))  # [B, D], [CLS] is 0
        merged = [ops.compact(tower.hidden, kept, backend=self.backend)]
        if contextual:
            left = torch.ones(tower.hidden.shape[:2], device=rows.device).scatter(1, kept, 0.0)
            num_left = left.shape[1] - dominant
            remaining = ops.topk(left, num_left, backend=self.backend)  # [B, M], ascending
            targets = remaining[:, :: num_left // contextual][:, :contextual]
            metric = keys.mean(dim=1, dtype=torch.float32)  # [B, 1 + N, D]
            merged.append(ops.merge(tower.hidden, metric, targets, left, backend=self.backend)[0])
        return Tokens(torch.cat(merged, dim=1), None, patches, scores)
