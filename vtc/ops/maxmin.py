"""maxmin: greedy max-min distance, the rule of DivPrune."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.ops import greedy
from vtc.ops.checks import shapes
from vtc.ops.dispatch import implementation, register


def maxmin(
    similarity: Tensor,
    k: int,
    *,
    allowed: Tensor | None = None,
    counts: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Greedy max-min distance: `k` tokens, one after the other, each the one that is least like those chosen.

    See `vtc.reference.maxmin` for the formula. Not differentiable. All backends choose the same tokens in the same
    order. An image's choice does not depend on the other images of the batch.

    Parameters
    ----------
    similarity : Tensor[B, N, N], float32
        Symmetric; row m is read for token m. Of tokens to themselves `similarity` is symmetric up to rounding, which
        then decides where distances are equal. Any strides, nothing is copied; contiguous rows are read fastest.
        The Triton kernel takes N <= 4096.
    k : int
        1 <= k <= N.
    allowed : Tensor[B, N], bool, optional
        False at tokens that may not be chosen; they are when no other is left, the lowest first.
    counts : Tensor[B], int64, optional
        How many tokens an image chooses, 1 to k; k when not given.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    indices : Tensor[B, k], int64
        The chosen tokens, ascending. Entries from an image's count on are 0.
    order : Tensor[B, k], int64
        The same in the order in which they are chosen.

    Raises
    ------
    ValueError
        For shapes, dtypes, devices or a `k` that do not fit, and for a backend that cannot run. On the CPU also for
        counts outside [1, k].
    """
    greedy.check_choices("maxmin", "similarity", similarity, k, None, allowed, counts)
    if similarity.shape[1] != similarity.shape[2]:
        raise ValueError(f"maxmin: similarity must be [B, N, N], got {shapes(similarity)}.")
    return torch.ops.vtc.maxmin(similarity.detach(), k, allowed, counts, backend)


@register(
    "maxmin(Tensor similarity, SymInt k, Tensor? allowed, Tensor? counts, str backend) -> (Tensor, Tensor)",
    lambda similarity, k, *_: greedy.fake(similarity, k),
)
def _maxmin(similarity: Tensor, k: int, allowed: Tensor | None, counts: Tensor | None, backend: str) -> Any:
    greedy.check_counts("maxmin", counts, k)
    return implementation("maxmin", similarity.device, backend)(similarity, k, allowed=allowed, counts=counts)
