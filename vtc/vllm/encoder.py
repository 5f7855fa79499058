"""Pixels to the visual tokens that stay, inside a worker of vLLM, a bounded number of views at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtc.methods import VisionOutputs
from vtc.plan import Plan
from vtc.tiles import Tiling, best_places, numbers_of, reduce_each


class Encoder(NamedTuple):
    """What encodes the images of one model.

    Attributes
    ----------
    plan : Plan
    tower : callable
        Views `[T, 3, height, width]` to what the plan's method needs.
    projector : callable
        Features `[..., C]` to tokens `[..., D]`.
    newline : Tensor[D] or None
        Of a model with tiles.
    batch : int
        The largest number of views in one pass of the tower. An image with more tiles has a pass of its own.
    """

    plan: Plan
    tower: Callable[[Tensor], VisionOutputs]
    projector: Callable[[Tensor], Tensor]
    newline: Tensor | None
    batch: int

    def whole(self, pixels: Tensor, keeps: Sequence[int]) -> list[Tensor]:
        """The tokens `[K, D]` of each image, `pixels` `[images, 3, height, width]`, with `keep` of its own."""
        found: list[Tensor] = [pixels] * len(pixels)
        for keep in sorted(set(keeps)):  # the requests of a batch have different budgets
            numbers = [number for number, own in enumerate(keeps) if own == keep]
            images = pixels if len(numbers) == len(pixels) else torch.stack([pixels[number] for number in numbers])
            expected = self.plan.method.num_outputs(self.plan.num_tokens, keep)
            for some in images.split(self.batch):
                tokens = self.plan.method.reduce(self.tower(some), keep)
                if tokens.features.shape[1] != expected:
                    raise ValueError(
                        f"reduce of method {self.plan.method.name!r} must return {expected} tokens of an image, as its "
                        f"num_outputs says, got {tokens.features.shape[1]}"
                    )
                for own in self.projector(tokens.features):
                    found[numbers.pop(0)] = own
        return found

    def tiled(self, images: Sequence[Tensor], tiles: Sequence[Tiling], counts: Sequence[int]) -> list[Tensor]:
        """The tokens `[K, D]` of each image, K in `counts`.

        An image is `[tiles, 3, height, width]`, and may be padded with more tiles.
        """
        found: list[Tensor] = []
        for some in self._batches(tiles):
            own, kept = [tiles[number] for number in some], [counts[number] for number in some]
            pixels = [images[number][: tiles[number].num_tiles] for number in some]
            vision = self.tower(torch.cat(pixels))
            features, is_newline = self._reduce_tiled(vision, own, kept)
            visual = self.projector(features)
            if self.newline is not None:
                visual = torch.where(is_newline[:, None], self.newline.to(visual), visual)
            found += visual.split(kept)
        return found

    def _batches(self, tiles: Sequence[Tiling]) -> Iterator[list[int]]:
        """The images, as many as have at most `batch` views together, but at least one."""
        numbers: list[int] = []
        views = 0
        for number, tiling in enumerate(tiles):
            if numbers and views + tiling.num_tiles > self.batch:
                yield numbers
                numbers, views = [], 0
            numbers.append(number)
            views += tiling.num_tiles
        if numbers:
            yield numbers

    def _reduce_tiled(
        self, vision: VisionOutputs, tiles: Sequence[Tiling], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The features `[M, C]` of all images, and which of them are newlines."""
        plan = self.plan
        if not plan.method.per_view:
            numbers = numbers_of(best_places(plan, vision, tiles, counts), tiles, plan.num_tokens)
            return vision.patches.flatten(0, 1)[numbers.clamp(min=0)], numbers < 0
        found, first = [], 0
        for tiling, kept in zip(tiles, counts, strict=True):
            own = vision.of_views(slice(first, first + tiling.num_tiles))
            found.append(reduce_each(plan, own, tiling, kept))
            first += tiling.num_tiles
        features, is_newline = zip(*found, strict=True)
        return torch.cat(features), torch.cat(is_newline)
