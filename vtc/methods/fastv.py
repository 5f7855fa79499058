"""FastV: keep the image tokens that the last prompt token attends to, inside the language model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import Method
from vtc.methods.checks import check_bool


@dataclasses.dataclass(frozen=True)
class FastV(Method):
    """Attention of the last prompt token in layer k - 1 of the language model, mean over heads (arXiv 2403.06764).

    ::

        s[n] = 1/H Σ_h softmax_j(q_h[last] · k_h[j] / √d)[n]      j over all tokens that the last one sees

    From layer k on, a prompt has its K image tokens with the largest s, and all its text. These tokens keep their order
    and their rotary positions. k is `prune_layer`, 2 by default as in the paper (3 in its demonstration).
    The paper's R is the share of tokens that is dropped, and `ratio` is the kept one: K = round((1 - R) · N) =
    round(`ratio` · N), to the even number where two are equally near.

    Its authors ran three variants, which give different answers from the second new token on:

    - The prompt's last token selects once, and the others are removed. Layers before k keep all tokens in the KV cache
      (`kv="full"`). This is their version with a KV cache, and the default here. `kv="compact"` is not theirs.
    - `use_cache=False` in `generate()`: every step runs the whole sequence again, and its last token selects. This is
      their original version.
    - `reselect=True`: the KV cache holds all tokens in all layers, and every new token selects those that it sees. This
      is their version with a token mask.

    The paper's figures come from the variants that select at every step.

    Parameters
    ----------
    reselect : bool
        Default False: select once. True: select again for every new token. Dropped tokens are masked in the layers from
        k on and not removed, so nothing gets faster or smaller.
    """

    name: ClassVar[str] = "fastv"
    scores: ClassVar[str] = "the last prompt token's attention, one language-model layer"
    paper: ClassVar[str] = "arXiv 2403.06764"
    prunes: ClassVar[tuple[str, ...]] = ("language",)
    kv: ClassVar[str] = "full"
    operations: ClassVar[tuple[str, ...]] = ("row_scores", "compact")
    selects: ClassVar[bool] = False
    rounds_up: ClassVar[bool] = False

    reselect: bool = False

    def check(self) -> None:
        check_bool("reselect", self.reselect)

    def keep_prompt(self, scores: Tensor, is_image: Tensor, keep: int | Tensor) -> Tensor:
        """Which tokens of the prompts stay.

        Parameters
        ----------
        scores : Tensor[B, L], float32
            From `vtc.ops.row_scores` with the last prompt token's query and the prompt's mask. NaN counts as -inf.
        is_image : Tensor[B, L], bool
            True at image tokens.
        keep : int or Tensor[B], int64
            Number of image tokens that stay in each prompt, over all its images together.

        Returns
        -------
        Tensor[B, L], bool
            True at every text token, and at the `keep` image tokens with the largest scores. Of equal scores the
            earlier one stays.
        """
        return keep_best(scores, is_image, keep)


def keep_best(scores: Tensor, is_image: Tensor, keep: int | Tensor) -> Tensor:
    """All text, and the `keep` image tokens with the largest scores, `[B, L]` bool; see `FastV.keep_prompt`."""
    rank = rank_of(scores.masked_fill(scores.isnan(), float("-inf")), is_image)
    return ~is_image | (rank < (keep.unsqueeze(1) if isinstance(keep, Tensor) else keep))


def rank_of(scores: Tensor, candidates: Tensor) -> Tensor:
    """The rank 0, 1, ... of each candidate in its row, the larger score first, then the earlier position.

    Parameters
    ----------
    scores : Tensor[B, L], floating point
    candidates : Tensor[B, L], bool

    Returns
    -------
    Tensor[B, L], int64
        All others come after the candidates.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, candidates.gather(1, order).int().sort(dim=1, descending=True, stable=True).indices)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
