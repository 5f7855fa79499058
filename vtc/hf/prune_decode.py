"""Tokens that follow a prompt that was pruned inside the language model: their mask and positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.hf.conversation import PrunedConversation
from vtc.hf.names import CACHE
from vtc.hf.prune_layers import ARGUMENT, Pruning, causal_mask, hooked
from vtc.hf.prune_limits import is_static
from vtc.hf.prune_mask import Masking
from vtc.hf.settings import Settings


class _Decode:
    """A call on top of a cache whose layers are shorter from each stage on, and need a mask of their own.

    `after` `[B, T]` bool is the mask of what came after the prompt, None if nothing is hidden.
    """

    def __init__(self, text: Any, note: PrunedConversation, after: Tensor | None) -> None:
        self.text, self.after = text, after
        self.stages = {stage.layer: stage for stage in note.stages}
        self.mask: Any = None  # in the form that the attention takes

    def before(self, number: int, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        if stage := self.stages.get(number):
            mask = None if self.after is None else stage.mask(self.after)
            self.mask = causal_mask(self.text, hidden, mask, arguments[CACHE], number)
        if number >= min(self.stages):
            arguments["attention_mask"] = self.mask
        return hidden


def decode(stock: Callable[..., Any], settings: Settings, call: dict[str, Any], note: PrunedConversation) -> Any:
    """Run `forward` for tokens after a pruned prompt: the caller's mask has its L columns, the cache has S."""
    cache, mask, language_model = call["cache"], call.get("attention_mask"), settings.base.language_model
    tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
    batch, new = tokens.shape[:2]
    last = note.stages[-1]
    if batch != note.num_rows:
        raise ValueError(f"the cache holds {note.num_rows} pruned prompt(s), got {batch} row(s)")
    static = is_static(cache, note.compact)
    seen = cache.get_seq_length() - note.held  # a tensor if the cache is static
    if not static and seen < 0:
        raise ValueError(
            f"the cache was cropped by {-seen} columns of its prompt, which was pruned inside the language model; crop "
            "it less, or start without it, with the whole conversation and all its images"
        )
    positions = call.get("position_ids")
    if positions is None or note.short is not None:  # those of a prompt that was shortened are not the caller's
        steps = torch.arange(new, device=tokens.device) if positions is None else positions - positions[:, :1]
        call["position_ids"] = note.position.to(tokens.device) + seen + steps
    if static:  # transformers made the mask for the columns of the full prompt, so it is made again
        if last.valid is not None or mask is not None:
            after = torch.ones(batch, cache.layers[0].max_cache_len - last.kept, dtype=torch.bool, device=tokens.device)
            call["attention_mask"] = last.mask(after)
        return stock(**call)
    if mask is not None and (mask.ndim != 2 or mask.shape[1] != note.length + seen + new):
        raise ValueError(
            f"attention_mask must be [B, {note.length + seen + new}], the full prompt of {note.length} tokens and what "
            f"came after it, got {list(mask.shape)}"
        )
    after = tokens.new_ones(batch, seen + new, dtype=torch.bool) if mask is None else mask[:, note.length :].bool()
    hides = mask is not None or any(stage.valid is not None for stage in note.stages)
    if note.compact:
        call["attention_mask"] = last.mask(after) if mask is not None or last.valid is not None else None
        return stock(**call)
    if note.real is not None if mask is None else note.length != note.entered:
        call["attention_mask"] = note.full_mask(after)
    if note.is_image is None or note.keep is None:
        return _hooked(stock, language_model, call, _Decode(language_model.config, note, after if hides else None))
    is_image = torch.cat([note.is_image.to(after.device), torch.zeros_like(after)], 1)
    real, text = note.full_mask(after), language_model.config
    return _hooked(stock, language_model, call, Masking(note.method, text, last.layer, is_image, real, note.keep, new))


@functools.partial(torch.compiler.disable, reason='hooks on layers; use kv="compact" to compile forward()')
def _hooked(stock: Callable[..., Any], language_model: Any, call: dict[str, Any], pruning: Pruning) -> Any:
    with hooked(language_model.layers, pruning):
        return stock(**call, **{ARGUMENT: pruning})
