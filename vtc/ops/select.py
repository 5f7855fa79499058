"""select: the tokens with the largest scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.ops.checks import check_devices, shapes
from vtc.ops.compact import compact
from vtc.ops.dispatch import implementation, register
from vtc.ops.topk import check_scores, dtype_of_total, topk


def select(
    scores: Tensor, x: Tensor, k: int, *, ensemble: str = "sum", backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` tokens of `x` with the largest scores, in their order: `topk` and `compact`. Differentiable in `x`.

    One launch takes rows of up to 1024 scores. Longer rows, and an `x` that requires a gradient, take the launches of
    `topk` and `compact`, with the same results. An image's result does not depend on the other images of the batch.

    Parameters
    ----------
    scores : Tensor[B, N] or [L, B, N] or [L, B, H, N], floating point
        Any strides. Heads are averaged, then layers are combined. NaN counts as -inf; ties go to the lower index.
    x : Tensor[B, N, ...], any dtype
        Any strides.
    k : int
        1 <= k <= N.
    ensemble : {"sum", "mean", "max", "min"}
        How the L layers are combined. A NaN in a layer makes the combination NaN.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    features : Tensor[B, K, ...], the dtype of `x`
        Contiguous.
    indices : Tensor[B, K], int64
        Ascending.
    total : Tensor[B, N], float32 (float64 for float64 scores)
        The combined scores.

    Raises
    ------
    ValueError
        As `topk`; if `x` has other images or tokens than the scores, or is on another device.
    """
    num_images, num_tokens = check_scores("select", scores, k, ensemble)
    if x.shape[:2] != (num_images, num_tokens):
        raise ValueError(f"select: x must be [B, N, ...] = [{num_images}, {num_tokens}, ...], got {shapes(x)}.")
    check_devices("select", scores=scores, x=x)
    scores = scores.detach()
    if torch.is_grad_enabled() and x.requires_grad:
        total = scores.new_empty((num_images, num_tokens), dtype=dtype_of_total(scores))
        indices = topk(scores, k, ensemble=ensemble, total=total, backend=backend)
        return compact(x, indices, backend=backend), indices, total
    return torch.ops.vtc.select(scores, x, k, ensemble, backend)


def _fake(scores: Tensor, x: Tensor, k: int, *_: str) -> tuple[Tensor, Tensor, Tensor]:
    features = x.new_empty((x.shape[0], k, *x.shape[2:]))
    indices = x.new_empty((x.shape[0], k), dtype=torch.int64)
    return features, indices, x.new_empty(x.shape[:2], dtype=dtype_of_total(scores))


@register("select(Tensor scores, Tensor x, SymInt k, str ensemble, str backend) -> (Tensor, Tensor, Tensor)", _fake)
def _select(scores: Tensor, x: Tensor, k: int, ensemble: str, backend: str) -> Any:
    return implementation("select", scores.device, backend)(scores, x, k, ensemble=ensemble)
