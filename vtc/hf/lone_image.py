"""A prompt of one row with one image, the usual one: read from the device once, and shortened by one concatenation.

What `vtc.hf.prompt` computes for any prompt follows here from two numbers that the host knows: where the image begins,
and the length of the row. A row that only its ids show to be of another kind, with padding or two images, is read again
by `Prompt`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vtc.hf.prompt import Counts, Kept, Patches, Prompt, Shortening, placed_tokens


@dataclasses.dataclass(frozen=True)
class LoneImage:
    """A prompt `[1, L]` without padding, whose placeholders `token` are in N columns from column `first` on.

    It has those methods of `Prompt` that shorten, with the same results.
    """

    input_ids: Tensor
    token: int
    first: int
    num_placeholders: int

    @classmethod
    def read(cls, input_ids: Tensor, mask: Tensor | None, sizes: Mapping[int, Sequence[int]]) -> LoneImage | None:
        """Read a prompt as `Prompt.read` does, or return None if it is of another kind or has to be traced.

        Synchronises with the device once, and never if the shapes tell that it is of another kind.
        """
        if len(input_ids) != 1 or len(sizes) != 1 or torch.compiler.is_compiling():
            return None
        ((token, own),) = sizes.items()
        if len(own) != 1 or (mask is not None and not _goes_with(mask, input_ids)):
            return None
        length = input_ids.shape[1]
        (row,) = (input_ids if mask is None else torch.cat([input_ids, mask], 1)).tolist()
        ids, seen, (count,) = row[:length], row[length:], own
        if ids.count(token) != count or not count or seen.count(1) != len(seen):
            return None
        first = ids.index(token)
        if ids[first : first + count].count(token) != count:
            return None
        return cls(input_ids, token, first, count)

    @property
    def images(self) -> dict[int, list[int]]:
        """As `Prompt.images`."""
        return {self.token: [1]}

    def text(self, sizes: Mapping[int, Sequence[int]]) -> tuple[Tensor, Tensor]:
        """As `Prompt.text`."""
        ids = torch.cat([self.input_ids[:, : self.first], self.input_ids[:, self.first + self.num_placeholders :]], 1)
        return (ids, torch.ones_like(ids, dtype=torch.bool)) if ids.shape[1] else self._any().text(sizes)

    def shortening(
        self, counts: Mapping[int, Counts], kept: Mapping[int, Kept], original: bool = False
    ) -> Shortening | None:
        """As `Prompt.shortening`."""
        ((tokens, count),) = counts[self.token]
        if tokens == count:
            return None
        own, length, device = kept[self.token], self.input_ids.shape[1], self.input_ids.device
        # Without the ids: whoever passed them may overwrite them before `stays` is made.
        stays = functools.partial(_stays, own, self.first, tokens, count, length, device, original)
        shortening = Shortening(stays, length - tokens + count, length - tokens + count)
        if original and isinstance(own, Patches) and own.indices.device == device:
            before, after = (
                torch.arange(*ends, device=device) for ends in ((self.first,), (self.first + tokens, length))
            )
            shortening.columns = torch.cat([before, own.indices[0] + self.first, after])[None]
        return shortening

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
        """As `Prompt.shortened`."""
        if shortening is None or position_ids is not None or packed:
            return self._any().shortened(shortening, mask, position_ids, pad, counted, packed, original)
        ids, length = self.input_ids, shortening.longest
        after = ids.shape[1] - self.first - self.num_placeholders
        image = ids[:, self.first : self.first + 1].expand(1, length - self.first - after)
        short = {"input_ids": torch.cat([ids[:, : self.first], image, ids[:, ids.shape[1] - after :]], 1)}
        if mask is not None or original:
            short["attention_mask"] = (ids if mask is None else mask).new_ones((1, length))
        if original:  # without padding, a column is the position
            short["position_ids"] = shortening.columns
        elif mask is not None and counted:
            short["position_ids"] = torch.arange(length, device=ids.device)[None]
        return short

    def last_position(self, given: Tensor | None, counted: bool) -> Tensor | None:
        """As `Prompt.last_position`."""
        ends_in_text = self.first + self.num_placeholders < self.input_ids.shape[1]
        return None if ends_in_text else self._any().last_position(given, counted)

    def _any(self) -> Prompt:
        """The same prompt, as a `Prompt`."""
        is_image, real = self.input_ids == self.token, torch.ones_like(self.input_ids, dtype=torch.bool)
        length = self.input_ids.shape[1]
        return Prompt(self.input_ids, {self.token: is_image}, real, ~real, {self.token: [1]}, [length], False)


def _goes_with(mask: Tensor, input_ids: Tensor) -> bool:
    """Whether a mask and ids can be read together without rounding."""
    return mask.shape == input_ids.shape and mask.device == input_ids.device and not mask.is_floating_point()


def _stays(
    kept: Kept, first: int, tokens: int, count: int, length: int, device: torch.device, original: bool
) -> Tensor:
    """`Shortening.stays` `[1, L]` of an image of `tokens` placeholders, from column `first` on."""
    flat = kept() if callable(kept) else kept
    if flat is None or flat.is_meta:  # which patches are kept is unknown
        flat = placed_tokens(tokens, count, original)
    stays = torch.ones((1, length), dtype=torch.int64, device=device)
    stays[0, first : first + tokens] = flat.to(device, torch.int64)
    return stays
