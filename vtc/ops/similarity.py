"""similarity: cosine similarity of two sets of tokens, or its softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.checks import FLOATS, check_devices, is_finite, shapes
from vtc.ops.dispatch import implementation, register


def similarity(x: Tensor, y: Tensor, *, temperature: float | None = None, backend: str = "auto") -> Tensor:
    """Cosine similarity of every token of `x` to every token of `y`, or its softmax over the tokens of `y`.

    See `vtc.reference.similarity` for the formula. Not differentiable. An image's result does not depend on the other
    images of the batch, and repeated calls give the same bits.

    Parameters
    ----------
    x : Tensor[B, R, D], float32, float16 or bfloat16
        Any strides, nothing is copied.
    y : Tensor[B, N, D], the dtype of `x`
        Any strides, nothing is copied.
    temperature : float, optional
        Positive. The similarity is divided by it before the softmax; no softmax when not given.
    backend : {"auto", "triton", "torch"}

    Returns
    -------
    Tensor[B, R, N], float32
        The columns are contiguous, as `coverage` reads them.

    Raises
    ------
    ValueError
        For shapes, dtypes, devices or a temperature that do not fit, and for a backend that cannot run.
    """
    if x.ndim != 3 or y.ndim != 3 or x.shape[::2] != y.shape[::2] or 0 in (*x.shape[1:], y.shape[1]):
        raise ValueError(
            "similarity: x must be [B, R, D] and y [B, N, D] with one B and D, at least one token each and one "
            f"feature, got {shapes(x, y)}."
        )
    if x.dtype not in FLOATS or x.dtype != y.dtype:
        raise ValueError(
            f"similarity: x and y must share one dtype, float32, float16 or bfloat16, got {x.dtype} and {y.dtype}."
        )
    if temperature is not None and not (is_finite(temperature) and temperature > 0):
        raise ValueError(
            f"similarity: temperature must be a positive number or None, got {temperature!r}. Use float(temperature) "
            "of a number."
        )
    check_devices("similarity", x=x, y=y)
    return torch.ops.vtc.similarity(x.detach(), y.detach(), temperature, backend)


@register(
    "similarity(Tensor x, Tensor y, float? temperature, str backend) -> Tensor",
    lambda x, y, *_: x.new_empty((x.shape[0], y.shape[1], x.shape[1]), dtype=torch.float32).mT,
)
def _similarity(x: Tensor, y: Tensor, temperature: float | None, backend: str) -> Tensor:
    return implementation("similarity", x.device, backend)(x, y, temperature=temperature)
