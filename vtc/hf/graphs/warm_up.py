"""Graphs that are recorded ahead, by answers to empty images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.hf.families import family_of

NEW_TOKENS = 256  # that answers may have, if nothing is said


def calls(base: Any, num_tokens: int, sizes: Sequence[Sequence[int]]) -> list[tuple[dict[str, Tensor], int]]:
    """The arguments of a call for each of `sizes`, and how many tokens it may add; the largest prompts first.

    Parameters
    ----------
    base : LlavaModel
    num_tokens : int
        N, visual tokens of an image.
    sizes : sequence of (int, int) or (int, int, int)
        The rows of a batch, the tokens of each prompt with the N of its image, and the tokens of an answer.

    Raises
    ------
    ValueError
        For other sizes, and for a model whose images are cut into tiles.
    """
    if family_of(base).inputs[0].layout != "whole":
        raise ValueError(
            f"warm_up knows models that see an image in one piece, and {family_of(base).name} cuts it into tiles; leave"
            " it out, and answer one question of each kind instead"
        )
    made = []
    for size in sizes:
        kinds = isinstance(size, Sequence) and all(type(number) is int and number > 0 for number in size)
        if not kinds or len(size) not in (2, 3):
            raise ValueError(f"warm_up must be pairs (batch, length), or (batch, length, new tokens), got {size!r}")
        batch, length, *new = size
        if length <= num_tokens:
            raise ValueError(
                f"warm_up has a prompt of {length} tokens, but an image alone has {num_tokens}; count the tokens of "
                "input_ids, as the processor makes them"
            )
        made.append((batch, length, *(new or (NEW_TOKENS,))))
    made.sort(key=lambda size: -size[0] * size[1])
    return [(_call(base, num_tokens, batch, length), new) for batch, length, new in made]


def _call(base: Any, num_tokens: int, batch: int, length: int) -> dict[str, Tensor]:
    vision, image = base.config.vision_config, family_of(base).inputs[0]
    placeholder = getattr(base.config, image.token)
    word = int(placeholder == 0)  # any other token
    ids = torch.full((batch, length), word, device=base.language_model.device)
    ids[:, :num_tokens] = placeholder
    pixels = torch.zeros(batch, vision.num_channels, vision.image_size, vision.image_size)
    tower = base.vision_tower
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        image.pixels: pixels.to(tower.device, tower.dtype),
    }


def has_two_tokens(length: int) -> Any:
    """A stopping criterion: the prompt of `length` tokens has two more."""

    def stop(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= length + 2, device=ids.device)

    return stop
