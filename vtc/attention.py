"""The attention implementation "vtc": SDPA, and where a vision layer is scored also its [CLS] row's probabilities.

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
    layers : list of Tensor [B, H, N] or [B, 1, N], float32
        Of each scored layer, every head's row or their mean.
    ops : list of str
        The operations that made them.
    """

    def __init__(self, config: VTCConfig) -> None:
        self.config = config
        self.layers: list[torch.Tensor] = []
        self.ops: list[str] = []

    def add(self, op: str, rows: torch.Tensor) -> None:
        """Add one layer `[B, H, N]` or `[B, 1, N]` float32, computed by `op`."""
        self.layers.append(rows)
        if op not in self.ops:
            self.ops.append(op)

    def fuses(self, query: torch.Tensor, dropout: float = 0.0) -> bool:
        """Return whether a scored layer takes `cls_attention`: it has no gradient and no dropout."""
        if torch.is_grad_enabled() or dropout:
            return False
        if self.config.fused is not None:
            return self.config.fused
        return ops.fused_is_faster(query.device, query.dtype, query.shape[-1], self.config.backend)

    def pool(self, grid: tuple[int, int], size: int) -> None:
        """Average the scores of each `size` x `size` patches: `[B, 1, N / size**2]` per layer, of patches `grid`."""
        pictures = [rows.mean(1, keepdim=True).unflatten(2, grid) for rows in self.layers]
        self.layers = [torch.nn.functional.avg_pool2d(rows, size).flatten(2) for rows in pictures]

    def select(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the indices `[B, count]` of the patches kept and the combined scores `[B, N]` float32."""
        if not self.layers:
            raise RuntimeError('no scored layer ran: is the vision tower\'s attention implementation still "vtc"?')
        layers = torch.stack(self.layers)
        total = torch.empty_like(layers[0, :, 0])
        indices = ops.topk(layers, count, ensemble=self.config.ensemble, total=total, backend=self.config.backend)
        return indices, total


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
    if vtc_scores is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    backend = vtc_scores.config.backend
    if vtc_scores.fuses(query, kwargs.get("dropout", 0.0)):
        out, rows = ops.cls_attention(query, key, value, scale=scaling, backend=backend)
        vtc_scores.add("cls_attention", rows[:, :, 1:])
        return out, None
    row = ops.row_scores(query[:, :, 0], key, scale=scaling, skip=1, backend=backend)
    vtc_scores.add("row_scores", row.unsqueeze(1))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def register() -> None:
    """Make "vtc" a value of transformers' `attn_implementation`, with the mask that SDPA expects."""
    AttentionInterface.register(NAME, vtc_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
