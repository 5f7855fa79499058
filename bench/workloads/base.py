"""The base class of workloads, and the shapes of real models.

A workload says what is timed: inputs from the shapes of real models, the bytes that have to move, the providers to
compare, and the gate, which checks a provider's result before it is timed.

Shapes: B prompts of T tiles (images for the vision tower), N tokens per image with [CLS], H heads, D features a head,
K kept; L layers, G key heads and F features a head of the language model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import Accuracy

Shape = dict[str, int]
SCORED = 3  # vision layers whose [CLS] probabilities are combined
NEED_GPU = ("triton", "triton-fused", "triton-no-lse", "sdpa+cls_probs", "topk+compact")


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of one model: `tiles, tokens, heads, features` of its vision tower, then those of its KV cache."""

    name: str
    tiles: int
    tokens: int
    heads: int
    features: int
    layers: int
    kv_heads: int
    kv_features: int

    def shape(self, batch: int, keep: int | None) -> Shape:
        sizes = {"B": batch, "T": self.tiles, "N": self.tokens, "H": self.heads, "D": self.features}
        sizes |= {"L": self.layers, "G": self.kv_heads, "F": self.kv_features}
        return sizes | ({} if keep is None else {"K": keep})


# SigLIP has no [CLS] token; its first row takes that place here, for timings at N = 729 and D = 72.
MODELS = (
    Model("LLaVA-1.5", 1, 577, 16, 64, 32, 32, 128),
    Model("LLaVA-NeXT", 5, 577, 16, 64, 32, 8, 128),
    Model("SigLIP-like", 1, 729, 16, 72, 28, 4, 128),
)
BATCHES, KEEPS = (1, 4, 16, 64), (32, 64, 128, 192, 256)
SMALL_MODELS = (Model("small", 1, 145, 4, 16, 2, 2, 16), Model("small, 2 tiles", 2, 37, 2, 24, 2, 1, 24))
SMALL_BATCHES, SMALL_KEEPS = (1, 4), (8, 16)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


class Workload:
    """What is timed for one operation. `providers` take the values that `make` returns as their arguments."""

    sizes = "BTNHD"  # which of a model's sizes matter
    needs_keep = True
    floats = True  # whether the dtype matters

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        raise NotImplementedError

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """Bytes that any implementation has to read and write, inputs and outputs once each, `size` per element."""
        raise NotImplementedError

    def needs_bytes(self, shape: Shape, size: int) -> int:
        """Memory that the inputs take."""
        return self.bytes_moved(shape, size)

    def providers(self) -> dict[str, Callable[..., Any]]:
        raise NotImplementedError

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        """The gate: raise `WrongResult` unless a provider's `result` is right; returns the measured errors."""
        raise NotImplementedError


def random_tensor(*size: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(size) + 10_007 * seed)
    return torch.randn(size, device=device, generator=generator).to(dtype)


def random_layers(shape: Shape, count: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """`count` tensors [B·T, H, N, D], views of [B·T, N, H·D] as a vision tower gives them."""
    size = count, shape["B"] * shape["T"], shape["N"], shape["H"], shape["D"]
    return [x.transpose(1, 2) for x in random_tensor(*size, dtype=dtype, device=device)]


def random_indices(num_images: int, num_tokens: int, keep: int, device: torch.device) -> Tensor:
    return random_tensor(num_images, num_tokens, dtype=torch.float32, device=device).argsort(1)[:, :keep].sort(1).values
