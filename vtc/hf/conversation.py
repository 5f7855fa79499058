"""The note on a KV cache, which lets a further turn map the caller's full prompt to the cache's shorter columns.

The caller passes the whole conversation, as with any model. The cache holds fewer columns, because the dropped visual
tokens never reached it. The note is an attribute of the cache, so it never outlives the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NOTE = "_vtc_conversation"


def read(cache: Any, new: int | None = None) -> ShortConversation | PrunedConversation | None:
    """The note on `cache`, or None. The note on a cache that was reset says nothing any more, and is removed.

    With one `new` token a static cache is trusted: looking at its length would synchronise at every decoding step.
    """
    note: ShortConversation | PrunedConversation | None = getattr(cache, _NOTE, None)
    is_trusted = new == 1 and getattr(cache, "is_compileable", False)
    if note is None or is_trusted or length_of(cache):
        return note
    leave(cache, None)
    return None


def has_note(cache: Any) -> bool:
    """Whether `cache` holds, or held before a reset, a compressed conversation."""
    return getattr(cache, _NOTE, None) is not None


def leave(cache: Any, note: ShortConversation | PrunedConversation | None) -> None:
    """Put `note` on `cache` in place of an older one; None removes it."""
    if note is not None:
        setattr(cache, _NOTE, note)
    elif hasattr(cache, _NOTE):
        delattr(cache, _NOTE)


def length_of(cache: Any) -> int:
    """How many columns `cache` holds. Synchronises with the device if the cache is static."""
    return 0 if cache is None else int(cache.get_seq_length())


@dataclasses.dataclass(frozen=True)
class ShortConversation:
    """A conversation whose prompts were shortened before the language model.

    Attributes
    ----------
    length : int
        L, the length of the caller's full prompt. The tokens generated after it are in the cache unchanged.
    input_ids, attention_mask : Tensor[B, L'], int64
        The shortened prompt, which the cache holds; no mask if nothing is padded.
    budget : str or None
        The settings that its images were compressed with, "method='vtc-cls', keep=64"; None without images.
    """

    length: int
    input_ids: Tensor
    attention_mask: Tensor | None
    budget: str | None

    @classmethod
    def resume(
        cls, cache: Any, ids: Tensor, mask: Tensor, placeholders: Sequence[int], budget: str | None
    ) -> tuple[ShortConversation, int]:
        """The conversation in a `cache` that is not empty, and how many columns of the caller's `ids` [B, L] it holds.

        Raises
        ------
        ValueError
            If the cache holds images that were not compressed, or that were compressed with other settings than
            `budget` (None: the new turn has no images), or if `ids` is not the whole conversation.
        """
        count = length_of(cache)
        note = read(cache)
        if not isinstance(note, ShortConversation):
            if any((ids[:, :count] == placeholder).any() for placeholder in placeholders):
                raise ValueError("the cache holds images that are not compressed; start without it, or vtc.disable")
            note = cls(count, ids[:, :count], mask[:, :count], None)
        if budget and note.budget and budget != note.budget:
            raise ValueError(
                f"the cache holds images compressed with {note.budget}, the settings say {budget}; use "
                f"vtc.configure(model, {note.budget}), or start without the cache"
            )
        start = note.length + count - note.input_ids.shape[1]
        if len(ids) != len(note.input_ids) or not note.length <= start < ids.shape[1]:
            raise ValueError(
                f"the cache holds {start} tokens of {len(note.input_ids)} prompt(s), input_ids is {list(ids.shape)}; "
                "for a further turn pass the whole conversation: what generate() returned, then the new question"
            )
        return note, start

    def extended(self, ids: Tensor, mask: Tensor, start: int, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """The arguments for the whole conversation: the old columns as the cache has them, then the `new` ones.

        Between them are the generated tokens, columns `length` to `start` of the caller's `ids` and `mask` [B, L].
        """
        old = torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask
        return {
            "input_ids": torch.cat([self.input_ids, ids[:, self.length : start], new["input_ids"]], 1),
            "attention_mask": torch.cat([old, mask[:, self.length : start], new["attention_mask"]], 1),
        }


@dataclasses.dataclass(frozen=True)
class PrunedConversation:
    """A conversation whose prompt was pruned inside the language model.

    Attributes
    ----------
    layer, length, kept : int
        r, the layer that pruned; L and S, the columns of the full and of the shortened prompt.
    compact : bool
        Whether layers before r have S columns as well.
    valid, real : Tensor[B, S] and Tensor[B, L], bool, or None
        Which columns of the shortened and of the full prompt are tokens; None if all are.
    position : Tensor[B or 1, 1], int64
        Of the first token after the prompt.
    """

    layer: int
    length: int
    kept: int
    compact: bool
    valid: Tensor | None
    real: Tensor | None
    position: Tensor

    def extended_mask(self, after: Tensor) -> Tensor:
        """The mask `[B, S + T]` bool of the shortened prompt and `after` `[B, T]`."""
        before = after.new_ones(len(after), self.kept) if self.valid is None else self.valid.to(after.device)
        return torch.cat([before, after], 1)
