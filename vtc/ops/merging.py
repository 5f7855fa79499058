"""Shared by `merge_neighbors` and `merge_nearest`: the checks of their tensors, and the gradient of a weighted sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.ops.checks import FLOATS, check_devices, shapes


def check_tensors(
    op: str, x: Tensor, key: Tensor, targets: Tensor, weight: Tensor, counts: Tensor | None = None
) -> None:
    if x.ndim != 3 or key.ndim != 3 or x.shape[:2] != key.shape[:2] or 0 in (x.shape[1], x.shape[2], key.shape[2]):
        raise ValueError(
            f"{op}: x must be [B, N, D] and key [B, N, C] with one B and N, at least one token and one feature, "
            f"got {shapes(x, key)}."
        )
    if x.dtype not in FLOATS or key.dtype not in FLOATS:
        raise ValueError(f"{op}: x and key must be float32, float16 or bfloat16, got {x.dtype} and {key.dtype}.")
    if targets.ndim != 2 or len(targets) != len(x) or targets.dtype != torch.int64 or not targets.shape[1]:
        raise ValueError(
            f"{op}: targets must be int64 [B, K] with B = {len(x)} and at least one target, "
            f"got {targets.dtype} {shapes(targets)}."
        )
    if weight.dtype != torch.float32 or weight.shape != x.shape[:2]:
        raise ValueError(
            f"{op}: weight must be float32 [B, N] = {list(x.shape[:2])}, got {weight.dtype} {shapes(weight)}."
        )
    if counts is not None and (counts.dtype != torch.int64 or counts.shape != x.shape[:1]):
        raise ValueError(f"{op}: counts must be int64 [B] = [{len(x)}], got {counts.dtype} {shapes(counts)}.")
    check_devices(op, x=x, key=key, targets=targets, weight=weight, counts=counts)


def fake(x: Tensor, num_outputs: int) -> tuple[Tensor, Tensor]:
    """`features` and `mix` without their values."""
    features = x.new_empty((x.shape[0], num_outputs, x.shape[2]))
    return features, x.new_empty((x.shape[0], num_outputs, x.shape[1]), dtype=torch.float32)


def register_gradient(op: str) -> None:
    """Make the operator differentiable in `x`, its first argument: ``features = mix · x``."""
    torch.library.register_autograd(f"vtc::{op}", _backward, setup_context=_save_mix)


def _save_mix(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, mix = output
    ctx.save_for_backward(mix)
    ctx.num_others = len(inputs) - 1


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (mix,) = ctx.saved_tensors
    gradient = None if grad is None else (mix.mT @ grad.float()).to(grad.dtype)
    return gradient, *[None] * ctx.num_others
