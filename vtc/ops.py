"""The operations of VTC: check the arguments, then run the Triton kernel or the PyTorch reference.

This is the only module that chooses between the two. `vtc.reference` specifies what each operation computes; here it
takes one more argument, `backend`:

- ``"auto"``: Triton on CUDA (and ROCm) tensors if triton can be imported, PyTorch otherwise. The environment variable
  ``VTC_BACKEND`` (same three values) replaces "auto", and nothing else.
- ``"triton"``: the kernel, or a `ValueError` that says why it cannot run.
- ``"torch"``: the reference.

The first choice of each kind is logged on the logger "vtc" at level INFO. No operation waits for the GPU.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtc import reference

OPS = ("row_scores", "topk", "compact")
BACKENDS = ("auto", "triton", "torch")

_log = logging.getLogger("vtc")
_announced: set[tuple[str, str]] = set()


def row_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    skip: int = 0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much one query row attends to every key: softmax over the keys in float32, averaged over the heads.

    See `vtc.reference.row_scores` for the formula. Not differentiable. An image's scores do not depend on the other
    images of the batch, and repeated calls give the same bits.

    Parameters
    ----------
    query : Tensor[B, H, D], floating point
    key : Tensor[B, H, N, D], same dtype and device
        Any strides; nothing is copied.
    scale : float, optional
        ``D ** -0.5`` when not given.
    skip : int
        0 <= skip < N leading columns are left out of the result, but stay in the denominator ([CLS]: 1).
    out : Tensor[B, N - skip], float32, optional
        The scores are added to it in place.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[B, N - skip], float32
        `out` if it was given.

    Raises
    ------
    ValueError
        For shapes, dtypes, devices or a `skip` that do not fit, and for a backend that cannot run.
    """
    if query.ndim != 3 or key.ndim != 4 or query.shape != (*key.shape[:2], key.shape[3]):
        raise ValueError(
            "row_scores: query must be [B, H, D] and key [B, H, N, D] with the same B, H and D, "
            f"got {_shapes(query, key)}. For grouped-query attention repeat the key heads first."
        )
    if query.dtype != key.dtype or not query.is_floating_point():
        raise ValueError(
            f"row_scores: query and key must share one floating-point dtype, got {query.dtype} and {key.dtype}."
        )
    num_images, num_heads, num_tokens, num_features = key.shape
    if num_heads == 0 or num_features == 0:
        raise ValueError(f"row_scores: needs at least one head and one feature, got key {_shapes(key)}.")
    if not _is_int(skip) or not 0 <= skip < num_tokens:
        raise ValueError(
            f"row_scores: skip must be an int with 0 <= skip < N = {num_tokens}, or no column is left; got {skip!r}."
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"row_scores: scale must be a finite number or None, got {scale}.")
    _same_device("row_scores", query=query, key=key, out=out)
    if out is not None and (out.dtype != torch.float32 or out.shape != (num_images, num_tokens - skip)):
        raise ValueError(
            f"row_scores: out must be float32 [B, N - skip] = [{num_images}, {num_tokens - skip}], "
            f"got {out.dtype} {_shapes(out)}."
        )
    with torch.no_grad():
        return _choose("row_scores", query.device, backend)(query, key, scale=scale, skip=skip, out=out)


def topk(scores: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """Indices of the `k` largest scores of each row, ascending; ties go to the lower index, NaN counts as -inf.

    The result is always `k` different indices in [0, N), whatever the scores are. Not differentiable.

    Parameters
    ----------
    scores : Tensor[B, N], floating point
        Any strides.
    k : int
        1 <= k <= N.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[B, K], int64

    Raises
    ------
    ValueError
        If `scores` is not a floating-point matrix, if `k` is not an int in [1, N], or if the backend cannot run.
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"topk: scores must be a floating-point [B, N], got {scores.dtype} {_shapes(scores)}.")
    if not _is_int(k) or not 1 <= k <= scores.shape[1]:
        raise ValueError(
            f"topk: k must be an int with 1 <= k <= N = {scores.shape[1]} (one score per token), got {k!r}."
        )
    with torch.no_grad():
        return _choose("topk", scores.device, backend)(scores, k)


def compact(x: Tensor, indices: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows of `x` by index, image by image: ``result[b, k] = x[b, indices[b, k]]``. Differentiable in `x`.

    Parameters
    ----------
    x : Tensor[B, N, D], any dtype
        Any strides; nothing but the kept rows is copied.
    indices : Tensor[B, K], int64
        Each in [0, N). They need be neither sorted nor unique.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[B, K, D], the dtype of `x`
        Contiguous.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit, and for a backend that cannot run. On the CPU also for an index
        outside [0, N). On a GPU that check would have to wait for the device, so it is not made: there the kernel
        reads nothing for such an index and gives a row of zeros, and PyTorch reports a device-side assertion.
    """
    if x.ndim != 3 or indices.ndim != 2 or len(x) != len(indices):
        raise ValueError(f"compact: x must be [B, N, D] and indices [B, K] with the same B, got {_shapes(x, indices)}.")
    if indices.dtype != torch.int64:
        raise ValueError(f"compact: indices must be int64, got {indices.dtype}. Use indices.long().")
    _same_device("compact", x=x, indices=indices)
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= x.shape[1]:
            raise ValueError(
                f"compact: indices must lie in [0, N) = [0, {x.shape[1]}), got values from {low} to {high}."
            )
    return _choose("compact", x.device, backend)(x, indices)


def backend_for(op: str, device: torch.device, backend: str = "auto") -> tuple[str, str]:
    """Which backend an operation uses on a device, and why.

    Parameters
    ----------
    op : {"row_scores", "topk", "compact"}
    device : torch.device
        Where the tensors are.
    backend : {"auto", "triton", "torch"}
        The `backend` argument of the operation.

    Returns
    -------
    choice : {"triton", "torch"}
    reason : str
        A clause for people to read.

    Raises
    ------
    ValueError
        For an unknown operation or backend, a ``VTC_BACKEND`` that is neither, and for "triton" where it cannot run.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    asked = f"backend={backend!r}"
    if backend == "auto" and (override := os.environ.get("VTC_BACKEND")):
        if override not in BACKENDS:
            raise ValueError(
                f"environment variable VTC_BACKEND must be one of {', '.join(BACKENDS)}, or unset; got {override!r}."
            )
        backend, asked = override, f"VTC_BACKEND={override}"
    if backend == "torch":
        return "torch", asked
    on_gpu = device.type == "cuda"  # ROCm builds of torch call their devices cuda, too
    if backend == "auto" and not on_gpu:
        return "torch", f"tensors on {device.type}; the Triton kernels need a GPU"
    triton = _triton()
    if backend == "auto":
        return ("torch", triton.error) if triton.error else ("triton", f"tensors on {device.type}")
    if triton.error:
        raise ValueError(f"{op}: {asked} cannot run, {triton.error}. Install triton, or use backend='torch'.")
    if not on_gpu and not triton.interpreted:
        raise ValueError(
            f"{op}: {asked} needs CUDA tensors, got tensors on {device.type}. Move them to a GPU, use "
            "backend='auto' or 'torch', or set TRITON_INTERPRET=1 before Python starts for Triton's (slow) interpreter."
        )
    return "triton", asked + ("" if on_gpu else ", in Triton's interpreter")


class _Triton(NamedTuple):
    launchers: dict[str, Callable[..., Tensor]]
    interpreted: bool
    error: str


@functools.cache
def _triton() -> _Triton:
    """The kernels, imported on first need: triton is optional, and slow to import."""
    try:
        from vtc_kernels import compact, scores, topk, tuning
    except ImportError as error:
        return _Triton({}, False, f"the Triton kernels cannot be imported ({error})")
    differentiable_compact = functools.partial(_differentiable, compact.compact)
    launchers = {"row_scores": scores.row_scores, "topk": topk.topk, "compact": differentiable_compact}
    return _Triton(launchers, tuning.INTERPRETED, "")


def _choose(op: str, device: torch.device, backend: str) -> Callable[..., Tensor]:
    choice, reason = backend_for(op, device, backend)
    if (op, choice) not in _announced:
        _announced.add((op, choice))
        _log.info("%s uses %s: %s", op, choice, reason)
    return _triton().launchers[op] if choice == "triton" else getattr(reference, op)


class _Compact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, launcher: Callable[..., Tensor], x: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape = x.shape
        return launcher(x, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (indices,) = ctx.saved_tensors
        images = torch.arange(len(indices), device=indices.device).unsqueeze(1)
        # accumulate: an index may occur twice. Unlike scatter_add, index_put is deterministic on CUDA.
        return None, grad.new_zeros(ctx.shape).index_put((images, indices), grad, accumulate=True), None


def _differentiable(launcher: Callable[..., Tensor], x: Tensor, indices: Tensor) -> Tensor:
    return _Compact.apply(launcher, x, indices)


def _same_device(op: str, **tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {got}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(list(tensor.shape)) for tensor in tensors)
