"""The columns that steps of one batch size read and write, and the cache they belong to."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vtc.hf.graphs.kv import fill, tensors_of


class Window:
    """Memory `kv` `[2 * layers, B, H, columns, features]` that holds the columns of one cache at a time.

    The layers of that cache hold views of it. A cache whose columns leave gets memory of its own.
    """

    def __init__(self, kv: Tensor) -> None:
        self.kv = kv
        self._cache: Callable[[], Any] = lambda: None
        self._given: list[Tensor] = []
        self._written = self.columns  # at most so many columns hold anything but zeros

    @property
    def batch(self) -> int:
        """B."""
        return self.kv.shape[1]

    @property
    def columns(self) -> int:
        """How many columns there may be."""
        return self.kv.shape[3]

    def fits(self, cache: Cache, columns: int) -> bool:
        """Whether all layers of `cache` have so many columns, of this model's heads, size and dtype."""
        tensors = tensors_of(cache)
        shape = (self.batch, self.kv.shape[2], columns, self.kv.shape[4])
        kinds = {(each.shape, each.dtype, each.device) if each is not None else None for each in tensors}
        return len(tensors) == len(self.kv) and kinds == {(shape, self.kv.dtype, self.kv.device)}

    def take(self, cache: Cache) -> None:
        """Hold the columns of `cache`, which fits; they are copied unless they are here."""
        tensors, owner = tensors_of(cache), self._cache()
        if owner is cache and all(map(operator.is_, tensors, self._given)):
            return
        if owner is cache:  # what was put there may be views of this memory, at other places
            here = self.kv.untyped_storage().data_ptr()
            tensors = [each.clone() if each.untyped_storage().data_ptr() == here else each for each in tensors]
        else:
            self.release()
        columns = tensors[0].shape[2]
        torch._foreach_copy_(self._views(columns), tensors)
        # Steps read what is behind them with a weight of 0, and 0 times the NaN of another cache is NaN.
        self.kv[:, :, :, columns : self._written].zero_()
        self._written = columns

    def give(self, cache: Cache, columns: int) -> None:
        """Let the layers of `cache` hold the first `columns`."""
        self._cache, self._given = weakref.ref(cache), self._views(columns)
        self._written = max(self._written, columns)
        fill(cache, self._given)

    def release(self, cache: Cache | None = None) -> None:
        """Give the cache whose columns are here memory of its own, if it is `cache` or that is None."""
        owner = self._cache()
        if owner is None or (cache is not None and owner is not cache):
            return
        tensors = tensors_of(owner)
        if len(tensors) == len(self._given) and all(map(operator.is_, tensors, self._given)):
            fill(owner, list(self.kv[:, :, :, : self._given[0].shape[2]].clone().unbind(0)))
        else:  # some were replaced, and the others may be parts of this memory
            for layer in owner.layers:
                if layer.keys is not None:  # as after reset()
                    vars(layer).update(keys=layer.keys.clone(), values=layer.values.clone())
        self._cache, self._given = (lambda: None), []

    def _views(self, columns: int) -> list[Tensor]:
        return list(self.kv[:, :, :, :columns].unbind(0))
