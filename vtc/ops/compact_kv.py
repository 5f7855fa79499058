"""compact_kv: the kept tokens of the KV caches of many layers."""

from __future__ import annotations

import operator
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
        Contiguous. Those of one launch share their memory.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit, and for a backend that cannot run. On the CPU also for an index
        outside [0, N); for a GPU see `compact`.
    """
    keys, values = tuple(keys), tuple(values)
    tensors = (*keys, *values)
    checked = tensors[:1] if _are_alike(tensors) else tensors
    if not tensors or len(keys) != len(values) or any(tensor.ndim != 4 for tensor in checked):
        raise ValueError(
            "compact_kv: keys and values must be sequences of [B, H, N, D], one of each per layer, got "
            f"{len(keys)} and {len(values)}: {shapes(*tensors)}."
        )
    num_images, _, num_tokens, _ = tensors[0].shape
    if any((tensor.shape[0], tensor.shape[2]) != (num_images, num_tokens) for tensor in checked):
        raise ValueError(f"compact_kv: keys and values must have one B and one N, got {shapes(*tensors)}.")
    if any(tensor.element_size() > 8 for tensor in checked):
        raise ValueError(f"compact_kv: elements have 1, 2, 4 or 8 bytes, got {tensors[0].dtype}.")
    check_indices("compact_kv", indices, num_images)
    check_devices("compact_kv", indices=indices, **{f"tensor {i}": tensor for i, tensor in enumerate(checked)})
    with torch.no_grad():
        if len(checked) == 1:
            kept = torch.ops.vtc.compact_kv(tensors, indices, backend).unbind()
        else:
            kept = _each_kind(tensors, indices, backend)
    return tuple(kept[: len(keys)]), tuple(kept[len(keys) :])


def _each_kind(tensors: tuple[Tensor, ...], indices: Tensor, backend: str) -> list[Tensor]:
    """The kept tokens of tensors of several shapes, dtypes or strides."""
    groups: list[list[int]] = []  # by comparing, for torch.compile cannot hash a size that it does not know
    for number, tensor in enumerate(tensors):
        for group in groups:
            if _layout(tensor) == _layout(tensors[group[0]]):
                group.append(number)
                break
        else:
            groups.append([number])
    kept = list(tensors)
    for group in groups:
        own = torch.ops.vtc.compact_kv([tensors[number] for number in group], indices, backend)
        for number, tensor in zip(group, own.unbind(), strict=True):
            kept[number] = tensor
    return kept


_kind = operator.attrgetter("dtype", "device")


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all are laid out as the first one, on its device: then a check of that one is a check of all."""
    if torch.compiler.is_compiling():
        return False
    sizes, strides, kinds = [*map(Tensor.size, tensors)], [*map(Tensor.stride, tensors)], [*map(_kind, tensors)]
    return bool(sizes) and sizes.count(sizes[0]) == strides.count(strides[0]) == kinds.count(kinds[0]) == len(sizes)


def _fake(tensors: Sequence[Tensor], indices: Tensor, *_: Any) -> Tensor:
    first, count = tensors[0], indices.shape[1]
    return first.new_empty((len(tensors), *first.shape[:2], count, first.shape[3]))


# One tensor: a compiled graph takes the results of an operator to share no memory.
@register("compact_kv(Tensor[] tensors, Tensor indices, str backend) -> Tensor", _fake)
def _compact_kv(tensors: Sequence[Tensor], indices: Tensor, backend: str) -> Tensor:
    check_range("compact_kv", indices, tensors[0].shape[2])
    kept: Any = implementation("compact_kv", indices.device, backend)(tensors, (), indices)[0]
    return kept if isinstance(kept, Tensor) else torch.stack(kept)  # of the reference, or a compiler changed strides
