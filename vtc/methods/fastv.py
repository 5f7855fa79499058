"""FastV: the image tokens that the prompt's last token attends to, inside the language model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import Method, Needs


@dataclasses.dataclass(frozen=True)
class FastV(Method):
    """Attention of the last prompt token in layer k - 1 of the language model, mean over heads (arXiv 2403.06764).

    ::

        s[n] = 1/H Σ_h softmax_j(q_h[last] · k_h[j] / √d)[n]      j over all tokens that the last one sees

    Before layer k, of a prompt's image tokens only the K with the largest s stay; all its text stays. Everything keeps
    its order and its rotary position. The paper's R is the share that is dropped: K = round((1 - R) · N). Its k is 2,
    in its demonstration 3.
    """

    name: ClassVar[str] = "fastv"
    scores: ClassVar[str] = "the last prompt token's attention, one language-model layer"
    paper: ClassVar[str] = "arXiv 2403.06764"
    needs: ClassVar[Needs] = Needs(prompt=True)
    prunes: ClassVar[tuple[str, ...]] = ("language",)
    operations: ClassVar[tuple[str, ...]] = ("row_scores", "compact")
    chooses: ClassVar[bool] = False

    def keep_prompt(self, scores: Tensor, is_image: Tensor, keep: int | Tensor) -> Tensor:
        """Which tokens of the prompts stay.

        Parameters
        ----------
        scores : Tensor[B, L], float32
            From `vtc.ops.row_scores` of the last prompt token's query, masked as the prompt is. NaN counts as -inf.
        is_image : Tensor[B, L], bool
            True at image tokens.
        keep : int or Tensor[B], int64
            Image tokens that stay in each prompt: of one with several images, of all of them together.

        Returns
        -------
        Tensor[B, L], bool
            True at all tokens that are no image's, and at the `keep` best image tokens; ties go to the earlier one.
        """
        ranked = scores.masked_fill(scores.isnan(), float("-inf"))
        # Image tokens before the others, whatever their scores are; then the larger score, then the earlier token.
        order = ranked.sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, is_image.gather(1, order).int().sort(dim=1, descending=True, stable=True).indices)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        return ~is_image | (rank < (keep.unsqueeze(1) if isinstance(keep, Tensor) else keep))
