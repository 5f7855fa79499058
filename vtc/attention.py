"""The attention implementation "vtc": SDPA that can also add up the [CLS] row's probabilities.

An attention function knows nothing but its arguments. A scored vision layer is therefore told so by one more argument,
`vtc_scores`; every other layer, the language model's included, is plain SDPA.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vtc import ops
from vtc.config import VTCConfig

NAME = "vtc"


class ClsScores:
    """The [CLS] scores of one batch of images, layer after layer.

        s[n] = ensemble over the scored layers l of  1/H * sum_h softmax_j(q_lh[CLS] . k_lh[j] / sqrt(d))[n]

    with j over all 1+N keys. One object belongs to one pass through the vision tower.

    Attributes
    ----------
    total : Tensor [B, N] float32, or None before the first scored layer
    """

    def __init__(self, config: VTCConfig) -> None:
        self.config = config
        self.total: torch.Tensor | None = None
        self.layers = 0

    @torch.no_grad()
    def add(self, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> None:
        """Add one layer: query `[B, H, D]` of the [CLS] token, key `[B, H, 1+N, D]`, any strides."""
        self.layers += 1
        summed = self.config.ensemble in ("sum", "mean")
        into = self.total if summed else None
        row = ops.row_scores(query, key, scale=scale, skip=1, out=into, backend=self.config.backend)
        if summed or self.total is None:
            self.total = row
        else:
            self.total = (torch.maximum if self.config.ensemble == "max" else torch.minimum)(self.total, row)

    def result(self) -> torch.Tensor:
        """Scores `[B, N]` float32 of the layers added."""
        if self.total is None:
            raise RuntimeError('no scored layer ran: is the vision tower\'s attention implementation still "vtc"?')
        return self.total / self.layers if self.config.ensemble == "mean" else self.total


def vtc_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    vtc_scores: ClsScores | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA over query `[B, H, N, D]`, key and value `[B, H_kv, M, D]`, any strides; returns `([B, N, H, D], None)`.

    With `vtc_scores` the first query row's probabilities are added to it: O(N) more memory, never an N x N matrix.
    """
    if vtc_scores is not None:
        vtc_scores.add(query[:, :, 0], key, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def register() -> None:
    """Make "vtc" a value of transformers' `attn_implementation`, with the mask that SDPA expects."""
    AttentionInterface.register(NAME, vtc_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
