"""The note on a KV cache that holds a compressed conversation: what of the caller's full prompt each column holds.

The caller passes the whole conversation, as with any model. The cache holds fewer columns, because the dropped visual
tokens never reached it. The note is an attribute of the cache, so it never outlives it. Whoever reorders, repeats,
selects or crops the rows of a cache does not change the note: `read` notices and follows, or raises an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from vtc.config import VTCConfig
from vtc.hf.prompt import Shortening

NOTE = "_vtc_conversation"  # the attribute of a cache that holds its note
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # NaN does not equal NaN, but its bits do
Own = TypeVar("Own", bound="Conversation")


@dataclasses.dataclass
class _Noted:
    """A note, and how to tell whether the cache has changed since.

    Attributes
    ----------
    note : Conversation or None
        None: a call that was filling the cache failed, or what it holds is not what was returned.
    keys : Tensor or None
        The tensor of keys that the cache held then. As long as it still holds this very tensor, nothing has changed.
    bits : Tensor[B, M, D] or None
        A copy of the first head's keys, as integers: they tell which row is which.
    """

    note: Any
    keys: Tensor | None
    bits: Tensor | None


def has_note(cache: Any) -> bool:
    """Whether `cache` holds a compressed conversation, or did before it was reset."""
    return hasattr(cache, NOTE)


def read(cache: Any, new: int | None = None) -> ShortConversation | PrunedConversation | None:
    """The note on `cache` for its present rows, or None. The note on a cache that was reset is removed.

    With one `new` token a static cache is trusted: looking at its length would synchronise at every decoding step.

    Raises
    ------
    ValueError
        If the cache has rows of which nothing is known.
    """
    noted: _Noted | None = getattr(cache, NOTE, None)
    if noted is None:
        return None
    keys = _keys_of(cache)
    unchanged = keys is not None and keys is noted.keys
    if unchanged and new == 1 and noted.note and getattr(cache, "is_compileable", False):
        return noted.note  # type: ignore[no-any-return]
    held = length_of(cache)
    if not held:
        delattr(cache, NOTE)
        return None
    if noted.note is None:
        raise ValueError(
            "this cache does not hold the conversation that generate() returned, because it failed or searched with "
            "beams; start without the cache, with the whole conversation and all its images"
        )
    if not unchanged:
        rows = _rows_of(keys, noted, cache)
        noted = _Noted(noted.note.of_rows(rows), keys, None if noted.bits is None else noted.bits[rows])
        setattr(cache, NOTE, noted)
    if noted.bits is not None and held < noted.bits.shape[1]:  # cropped: what comes next may be something else
        noted.bits, noted.note = noted.bits[:, :held], noted.note.up_to(held)
    return noted.note  # type: ignore[no-any-return]


def leave(cache: Any, note: Conversation | None) -> None:
    """Put `note` on `cache` in place of an older one. None: the cache cannot be continued."""
    keys = _keys_of(cache)
    bits = _bits_of(keys, length_of(cache)).clone() if keys is not None and _is_plain(cache) else None
    setattr(cache, NOTE, _Noted(note, keys, bits))


@contextlib.contextmanager
def filling(cache: Any) -> Iterator[None]:
    """While transformers fills `cache`, it has no note: ids and masks are in its own columns. Leave a note afterwards.

    If transformers raises an error, the note is as before, or the cache cannot be continued if it has changed.
    """
    if cache is None:
        yield
        return
    noted, keys, length = cache.__dict__.pop(NOTE, None), _keys_of(cache), length_of(cache)
    try:
        yield
    except BaseException:
        if keys is not _keys_of(cache) or length != length_of(cache):
            noted = _Noted(None, None, None)
        if noted is not None:
            setattr(cache, NOTE, noted)
        raise


def keep(cache: Any) -> None:
    """After a call that only appended tokens to `cache`: its rows are still those of the note."""
    if has_note(cache):
        getattr(cache, NOTE).keys = _keys_of(cache)


def length_of(cache: Any) -> int:
    """How many columns `cache` holds. Synchronises with the device if the cache is static."""
    return 0 if cache is None else int(cache.get_seq_length())


def _keys_of(cache: Any) -> Tensor | None:
    """The tensor of keys that the first layer holds, or None."""
    return next((getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())), None)


def _is_plain(cache: Any) -> bool:
    """Whether the first layer holds the keys `[B, H, M, D]` of every column. A sliding or quantized one does not."""
    return type(cache.layers[0]) in (DynamicLayer, StaticLayer)


def _bits_of(keys: Tensor, length: int) -> Tensor:
    return keys[:, 0, :length].detach().view(_BITS[keys.element_size()])


def _rows_of(keys: Tensor | None, noted: _Noted, cache: Any) -> Tensor:
    """The row of the note that each row of the cache is, [rows] int64."""
    if keys is None or noted.bits is None:
        if noted.note.num_rows == 1 and (keys is None or len(keys) == 1):
            return torch.zeros(1, dtype=torch.int64)
        raise ValueError(
            f"this {type(cache).__name__} holds a compressed conversation, but not in a way that tells its rows apart, "
            "so they may have changed places; use one row, or a DynamicCache, or start without the cache"
        )
    held, known = _bits_of(keys, length_of(cache)), noted.bits.to(keys.device)
    length = min(held.shape[1], known.shape[1])
    same = [(row[None, :length] == known[:, :length]).flatten(1).all(1) for row in held]
    matches = torch.stack(same).cpu()
    if not matches.any(1).all():
        raise ValueError(
            f"row {int((~matches.any(1)).int().argmax())} of the cache is none of the {len(known)} row(s) that VTC "
            "compressed; start without the cache, with the whole conversation and all its images"
        )
    return matches.int().argmax(1)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What the notes have in common. Their tensors have one row for each of the cache."""

    @property
    def num_rows(self) -> int:
        """B, the rows of the cache."""
        raise NotImplementedError

    def up_to(self: Own, held: int) -> Own:
        """The same conversation in a cache that was cropped to `held` columns."""
        return self

    def of_rows(self: Own, rows: Tensor) -> Own:
        """The same conversation with these `rows` `[R]` int64 of it."""
        tensors = {
            field.name: value[rows.to(value.device)]
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True)
class ShortConversation(Conversation):
    """A conversation whose prompts were shortened before the language model.

    Attributes
    ----------
    full : Tensor[B, M], int64
        What is known of the caller's columns that the cache holds: the prompt of L columns, and what was generated.
    length : int
        L. The tokens after it are in the cache one by one.
    kept : Tensor[B, L'], int64, or Shortening, or None
        What tells `columns`: they, what makes them on demand, or that the cache holds all of the prompt.
    input_ids, attention_mask : Tensor[B, L'], int64
        The shortened prompt; no mask if nothing is padded.
    position : Tensor[B, 1], int64
        Of the first token after the prompt.
    config : VTCConfig
        The settings that the images were compressed with.
    """

    full: Tensor
    length: int
    kept: Tensor | Shortening | None
    input_ids: Tensor
    attention_mask: Tensor | None
    position: Tensor
    config: VTCConfig

    @classmethod
    def of(
        cls,
        full: Tensor,
        short: dict[str, Tensor],
        kept: Shortening | None,
        config: VTCConfig,
        last: Tensor | None = None,
    ) -> ShortConversation:
        """A conversation of the prompt `full` `[B, L]`, and the arguments `short` for transformers made from it.

        `kept` tells which columns of `full` stay; None if all do. `last` `[B, 1]` are the positions of the last tokens,
        if those may not stay and nevertheless count.
        """
        ids, mask, positions = (short.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        if ids is None:
            raise ValueError("a conversation needs input_ids")
        if last is not None:
            position = last + 1
        elif positions is not None:
            position = positions[:, -1:].expand(len(ids), 1) + 1
        elif mask is not None:
            position = mask.sum(1, keepdim=True)
        else:
            position = ids.new_full((len(ids), 1), ids.shape[1])
        return cls(full, full.shape[1], kept, ids, mask, position, config)

    @property
    def num_rows(self) -> int:
        return len(self.input_ids)

    @property
    def columns(self) -> Tensor:
        """The column of the full prompt that each column of the cache holds, `[B, L']` int64."""
        if isinstance(self.kept, Tensor):
            return self.kept
        if self.kept is not None:
            return self.kept.columns
        return torch.arange(self.short_length, device=self.input_ids.device).expand_as(self.input_ids)

    def of_rows(self, rows: Tensor) -> ShortConversation:
        columns = self.columns
        return dataclasses.replace(super().of_rows(rows), kept=columns[rows.to(columns.device)])

    @property
    def short_length(self) -> int:
        """L'."""
        return self.input_ids.shape[1]

    @property
    def arguments(self) -> dict[str, Tensor]:
        """The shortened prompt as arguments for transformers."""
        mask = {} if self.attention_mask is None else {"attention_mask": self.attention_mask}
        return {"input_ids": self.input_ids} | mask

    def up_to(self, held: int) -> ShortConversation:
        after = max(held - self.short_length, 0)
        return dataclasses.replace(self, full=self.full[:, : self.length + after])

    def cropped(self, held: int, placeholders: Sequence[int]) -> ShortConversation:
        """The same conversation in a cache that was cropped to `held` columns.

        Raises
        ------
        ValueError
            If it was cropped in the middle of an image, or where the rows end at different columns.
        """
        if held >= self.short_length:
            return self
        ends, cut, mask = self.columns[:, held], self.input_ids[:, held], self.attention_mask
        if (ends != ends[0]).any() or any((cut == placeholder).any() for placeholder in placeholders):
            raise ValueError(
                f"the cache was cropped to {held} columns, in the middle of an image or of padding; crop it less, or "
                "start without it"
            )
        removed = self.short_length - held if mask is None else mask[:, held:].sum(1, keepdim=True)
        length = int(ends[0])
        return dataclasses.replace(
            self,
            full=self.full[:, :length],
            length=length,
            kept=self.columns[:, :held],
            input_ids=self.input_ids[:, :held],
            attention_mask=None if mask is None else mask[:, :held],
            position=self.position - removed,
        )

    def require_whole(self, ids: Tensor, held: int) -> None:
        """Raise ValueError unless the caller's `ids` `[B, L]` begin with the `held` columns that the cache holds."""
        if len(ids) != self.num_rows or not self.length <= held < ids.shape[1]:
            raise ValueError(
                f"the cache holds {held} tokens of {self.num_rows} prompt(s), input_ids is {list(ids.shape)}; for a "
                "further turn pass the whole conversation: what generate() returned, then the new question"
            )
        known = min(self.full.shape[1], held)
        if not torch.equal(ids[:, :known], self.full[:, :known].to(ids.device)):
            raise ValueError(
                f"input_ids begins with other tokens than the {known} that the cache holds; pass the whole "
                "conversation, crop the cache to what is to stay (cache.crop(-n) removes the last n), or start "
                "without it"
            )

    def followed_by(self, new: ShortConversation, ids: Tensor, mask: Tensor, start: int) -> ShortConversation:
        """This conversation, then `new`, which begins at column `start` of the caller's `ids` and `mask` `[B, L]`.

        Between them are the generated tokens, columns `length` to `start`.
        """
        between = slice(self.length, start)
        generated = torch.arange(self.length, start, device=ids.device).expand(len(ids), -1)
        full_mask = torch.cat([self._mask().to(mask), mask[:, between], new._mask().to(mask)], 1)
        return dataclasses.replace(
            new,
            full=ids,
            length=ids.shape[1],
            kept=torch.cat([self.columns.to(ids.device), generated, start + new.columns], 1),
            input_ids=torch.cat([self.input_ids.to(ids.device), ids[:, between], new.input_ids], 1),
            attention_mask=full_mask,
            position=(mask if new.config.positions == "original" else full_mask).sum(1, keepdim=True),
        )

    def positions(self, mask: Tensor) -> Tensor:
        """The positions `[B, L']` of the columns in the full prompt, of which `mask` `[B, L]` hides some."""
        full = (mask.cumsum(1) - 1).gather(1, self.columns.to(mask.device))
        return full.masked_fill(self._mask().to(mask.device) == 0, 0)

    def answered(self, sequences: Tensor, held: int) -> ShortConversation:
        """The same conversation with what was generated: `sequences` `[B * C, M]`, whose C copies are neighbours.

        The cache holds `held` columns.
        """
        copies, note = len(sequences) // self.num_rows, self
        if copies > 1:
            note = self.of_rows(torch.arange(self.num_rows).repeat_interleave(copies))
        return dataclasses.replace(note, full=sequences[:, : self.length + held - self.short_length].clone())

    def continued(self, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `forward()` for tokens after this conversation, in the columns of the cache.

        The mask is in the caller's columns. Positions go on from those of the prompt, in the caller's steps.

        Raises
        ------
        ValueError
            If the mask has other columns, or the call has other rows than the cache.
        """
        tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        mask, positions, (rows, new) = call.get("attention_mask"), call.get("position_ids"), tokens.shape[:2]
        after = length_of(call["cache"]) - self.short_length
        if after < 0:
            raise ValueError(
                f"the cache was cropped by {-after} columns of its prompt; use generate(), or crop it less"
            )
        columns = self.length + after + new
        if rows != self.num_rows or (mask is not None and (mask.ndim != 2 or mask.shape[1] != columns)):
            raise ValueError(
                f"the cache holds {self.num_rows} conversation(s), which have {columns} columns with the new tokens; "
                f"got {rows} row(s) and attention_mask {None if mask is None else list(mask.shape)}: pass the mask of "
                "the whole conversation, or leave it out if nothing is padded"
            )
        if mask is None:
            real = torch.arange(after + 1, after + new + 1, device=tokens.device)[None]
        else:
            real = mask[:, self.length :].to(tokens.device).cumsum(1)[:, -new:]
        steps = real if positions is None else real[:, :1] + positions - positions[:, :1]
        continued = call | {"position_ids": self.position.to(tokens.device) + steps - 1}
        if mask is not None or self.attention_mask is not None:
            old = self._mask().to(tokens.device)
            new_mask = old.new_ones(rows, after + new) if mask is None else mask[:, self.length :].to(old)
            continued["attention_mask"] = torch.cat([old, new_mask.expand(rows, -1)], 1)
        return continued

    def _mask(self) -> Tensor:
        return torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask


class Stage(NamedTuple):
    """What a prompt has from one layer of the language model on.

    Attributes
    ----------
    layer : int
        r, the layer that pruned.
    kept : int
        S, the columns of the shortened prompt.
    valid : Tensor[B, S], bool, or None
        Which of them are not hidden by the mask; None if all are.
    """

    layer: int
    kept: int
    valid: Tensor | None

    def mask(self, after: Tensor) -> Tensor:
        """The mask `[B, S + T]` bool of the shortened prompt and `after` `[B, T]`."""
        return _extended(self.valid, self.kept, after)


def _extended(valid: Tensor | None, length: int, after: Tensor) -> Tensor:
    before = after.new_ones(len(after), length) if valid is None else valid.to(after.device)
    return torch.cat([before, after], 1)


@dataclasses.dataclass(frozen=True)
class PrunedConversation(Conversation):
    """A conversation whose prompt was pruned inside the language model.

    Attributes
    ----------
    stages : tuple of Stage
        In the order of their layers.
    length : int
        L, the columns of the full prompt in the caller's masks.
    entered : int
        M, the columns that entered the language model; L unless the prompt was shortened before it.
    compact : bool
        Whether all layers have as many columns of the prompt as those of the last stage.
    real : Tensor[B, M], bool, or None
        Which of the columns that entered are not hidden by the mask; None if all are.
    position : Tensor[B, 1], int64
        Of the first token after the prompt.
    method : Method or None
        If later tokens select again by a token mask: the method that does. S is L then.
    is_image : Tensor[B, L], bool, or None
        For `method`: which columns are image tokens.
    keep : Tensor[B], int64, or None
        For `method`: how many of them each row sees.
    short : ShortConversation or None
        If the prompt was shortened before the language model, too: what `generate()` needs to know for a further turn.
    """

    stages: tuple[Stage, ...]
    length: int
    entered: int
    compact: bool
    real: Tensor | None
    position: Tensor
    method: Any = None
    is_image: Tensor | None = None
    keep: Tensor | None = None
    short: ShortConversation | None = None

    @property
    def num_rows(self) -> int:
        return len(self.position)

    @property
    def held(self) -> int:
        """The columns of the prompt that the first layer holds."""
        return self.stages[-1].kept if self.compact else self.entered

    def of_rows(self, rows: Tensor) -> PrunedConversation:
        stages = tuple(
            each if each.valid is None else each._replace(valid=each.valid[rows.to(each.valid.device)])
            for each in self.stages
        )
        short = self.short and self.short.of_rows(rows)
        return dataclasses.replace(super().of_rows(rows), stages=stages, short=short)

    def up_to(self, held: int) -> PrunedConversation:
        return dataclasses.replace(self, short=self.short and self.short.up_to(held - self.held + self.entered))

    def full_mask(self, after: Tensor) -> Tensor:
        """The mask `[B, M + T]` bool of the prompt that entered the language model and `after` `[B, T]`."""
        return _extended(self.real, self.entered, after)
