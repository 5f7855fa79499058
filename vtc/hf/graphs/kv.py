"""KV caches of recorded functions, and an ordinary cache that is given their columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Collecting(Cache):  # type: ignore[misc]
    """An empty cache that notes the keys and values `[B, H, L, D]` of a prompt, layer after layer."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.append(key_states)
        self.values.append(value_states)
        return key_states, value_states


class Placed(Cache):  # type: ignore[misc]
    """A cache of `memory` `[2 * layers, B, H, W, D]`, keys first. A new token's are written at `column` `[1]` int64."""

    def __init__(self, memory: Tensor, column: Tensor) -> None:
        super().__init__(layers=[])
        self.keys, self.values = memory.unflatten(0, (2, -1)).unbind(0)
        self.column = column

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.column, key_states)
        values.index_copy_(2, self.column, value_states)
        return keys, values


def fill(cache: Any, tensors: Sequence[Tensor]) -> None:
    """Give an empty cache the keys, then the values `[B, H, L, D]` of all layers."""
    count = len(tensors) // 2
    for number, (keys, values) in enumerate(zip(tensors[:count], tensors[count:], strict=True)):
        while len(cache.layers) <= number:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[number]
        if type(layer) is DynamicLayer:  # its update() would copy them
            vars(layer).update(keys=keys, values=values, dtype=keys.dtype, device=keys.device, is_initialized=True)
        else:
            cache.update(keys, values, number)


def tensors_of(cache: Any) -> list[Tensor]:
    """The keys, then the values of all layers."""
    return [layer.keys for layer in cache.layers] + [layer.values for layer in cache.layers]
