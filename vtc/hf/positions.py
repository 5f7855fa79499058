"""Positions with gaps, of `positions="original"`: what transformers has to be told, because it reads samples from them.

Where it gets no mask and no cache, each gap is the start of another sample, packed in the same row. Flash attention
looks for such samples in every call, and expects no keys of a cache before them.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.generic import is_flash_attention_requested

from vtc.hf.conversation import length_of
from vtc.hf.names import CACHE
from vtc.hf.settings import Settings

_log = logging.getLogger("vtc")


def one_sample(settings: Settings, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a prefill that `generate()` makes, such that each row is one sample with its own positions."""
    ids, cache = call["input_ids"], call.get("cache")
    (rows, new), device = ids.shape, ids.device
    if call.get("attention_mask") is None and cache is None:
        call = call | {"attention_mask": torch.ones_like(ids)}
    is_flash = rows == 1 and is_flash_attention_requested(settings.base.language_model.config)
    held = length_of(cache) if is_flash or settings.ending else 0
    if held and is_flash:
        queries, keys = (torch.tensor([0, end], dtype=torch.int32, device=device) for end in (new, held + new))
        call = call | _lengths(queries, keys, new, held + new)
    if settings.ending and 0 <= (column := settings.ending.column - held) < new:
        last, positions = settings.ending.position, call["position_ids"].expand(rows, -1)
        last = last.to(positions).repeat_interleave(rows // len(last), 0)
        call = call | {"position_ids": torch.cat([positions[:, :column], last, positions[:, column + 1 :]], 1)}
    return call


def several_samples(text: Any, positions: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that tell the samples packed in rows apart. Their `positions` `[B, L']` start again, without gaps.

    `dtype` is that of the hidden states.
    """
    if is_flash_attention_requested(text):  # it finds samples in a single row only
        if len(positions) > 1:
            return {}
        (queries, keys), (longest, _) = prepare_fa_kwargs_from_position_ids(positions)
        return _lengths(queries, keys, longest, longest)
    hidden = torch.empty((*positions.shape, 0), dtype=dtype, device=positions.device)
    arguments = {"config": text, "inputs_embeds": hidden, "attention_mask": None, "position_ids": positions}
    mask = create_masks_for_generate(**arguments, **{CACHE: None})
    return {"attention_mask": torch.ones_like(positions) if mask is None else mask}


def _lengths(queries: Tensor, keys: Tensor, longest_query: Any, longest_keys: Any) -> dict[str, Any]:
    """What flash attention calls the ends of samples in a row."""
    return {
        "cu_seq_lens_q": queries,
        "cu_seq_lens_k": keys,
        "max_length_q": longest_query,
        "max_length_k": longest_keys,
    }


@functools.cache
def warn_of_length(length: int, limit: int) -> None:
    """Log, once for each prompt's length, that its last positions are beyond those of the language model."""
    _log.warning(
        'with positions="original" the full length of a prompt counts: it has %d tokens, and the language model has %d '
        'positions; use positions="packed", or give fewer images',
        length,
        limit,
    )
