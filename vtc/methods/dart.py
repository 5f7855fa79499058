"""DART: keep the image tokens that are least like a few pivots, inside the language model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import Method
from vtc.methods.checks import check_integer
from vtc.methods.fastv import keep_best, rank_of


@dataclasses.dataclass(frozen=True)
class DART(Method):
    """Image tokens that duplicate no pivot before layer k of the language model (arXiv 2502.11494).

    ::

        z[n]   = the keys of token n in layer k - 1, all heads in a row, after the rotary embedding
        x[n]   = the hidden state of token n before layer k, after the language model's last norm
        pivots = the image tokens, then the text tokens after the last image, with the largest ‖z[n]‖₁
        q      = ceil((K - image pivots) / pivots)

    The image pivots stay. Every pivot p in turn adds the q image tokens with the smallest cosine of x[n] and x[p] among
    those that are not yet taken, until there are K. From layer k on, a prompt has these K image tokens and all its
    text, in their order and at their rotary positions. Of equal ones the earlier token counts first. Tokens with
    NaN come after all others, and image tokens that the attention mask hides come last. k is `prune_layer`, 2 by
    default as in the paper. It needs no attention weights.

    The authors' code takes its pivots in the order of a Python set, and rounds q down, so that it keeps fewer tokens
    than K. Several images of a prompt share its pivots and its K, as in "fastv". A prompt with fewer tokens than pivots
    has fewer pivots.

    Parameters
    ----------
    image_pivots : int
        Number of image tokens among the pivots, at least 1 and at most K count. Default 4.
    text_pivots : int
        Number of text tokens among the pivots. Default 4.
    """

    name: ClassVar[str] = "dart"
    scores: ClassVar[str] = "unlikeness to a few pivots with large keys, one language-model layer"
    paper: ClassVar[str] = "arXiv 2502.11494"
    prunes: ClassVar[tuple[str, ...]] = ("language",)
    kv: ClassVar[str] = "full"
    operations: ClassVar[tuple[str, ...]] = ("compact",)
    selects: ClassVar[bool] = False
    reads: ClassVar[str] = "states"

    image_pivots: int = 4
    text_pivots: int = 4

    def check(self) -> None:
        check_integer("image_pivots", self.image_pivots, 1)
        check_integer("text_pivots", self.text_pivots, 0)

    def prompt_scores(self, keys: Tensor, hidden: Tensor, is_image: Tensor, real: Tensor, keep: Tensor) -> Tensor:
        """Scores of the tokens of the prompts: 1 - i / keep for the i-th image token that is chosen, 0 for the rest.

        Parameters
        ----------
        keys : Tensor[B, H, L, D]
            Of layer k - 1, any strides.
        hidden : Tensor[B, L, C]
            Before layer k, after the language model's last norm.
        is_image : Tensor[B, L], bool
            True at image tokens.
        real : Tensor[B, L], bool
            The prompts' attention mask: False at padding, and at tokens that are hidden.
        keep : Tensor[B], int64
            Number of image tokens that stay in each prompt, over all its images together.

        Returns
        -------
        Tensor[B, L], float32
        """
        unit = torch.nn.functional.normalize(hidden.detach().float(), dim=-1)
        norms = keys.detach().float().abs().sum((1, 3))
        norms = norms.masked_fill(norms.isnan() | unit.isnan().any(2), -1.0)
        norms = norms.masked_fill(~real, float("-inf"))
        keep = keep.unsqueeze(1)
        rank = rank_of(norms, is_image)
        taken = is_image & (rank < keep.clamp(max=self.image_pivots))
        place = torch.where(taken, rank, 0)  # in the order of choice
        pivots = [(rank, is_image, i) for i in range(self.image_pivots)]
        follows = real & ~is_image & (is_image.flip(1).cumsum(1).flip(1) == 0)
        rank = rank_of(norms, follows)
        pivots += [(rank, follows, i) for i in range(self.text_pivots)]
        found = [candidates & (rank == i) for rank, candidates, i in pivots]
        exist = torch.stack([each.any(1, keepdim=True) for each in found])
        count = taken.sum(1, keepdim=True)
        left = keep - count
        quota = (left + exist.sum(0).clamp(min=1) - 1) // exist.sum(0).clamp(min=1)
        for pivot, exists in zip(found, exist, strict=True):
            at = pivot.int().argmax(1)[:, None, None].expand(-1, 1, unit.shape[2])
            # A product and a sum, not a matmul: a batched one may round a prompt differently in another batch.
            unlike = -(unit * unit.gather(1, at)).sum(2)
            unlike = unlike.masked_fill(unlike.isnan(), -2.0).masked_fill(~real, float("-inf"))  # cosines are above -2
            free = is_image & ~taken
            rank = rank_of(unlike, free)
            more = free & (rank < torch.minimum(quota, keep - count)) & exists
            place = torch.where(more, count + rank, place)
            taken, count = taken | more, count + more.sum(1, keepdim=True)
        return torch.where(taken, 1 - place.float() / keep.clamp(min=1), 0.0)

    def keep_prompt(self, scores: Tensor, is_image: Tensor, keep: int | Tensor) -> Tensor:
        """Which tokens of the prompts stay, `[B, L]` bool: all text, and the `keep` image tokens of `prompt_scores`."""
        return keep_best(scores, is_image, keep)
