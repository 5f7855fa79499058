"""`scored_layers`: attention, [CLS] probabilities and selection as one path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.accuracy import Accuracy, WrongResult, check_attention, eager, equal, head_mean, plain_row
from bench.workloads.base import SCORED, Shape, Workload, compiled, random_layers, random_tensor
from bench.workloads.cls_attention import ClsAttention
from bench.workloads.compact import Compact
from vtc import ops, reference


class ScoredLayers(Workload):
    """Attention and scores of three layers, and `select`: everything that VTC adds to a tower or replaces in it.

    Providers return the last layer's attention, the combined scores, the indices and the kept features.
    """

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        tensors = random_layers(shape, 3 * SCORED, dtype, device)
        hidden = random_tensor(shape["B"] * shape["T"], shape["N"], shape["H"] * shape["D"], dtype=dtype, device=device)
        return [tuple(tensors[3 * i : 3 * i + 3]) for i in range(SCORED)], hidden, shape["K"]

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """Three times cls_attention's (whose cls_probs stand for topk's input), compact's, indices once."""
        return SCORED * ClsAttention().bytes_moved(shape, size) + Compact().bytes_moved(shape, size)

    def providers(self) -> dict[str, Callable[..., Any]]:
        def by_reference(layers: Any, hidden: Tensor, k: int) -> Any:
            made = [reference.cls_attention(*layer) for layer in layers]
            total = torch.stack([probs[:, :, 1:].mean(dim=1) for _, probs in made]).sum(dim=0)
            indices = reference.topk(total, k)
            return made[-1][0], total, indices, reference.compact(hidden[:, 1:], indices)

        return {
            "triton": _separate,
            "triton-fused": _fused,
            "reference": by_reference,
            "compiled": compiled(by_reference),
            "sdpa+row": functools.partial(
                _by_torch, attend=lambda q, k, v: (sdpa(q, k, v).transpose(1, 2), plain_row(q, k))
            ),
            "full-weights": functools.partial(_by_torch, attend=eager),
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        layers, hidden, k = inputs
        out, total, indices, kept = result
        attention = check_attention(layers[-1], out, None)
        accuracy = Accuracy("scores")
        plain, oracle = (
            torch.stack([head_mean(q.to(d), key.to(d)) for q, key, _ in layers]).sum(dim=0)
            for d in (hidden.dtype, torch.float64)
        )
        accuracy.add(total, plain, oracle)
        accuracy.check()
        # The selection by the provider's own scores must be exact. If scores tie, a baseline may take either.
        expected = reference.topk(total, k)
        if indices.shape != expected.shape or (indices[:, 1:] <= indices[:, :-1]).any():
            raise WrongResult("indices: not ascending, or not K of them")
        equal("selected scores", total.gather(1, indices).sort(1).values, total.gather(1, expected).sort(1).values)
        equal("features", kept, reference.compact(hidden[:, 1:], indices))
        return [*attention, accuracy]


def _separate(layers: Any, hidden: Tensor, k: int) -> Any:
    """As the integration with transformers does it, with SDPA."""
    outs = [sdpa(*layer) for layer in layers]
    queries, keys, _ = zip(*layers, strict=True)
    probs = ops.cls_probs([query[:, :, 0] for query in queries], keys, skip=1, backend="triton")
    kept, indices, total = ops.select(probs, hidden[:, 1:], k, backend="triton")
    return outs[-1].transpose(1, 2), total, indices, kept


def _fused(layers: Any, hidden: Tensor, k: int) -> Any:
    """As the integration with transformers does it, with `cls_attention`."""
    made = [ops.cls_attention(*layer, backend="triton") for layer in layers]
    probs = torch.stack([probs[:, :, 1:] for _, probs in made])
    kept, indices, total = ops.select(probs, hidden[:, 1:], k, backend="triton")
    return made[-1][0], total, indices, kept


def _by_torch(layers: Any, hidden: Tensor, k: int, *, attend: Callable[..., Any]) -> Any:
    made = [attend(*layer) for layer in layers]
    total = torch.stack([probs[:, :, 1:].float().mean(dim=1) for _, probs in made]).sum(dim=0)
    indices = total.topk(k).indices.sort().values
    kept = hidden[:, 1:].gather(1, indices.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
    return made[-1][0], total, indices, kept
