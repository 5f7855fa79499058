"""cls_attention: a vision tower's attention, and the probabilities of its [CLS] row in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.ops.checks import FLOATS, check_devices, check_scale, shapes
from vtc.ops.dispatch import backend_for, implementation, register

# Where `cls_attention` was measured to be no slower than SDPA and `cls_probs` together, by `python -m bench micro`
# (workload `cls_attention`, records under bench/results/): compute capability, dtype, head dim. Nothing yet.
FUSED: frozenset[tuple[tuple[int, int], torch.dtype, int]] = frozenset()


def fused_is_faster(device: torch.device, dtype: torch.dtype, head_dim: int, backend: str = "auto") -> bool:
    """Return whether `cls_attention` is known to be no slower than SDPA and `cls_probs`: it is in `FUSED`.

    Raises
    ------
    ValueError
        As `backend_for`.
    """
    if not FUSED or backend_for("cls_attention", device, backend)[0] != "triton" or device.type != "cuda":
        return False
    if torch.version.hip:  # AMD's GPUs have the same numbers
        return False
    return (torch.cuda.get_device_capability(device), dtype, head_dim) in FUSED


def cls_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention of a vision tower, and in the same pass the probabilities of its first row, the [CLS] token's.

    See `vtc.reference.cls_attention` for the formula. No mask, not causal. Never an N x N matrix. An image's result
    does not depend on the other images of the batch, and repeated calls give the same bits.

    Parameters
    ----------
    query, key, value : Tensor[B, H, N, D], float32, float16 or bfloat16
        One dtype, any strides; nothing is copied. D <= 256.
    scale : float, optional
        ``D ** -0.5`` when not given.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    out : Tensor[B, N, H, D], the dtype of `query`
        Contiguous.
    cls_probs : Tensor[B, H, N], float32
        Softmax of the first query row over all N keys, head by head. Contiguous.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit, for a backend that cannot run, and for inputs that require a
        gradient: the operation is not differentiable.
    """
    if query.ndim != 4 or key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"cls_attention: query, key and value must be [B, H, N, D] of one shape, got {shapes(query, key, value)}."
        )
    if query.dtype not in FLOATS or key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(
            "cls_attention: query, key and value must share one dtype of float32, float16 and bfloat16, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}."
        )
    if 0 in query.shape[1:] or query.shape[3] > 256:
        raise ValueError(f"cls_attention: needs a head, a token and 1 to 256 features, got {shapes(query)}.")
    check_scale("cls_attention", scale)
    check_devices("cls_attention", query=query, key=key, value=value)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError(
            "cls_attention: not differentiable, and an input requires a gradient. Call it under torch.no_grad(), or "
            "use torch.nn.functional.scaled_dot_product_attention and cls_probs."
        )
    return torch.ops.vtc.cls_attention(query, key, value, scale, backend)


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@register("cls_attention(Tensor query, Tensor key, Tensor value, float? scale, str backend) -> (Tensor, Tensor)", _fake)
def _cls_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: str) -> Any:
    return implementation("cls_attention", query.device, backend)(query, key, value, scale=scale)
