"""The kept patches of hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.accuracy import Accuracy, equal
from bench.workloads.base import Shape, Workload, compiled, random_indices, random_tensor
from vtc import ops, reference


class Compact(Workload):
    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        images = shape["B"] * shape["T"]
        hidden = random_tensor(images, shape["N"], shape["H"] * shape["D"], dtype=dtype, device=device)
        return hidden[:, 1:], random_indices(images, shape["N"] - 1, shape["K"], device)

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """features read and written: 2·B·T·K·H·D·size, indices: 8·B·T·K."""
        return shape["B"] * shape["T"] * shape["K"] * (2 * shape["H"] * shape["D"] * size + 8)

    def providers(self) -> dict[str, Callable[..., Any]]:
        return {
            "triton": functools.partial(ops.compact, backend="triton"),
            "reference": reference.compact,
            "compiled": compiled(reference.compact),
            "gather": lambda x, indices: x.gather(1, indices.unsqueeze(2).expand(-1, -1, x.shape[2])),
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        equal("features", result, reference.compact(*inputs))
        return []
