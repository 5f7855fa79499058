"""The [CLS] token's attention probabilities in three layers, without the attention of the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import Accuracy, eager, plain_row
from bench.workloads.base import SCORED, Shape, Workload, compiled, random_layers
from vtc import ops, reference


class ClsProbs(Workload):
    needs_keep = False

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        tensors = random_layers(shape, 2 * SCORED, dtype, device)
        return tuple(tensors[:SCORED]), tuple(tensors[SCORED:])

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """Of 3 layers, keys: B·T·H·N·D·size, query rows: B·T·H·D·size, probabilities: 4·B·T·H·(N - 1)."""
        heads = SCORED * shape["B"] * shape["T"] * shape["H"]
        return heads * ((shape["N"] + 1) * shape["D"] * size + 4 * (shape["N"] - 1))

    def providers(self) -> dict[str, Callable[..., Any]]:
        def by_reference(queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> Tensor:
            return reference.cls_probs([query[:, :, 0] for query in queries], keys, skip=1)

        def each(row: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
            def call(queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> Tensor:
                return torch.stack([row(*layer)[:, :, 1:] for layer in zip(queries, keys, strict=True)])

            return call

        return {
            "triton": lambda qs, ks: ops.cls_probs([q[:, :, 0] for q in qs], ks, skip=1, backend="triton"),
            "reference": by_reference,
            "compiled": compiled(by_reference),
            "sdpa+row": each(plain_row),  # SDPA itself is left out
            "full-weights": each(lambda q, k: eager(q, k, k)[1]),
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        accuracy = Accuracy("cls_probs")
        plain, oracle = (
            torch.stack([plain_row(q.to(d), k.to(d))[:, :, 1:] for q, k in zip(*inputs, strict=True)])
            for d in (inputs[0][0].dtype, torch.float64)
        )
        accuracy.add(result, plain, oracle)
        return [accuracy.check()]
