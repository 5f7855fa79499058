"""row_scores: how much one query row attends to every key."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.checks import check_devices, check_scale, is_int, shapes
from vtc.ops.dispatch import implementation, register


def row_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    skip: int = 0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much one query row attends to every key: softmax over the keys in float32, averaged over the heads.

    See `vtc.reference.row_scores` for the formula. Not differentiable. An image's scores do not depend on the other
    images of the batch, and repeated calls give the same bits.

    Parameters
    ----------
    query : Tensor[B, H, D], floating point
        The [CLS] row of a vision tower, or the last prompt token's of a language model.
    key : Tensor[B, Hkv, N, D], same dtype and device
        Any strides; nothing is copied. H is a multiple of Hkv (grouped-query attention).
    scale : float, optional
        ``D ** -0.5`` when not given.
    skip : int
        0 <= skip < N leading columns are left out of the result, but stay in the denominator ([CLS]: 1).
    mask : Tensor[B, N], bool, optional
        False where a key gets no attention (padding). A row whose keys are all masked is NaN.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[B, N - skip], float32
        Contiguous.

    Raises
    ------
    ValueError
        For shapes, dtypes, devices or a `skip` that do not fit, and for a backend that cannot run.
    """
    if query.ndim != 3 or key.ndim != 4 or (query.shape[0], query.shape[2]) != (key.shape[0], key.shape[3]):
        raise ValueError(
            "row_scores: query must be [B, H, D] and key [B, Hkv, N, D] with the same B and D, "
            f"got {shapes(query, key)}."
        )
    if query.dtype != key.dtype or not query.is_floating_point():
        raise ValueError(
            f"row_scores: query and key must share one floating-point dtype, got {query.dtype} and {key.dtype}."
        )
    num_images, num_key_heads, num_tokens, num_features = key.shape
    if 0 in (query.shape[1], num_key_heads, num_features) or query.shape[1] % num_key_heads:
        raise ValueError(
            "row_scores: needs at least one feature and one head, and a multiple of key heads as query heads, "
            f"got {shapes(query, key)}."
        )
    if not is_int(skip) or not 0 <= skip < num_tokens:
        raise ValueError(
            f"row_scores: skip must be an int with 0 <= skip < N = {num_tokens}, or no column is left; got {skip!r}."
        )
    check_scale("row_scores", scale)
    check_devices("row_scores", query=query, key=key, mask=mask)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (num_images, num_tokens)):
        raise ValueError(
            f"row_scores: mask must be bool [B, N] = [{num_images}, {num_tokens}], got {mask.dtype} {shapes(mask)}. "
            "Use mask.bool() for a mask of 0 and 1."
        )
    return torch.ops.vtc.row_scores(query.detach(), key.detach(), scale, skip, mask, backend)


@register(
    "row_scores(Tensor query, Tensor key, float? scale, SymInt skip, Tensor? mask, str backend) -> Tensor",
    lambda _, key, scale, skip, *__: key.new_empty((key.shape[0], key.shape[2] - skip), dtype=torch.float32),
)
def _row_scores(
    query: Tensor, key: Tensor, scale: float | None, skip: int, mask: Tensor | None, backend: str
) -> Tensor:
    return implementation("row_scores", query.device, backend)(query, key, scale=scale, skip=skip, mask=mask)
