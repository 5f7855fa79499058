"""An image with tiles, as LLaVA-NeXT has: how its tokens are shared among them, and which stay. It knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtc import ops
from vtc.config import kept_count, kept_per_view
from vtc.methods import Method, VisionOutputs
from vtc.plan import Plan


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


def kept_of_tiles(plan: Plan, tokens: int, views: int) -> int:
    """K of an image of so many placeholders and tiles, or ValueError if it is too small for its views."""
    method = plan.method
    kept = kept_count(plan.config, tokens)
    if not method.per_view or (kept == tokens and is_whole(plan)):
        return kept
    keep = kept_per_view(plan.config, tokens, views, plan.num_tokens)
    outputs, why = _outputs(plan, keep)
    if not outputs:
        least = next((each for each in range(1, plan.num_tokens + 1) if _outputs(plan, each)[0]), plan.num_tokens)
        raise ValueError(
            f"each of the {views} views of an image gets keep // {views} = {keep} tokens, which is too few; use keep="
            f"{views * least} or more, or a larger ratio{why}"
        )
    return views * outputs


def is_whole(plan: Plan) -> bool:
    """Whether K = N changes nothing of a view: patches are chosen, or the view is made smaller."""
    method = plan.method
    resizes = type(method).view_grid is not Method.view_grid
    return method.keeps_patches() or (resizes and method.view_grid(plan.grid, plan.num_tokens) == plan.grid)


def _outputs(plan: Plan, keep: int) -> tuple[int, str]:
    """How many tokens a view has for `keep`; 0 and why, if they are too few."""
    try:
        return keep and plan.method.num_outputs(plan.num_tokens, keep), ""
    except ValueError as error:
        return 0, f". Of each view: {error}"


def kept_of_view(plan: Plan, tiling: Tiling, kept: int) -> int:
    """K of each view of an image that keeps `kept` tokens, for a method that reduces views one by one."""
    return plan.num_tokens if _stays(plan, tiling, kept) else kept // tiling.num_tiles


def _stays(plan: Plan, tiling: Tiling, kept: int) -> bool:
    return kept == len(tiling.layout) and is_whole(plan)


def reduce_each(plan: Plan, vision: VisionOutputs, tiling: Tiling, kept: int) -> tuple[Tensor, Tensor]:
    """The features `[kept, C]` of an image whose views, `vision`, are reduced one by one, and which are newlines.

    The base image's come first. If all tokens stay, they are those of the image.
    """
    features = plan.method.reduce(vision, kept_of_view(plan, tiling, kept)).features.flatten(0, 1)
    layout = (tiling.layout if _stays(plan, tiling, kept) else torch.arange(kept)).to(features.device)
    return features[layout.clamp(min=0)], layout < 0


def best_places(plan: Plan, vision: VisionOutputs, tiles: Sequence[Tiling], counts: Sequence[int]) -> list[Tensor]:
    """The places, among each image's placeholders, of the best tokens of all its tiles.

    Parameters
    ----------
    vision : VisionOutputs
        Of the tiles of all images, one after the other.
    tiles : sequence of Tiling
    counts : sequence of int
        K of each image. Where it is the number of its placeholders, all stay.

    Returns
    -------
    list of Tensor[K], int64, ascending

    Raises
    ------
    ValueError
        If a method that chooses among all tiles together does not take so many patches.
    """
    places, first, scores = [], 0, None
    for tiling, kept in zip(tiles, counts, strict=True):
        own = slice(first, first + tiling.num_tiles)
        first += tiling.num_tiles
        if kept == len(tiling.layout):
            places.append(torch.arange(kept, device=vision.hidden.device))
            continue
        if plan.method.joint:
            ranking = _joint_ranking(plan, vision.of_views(own), tiling.layout, kept)
        else:
            scores = plan.method.selected(vision, 1)[1] if scores is None else scores  # [T, N]
            ranking = share_out(scores[own], tiling.layout, plan.config.tiles)
        places.append(ops.topk(ranking[None], kept, backend=plan.config.backend)[0])
    return places


def numbers_of(places: Sequence[Tensor], tiles: Sequence[Tiling], num_tokens: int) -> Tensor:
    """The tokens `[M]` int64 at the places of all images, counted over all tiles of `num_tokens`; -1 for a newline."""
    found, first = [], 0
    for own, tiling in zip(places, tiles, strict=True):
        numbers = tiling.layout.to(own.device)[own]
        found.append(torch.where(numbers < 0, numbers, numbers + first * num_tokens))
        first += tiling.num_tiles
    return torch.cat(found)


def _joint_ranking(plan: Plan, vision: VisionOutputs, layout: Tensor, keep: int) -> Tensor:
    """The scores `[n]` of an image's tokens, chosen among the patches of all its tiles. Newlines come last.

    `layout` is that of `Tiling`.

    Raises
    ------
    ValueError
        If the method does not take so many patches.
    """
    places = (layout >= 0).nonzero()[:, 0]
    patches = layout[places].to(vision.hidden.device)
    try:
        scores = plan.method.selected(vision.joined(patches), min(keep, len(patches)))[1][0]
    except ValueError as error:
        raise ValueError(
            f"method {plan.method.name!r} chooses among all {len(patches)} patches of an image's tiles together: "
            f"{error} Use smaller images, or a method that ranks the tiles' patches, such as 'vtc-cls' or 'received'."
        ) from error
    return scores.new_full(layout.shape, -1.0).index_copy(0, places.to(scores.device), scores)


def share_out(scores: Tensor, layout: Tensor, how: str) -> Tensor:
    """Rank an image's tokens `[n]` so that the K largest are the best tokens of each tile, shared as `how` says.

    The token of rank r = 0, 1, 2, ... in its tile gets mass / (r + 1/2). The tile's mass is the sum of its scores
    ("mass") or 1 ("equal"). Taking the largest of these is the Sainte-Lague method of sharing out seats: shares are
    proportional and rounded without bias, and the other tiles get what a small tile cannot use. Newlines come last.

    Parameters
    ----------
    scores : Tensor[T, N], floating point
        Of the tokens of an image's tiles, the base image first; NaN ranks last.
    layout : Tensor[n], int64, on the CPU
        The token at each placeholder of the image, counted over its tiles: tile * N + token; -1 for a newline.
    how : {"mass", "equal"}

    Returns
    -------
    Tensor[n], float32
    """
    tile = torch.where(layout < 0, len(scores), layout // scores.shape[1])
    sizes = tile.bincount(minlength=len(scores) + 1)
    start = (sizes.cumsum(0) - sizes).to(scores.device)
    tile, layout = tile.to(scores.device), layout.to(scores.device)
    score = scores.flatten()[layout.clamp(min=0)].float()
    order = score.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    order = order[tile[order].argsort(stable=True)]  # tile by tile, each from its best to its worst
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - start[tile[order]]
    mass = torch.ones_like(start, dtype=torch.float32)
    if how == "mass":
        own = tile == torch.arange(len(start), device=tile.device)[:, None]
        mass = torch.where(own, score.nan_to_num(nan=0.0), 0.0).sum(1)
    return torch.where(layout < 0, -1.0, mass[tile] / (rank + 0.5))
