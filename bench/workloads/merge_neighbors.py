"""PruMerge's merging."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import Accuracy, WrongResult
from bench.workloads.base import Shape, Workload, compiled, random_indices, random_tensor
from vtc import ops, reference


class MergeNeighbors(Workload):
    """PruMerge's merging: each kept patch absorbs its 32 most similar others, by keys as wide as the features.

    Weights differ from token to token, so that a provider's `mix` shows which tokens it selected.
    """

    NEIGHBORS = 32

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        images, patches = shape["B"] * shape["T"], shape["N"] - 1
        x, key = random_tensor(2, images, shape["N"], shape["H"] * shape["D"], dtype=dtype, device=device)[:, :, 1:]
        weight = random_tensor(images, patches, dtype=torch.float32, device=device).softmax(dim=1)
        return x, key, random_indices(images, patches, shape["K"], device), weight

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """For B·T images: x and key 2·(N - 1)·H·D·size, features (K + 1)·H·D·size, weight 4·(N - 1), targets 8·K."""
        patches, keep, width = shape["N"] - 1, shape["K"], shape["H"] * shape["D"] * size
        return shape["B"] * shape["T"] * (width * (2 * patches + keep + 1) + 4 * patches + 8 * keep)

    def providers(self) -> dict[str, Callable[..., Any]]:
        by_reference = functools.partial(reference.merge_neighbors, neighbors=self.NEIGHBORS)
        return {
            "triton": functools.partial(ops.merge_neighbors, neighbors=self.NEIGHBORS, backend="triton"),
            "reference": by_reference,
            "compiled": compiled(by_reference),
            "gather": functools.partial(_by_gather, neighbors=self.NEIGHBORS),
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        """The right number of neighbors, none of them less similar than one left out, and the exact sum."""
        x, key, targets, weight = inputs
        features, mix = result
        accuracy = Accuracy("features")
        for image in range(len(x)):
            unit = torch.nn.functional.normalize(key[image].double(), dim=1)
            cosines = unit[targets[image]] @ unit.mT
            itself = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, targets[image].unsqueeze(1), True)
            member = (mix[image, :-1] != 0) & ~itself
            if (member.sum(dim=1) != min(self.NEIGHBORS, x.shape[1] - 1)).any():
                raise WrongResult("neighbors: not the right number of them")
            worst = cosines.masked_fill(~member, 2).amin(dim=1)
            best_left = cosines.masked_fill(member | itself, -2).amax(dim=1)
            if (worst < best_left - 1e-5).any():  # closer ones may change places by rounding
                raise WrongResult("neighbors: one left out is more similar")
            exact = torch.where(itself, 1.0, torch.where(member, weight[image].double(), 0.0))
            dropped = weight[image].double().scatter(0, targets[image], 0.0)
            exact = torch.cat([exact, dropped[None]])
            accuracy.add(features[image], exact.to(x.dtype) @ x[image], exact @ x[image].double())
        return [accuracy.check()]


def _by_gather(x: Tensor, key: Tensor, targets: Tensor, weight: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """PruMerge's own steps in the inputs' dtype, all images and targets at once: B x K x 32 x D gathered rows."""
    images = torch.arange(len(x), device=x.device)[:, None]
    unit = torch.nn.functional.normalize(key.float(), dim=2)
    similarity = unit[images, targets] @ unit.mT
    similarity.scatter_(2, targets.unsqueeze(2), float("-inf"))
    nearest = similarity.topk(min(neighbors, x.shape[1] - 1), dim=2).indices  # [B, K, M]
    gathered = x[images.unsqueeze(2), nearest] * weight[images.unsqueeze(2), nearest].unsqueeze(3)
    merged = x[images, targets] + gathered.sum(dim=2)
    dropped = weight.scatter(1, targets, 0.0)
    extra = (x * dropped.unsqueeze(2)).sum(dim=1, keepdim=True)
    mix = torch.zeros_like(similarity).scatter_(
        2, nearest, weight.unsqueeze(1).expand_as(similarity).gather(2, nearest)
    )
    mix.scatter_(2, targets.unsqueeze(2), 1.0)
    return torch.cat([merged, extra], dim=1).to(x.dtype), torch.cat([mix, dropped.unsqueeze(1)], dim=1)
