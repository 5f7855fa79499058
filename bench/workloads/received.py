"""The attention that each token receives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import Accuracy, chunks
from bench.workloads.base import Shape, Workload, compiled, random_layers
from vtc import ops, reference


class Received(Workload):
    needs_keep = False

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        """query, key, and the log-sum-exp that the layer's forward pass has."""
        query, key = random_layers(shape, 2, dtype, device)
        blocks = [_logits(block.float(), key.float()).logsumexp(dim=3) for block in query.split(64, dim=2)]
        return query, key, torch.cat(blocks, dim=2)

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """query and key: 2·B·T·H·N·D·size, log-sum-exp: 4·B·T·H·N, result: 4·B·T·(N - 1)."""
        heads = shape["H"] * shape["N"] * (2 * shape["D"] * size + 4)
        return shape["B"] * shape["T"] * (heads + 4 * (shape["N"] - 1))

    def providers(self) -> dict[str, Callable[..., Any]]:
        def by_reference(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
            return reference.received(query, key, skip=1, lse=lse)

        return {
            "triton": lambda q, k, lse: ops.received(q, k, skip=1, lse=lse, backend="triton"),
            "triton-no-lse": lambda q, k, lse: ops.received(q, k, skip=1, backend="triton"),
            "reference": by_reference,
            "compiled": compiled(by_reference),
            "full-weights": lambda q, k, lse: _of_weights(q, k),
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        query, key, _ = inputs
        accuracy = Accuracy("shares")
        for part in chunks(query):
            plain = _of_weights(query[part], key[part])
            accuracy.add(result[part], plain, _of_weights(query[part].double(), key[part].double()))
        return [accuracy.check()]


def _logits(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT * query.shape[-1] ** -0.5


def _of_weights(query: Tensor, key: Tensor) -> Tensor:
    """The mean of eager attention's probabilities over heads and queries, as everyone computes it."""
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = _logits(query, key).softmax(dim=-1, dtype=wide).to(query.dtype)
    return weights.to(wide).mean(dim=(1, 2))[:, 1:]
