"""The selection of K patches by the scores of several layers and heads, and their features."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import Accuracy, equal
from bench.workloads.base import SCORED, Shape, Workload, compiled, random_tensor
from vtc import ops, reference


class Select(Workload):
    """Providers return the features, the indices and the combined scores."""

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        """Distinct scores whose sums are exact: neither ties nor the order of additions decide the indices."""
        images, patches, heads = shape["B"] * shape["T"], shape["N"] - 1, shape["H"]
        number = random_tensor(images, patches, dtype=torch.float32, device=device).argsort(1)
        scores = number.float().expand(SCORED, heads, -1, -1).transpose(1, 2) * 2**-10
        hidden = random_tensor(images, shape["N"], heads * shape["D"], dtype=dtype, device=device)
        return scores.contiguous(), hidden[:, 1:], shape["K"]

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """scores of 3 layers: 3·4·B·T·H·(N - 1); combined: 4·B·T·(N - 1); indices: 8·B·T·K; features, read and written:
        2·B·T·K·H·D·size."""
        patches, heads = shape["N"] - 1, shape["H"]
        scores = 4 * patches * (SCORED * heads + 1)
        return shape["B"] * shape["T"] * (scores + shape["K"] * (8 + 2 * heads * shape["D"] * size))

    def providers(self) -> dict[str, Callable[..., Any]]:
        def separate(scores: Tensor, x: Tensor, k: int) -> Any:
            total = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
            indices = ops.topk(scores, k, total=total, backend="triton")
            return ops.compact(x, indices, backend="triton"), indices, total

        def by_torch(scores: Tensor, x: Tensor, k: int) -> Any:
            total = scores.mean(dim=2).sum(dim=0)
            indices = total.topk(k).indices.sort().values
            return x.gather(1, indices.unsqueeze(2).expand(-1, -1, x.shape[2])), indices, total

        return {
            "triton": functools.partial(ops.select, backend="triton"),
            "topk+compact": separate,
            "reference": reference.select,
            "compiled": compiled(reference.select),
            "torch.topk": by_torch,
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        scores, x, k = inputs
        features, indices, total = result
        accuracy = Accuracy("scores")
        accuracy.add(total, *(scores.to(d).mean(dim=2).sum(dim=0) for d in (torch.float32, torch.float64)))
        accuracy.check()
        equal("indices", indices, reference.topk(scores, k))
        equal("features", features, reference.compact(x, indices))
        return [accuracy]
