"""When a provider's result is right: the tests' error rule, against an oracle in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class WrongResult(ValueError):
    """A provider's result did not pass the gate."""


class Accuracy:
    """The error rule of the tests: at most twice plain PyTorch's error in the same dtype, plus two units of fp32."""

    def __init__(self, what: str) -> None:
        self.what, self.error, self.plain, self.largest = what, 0.0, 0.0, 0.0

    def add(self, actual: Tensor, plain: Tensor, oracle: Tensor) -> None:
        if actual.shape != oracle.shape:
            raise WrongResult(f"{self.what}: shape {list(actual.shape)}, expected {list(oracle.shape)}")
        if not actual.isfinite().all():
            raise WrongResult(f"{self.what}: not finite")
        self.error = max(self.error, (actual.double() - oracle).abs().max().item())
        self.plain = max(self.plain, (plain.double() - oracle).abs().max().item())
        self.largest = max(self.largest, oracle.abs().max().item())

    @property
    def bound(self) -> float:
        return 2 * self.plain + 2 * torch.finfo(torch.float32).eps * self.largest

    def check(self) -> Accuracy:
        if not self.error <= self.bound:
            raise WrongResult(f"{self.what}: error {self.error:.3g} > {self.bound:.3g}")
        return self


def equal(what: str, actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype or not torch.equal(actual, expected):
        raise WrongResult(f"{what}: not equal to the reference")


def eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with the full weights [B, H, N, N], as with transformers' ``output_attentions=True``."""
    logits = query @ key.mT * query.shape[-1] ** -0.5
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights[:, :, 0]


def plain_row(query: Tensor, key: Tensor) -> Tensor:
    """The [CLS] row [B, H, N] in two lines of PyTorch, to run after SDPA: the strongest baseline."""
    logits = query[:, :, :1] @ key.mT * query.shape[-1] ** -0.5
    return logits.softmax(dim=-1, dtype=torch.float32)[:, :, 0]


def chunks(query: Tensor) -> Iterator[slice]:
    """Slices of the images, for fp64 weights of at most a GiB."""
    _, num_heads, num_tokens, _ = query.shape
    step = max(1, 2**27 // (num_heads * num_tokens**2))
    for start in range(0, len(query), step):
        yield slice(start, start + step)


def check_attention(layer: tuple[Tensor, ...], out: Tensor, cls_probs: Tensor | None) -> list[Accuracy]:
    """Raise unless `out` [B, N, H, D] and `cls_probs` [B, H, N] are as exact as `eager` in the same dtype."""
    accuracies = Accuracy("attention"), Accuracy("[CLS] rows")
    for part in chunks(layer[0]):
        plain = eager(*(x[part] for x in layer))
        oracle = eager(*(x[part].double() for x in layer))
        for accuracy, got, p, o in zip(accuracies, (out, cls_probs), plain, oracle, strict=True):
            if got is not None:
                accuracy.add(got[part], p, o)
    return [accuracy.check() for accuracy in (accuracies if cls_probs is not None else accuracies[:1])]


def head_mean(query: Tensor, key: Tensor) -> Tensor:
    """The scores [B, N - 1] from plain attention weights in the inputs' dtype; float64 inputs give the oracle."""
    logits = query[:, :, :1] @ key.mT * query.shape[-1] ** -0.5
    wide = torch.promote_types(query.dtype, torch.float32)
    return logits.softmax(dim=-1, dtype=wide).to(query.dtype).to(wide)[:, :, 0].mean(dim=1)[:, 1:]
