"""Attention of a vision layer with the [CLS] probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.accuracy import Accuracy, check_attention, eager, plain_row
from bench.workloads.base import Shape, Workload, compiled, random_layers
from bench.workloads.row_scores import RowScores
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
            # What VTC runs where `vtc.ops.fused_is_faster` says no. The mean over heads is part of it.
            "sdpa+row_scores": lambda q, k, v: (
                sdpa(q, k, v).transpose(1, 2),
                ops.row_scores(q[:, :, 0], k, skip=1, backend="triton"),
            ),
            "full-weights": eager,
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        out, probs = result
        if probs is None or probs.ndim == 3:
            return check_attention(inputs, out, probs)
        return check_attention(inputs, out, None) + RowScores().check(inputs[:2], probs)
