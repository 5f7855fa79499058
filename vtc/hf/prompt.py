"""The prompt: read once, shortened to the kept placeholders, and put back in front of what `generate()` returns.

All placeholders are alike, so a prompt can be shortened without knowing which patches will fill it. This module works
on tensors and knows no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

Counts = Sequence[tuple[int, int]]  # of each image: N placeholders, of which K stay


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of B rows and L columns, read once.

    Attributes
    ----------
    input_ids : Tensor[B, L], int64
    is_image : dict of int to Tensor[B, L], bool
        Where each placeholder token is.
    real : Tensor[B, L], bool
        False at padding.
    images : dict of int to list of int
        For each placeholder token, the number of images of each row.
    num_tokens : list of int
        The number of tokens of each row, without padding.
    hidden : list of int
        The number of image placeholders of each row that the mask hides.
    """

    input_ids: Tensor
    is_image: dict[int, Tensor]
    real: Tensor
    images: dict[int, list[int]]
    num_tokens: list[int]
    hidden: list[int]

    @classmethod
    def read(
        cls, input_ids: Tensor, mask: Tensor | None, sizes: Mapping[int, Sequence[int]], static: bool = False
    ) -> Prompt:
        """Check the prompt against its images. Synchronises with the device once, to read lengths and counts.

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
        sums = [real.sum(1)]
        for found in is_image.values():
            sums += [found.sum(1), (found & ~real).sum(1)]
        num_tokens, *rest = torch.stack(sums).tolist()
        images = {
            token: _images_of_rows(counted, sizes[token]) for token, counted in zip(sizes, rest[::2], strict=True)
        }
        hidden = [sum(row) for row in zip(*rest[1::2], strict=True)]
        return cls(input_ids, is_image, real, images, num_tokens, hidden)

    @property
    def shape(self) -> tuple[int, int]:
        """B and L."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    @property
    def is_padded(self) -> bool:
        """Whether a row has padding."""
        return min(self.num_tokens) < self.input_ids.shape[1]

    def lengths(self, counts: Mapping[int, Counts]) -> list[int]:
        """How many tokens of each row stay if K of each image's N placeholders stay. Computed on the host.

        Raises
        ------
        ValueError
            If the mask hides placeholders.
        """
        if any(self.hidden):
            raise ValueError(
                f"attention_mask hides {', '.join(map(str, self.hidden))} image placeholders of the rows of input_ids; "
                "images that are masked are not supported: pass attention_mask as the processor makes it"
            )
        lengths = list(self.num_tokens)
        for token, images in self.images.items():
            dropped = [tokens - kept for tokens, kept in counts[token]]
            for row, count in enumerate(images):
                lengths[row] -= sum(dropped[:count])
                dropped = dropped[count:]
        return lengths

    def shortened(
        self,
        counts: Mapping[int, Counts],
        mask: Tensor | None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pad: int = 0,
    ) -> dict[str, Tensor]:
        """Keep the first K of each image's N placeholders, and all other tokens that are not padding.

        The shortened rows are right-aligned, and L' is the length of the longest one. It does not depend on the padding
        of the full prompt. Padding gets the token `pad`, mask 0, position 0 and label -100. If every K is N, the
        arguments are returned unchanged.

        Parameters
        ----------
        counts : mapping of int to sequence of (N, K)
            For each placeholder token, of each image.
        mask, position_ids, labels : Tensor[B, L] or None
            `position_ids` may be `[1, L]`.
        pad : int
            The token id of padding.

        Returns
        -------
        dict of Tensor[B, L']
            `input_ids`, and where needed `attention_mask`, `position_ids` and `labels`. The positions are the given
            ones less the number of placeholders dropped before each. If none are given, each row has 0, 1, 2, ..., or
            no positions if nothing is masked. Nothing predicts a row's first token, so its label becomes -100.
        """
        batch, length = self.shape
        given = {"attention_mask": mask, "position_ids": position_ids, "labels": labels}
        for name, tensor in given.items():
            if tensor is not None and (tensor.ndim != 2 or tensor.shape[1] != length):
                raise ValueError(
                    f"{name} must have the {length} columns of input_ids, got shape {list(tensor.shape)}; pass it for "
                    "the same tokens as input_ids (for a further turn: the whole conversation)"
                )
        short = {"input_ids": self.input_ids} | {name: each for name, each in given.items() if each is not None}
        if all(tokens == kept for own in counts.values() for tokens, kept in own):
            return short
        dropped = torch.zeros_like(self.real)
        for token, own in counts.items():
            dropped |= self.is_image[token] & _beyond_first_k(self.is_image[token], own)
        lengths = self.lengths(counts)
        columns, real = right_aligned(self.real & ~dropped, max(lengths))
        short["input_ids"] = self.input_ids.gather(1, columns).masked_fill(~real, pad)
        if labels is not None:
            first = real & (real.cumsum(1) == 1)
            short["labels"] = labels.gather(1, columns).masked_fill(~real | first, -100)
        if mask is not None or min(lengths) < max(lengths):
            short["attention_mask"] = real.to(torch.long if mask is None else mask.dtype)
        if position_ids is not None:
            closed_up = position_ids.expand(batch, length) - dropped.cumsum(1)
            short["position_ids"] = closed_up.gather(1, columns).masked_fill(~real, 0)
        elif "attention_mask" in short:
            short["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
        return short


def require_ids(call: dict[str, Any]) -> None:
    """Raise ValueError if a prompt with images has no token ids."""
    if call.get("input_ids") is None or call.get("inputs_embeds") is not None:
        raise ValueError("VTC finds image placeholders in input_ids; pass input_ids and no inputs_embeds")


def right_aligned(stays: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Move the tokens that stay to the right end of each row, in order. Padding comes before them.

    The last token of each row has to be in the last column, because `generate()` takes the logits from there.

    Parameters
    ----------
    stays : Tensor[B, L], bool
    length : int
        S, the length of the longest shortened row.

    Returns
    -------
    columns : Tensor[B, S], int64
        Where each column of the result comes from.
    real : Tensor[B, S], bool
        False at padding.
    """
    columns = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, stays.shape[1] - length :]
    return columns, stays.gather(1, columns)


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


def _beyond_first_k(found: Tensor, counts: Counts) -> Tensor:
    """Where a placeholder `[B, L]` bool is not among the first K of its image's N."""
    if not counts:
        return torch.zeros_like(found)
    number = found.flatten().cumsum(0).view_as(found) - 1  # of each placeholder among all, row after row
    if len(set(counts)) == 1:
        return number % counts[0][0] >= counts[0][1]
    tokens, kept = torch.tensor(counts, device=found.device).unbind(1)
    ends = tokens.cumsum(0)
    image = torch.bucketize(number, ends, right=True).clamp(max=len(counts) - 1)
    return number - (ends - tokens)[image] >= kept[image]


def _images_of_rows(found: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """How many images each row's `found` placeholders belong to, or ValueError if they do not make whole images."""
    images, left = [], list(sizes)
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
        prompt = self.full.repeat_interleave(len(ids) // len(self.full), 0).to(ids.device)
        return torch.cat([prompt, ids[:, self.short_length :]], 1)

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
        return getattr(self._wrapped, name)
