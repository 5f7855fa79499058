"""The prompt: read once, shortened to the kept placeholders, and put back in front of what `generate()` returns.

Placeholder number p of an image stands for its patch p, so a shortened prompt says where each kept patch was. An image
with more tokens than placeholders (all patches and an extra token) has its last placeholder several times. This module
works on tensors and knows no model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

Counts = Sequence[tuple[int, int]]  # of each image: N placeholders, of which K stay; or K > N tokens


@dataclasses.dataclass(eq=False)  # torch.compile asks for a hash before the fields are there
class Patches:
    """The patches of images that stay: `indices` `[images, K]` int64, ascending, of `num_tokens` each."""

    indices: Tensor
    num_tokens: int

    def __call__(self) -> Tensor:
        """Of each placeholder, image after image, whether it stays: `[images * num_tokens]` bool."""
        shape = (len(self.indices), self.num_tokens)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.indices.device)
        return mask.scatter(1, self.indices, True).flatten()


Kept = Tensor | Patches | Callable[[], Tensor] | None  # of each placeholder, image after image, whether it stays


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of B rows and L columns, read once.

    Attributes
    ----------
    input_ids : Tensor[B, L], int64
    is_image : dict of int to Tensor[B, L], bool
        Where each placeholder token is.
    real : Tensor[B, L], bool
        False where the mask hides a token.
    padding : Tensor[B, L], bool
        True at hidden tokens before the first and after the last real one of a row, unless they are placeholders.
    images : dict of int to list of int
        For each placeholder token, the number of images of each row.
    num_tokens : list of int
        The number of tokens of each row, without padding.
    hides_images : bool
        Whether the mask hides placeholders.
    """

    input_ids: Tensor
    is_image: dict[int, Tensor]
    real: Tensor
    padding: Tensor
    images: dict[int, list[int]]
    num_tokens: list[int]
    hides_images: bool

    @classmethod
    def read(
        cls, input_ids: Tensor, mask: Tensor | None, sizes: Mapping[int, Sequence[int]], static: bool = False
    ) -> Prompt:
        """Check the prompt against its images. Synchronises with the device once, to read lengths and counts.

        While torch compiles or exports, nothing can be read: see `_traced`.

        Parameters
        ----------
        input_ids : Tensor[B, L], int64
        mask : Tensor[B, L] or None
            With `static`, it may also be `[B, 1, L, M]`, which transformers makes for a static cache.
        sizes : mapping of int to sequence of int
            For each placeholder token, N of each image in the order of the prompts.

        Raises
        ------
        ValueError
            If the mask has another shape, or images and placeholders do not match.
        """
        is_image = {token: input_ids == token for token in sizes}
        real = _real(input_ids, mask, static)
        if torch.compiler.is_compiling():
            return cls._traced(input_ids, is_image, real, sizes)
        text = ~torch.stack(list(is_image.values())).any(0) if is_image else torch.ones_like(real)
        outside = (real.cumsum(1) == 0) | (real.flip(1).cumsum(1).flip(1) == 0)
        padding = outside & text
        sums = [(~padding).sum(1), (~real & ~text).sum(1)] + [found.sum(1) for found in is_image.values()]
        num_tokens, hidden, *found = torch.stack(sums).tolist()
        images = {token: _images_of_rows(counted, sizes[token]) for token, counted in zip(sizes, found, strict=True)}
        return cls(input_ids, is_image, real, padding, images, num_tokens, any(hidden))

    @classmethod
    def _traced(
        cls, input_ids: Tensor, is_image: dict[int, Tensor], real: Tensor, sizes: Mapping[int, Sequence[int]]
    ) -> Prompt:
        """Read a prompt without looking at its values, for torch.compile and torch.export.

        Every row is taken to have the same images, and padding stays where it is, so that the length of the shortened
        prompt follows from shapes. The graph checks the former when it runs.
        """
        batch, length = input_ids.shape
        images = {}
        for token, own in sizes.items():
            if len(own) % batch or list(own) != list(own[: len(own) // batch]) * batch:
                raise ValueError(
                    f"got {len(own)} image(s) in {batch} rows: a compiled or exported forward() of a model that "
                    "compresses needs the same images in each row; do not compile it for other batches"
                )
            images[token] = [len(own) // batch] * batch
            each = sum(own[: len(own) // batch])
            torch._assert_async(
                (is_image[token].sum(1) == each).all(),
                f"each row of input_ids must hold {each} placeholders, because the graph was made for such rows",
            )
        return cls(input_ids, is_image, real, torch.zeros_like(real), images, [length] * batch, False)

    @property
    def shape(self) -> tuple[int, int]:
        """B and L."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    @property
    def is_padded(self) -> bool:
        """Whether a row has padding."""
        return min(self.num_tokens) < self.input_ids.shape[1]

    def lengths(self, counts: Mapping[int, Counts]) -> list[int]:
        """How many tokens of each row stay if K of each image's N placeholders stay. Computed on the host."""
        lengths = list(self.num_tokens)
        for token, images in self.images.items():
            dropped = [tokens - kept for tokens, kept in counts[token]]
            for row, count in enumerate(images):
                lengths[row] -= sum(dropped[:count])
                dropped = dropped[count:]
        return lengths

    def text(self, sizes: Mapping[int, Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The text of each row without its placeholders and padding, `[B, T]`, left-aligned, and where it is real.

        T is the length of the longest, and at least 1. `sizes` are N of each image, as `read` got them.
        """
        length = max(1, *self.lengths({token: [(tokens, 0) for tokens in own] for token, own in sizes.items()}))
        is_text = ~self.padding
        for found in self.is_image.values():
            is_text = is_text & ~found
        columns = is_text.int().sort(dim=1, descending=True, stable=True).indices[:, :length]
        return self.input_ids.gather(1, columns), (is_text & self.real).gather(1, columns)

    def shortening(
        self, counts: Mapping[int, Counts], kept: Mapping[int, Kept], original: bool = False
    ) -> Shortening | None:
        """Which columns stay: all text, and K of each image's N placeholders. None if every K is N.

        Parameters
        ----------
        counts : mapping of int to sequence of (N, K)
            For each placeholder token, of each image.
        kept : mapping of int to Tensor, bool, or a function that makes it, or None
            For each placeholder token, one value for each of its placeholders, image after image. None, for methods
            whose tokens are no patches: the first K of each image, or K spread over it.
        original : bool
            Whether the columns that stay keep their positions: then tokens that are no patches are spread.

        Raises
        ------
        ValueError
            If the mask hides a part of an image whose tokens are no patches.
        """
        if all(tokens == count for own in counts.values() for tokens, count in own):
            return None
        stays = (~self.padding).long()
        for token, own in counts.items():
            found, flat = self.is_image[token], kept[token]
            flat = flat() if callable(flat) else flat
            if flat is None or flat.is_meta:  # which patches are kept is unknown
                self._require_whole_images(token, own)
                flat = torch.cat([placed_tokens(*each, original) for each in own] or [torch.zeros(0)])
            stays = stays.masked_scatter(found, flat.to(found.device, stays.dtype))
        lengths = self.lengths(counts)
        return Shortening(stays, max(lengths), min(lengths))

    def shortened(
        self,
        shortening: Shortening | None,
        mask: Tensor | None,
        position_ids: Tensor | None = None,
        pad: int = 0,
        counted: bool = False,
        packed: bool = False,
        original: bool = False,
    ) -> dict[str, Tensor]:
        """The shortened `input_ids`, and where needed `attention_mask` and `position_ids`, each `[B, L']`.

        Padding gets the token `pad`, mask 0 and position 0. Without a shortening, the arguments are returned unchanged.
        With `original` there are always positions, and a mask unless samples are `packed`: transformers would take a
        row without one for several samples, because its positions have gaps.

        Parameters
        ----------
        shortening : Shortening or None
        mask, position_ids : Tensor[B, L] or None
            `position_ids` may be `[1, L]`.
        counted : bool
            Whether to count positions that are not given, as `forward()` does. `generate()` infers them from the mask.
        packed : bool
            Whether the positions start again at each of several samples in a row, and no mask must hide that.
        original : bool
            Whether the positions are those in the full prompt.
        """
        given = {"attention_mask": mask, "position_ids": position_ids}
        for name, tensor in given.items():
            if tensor is not None and (tensor.ndim != 2 or tensor.shape[1] != self.input_ids.shape[1]):
                raise ValueError(
                    f"{name} must have the {self.input_ids.shape[1]} columns of input_ids, got shape "
                    f"{list(tensor.shape)}; pass it for the same tokens as input_ids (for a further turn: the whole "
                    "conversation)"
                )
        short = {"input_ids": self.input_ids} | {name: each for name, each in given.items() if each is not None}
        if shortening is None:
            return short
        short["input_ids"] = shortening.take(self.input_ids, pad)
        if mask is not None:
            short["attention_mask"] = shortening.take(mask, 0)
        elif not packed and (original or not shortening.is_even):
            short["attention_mask"] = shortening.filled.long()
        if original:
            full = self.full_positions(counted) if position_ids is None else position_ids.expand(self.shape)
            short["position_ids"] = shortening.take(full, 0)
        elif position_ids is not None or (counted and "attention_mask" in short):
            short["position_ids"] = self.positions(shortening, position_ids, packed)
        if (
            packed and not original
        ):  # equal positions are samples of their own, so padding is no part of the row's first sample
            first = short["position_ids"].gather(1, shortening.filled.int().argmax(1, keepdim=True))
            short["position_ids"] = torch.where(shortening.filled, short["position_ids"], first)
        return short

    def full_positions(self, counted: bool) -> Tensor:
        """The positions `[B, L]` of the full prompt where none are given; that of padding is 0.

        `counted`: those of `forward()` for each row alone. Else those of `generate()`, which counts no hidden token.
        """
        seen = ~self.padding if counted else self.real
        return (seen.cumsum(1) - 1).masked_fill(~seen, 0)

    def last_position(self, given: Tensor | None, counted: bool) -> Tensor | None:
        """That of each row's last token, `[B, 1]`; None if it stays, so that it is in the short prompt, too."""
        last = self.padding.shape[1] - 1 - (~self.padding).flip(1).int().argmax(1, keepdim=True)
        full = self.full_positions(counted) if given is None else given.expand(self.shape)
        return full.gather(1, last)

    def positions(self, shortening: Shortening, given: Tensor | None, packed: bool = False) -> Tensor:
        """The positions `[B, L']` of the short prompt: 0, 1, 2, ... in each row, or the `given` ones `[B or 1, L]`.

        The given ones are closed up: less the number of placeholders dropped before each, of samples that are `packed`
        in a row those of its own sample. A placeholder that is there again moves those after it. Padding has the
        position 0.
        """
        places = shortening.filled.cumsum(1) - 1  # in the row of the short prompt
        if given is None:
            return places.clamp(min=0)
        more = torch.where(self.padding, 0, shortening.stays - 1)
        shift, given = more.cumsum(1), given.expand(more.shape)
        if packed:
            starts = given.diff(dim=1, prepend=given[:, :1]) != 1
            start = torch.where(starts, torch.arange(starts.shape[1], device=starts.device), 0).cummax(1).values
            shift = shift - (shift - more).gather(1, start)
        # Of a column that is there several times, `given + shift` is the last one's position.
        later = shortening.stays.cumsum(1).gather(1, shortening.columns) - 1 - places
        return (shortening.take(given + shift, 0) - later).masked_fill(~shortening.filled, 0)

    def _require_whole_images(self, token: int, counts: Counts) -> None:
        if not self.hides_images:
            return
        found = self.is_image[token]
        for number, own in enumerate((found & self.real)[found].split([tokens for tokens, _ in counts])):
            if own.any() and not own.all():
                raise ValueError(
                    f"attention_mask hides {int((~own).sum())} of the {len(own)} placeholders of image {number}, but "
                    "this method makes new tokens of all patches; hide all of them or none, or use a method that "
                    'keeps patches, such as "vtc-cls"'
                )


class Shortening:
    """Which columns of a full prompt `[B, L]` its short one `[B, L']` has. The rows of the short one are right-aligned.

    The last token of each row has to be in the last column, because `generate()` takes the logits from there.

    Attributes
    ----------
    stays : Tensor[B, L], int64
        How many columns of the short prompt come from each column: 0 or 1, more for an image of more tokens than
        placeholders.
    columns : Tensor[B, L'], int64
        Where each column of the short prompt comes from.
    filled : Tensor[B, L'], bool
        False at padding.
    longest : int
        L'.
    is_even : bool
        Whether all rows have L' tokens, so that there is no padding.
    """

    def __init__(self, stays: Tensor | Callable[[], Tensor], longest: int, shortest: int) -> None:
        """The shortening that keeps the tokens that stay, of which a row has `shortest` to `longest`.

        The attributes are made at their first use, and `stays` too if it is given as a function: `generate()` needs
        none of them for a `LoneImage`.
        """
        self.longest, self.is_even = longest, shortest == longest
        self._given = stays

    @functools.cached_property
    def stays(self) -> Tensor:
        return self._given if isinstance(self._given, Tensor) else self._given()

    @functools.cached_property
    def _ends(self) -> Tensor:
        return self.stays.cumsum(1)

    @functools.cached_property
    def _places(self) -> Tensor:
        return torch.arange(self.longest, device=self.stays.device) - self.longest + self._ends[:, -1:]

    @functools.cached_property
    def columns(self) -> Tensor:
        return torch.searchsorted(self._ends, self._places, right=True).clamp(max=self.stays.shape[1] - 1)

    @functools.cached_property
    def filled(self) -> Tensor:
        return self._places >= 0

    def take(self, full: Tensor, padding: int | bool) -> Tensor:
        """The short version `[B, L']` of `[B, L]`."""
        taken = full.gather(1, self.columns)
        return taken if self.is_even else taken.masked_fill(~self.filled, padding)

    def spread(self, short: Tensor) -> Tensor:
        """The full version `[B, L, ...]` of `[B, L', ...]`: column j is that of the last column <= j that stays.

        Columns before the first one of a row are that one.
        """
        places = (self._ends - 1).clamp(min=0)
        if not self.is_even:
            places = places + short.shape[1] - self._ends[:, -1:]
        places = places.to(short.device)
        if len(places) == 1:
            return short.index_select(1, places[0])
        return short[torch.arange(len(places), device=places.device)[:, None], places]

    def spread_outputs(self, outputs: Any, layer: int = 0) -> None:
        """Give a language model's outputs the columns of the full prompt, in place.

        They are `last_hidden_state`, `hidden_states` and `attentions`; of the latter two those of layers from `layer`
        on. Nothing attends to a column that does not stay.
        """
        outputs.last_hidden_state = self.spread(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            states = list(outputs.hidden_states)
            first = layer + 1 if layer else 0
            outputs.hidden_states = tuple(
                each if each is None or number < first else self.spread(each) for number, each in enumerate(states)
            )
        if outputs.attentions is not None:
            outputs.attentions = tuple(
                each if each is None or number < layer else self._spread_attention(each)
                for number, each in enumerate(outputs.attentions)
            )

    def _spread_attention(self, attention: Tensor) -> Tensor:
        """`[B, H, L', L']` to `[B, H, L, L]`; a column that is there several times gets the sum."""
        filled, columns = (each[:, None, None].to(attention.device) for each in (self.filled, self.columns))
        keys = attention.new_zeros(*attention.shape[:3], self.stays.shape[1])
        keys = keys.scatter_add(3, columns.expand_as(attention), attention.masked_fill(~filled, 0))
        return self.spread(keys.transpose(1, 2)).transpose(1, 2)


def placed_tokens(tokens: int, count: int, spread: bool) -> Tensor:
    """How often each of an image's `tokens` placeholders is there for `count` tokens, [tokens] int64.

    The first ones are, or with `spread` those at floor((2i + 1) * tokens / (2 * count)) for i = 0, ..., count - 1. Of
    more tokens than placeholders, those that are left over are at the last one.
    """
    numbers = torch.arange(min(count, tokens))
    if spread and count < tokens:
        numbers = (2 * numbers + 1) * tokens // (2 * count)
    stays = torch.zeros(tokens, dtype=torch.int64).index_fill(0, numbers, 1)
    stays[-1:] += max(count - tokens, 0)
    return stays


def require_ids(call: dict[str, Any]) -> None:
    """Raise ValueError if a prompt with images has no token ids."""
    if call.get("input_ids") is None or call.get("inputs_embeds") is not None:
        raise ValueError("VTC finds image placeholders in input_ids; pass input_ids and no inputs_embeds")


def _real(input_ids: Tensor, mask: Tensor | None, static: bool) -> Tensor:
    """Where `input_ids` [B, L] is not padding, [B, L] bool."""
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if mask.ndim == 2 and mask.shape[1] == input_ids.shape[1] and len(mask) in (1, len(input_ids)):
        return mask.bool().expand(input_ids.shape)
    if mask.ndim == 4 and static:  # [B, 1, L, M], left-padded: the last token sees all of its row
        row = mask[:, 0, -1, : input_ids.shape[1]]
        return (row if row.dtype == torch.bool else row == 0).expand(input_ids.shape)
    raise ValueError(
        f"attention_mask must be [B, L] = {list(input_ids.shape)}, got {list(mask.shape)}: a mask of another kind "
        "cannot be shortened; pass it for the same tokens as input_ids (for a further turn: the whole conversation)"
    )


def _images_of_rows(found: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """How many images each row's `found` placeholders belong to, or ValueError if they do not make whole images."""
    images, left, placeholders = [], list(sizes), 0
    for placeholders in found:
        count = 0
        while placeholders > 0 and left:
            placeholders -= left.pop(0)
            count += 1
        images.append(count)
        if placeholders:
            break
    if len(images) < len(found) or placeholders or left:
        takes = ", ".join(map(str, dict.fromkeys(sizes))) or "none"
        raise ValueError(
            f"got {len(sizes)} image(s), but the rows of input_ids hold {', '.join(map(str, found))} image "
            f"placeholders; each image takes {takes}, all in one row: pass as many images as the prompts have, and "
            "input_ids as the processor makes them"
        )
    return images


class FullPrompt:
    """The caller's prompt `[B, L]`, which replaces the shortened one of length L' in the results of `generate()`.

    The caller's streamer, stopping criteria and so on see it, too, because they may count tokens of the full prompt.
    """

    def __init__(self, full: Tensor, short_length: int) -> None:
        self.full, self.short_length = full, short_length

    def restore(self, ids: Tensor) -> Tensor:
        """Turn `[B * C, L' + T]` into `[B * C, L + T]`; the C copies of a prompt (beams, samples) are neighbours."""
        copies = len(ids) // len(self.full)
        prompt = self.full if copies == 1 else self.full.repeat_interleave(copies, 0)
        return torch.cat([prompt.to(ids.device), ids[:, self.short_length :]], 1)

    def wrap(self, call: dict[str, Any]) -> None:
        """Let the callables among `generate()`'s arguments see the full prompt."""
        for name, container in (("logits_processor", LogitsProcessorList), ("stopping_criteria", StoppingCriteriaList)):
            if call.get(name):
                call[name] = container(_FullPromptView(each, self.restore) for each in call[name])
        if call.get("streamer") is not None:
            call["streamer"] = _FullPromptView(call["streamer"], self.restore)
        if (allowed := call.get("prefix_allowed_tokens_fn")) is not None:
            call["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                row, torch.cat([self.full[row].to(ids.device), ids[self.short_length :]])
            )


class _FullPromptView:
    """A logits processor, stopping criterion or streamer that sees restored ids."""

    def __init__(self, wrapped: Any, restore: Callable[[Tensor], Tensor]) -> None:
        self._wrapped, self._restore, self._started = wrapped, restore, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._wrapped(self._restore(input_ids), scores)

    def put(self, value: Tensor) -> None:
        self._wrapped.put(value if self._started else self._restore(value))  # the prompt comes first
        self._started = True

    def __getattr__(self, name: str) -> Any:
        if name == "_wrapped":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._wrapped, name)
