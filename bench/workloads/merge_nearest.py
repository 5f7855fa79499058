"""VisionZip's merging."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import Accuracy, WrongResult
from bench.workloads.base import Shape, Workload, compiled, random_indices, random_tensor
from vtc import ops, reference


class MergeNearest(Workload):
    """VisionZip's merging: each patch joins its nearest target, by the mean of its keys over the heads.

    Weights differ from token to token, so that the weighted mean differs from a plain one.
    """

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        images, patches = shape["B"] * shape["T"], shape["N"] - 1
        x = random_tensor(images, shape["N"], shape["H"] * shape["D"], dtype=dtype, device=device)[:, 1:]
        key = random_tensor(images, patches, shape["D"], dtype=torch.float32, device=device, seed=1)
        weight = random_tensor(images, patches, dtype=torch.float32, device=device).softmax(dim=1)
        return x, key, random_indices(images, patches, shape["K"], device), weight

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """For B·T images: x (N - 1)·H·D·size, features K·H·D·size, key 4·(N - 1)·D, weight 4·(N - 1), targets 8·K."""
        patches, keep, width = shape["N"] - 1, shape["K"], shape["H"] * shape["D"] * size
        return shape["B"] * shape["T"] * (width * (patches + keep) + 4 * patches * (shape["D"] + 1) + 8 * keep)

    def providers(self) -> dict[str, Callable[..., Any]]:
        return {
            "triton": functools.partial(ops.merge_nearest, backend="triton"),
            "reference": reference.merge_nearest,
            "compiled": compiled(reference.merge_nearest),
            "one-hot": _by_one_hot,
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        """Each patch that is not a target is in one sum, that of its most similar target, and the sum is exact."""
        x, key, targets, weight = inputs
        features, mix = result
        accuracy = Accuracy("features")
        for image in range(len(x)):
            unit = torch.nn.functional.normalize(key[image].double(), dim=1)
            cosines = unit[targets[image]] @ unit.mT
            itself = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, targets[image].unsqueeze(1), True)
            member = (mix[image] != 0) & ~itself
            if not torch.equal(member.sum(dim=0), (~itself.any(dim=0)).long()):
                raise WrongResult("members: a token joins no target or several, or a target joins another")
            if (cosines.masked_fill(~member, 2).amin(dim=0) < cosines.amax(dim=0) - 1e-5).any():  # but for rounding
                raise WrongResult("members: another target is more similar")
            share = torch.where(member, weight[image].double(), 0.0)
            share = torch.where(member, share / share.sum(dim=1, keepdim=True), 0.0)
            exact = torch.where(itself, 1.0, share)
            accuracy.add(features[image], exact.to(x.dtype) @ x[image], exact @ x[image].double())
        return [accuracy.check()]


def _by_one_hot(x: Tensor, key: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """VisionZip's own steps, all images at once: a one-hot matrix of who joins whom, and a matrix product."""
    images = torch.arange(len(x), device=x.device)[:, None]
    unit = torch.nn.functional.normalize(key, dim=2)
    nearest = (unit[images, targets] @ unit.mT).argmax(dim=1)  # [B, N]
    one_hot = torch.nn.functional.one_hot(nearest, targets.shape[1]).mT * weight.unsqueeze(1)
    one_hot = one_hot.scatter(2, targets.unsqueeze(1).expand(-1, targets.shape[1], -1), 0.0)
    mix = one_hot / one_hot.sum(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    mix = mix.scatter_add(2, targets.unsqueeze(2), torch.ones_like(targets, dtype=mix.dtype).unsqueeze(2))
    return (mix.to(x.dtype) @ x).to(x.dtype), mix
