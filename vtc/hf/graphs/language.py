"""The language model's calls as recorded functions: a prompt of a bucket's length, and one token after it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtc import ops
from vtc.hf.graphs.capture import Recorder
from vtc.hf.graphs.kv import Collecting, Placed
from vtc.hf.graphs.memory import Memory
from vtc.hf.names import CACHE

Model = Callable[..., Any]  # the language model's own forward()


class Shape(NamedTuple):
    """What a language model's calls have in common.

    Attributes
    ----------
    size : int
        D of the hidden states `[B, L, D]`.
    dtype : torch.dtype
        Of the hidden states.
    layers : int
    heads : int
        Of keys and values `[B, H, L, features]`.
    features : int
    kv_dtype : torch.dtype
    """

    size: int
    dtype: torch.dtype
    layers: int
    heads: int
    features: int
    kv_dtype: torch.dtype

    @classmethod
    def of(cls, model: Model, embeds: Tensor) -> Shape:
        """Run a call of two tokens and look; `embeds` `[B, L, D]` are of any call. ValueError if layers differ."""
        cache = Collecting()
        hidden = model(inputs_embeds=torch.zeros_like(embeds[:1, :2]), **{CACHE: cache}, use_cache=True)[0]
        kinds = {(each.shape, each.dtype) for each in (*cache.keys, *cache.values)}
        if len(kinds) != 1:
            raise ValueError(
                f"the language model's layers keep keys and values of several kinds: {sorted(map(str, kinds))}"
            )
        ((shape, dtype),) = kinds
        return cls(hidden.shape[2], hidden.dtype, len(cache.keys), shape[1], shape[3], dtype)

    def kv(self, batch: int, columns: int) -> tuple[int, ...]:
        """The shape of the keys, then the values of all layers."""
        return (2 * self.layers, batch, self.heads, columns, self.features)


class PromptGraph:
    """Prompts of B rows and at most `columns` columns, whose masked columns may be anywhere.

    The real tokens of a row are moved to its beginning. Attention is causal there and needs no mask, and what stands
    behind them changes nothing. Afterwards every column is back at its place.
    """

    def __init__(
        self, recorder: Recorder, memory: Memory, model: Model, shape: Shape, batch: int, columns: int
    ) -> None:
        self.columns = columns
        self.embeds = memory.take("prompt", (batch, columns, shape.size), shape.dtype)
        self.mask = memory.take("mask", (batch, columns), torch.bool)
        self.positions = memory.take("positions", (batch, columns), torch.int64)
        self.hidden = memory.take("hidden", (batch, columns, shape.size), shape.dtype)
        self.kv = memory.take("kv", shape.kv(batch, columns), shape.kv_dtype)
        for each in (self.embeds, self.mask, self.positions):
            each.zero_()
        inputs = (self.embeds, self.mask, self.positions)
        self._replay = recorder.record(functools.partial(self._run, model), inputs, (self.hidden, self.kv))

    def _run(self, model: Model) -> None:
        real, cache = self.mask.cumsum(1), Collecting()
        place = torch.where(self.mask, real, real[:, -1:] + (~self.mask).cumsum(1)) - 1  # of each column, when moved
        columns = torch.empty_like(place).scatter_(
            1, place, torch.arange(self.columns, device=place.device).expand_as(place)
        )
        moved = self.embeds.gather(1, columns.unsqueeze(2).expand_as(self.embeds))
        positions = self.positions.gather(1, columns)
        arguments = {"inputs_embeds": moved, "attention_mask": None, "position_ids": positions, CACHE: cache}
        hidden = model(**arguments, use_cache=True)[0]
        torch.gather(hidden, 1, place.unsqueeze(2).expand_as(hidden), out=self.hidden)
        keys, values = ops.compact_kv(cache.keys, cache.values, place)
        torch._foreach_copy_(list(self.kv.unbind(0)), [*keys, *values])

    def __call__(self, embeds: Tensor, mask: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states `[B, L, D]` and the keys and values `[2 * layers, B, H, L, features]` of a prompt.

        `embeds` are `[B, L, D]`, `mask` is `[B, L]` or None, `positions` are `[B or 1, L]`.
        """
        length = embeds.shape[1]
        self.embeds[:, :length].copy_(embeds)
        # Columns behind the prompt come after its real ones, whatever the mask there, and count with a weight of 0. But
        # 0 times a NaN of the last prompt is NaN.
        self.embeds[:, length:].zero_()
        if mask is None:
            self.mask[:, :length].fill_(True)
        else:
            self.mask[:, :length].copy_(mask)
        self.positions[:, :length].copy_(positions)
        self.positions[:, length:].zero_()
        self._replay()
        return self.hidden[:, :length].clone(), self.kv[:, :, :, :length].clone()


class StepGraph:
    """One token after up to `window - 1` columns, in B rows.

    `kv` `[2 * layers, B, H, window, features]` holds the columns, and gets the token's.
    """

    def __init__(
        self, recorder: Recorder, memory: Memory, model: Model, shape: Shape, kv: Tensor, additive: bool
    ) -> None:
        batch, window = kv.shape[1], kv.shape[3]
        self.kv, self.additive = kv, additive
        self.embeds = memory.take("token", (batch, 1, shape.size), shape.dtype)
        self.mask = memory.take("seen", (batch, window), torch.bool)
        self.positions = memory.take("position", (batch, 1), torch.int64)
        self.column = memory.take("column", (1,), torch.int64)
        self.hidden = memory.take("token's hidden", (batch, 1, shape.size), shape.dtype)
        inputs = (self.embeds, self.mask, self.positions, self.column)
        for each in inputs:
            each.zero_()
        self._replay = recorder.record(functools.partial(self._run, model), inputs, (self.hidden, self.kv))

    def _run(self, model: Model) -> None:
        mask = self.mask[:, None, None, :]
        if self.additive:
            lowest = torch.finfo(self.embeds.dtype).min
            mask = torch.zeros_like(mask, dtype=self.embeds.dtype).masked_fill(~mask, lowest)
        cache = Placed(self.kv, self.column)
        arguments = {"inputs_embeds": self.embeds, "attention_mask": mask, "position_ids": self.positions, CACHE: cache}
        self.hidden.copy_(model(**arguments, use_cache=True)[0])

    def __call__(self, embeds: Tensor, mask: Tensor | None, positions: Tensor, column: int) -> Tensor:
        """The hidden state `[B, 1, D]` of a token after `column` columns; its `mask` `[B, column + 1]` may be None."""
        self.embeds.copy_(embeds)
        self.positions.copy_(positions)
        self.column.fill_(column)
        self.mask[:, column + 1 :].fill_(False)
        if mask is None:
            self.mask[:, : column + 1].fill_(True)
        else:
            self.mask[:, : column + 1].copy_(mask)
        self._replay()
        return self.hidden.clone()
