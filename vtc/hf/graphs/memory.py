"""Memory that several recorded functions share, because only one of them runs at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Memory:
    """Buffers by name. One that is too small is replaced by a larger one, for functions that are recorded later."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in the buffer `name`. Its values are finite, whatever they are."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[name, dtype] = torch.zeros(_rounded(count), dtype=dtype, device=self.device)
        return buffer[:count].view(shape)


def _rounded(count: int) -> int:
    """`count` or up to a quarter more, so that sizes that differ little share a buffer."""
    step = max(1, (1 << count.bit_length()) // 8)
    return -(-count // step) * step
