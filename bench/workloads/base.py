"""One workload per operation, of the operation's name, and `select`: scores, topk and compact as one path.

A workload says what is timed: inputs from the shapes of real models, the bytes that have to move, the providers that
stand side by side, and the gate: what a provider must return before it is timed at all.

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
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.accuracy import Accuracy, WrongResult, check_attention, eager, equal, head_mean, plain_row
from vtc import ops, reference

Shape = dict[str, int]
SCORED = 3  # vision layers whose [CLS] rows are combined
NEED_GPU = ("triton", "triton-fused", "sdpa+row_scores")


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


# The SigLIP-like tower has no [CLS] token; its first row stands in for one, for the sake of N = 729 and D = 72.
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
    """What is timed for one operation. `providers` take what `make` returns, one argument each."""

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
        """The gate: raise `WrongResult` unless a provider's `result` is right; gives the errors that were measured."""
        raise NotImplementedError


def _random(*size: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(size) + 10_007 * seed)
    return torch.randn(size, device=device, generator=generator).to(dtype)


def _layers(shape: Shape, count: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """`count` tensors [B·T, H, N, D], views of [B·T, N, H·D] as a vision tower gives them."""
    size = count, shape["B"] * shape["T"], shape["N"], shape["H"], shape["D"]
    return [x.transpose(1, 2) for x in _random(*size, dtype=dtype, device=device)]


def _indices(num_rows: int, num_tokens: int, keep: int, device: torch.device) -> Tensor:
    return _random(num_rows, num_tokens, dtype=torch.float32, device=device).argsort(1)[:, :keep].sort(1).values


class ClsAttention(Workload):
    needs_keep = False

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        return tuple(_layers(shape, 3, dtype, device))

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """query, key, value, out: 4·B·T·H·N·D·size; rows: 4·B·T·H·N."""
        return shape["B"] * shape["T"] * shape["H"] * shape["N"] * 4 * (shape["D"] * size + 1)

    def providers(self) -> dict[str, Callable[..., Any]]:
        return {
            "triton": functools.partial(ops.cls_attention, backend="triton"),
            "reference": reference.cls_attention,
            "compiled": compiled(reference.cls_attention),
            "sdpa+row": lambda q, k, v: (sdpa(q, k, v).transpose(1, 2), plain_row(q, k)),
            # What VTC runs where `vtc.ops.fused_is_faster` says no. The mean over heads is part of it.
            "sdpa+row_scores": lambda q, k, v: (
                sdpa(q, k, v).transpose(1, 2),
                ops.row_scores(q[:, :, 0], k, skip=1, backend="triton"),
            ),
            "full-weights": eager,
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        out, rows = result
        if rows is None or rows.ndim == 3:
            return check_attention(inputs, out, rows)
        return check_attention(inputs, out, None) + RowScores().check(inputs[:2], rows)


class RowScores(Workload):
    needs_keep = False

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        return tuple(_layers(shape, 2, dtype, device))

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


class TopK(Workload):
    sizes = "BTN"
    floats = False

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        """Distinct scores whose sums are exact: neither ties nor the order of additions decide the indices."""
        size = SCORED, shape["B"] * shape["T"], shape["N"] - 1
        scores = (_random(*size, dtype=torch.float32, device=device).abs() * 2**8).floor().clamp(max=2**10) * 2**-22
        scores[0] = _random(*size[1:], dtype=torch.float32, device=device).argsort(1).float() * 2**-10
        return scores, shape["K"]

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """scores of 3 layers: 3·4·B·T·(N - 1), indices: 8·B·T·K."""
        return shape["B"] * shape["T"] * (SCORED * 4 * (shape["N"] - 1) + 8 * shape["K"])

    def providers(self) -> dict[str, Callable[..., Any]]:
        return {
            "triton": functools.partial(ops.topk, backend="triton"),
            "reference": reference.topk,
            "compiled": compiled(reference.topk),
            "torch.topk": lambda scores, k: scores.sum(dim=0).topk(k).indices.sort().values,
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        equal("indices", result, reference.topk(*inputs))
        return []


class Compact(Workload):
    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        images = shape["B"] * shape["T"]
        hidden = _random(images, shape["N"], shape["H"] * shape["D"], dtype=dtype, device=device)
        return hidden[:, 1:], _indices(images, shape["N"] - 1, shape["K"], device)

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """rows read and written: 2·B·T·K·H·D·size, indices: 8·B·T·K."""
        return shape["B"] * shape["T"] * shape["K"] * (2 * shape["H"] * shape["D"] * size + 8)

    def providers(self) -> dict[str, Callable[..., Any]]:
        return {
            "triton": functools.partial(ops.compact, backend="triton"),
            "reference": reference.compact,
            "compiled": compiled(reference.compact),
            "gather": lambda x, indices: x.gather(1, indices.unsqueeze(2).expand(-1, -1, x.shape[2])),
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        equal("rows", result, reference.compact(*inputs))
        return []


class CompactKV(Workload):
    sizes = "BTNLGF"

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        """The caches of B prompts: the patches of all T tiles lie in one row."""
        count = shape["T"] * (shape["N"] - 1)
        size = shape["B"], shape["G"], count, shape["F"]
        tensors = [_random(*size, dtype=dtype, device=device, seed=seed) for seed in range(2 * shape["L"])]
        return (
            tensors[: shape["L"]],
            tensors[shape["L"] :],
            _indices(shape["B"], count, shape["T"] * shape["K"], device),
        )

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """keys and values of L layers read and written: 4·L·B·G·T·K·F·size, indices: 8·B·T·K."""
        return shape["B"] * shape["T"] * shape["K"] * (4 * shape["L"] * shape["G"] * shape["F"] * size + 8)

    def needs_bytes(self, shape: Shape, size: int) -> int:
        return 2 * shape["L"] * shape["B"] * shape["G"] * shape["T"] * shape["N"] * shape["F"] * size

    def providers(self) -> dict[str, Callable[..., Any]]:
        def gather(keys: list[Tensor], values: list[Tensor], indices: Tensor) -> Any:
            index = indices[:, None, :, None].expand(-1, keys[0].shape[1], -1, keys[0].shape[3])
            return tuple(x.gather(2, index) for x in keys), tuple(x.gather(2, index) for x in values)

        return {
            "triton": functools.partial(ops.compact_kv, backend="triton"),
            "reference": reference.compact_kv,
            "compiled": compiled(reference.compact_kv),
            "gather": gather,
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        keys, values, indices = inputs
        for x, got in zip((*keys, *values), (*result[0], *result[1]), strict=True):
            equal("rows", got, reference.compact_kv([x], [x], indices)[0][0])
        return []


class Merge(Workload):
    """PruMerge's merging: each kept patch takes up its 32 most similar others, by keys as wide as the rows.

    Weights differ from token to token, so that a provider's `mix` tells whom it chose.
    """

    NEIGHBORS = 32

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        images, patches = shape["B"] * shape["T"], shape["N"] - 1
        x, key = _random(2, images, shape["N"], shape["H"] * shape["D"], dtype=dtype, device=device)[:, :, 1:]
        weight = _random(images, patches, dtype=torch.float32, device=device).softmax(dim=1)
        return x, key, _indices(images, patches, shape["K"], device), weight

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """x and key: 2·B·T·(N - 1)·H·D·size, rows: B·T·(K + 1)·H·D·size, weight: 4·B·T·(N - 1), targets: 8·B·T·K."""
        patches, keep, width = shape["N"] - 1, shape["K"], shape["H"] * shape["D"] * size
        return shape["B"] * shape["T"] * (width * (2 * patches + keep + 1) + 4 * patches + 8 * keep)

    def providers(self) -> dict[str, Callable[..., Any]]:
        by_reference = functools.partial(reference.merge, neighbors=self.NEIGHBORS)
        return {
            "triton": functools.partial(ops.merge, neighbors=self.NEIGHBORS, backend="triton"),
            "reference": by_reference,
            "compiled": compiled(by_reference),
            "gather": functools.partial(_merge_by_gather, neighbors=self.NEIGHBORS),
        }

    def check(self, inputs: tuple[Any, ...], result: Any) -> list[Accuracy]:
        """As many neighbors as there should be, none of them less similar than one left out, and the exact sum."""
        x, key, targets, weight = inputs
        rows, mix = result
        accuracy = Accuracy("rows")
        for image in range(len(x)):
            unit = torch.nn.functional.normalize(key[image].double(), dim=1)
            cosines = unit[targets[image]] @ unit.mT
            itself = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, targets[image].unsqueeze(1), True)
            member = (mix[image, :-1] != 0) & ~itself
            if (member.sum(dim=1) != min(self.NEIGHBORS, x.shape[1] - 1)).any():
                raise WrongResult("neighbors: not as many as asked for")
            worst = cosines.masked_fill(~member, 2).amin(dim=1)
            best_left = cosines.masked_fill(member | itself, -2).amax(dim=1)
            if (worst < best_left - 1e-5).any():  # closer ones may change places by rounding
                raise WrongResult("neighbors: one left out is more similar")
            exact = torch.where(itself, 1.0, torch.where(member, weight[image].double(), 0.0))
            dropped = weight[image].double().scatter(0, targets[image], 0.0)
            exact = torch.cat([exact, dropped[None]])
            accuracy.add(rows[image], exact.to(x.dtype) @ x[image], exact @ x[image].double())
        return [accuracy.check()]


def _merge_by_gather(x: Tensor, key: Tensor, targets: Tensor, weight: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """PruMerge's own steps in the inputs' dtype, all images and targets at once: B x K x 32 x D gathered rows."""
    images = torch.arange(len(x), device=x.device)[:, None]
    unit = torch.nn.functional.normalize(key.float(), dim=2)
    similarity = unit[images, targets] @ unit.mT
    similarity.scatter_(2, targets.unsqueeze(2), float("-inf"))
    nearest = similarity.topk(min(neighbors, x.shape[1] - 1), dim=2).indices  # [B, K, M]
    gathered = x[images.unsqueeze(2), nearest] * weight[images.unsqueeze(2), nearest].unsqueeze(3)
    rows = x[images, targets] + gathered.sum(dim=2)
    dropped = weight.scatter(1, targets, 0.0)
    extra = (x * dropped.unsqueeze(2)).sum(dim=1, keepdim=True)
    mix = torch.zeros_like(similarity).scatter_(
        2, nearest, weight.unsqueeze(1).expand_as(similarity).gather(2, nearest)
    )
    mix.scatter_(2, targets.unsqueeze(2), 1.0)
    return torch.cat([rows, extra], dim=1).to(x.dtype), torch.cat([mix, dropped.unsqueeze(1)], dim=1)


class Select(Workload):
    """Attention and scores of three layers, topk and compact: all that VTC adds to a tower or replaces in it.

    Providers return the last layer's attention, the combined scores, the indices and the kept rows.
    """

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        tensors = _layers(shape, 3 * SCORED, dtype, device)
        hidden = _random(shape["B"] * shape["T"], shape["N"], shape["H"] * shape["D"], dtype=dtype, device=device)
        return [tuple(tensors[3 * i : 3 * i + 3]) for i in range(SCORED)], hidden, shape["K"]

    def bytes_moved(self, shape: Shape, size: int) -> int:
        """Three times cls_attention's (its rows included, which stand for topk's input), compact's, indices once."""
        return SCORED * ClsAttention().bytes_moved(shape, size) + Compact().bytes_moved(shape, size)

    def providers(self) -> dict[str, Callable[..., Any]]:
        def by_reference(layers: Any, hidden: Tensor, k: int) -> Any:
            made = [reference.cls_attention(*layer) for layer in layers]
            total = torch.stack([rows[:, :, 1:].mean(dim=1) for _, rows in made]).sum(dim=0)
            indices = reference.topk(total, k)
            return made[-1][0], total, indices, reference.compact(hidden[:, 1:], indices)

        return {
            "triton": functools.partial(_by_triton, attend=_separate),
            "triton-fused": functools.partial(_by_triton, attend=_fused),
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
        # Exact: the choice by the provider's own scores. Where scores tie, a baseline may take another of the equals.
        expected = reference.topk(total, k)
        if indices.shape != expected.shape or (indices[:, 1:] <= indices[:, :-1]).any():
            raise WrongResult("indices: not ascending, or not K of them")
        equal("chosen scores", total.gather(1, indices).sort(1).values, total.gather(1, expected).sort(1).values)
        equal("rows", kept, reference.compact(hidden[:, 1:], indices))
        return [*attention, accuracy]


def _separate(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    rows = ops.row_scores(query[:, :, 0], key, skip=1, backend="triton").unsqueeze(1)
    return sdpa(query, key, value).transpose(1, 2), rows


def _fused(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out, rows = ops.cls_attention(query, key, value, backend="triton")
    return out, rows[:, :, 1:]


def _by_triton(layers: Any, hidden: Tensor, k: int, *, attend: Callable[..., Any]) -> Any:
    """As `vtc.hf.patch.encode` and `vtc.hf.attention` do it."""
    made = [attend(*layer) for layer in layers]
    total = torch.empty((len(hidden), hidden.shape[1] - 1), dtype=torch.float32, device=hidden.device)
    indices = ops.topk(torch.stack([rows for _, rows in made]), k, total=total, backend="triton")
    return made[-1][0], total, indices, ops.compact(hidden[:, 1:], indices, backend="triton")


def _by_torch(layers: Any, hidden: Tensor, k: int, *, attend: Callable[..., Any]) -> Any:
    made = [attend(*layer) for layer in layers]
    total = torch.stack([rows[:, :, 1:].float().mean(dim=1) for _, rows in made]).sum(dim=0)
    indices = total.topk(k).indices.sort().values
    kept = hidden[:, 1:].gather(1, indices.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
    return made[-1][0], total, indices, kept


# In the order in which they are timed: what matters most first, should the time run out.
WORKLOADS: dict[str, Workload] = {
    "select": Select(),
    "cls_attention": ClsAttention(),
    "row_scores": RowScores(),
    "topk": TopK(),
    "compact": Compact(),
    "compact_kv": CompactKV(),
    "merge": Merge(),
}
