"""The selection of K patches by the scores of several layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.accuracy import Accuracy, equal
from bench.workloads.base import SCORED, Shape, Workload, compiled, random_tensor
from vtc import ops, reference


class TopK(Workload):
    sizes = "BTN"
    floats = False

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        """Distinct scores whose sums are exact: neither ties nor the order of additions decide the indices."""
        size = SCORED, shape["B"] * shape["T"], shape["N"] - 1
        scores = (random_tensor(*size, dtype=torch.float32, device=device).abs() * 2**8).floor().clamp(
            max=2**10
        ) * 2**-22
        scores[0] = random_tensor(*size[1:], dtype=torch.float32, device=device).argsort(1).float() * 2**-10
        return scores, shape["K"]

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """scores of 3 layers: 3·4·B·T·(N - 1), indices: 8·B·T·K."""
        return shape["B"] * shape["T"] * (SCORED * 4 * (shape["N"] - 1) + 8 * shape["K"])

    def providers(self) -> dict[str, Callable[..., Any]]:
        return {
            "triton": functools.partial(ops.topk, backend="triton"),
            "reference": reference.topk,
            "compiled": compiled(reference.topk),
            "torch.topk": lambda scores, k: scores.sum(dim=0).topk(k).indices.sort().values,
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        equal("indices", result, reference.topk(*inputs))
        return []
