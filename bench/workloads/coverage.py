"""Greedy maximum coverage: K patches of each image."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.accuracy import Accuracy, equal
from bench.workloads.base import Shape, Workload, compiled, random_tensor
from vtc import ops, reference

TEMPERATURE = 0.2  # MMTok's


class Coverage(Workload):
    """Of the softmax similarity of patches that lie near each other: their features change slowly along the image."""

    sizes = "BTN"
    floats = False

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        x = random_tensor(shape["B"] * shape["T"], shape["N"] - 1, 64, dtype=torch.float32, device=device)
        smooth = x.cumsum(dim=1)  # a random walk
        return reference.similarity(smooth, smooth, temperature=TEMPERATURE), shape["K"]

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """For B·T images: cover 4·(N - 1)², indices and order 16·K."""
        return shape["B"] * shape["T"] * (4 * (shape["N"] - 1) ** 2 + 16 * shape["K"])

    def providers(self) -> dict[str, Callable[..., Any]]:
        return {
            "triton": functools.partial(ops.coverage, backend="triton"),
            "reference": reference.coverage,
            "compiled": compiled(reference.coverage),
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        for what, actual, expected in zip(("indices", "order"), result, reference.coverage(*inputs), strict=True):
            equal(what, actual, expected)
        return []
