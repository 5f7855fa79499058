"""received: the attention that each token receives from all queries, as in HiPrune."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.checks import FLOATS, check_devices, check_scale, is_int, shapes
from vtc.ops.dispatch import implementation, register


def received(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    skip: int = 0,
    lse: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The attention that each token receives: the mean over the heads and over all queries.

    See `vtc.reference.received` for the formula. Not differentiable. No N x N matrix is made. An image's result does
    not depend on the other images of the batch, and repeated calls give the same bits.

    Parameters
    ----------
    query, key : Tensor[B, H, N, D], float32, float16 or bfloat16, one dtype
        Any strides, nothing is copied.
    scale : float, optional
        ``D ** -0.5`` when not given.
    skip : int
        0 <= skip < N leading keys are left out of the result. They stay in the denominator, and their queries count.
    lse : Tensor[B, H, N], float32, optional
        The logarithm of each query's sum of exponentials, as the forward pass has it; computed when not given.
    cu_seqlens : Tensor[S + 1], int64 or int32, optional
        For B = 1: where each of S segments begins, and N. A query attends to its own segment.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[B, N - skip], float32
        Contiguous.

    Raises
    ------
    ValueError
        For shapes, dtypes, devices or a `skip` that do not fit, and for a backend that cannot run. On the CPU also for
        `cu_seqlens` that do not ascend from 0 to N.
    """
    if query.ndim != 4 or query.shape != key.shape or 0 in query.shape[1:]:
        raise ValueError(
            "received: query and key must be [B, H, N, D] of one shape, with at least one head, token and feature, "
            f"got {shapes(query, key)}."
        )
    if query.dtype not in FLOATS or query.dtype != key.dtype:
        raise ValueError(
            "received: query and key must share one dtype, float32, float16 or bfloat16, "
            f"got {query.dtype} and {key.dtype}."
        )
    num_images, num_heads, num_tokens, _ = query.shape
    if not is_int(skip) or not 0 <= skip < num_tokens:
        raise ValueError(f"received: skip must be an int with 0 <= skip < N = {num_tokens}, got {skip!r}.")
    check_scale("received", scale)
    if lse is not None and (lse.dtype != torch.float32 or lse.shape != query.shape[:3]):
        raise ValueError(
            f"received: lse must be float32 [B, H, N] = {[num_images, num_heads, num_tokens]}, "
            f"got {lse.dtype} {shapes(lse)}."
        )
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"received: cu_seqlens must be int32 or int64 [S + 1], got {cu_seqlens.dtype} {shapes(cu_seqlens)}."
            )
        if num_images != 1 or skip:
            raise ValueError(f"received: cu_seqlens needs B = 1 and skip = 0, got B = {num_images} and skip = {skip}.")
    check_devices("received", query=query, key=key, lse=lse, cu_seqlens=cu_seqlens)
    lse = None if lse is None else lse.detach()
    return torch.ops.vtc.received(query.detach(), key.detach(), scale, skip, lse, cu_seqlens, backend)


def _fake(query: Tensor, key: Tensor, scale: float | None, skip: int, *_: object) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2] - skip), dtype=torch.float32)


@register(
    "received(Tensor query, Tensor key, float? scale, SymInt skip, Tensor? lse, Tensor? cu_seqlens, str backend) -> "
    "Tensor",
    _fake,
)
def _received(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    skip: int,
    lse: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] != query.shape[2] or sorted(starts) != starts:
            raise ValueError(
                f"received: cu_seqlens must ascend from 0 to N = {query.shape[2]}, got {starts[:3]} ... {starts[-1]}."
            )
    run = implementation("received", query.device, backend)
    return run(query, key, scale=scale, skip=skip, lse=lse, cu_seqlens=cu_seqlens)
