"""cls_probs: the [CLS] token's attention probabilities in several layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.ops.checks import check_devices, check_scale, is_int, shapes
from vtc.ops.dispatch import implementation, register


def cls_probs(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    scale: float | None = None,
    skip: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Attention probabilities of one query row, the [CLS] token's, over all keys, in several layers at once.

    See `vtc.reference.cls_probs` for the formula. Not differentiable. An image's probabilities do not depend on the
    other images of the batch, and repeated calls give the same bits.

    Parameters
    ----------
    queries : sequence of Tensor[B, H, D], floating point
        The [CLS] row of each layer. All layers have one shape and one dtype.
    keys : sequence of Tensor[B, H, N, D], same dtype and device
        Of each layer, any strides; nothing is copied. Layers with the same strides take one launch.
    scale : float, optional
        ``D ** -0.5`` when not given.
    skip : int
        0 <= skip < N leading columns are left out of the result, but stay in the denominator ([CLS]: 1).
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[L, B, H, N - skip], float32
        Contiguous.

    Raises
    ------
    ValueError
        For shapes, dtypes, devices or a `skip` that do not fit, and for a backend that cannot run.
    """
    queries, keys = tuple(queries), tuple(keys)
    if not keys or len(queries) != len(keys):
        raise ValueError(
            f"cls_probs: queries and keys must be sequences, one of each per layer, got {len(queries)} and {len(keys)}."
        )
    size = keys[0].shape
    if (
        len(size) != 4
        or any(key.shape != size for key in keys)
        or any(q.shape != (*size[:2], size[3]) for q in queries)
    ):
        raise ValueError(
            "cls_probs: queries must be [B, H, D] and keys [B, H, N, D], all layers of one shape, "
            f"got {shapes(*queries, *keys)}."
        )
    dtypes = {tensor.dtype for tensor in (*queries, *keys)}
    if len(dtypes) > 1 or not keys[0].is_floating_point():
        got = " and ".join(sorted(map(str, dtypes)))
        raise ValueError(f"cls_probs: queries and keys must share one floating-point dtype, got {got}.")
    if 0 in (size[1], size[3]):
        raise ValueError(f"cls_probs: needs at least one head and one feature, got {shapes(queries[0], keys[0])}.")
    if not is_int(skip) or not 0 <= skip < size[2]:
        raise ValueError(
            f"cls_probs: skip must be an int with 0 <= skip < N = {size[2]}, or no column is left; got {skip!r}."
        )
    check_scale("cls_probs", scale)
    if len({tensor.device for tensor in (*queries, *keys)}) > 1:
        named = {f"queries[{i}]": query for i, query in enumerate(queries)}
        check_devices("cls_probs", **named, **{f"keys[{i}]": key for i, key in enumerate(keys)})
    queries, keys = (tuple(x.detach() if x.requires_grad else x for x in own) for own in (queries, keys))
    return torch.ops.vtc.cls_probs(queries, keys, scale, skip, backend)


def _fake(queries: Sequence[Tensor], keys: Sequence[Tensor], scale: float | None, skip: int, *_: str) -> Tensor:
    num_images, num_heads, num_tokens, _features = keys[0].shape
    return keys[0].new_empty((len(keys), num_images, num_heads, num_tokens - skip), dtype=torch.float32)


@register("cls_probs(Tensor[] queries, Tensor[] keys, float? scale, SymInt skip, str backend) -> Tensor", _fake)
def _cls_probs(
    queries: Sequence[Tensor], keys: Sequence[Tensor], scale: float | None, skip: int, backend: str
) -> Tensor:
    return implementation("cls_probs", keys[0].device, backend)(queries, keys, scale=scale, skip=skip)
