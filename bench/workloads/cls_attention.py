"""Attention of a vision layer with the [CLS] probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.accuracy import Accuracy, check_attention, eager, plain_row
from bench.workloads.base import Shape, Workload, compiled, random_layers
from vtc import ops, reference


class ClsAttention(Workload):
    needs_keep = False

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        return tuple(random_layers(shape, 3, dtype, device))

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """query, key, value, out: 4·B·T·H·N·D·size; cls_probs: 4·B·T·H·N."""
        return shape["B"] * shape["T"] * shape["H"] * shape["N"] * 4 * (shape["D"] * size + 1)

    def providers(self) -> dict[str, Callable[..., Any]]:
        return {
            "triton": functools.partial(ops.cls_attention, backend="triton"),
            "reference": reference.cls_attention,
            "compiled": compiled(reference.cls_attention),
            "sdpa+row": lambda q, k, v: (sdpa(q, k, v).transpose(1, 2), plain_row(q, k)),
            # What VTC runs where `vtc.ops.fused_is_faster` says no, but there one launch is for all scored layers.
            "sdpa+cls_probs": lambda q, k, v: (
                sdpa(q, k, v).transpose(1, 2),
                ops.cls_probs([q[:, :, 0]], [k], backend="triton")[0],
            ),
            "full-weights": eager,
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        return check_attention(inputs, *result)
