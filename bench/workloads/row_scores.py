"""The mean attention of the [CLS] row, without the attention of the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import Accuracy, eager, head_mean, plain_row
from bench.workloads.base import Shape, Workload, compiled, random_layers
from vtc import ops, reference


class RowScores(Workload):
    needs_keep = False

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        return tuple(random_layers(shape, 2, dtype, device))

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """key: B·T·H·N·D·size, the query row: B·T·H·D·size, scores: 4·B·T·(N - 1)."""
        return shape["B"] * shape["T"] * (shape["H"] * (shape["N"] + 1) * shape["D"] * size + 4 * (shape["N"] - 1))

    def providers(self) -> dict[str, Callable[..., Any]]:
        def by_reference(query: Tensor, key: Tensor) -> Tensor:
            return reference.row_scores(query[:, :, 0], key, skip=1)

        return {
            "triton": lambda q, k: ops.row_scores(q[:, :, 0], k, skip=1, backend="triton"),
            "reference": by_reference,
            "compiled": compiled(by_reference),
            "sdpa+row": lambda q, k: plain_row(q, k).mean(dim=1)[:, 1:],  # SDPA itself is left out
            "full-weights": lambda q, k: eager(q, k, k)[1].float().mean(dim=1)[:, 1:],
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        accuracy = Accuracy("scores")
        accuracy.add(result, head_mean(*inputs), head_mean(*(x.double() for x in inputs)))
        return [accuracy.check()]
