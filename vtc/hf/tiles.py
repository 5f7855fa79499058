"""LLaVA-NeXT's tiles: how many an image has, and which token stands at each of its placeholders."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtc.hf.settings import Settings


class Tiling(NamedTuple):
    """The tiles of one image, the base image first.

    Attributes
    ----------
    num_tiles : int
    layout : Tensor[n], int64, on the CPU
        The token at each placeholder of the image, counted over its tiles: tile * N + token; -1 for a newline.
    """

    num_tiles: int
    layout: Tensor


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


def flat_tiles(pixels: Tensor, tiles: list[Tiling], name: str) -> Tensor:
    """All tiles of all images, `[T, 3, height, width]`, without the padding to the largest number of tiles.

    Raises
    ------
    ValueError
        If the pixels do not hold the tiles that follow from the sizes of the images.
    """
    shape: Any = tuple(pixels.shape)
    if pixels.ndim == 5 and len(pixels) == len(tiles):
        pixels = torch.cat([own[: tiling.num_tiles] for own, tiling in zip(pixels, tiles, strict=True)])
    if pixels.ndim != 4 or len(pixels) != sum(tiling.num_tiles for tiling in tiles):
        raise ValueError(
            f"{name} of shape {shape} does not hold the {[tiling.num_tiles for tiling in tiles]} tiles of image_sizes; "
            "it must be [images, tiles, 3, height, width] as the processor makes it"
        )
    return pixels
