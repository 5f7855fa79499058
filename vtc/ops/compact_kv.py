"""compact_kv: the kept tokens of the KV caches of many layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.ops.checks import check_devices, check_indices, check_range, shapes
from vtc.ops.dispatch import implementation, register


def compact_kv(
    keys: Sequence[Tensor], values: Sequence[Tensor], indices: Tensor, *, backend: str = "auto"
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Tokens of the keys and values of many layers: ``result[b, h, k] = x[b, h, indices[b, k]]``. Not differentiable.

    Parameters
    ----------
    keys, values : sequences of Tensor[B, H, N, D], any dtype of 1, 2, 4 or 8 bytes
        One per layer, on one device. Any strides; layers may differ in dtype, H and D. All tensors with one shape,
        dtype and strides take one launch.
    indices : Tensor[B, K], int64
        Each in [0, N). They need be neither sorted nor unique.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    keys, values : tuples of Tensor[B, H, K, D], the dtypes given
        Contiguous.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit, and for a backend that cannot run. On the CPU also for an index
        outside [0, N); for a GPU see `compact`.
    """
    keys, values = tuple(keys), tuple(values)
    tensors = (*keys, *values)
    if not tensors or len(keys) != len(values) or any(tensor.ndim != 4 for tensor in tensors):
        raise ValueError(
            "compact_kv: keys and values must be sequences of [B, H, N, D], one of each per layer, got "
            f"{len(keys)} and {len(values)}: {shapes(*tensors)}."
        )
    num_images, _, num_tokens, _ = tensors[0].shape
    if any((tensor.shape[0], tensor.shape[2]) != (num_images, num_tokens) for tensor in tensors):
        raise ValueError(f"compact_kv: keys and values must have one B and one N, got {shapes(*tensors)}.")
    if any(tensor.element_size() > 8 for tensor in tensors):
        raise ValueError(f"compact_kv: elements have 1, 2, 4 or 8 bytes, got {tensors[0].dtype}.")
    check_indices("compact_kv", indices, num_images)
    check_devices("compact_kv", indices=indices, **{f"tensor {i}": tensor for i, tensor in enumerate(tensors)})
    with torch.no_grad():
        kept = torch.ops.vtc.compact_kv(keys, values, indices, backend)
    return tuple(kept[: len(keys)]), tuple(kept[len(keys) :])


def _fake(keys: Sequence[Tensor], values: Sequence[Tensor], indices: Tensor, *_: Any) -> list[Tensor]:
    count = indices.shape[1]
    return [tensor.new_empty((*tensor.shape[:2], count, tensor.shape[3])) for tensor in (*keys, *values)]


@register("compact_kv(Tensor[] keys, Tensor[] values, Tensor indices, str backend) -> Tensor[]", _fake)
def _compact_kv(keys: Sequence[Tensor], values: Sequence[Tensor], indices: Tensor, backend: str) -> list[Tensor]:
    check_range("compact_kv", indices, keys[0].shape[2])
    new_keys, new_values = implementation("compact_kv", indices.device, backend)(keys, values, indices)
    return [*new_keys, *new_values]
