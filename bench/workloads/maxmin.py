"""Greedy max-min distance, the rule of DivPrune."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import Accuracy, equal
from bench.workloads.base import Shape, Workload, compiled, random_tensor
from vtc import ops, reference


class MaxMin(Workload):
    sizes = "BTN"
    floats = False

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        """Cosine similarities of tokens with 32 features."""
        size = shape["B"] * shape["T"], shape["N"] - 1, 32
        tokens = torch.nn.functional.normalize(random_tensor(*size, dtype=torch.float32, device=device), dim=2)
        return tokens @ tokens.mT, shape["K"]

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """similarity: 4·B·T·(N - 1)², indices and order: 16·B·T·K."""
        return shape["B"] * shape["T"] * (4 * (shape["N"] - 1) ** 2 + 16 * shape["K"])

    def providers(self) -> dict[str, Callable[..., Any]]:
        return {
            "triton": functools.partial(ops.maxmin, backend="triton"),
            "reference": reference.maxmin,
            "compiled": compiled(reference.maxmin),
            "image by image": _image_by_image,
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        for what, one, other in zip(("indices", "order"), result, reference.maxmin(*inputs), strict=True):
            equal(what, one, other)
        return []


def _image_by_image(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """One image after the other, one token after the other: what a method without batches does."""
    orders = []
    for image in similarity.clone():
        chosen = [image.fill_diagonal_(float("-inf")).amax(dim=0).argmin()]
        nearest = image[chosen[0]].clone()
        for _ in range(k - 1):
            nearest[chosen[-1]] = float("inf")
            chosen.append(nearest.argmin())
            nearest = torch.maximum(nearest, image[chosen[-1]])
        orders.append(torch.stack(chosen))
    order = torch.stack(orders)
    return order.sort(dim=1).values, order
