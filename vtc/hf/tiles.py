"""LLaVA-NeXT's tiles, from transformers: how many an image has, and which token stands at each placeholder."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.tiles import Tiling

if TYPE_CHECKING:
    from vtc.hf.settings import Settings


def tilings(settings: Settings, sizes: Any) -> list[Tiling]:
    """The tiles of images of `sizes` `[images, 2]` (height, width): a tensor, an array, or a list of pairs.

    Runs transformers' own packing on token numbers, so that unpadding and newlines match by construction.

    Raises
    ------
    ValueError
        If `sizes` has another shape.
    """
    base = settings.base
    vision, module = base.vision_tower.config, sys.modules[settings.family.module]
    tokens = (vision.image_size // vision.patch_size) ** 2
    found = []
    for size in _read_sizes(sizes):
        count = module.image_size_to_num_patches(size, base.config.image_grid_pinpoints, vision.image_size)
        numbers = torch.arange(count * tokens, device="cpu").view(count, tokens, 1)
        newline = torch.tensor([-1], device="cpu")
        packed, _ = base.pack_image_features([numbers], size[None], "default", image_newline=newline)
        found.append(Tiling(count, packed[0][:, 0]))
    return found


def _read_sizes(given: Any) -> Tensor:
    """`given` as a tensor on the CPU, or ValueError."""
    try:
        each = given.cpu() if isinstance(given, Tensor) else given
        sizes = torch.stack([torch.as_tensor(size, device="cpu") for size in each])
    except (TypeError, ValueError, RuntimeError) as error:  # no numbers, rows of different lengths, or nothing at all
        raise ValueError(f"{_EXPECTED}, got {given!r}") from error
    if sizes.ndim != 2 or sizes.shape[1] != 2 or not (sizes > 0).all():
        raise ValueError(f"{_EXPECTED}, got {given!r}")
    return sizes


_EXPECTED = "image_sizes must be the (height, width) of each image, [images, 2], as the processor returned it"
