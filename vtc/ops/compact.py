"""compact: the kept tokens of hidden states, positions and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from vtc.ops.checks import check_devices, check_indices, check_range, shapes
from vtc.ops.dispatch import implementation, register


@overload
def compact(x: Tensor, indices: Tensor, *, backend: str = "auto") -> Tensor: ...
@overload
def compact(x: Sequence[Tensor], indices: Tensor, *, backend: str = "auto") -> tuple[Tensor, ...]: ...
def compact(x: Tensor | Sequence[Tensor], indices: Tensor, *, backend: str = "auto") -> Tensor | tuple[Tensor, ...]:
    """Tokens of `x` by index, image by image: ``result[b, k] = x[b, indices[b, k]]``. Differentiable in `x`.

    Parameters
    ----------
    x : Tensor[B, N, ...] or a sequence of such tensors, any dtypes
        Any strides. Several tensors (hidden states, positions, masks) have one B and one N, and take one launch.
    indices : Tensor[B, K], int64
        Each in [0, N). They need be neither sorted nor unique.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[B, K, ...] or a tuple of them, the dtypes of `x`
        Contiguous.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit, and for a backend that cannot run. On the CPU also for an index
        outside [0, N). On a GPU that check is left out, because it would have to synchronise: there the kernel reads
        nothing for such an index and gives zeros, and PyTorch reports a device-side assertion.
    """
    tensors = (x,) if isinstance(x, Tensor) else tuple(x)
    size = tensors[0].shape[:2] if tensors else ()
    if len(size) != 2 or any(tensor.shape[:2] != size for tensor in tensors):
        raise ValueError(f"compact: x must be [B, N, ...], several with one B and N, got {shapes(*tensors)}.")
    check_indices("compact", indices, size[0])
    check_devices("compact", indices=indices, **{f"x[{i}]": tensor for i, tensor in enumerate(tensors)})
    result = torch.ops.vtc.compact(tensors, indices, backend)
    return result[0] if isinstance(x, Tensor) else tuple(result)


def _fake(tensors: Sequence[Tensor], indices: Tensor, *_: Any) -> list[Tensor]:
    return [tensor.new_empty((*indices.shape, *tensor.shape[2:])) for tensor in tensors]


@register("compact(Tensor[] tensors, Tensor indices, str backend) -> Tensor[]", _fake)
def _compact(tensors: Sequence[Tensor], indices: Tensor, backend: str) -> list[Tensor]:
    check_range("compact", indices, tensors[0].shape[1])
    return list(implementation("compact", indices.device, backend)(tuple(tensors), indices))


def _save_indices(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, indices, _ = inputs
    ctx.save_for_backward(indices)
    ctx.shapes = [tensor.shape for tensor in tensors]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
    (indices,) = ctx.saved_tensors
    images = torch.arange(len(indices), device=indices.device).unsqueeze(1)

    def scatter(grad: Tensor | None, shape: torch.Size) -> Tensor | None:
        if grad is None:
            return None
        # accumulate: an index may occur twice. Unlike scatter_add, index_put is deterministic on CUDA.
        return grad.new_zeros(shape).index_put((images, indices), grad, accumulate=True)

    return [scatter(grad, shape) for grad, shape in zip(grads, ctx.shapes, strict=True)], None, None


torch.library.register_autograd("vtc::compact", _backward, setup_context=_save_indices)
