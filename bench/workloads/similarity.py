"""Cosine similarity of an image's patches, and its softmax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import Accuracy
from bench.workloads.base import Shape, Workload, compiled, random_tensor
from vtc import ops, reference

TEMPERATURE = 0.2  # MMTok's


class Similarity(Workload):
    """Of all patches to all patches, by their features."""

    sizes = "BTNHD"
    needs_keep = False

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        images, width = shape["B"] * shape["T"], shape["H"] * shape["D"]
        x = random_tensor(images, shape["N"], width, dtype=dtype, device=device)[:, 1:]
        return x, x

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """For B·T images: x (N - 1)·H·D·size, the result 4·(N - 1)²."""
        patches = shape["N"] - 1
        return shape["B"] * shape["T"] * patches * (shape["H"] * shape["D"] * size + 4 * patches)

    def providers(self) -> dict[str, Callable[..., Any]]:
        def by_torch(x: Tensor, y: Tensor) -> Tensor:
            unit_x, unit_y = (torch.nn.functional.normalize(one.float(), dim=2) for one in (x, y))
            return (unit_x @ unit_y.mT / TEMPERATURE).softmax(dim=2)

        call = functools.partial(reference.similarity, temperature=TEMPERATURE)
        return {
            "triton": functools.partial(ops.similarity, temperature=TEMPERATURE, backend="triton"),
            "reference": call,
            "compiled": functools.partial(compiled(reference.similarity), temperature=TEMPERATURE),
            "batched matmul": by_torch,
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        x, y = inputs
        accuracy = Accuracy("similarity")
        for image in range(len(x)):
            unit_x, unit_y = (torch.nn.functional.normalize(one[image].double(), dim=1) for one in (x, y))
            plain = reference.similarity(x[image : image + 1], y[image : image + 1], temperature=TEMPERATURE)[0]
            accuracy.add(result[image], plain, (unit_x @ unit_y.mT / TEMPERATURE).softmax(dim=1))
        return [accuracy.check()]
