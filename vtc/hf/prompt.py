"""The prompt: of each image's N placeholders K stay, and what `generate()` returns begins with the full prompt again.

All placeholders are alike, so a prompt can be shortened without knowing which patches will fill it. Tensors only; no
model is seen here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList


class Short(NamedTuple):
    """A shortened prompt `[B, L']`; `attention_mask` and the others are None if they are not needed."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    labels: Tensor | None


def shorten(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    placeholder: int,
    counts: Sequence[tuple[int, int]],
    pad: int = 0,
) -> tuple[Short, list[int]]:
    """Keep the first K of each image's N placeholders, and all other tokens that are not masked.

    What is left of each row is right-aligned, so that L' is the length of the longest row, whatever was padded before
    and however many images each row has. Left of it: token `pad`, mask 0, position 0, label -100. If every K is N the
    arguments are returned as they are.

    Parameters
    ----------
    input_ids, attention_mask, position_ids, labels : Tensor [B, L]
        All but the first optional; position_ids may be [1, L].
    placeholder : int
        The token id.
    counts : sequence of (N, K)
        Of each image, in the order of their placeholders, row after row.

    Returns
    -------
    Short
        `position_ids` are the given ones less the placeholders dropped before each; if none are given, each row's are
        0, 1, 2, ..., or None if nothing is masked. Nothing predicts a row's first token, so its label becomes -100.
    list of int
        The number of images of each row.

    Raises
    ------
    ValueError
        If the images do not match the placeholders, or a shape does not fit.
    """
    batch, length = input_ids.shape
    for name, given in {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}.items():
        if given is not None and (given.ndim != 2 or given.shape[1] != length):
            raise ValueError(
                f"{name} must have the {length} columns of input_ids, got shape {tuple(given.shape)}; pass it for the "
                "same tokens as input_ids (for a further turn: the whole conversation)"
            )
    found = input_ids == placeholder
    dropped = found & _beyond_its_share(found, counts)
    real = ~dropped if attention_mask is None else ~dropped & attention_mask.bool()
    per_row, lengths = torch.stack([found.sum(1), real.sum(1)]).tolist()  # the one read back: L' depends on it
    images = _images_of_rows(per_row, counts)
    if all(tokens == kept for tokens, kept in counts):
        return Short(input_ids, attention_mask, position_ids, labels), images
    # A stable sort moves what is left of each row to its end, in order.
    columns = real.to(torch.uint8).argsort(dim=1, stable=True)[:, length - max(lengths) :]
    real = real.gather(1, columns)
    if labels is not None:
        first = real & (real.cumsum(1) == 1)
        labels = labels.gather(1, columns).masked_fill(~real | first, -100)
    if attention_mask is not None or min(lengths) < max(lengths):
        attention_mask = real.to(torch.long if attention_mask is None else attention_mask.dtype)
    if position_ids is not None:
        closed_up = position_ids.expand(batch, length) - dropped.cumsum(1)
        position_ids = closed_up.gather(1, columns).masked_fill(~real, 0)
    elif attention_mask is not None:
        position_ids = (real.cumsum(1) - 1).clamp(min=0)
    return Short(input_ids.gather(1, columns).masked_fill(~real, pad), attention_mask, position_ids, labels), images


def _beyond_its_share(found: Tensor, counts: Sequence[tuple[int, int]]) -> Tensor:
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


def _images_of_rows(found: list[int], counts: Sequence[tuple[int, int]]) -> list[int]:
    """How many images each row's `found` placeholders belong to, or ValueError if they do not make whole images."""
    images, left = [], [tokens for tokens, _ in counts]
    for placeholders in found:
        count = 0
        while placeholders > 0 and left:
            placeholders -= left.pop(0)
            count += 1
        images.append(count)
        if placeholders:
            break
    if len(images) < len(found) or placeholders or left:
        takes = ", ".join(map(str, dict.fromkeys(tokens for tokens, _ in counts))) or "none"
        raise ValueError(
            f"got {len(counts)} image(s), but the rows of input_ids hold {', '.join(map(str, found))} image "
            f"placeholders; each image takes {takes}, all in one row: pass as many images as the prompts have, and "
            "input_ids as the processor makes them"
        )
    return images


class FullPrompt:
    """The caller's prompt `[B, L]`, to be put back in place of the short one of length L' that `generate()` was given.

    Also for the caller's own streamer, stopping criteria and so on: they may count tokens of the full prompt.
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
                call[name] = container(_Seeing(each, self.restore) for each in call[name])
        if call.get("streamer") is not None:
            call["streamer"] = _Seeing(call["streamer"], self.restore)
        if (allowed := call.get("prefix_allowed_tokens_fn")) is not None:
            call["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                row, torch.cat([self.full[row].to(ids.device), ids[self.short_length :]])
            )


class _Seeing:
    """A logits processor, stopping criterion or streamer that sees restored ids."""

    def __init__(self, wrapped: Any, restore: Callable[[Tensor], Tensor]) -> None:
        self._wrapped, self._restore, self._started = wrapped, restore, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._wrapped(self._restore(input_ids), scores)

    def put(self, value: Tensor) -> None:
        self._wrapped.put(value if self._started else self._restore(value))  # the prompt is what comes first
        self._started = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)
