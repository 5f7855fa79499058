"""Pixels to tokens in bounded passes of the vision tower, with towers and methods that can be followed by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vtc.config import VTCConfig
from vtc.methods import Tokens, VisionOutputs
from vtc.plan import Plan
from vtc.tiles import Tiling
from vtc.vllm.encoder import Encoder

PATCHES = 6
BATCH = 4


class Tower:
    """Gives patch p of a view of value v the features [v, p] and a score that grows with both.

    `passes` are the numbers of views that it has seen.
    """

    def __init__(self) -> None:
        self.passes: list[int] = []

    def __call__(self, views: torch.Tensor) -> VisionOutputs:
        self.passes.append(len(views))
        values = views[:, 0, :1, 0].expand(-1, 1 + PATCHES)
        patches = torch.arange(-1.0, PATCHES).expand(len(views), -1)
        hidden = torch.stack([values, patches], -1)
        scores = ((values + 1) * (patches + 1) / 1000)[None, :, 1:]
        return VisionOutputs(hidden, (2, 3), scores[:, :, None], cls=True, received=scores.expand(2, -1, -1))


def encoder(method: str = "vtc-cls", newline: Any = None, shares_keep: bool = False) -> tuple[Encoder, Tower]:
    vision = SimpleNamespace(num_hidden_layers=6, image_size=(28, 42), patch_size=14)
    model = SimpleNamespace(vision_config=vision, vision_feature_layer=-2)
    plan = Plan.of(VTCConfig(method=method, keep=3), model, shares_keep=shares_keep)
    tower = Tower()
    return Encoder(plan, tower, lambda features: features * 10, newline, BATCH), tower


def images(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 28, 42)


def tiling(views: int) -> Tiling:
    """All patches, tile after tile, and a newline."""
    return Tiling(views, torch.tensor([*range(views * PATCHES), -1]))


@pytest.mark.parametrize("count", [1, BATCH, BATCH + 1, 3 * BATCH])
def test_whole_images_in_bounded_passes(count) -> None:
    made, tower = encoder()
    found = made.whole(images(*range(count)), [2] * count)
    assert [own.tolist() for own in found] == [[[value * 10, 40], [value * 10, 50]] for value in range(count)]
    assert max(tower.passes) <= BATCH
    assert sum(tower.passes) == count
    assert len(tower.passes) == -(-count // BATCH)  # as few as there can be


def test_whole_images_with_different_keep_stay_in_order() -> None:
    made, tower = encoder()
    keeps = [3, 1, 3, 2, 1, 3, 3, 3]
    found = made.whole(images(*range(8)), keeps)
    for value, (keep, own) in enumerate(zip(keeps, found, strict=True)):
        assert own.tolist() == [[value * 10, patch * 10] for patch in range(PATCHES - keep, PATCHES)]
    assert sorted(tower.passes) == [1, 1, 2, 4]  # those of one keep together


def test_method_that_returns_another_number_of_tokens() -> None:
    made, _ = encoder()
    few = made.plan.method.changed()
    object.__setattr__(few, "reduce", lambda vision, keep: Tokens(vision.patches[:, :1]))
    made = made._replace(plan=made.plan._replace(method=few))
    with pytest.raises(ValueError, match=r"reduce of method 'vtc-cls' must return 3 tokens .* got 1"):
        made.whole(images(7), [3])


@pytest.mark.parametrize(
    ("views", "passes"),
    [([1, 3, 1], [4, 1]), ([2, 3, 2, 2], [2, 3, 4]), ([1, 9, 1], [1, 9, 1]), ([9], [9]), ([4, 4], [4, 4]), ([], [])],
)
def test_tiles_in_bounded_passes(views, passes) -> None:
    made, tower = encoder(newline=torch.tensor([-1.0, -2.0]), shares_keep=True)
    pixels, first = [], 0
    for count in views:
        # Padded, as images in one prompt are, with pixels that must not be seen.
        pixels.append(torch.cat([images(*range(first, first + count)), images(99)]))
        first += count
    counts = [count * PATCHES + 1 for count in views]
    if views:
        counts[0] = 1
    found = made.tiled(pixels, [tiling(count) for count in views], counts)
    assert tower.passes == passes
    first = 0
    for number, (count, own) in enumerate(zip(views, found, strict=True)):
        own_values = range(first, first + count)
        whole = [[value * 10, patch * 10] for value in own_values for patch in range(PATCHES)] + [[-1, -2]]
        if number:
            assert own.tolist() == whole  # all stay, with the newline
        else:
            assert own.tolist() in [[row] for row in whole if row[1] == (PATCHES - 1) * 10]  # one of the best patches
        first += count


@pytest.mark.parametrize(("method", "kept"), [("hiprune", [0, 0, 10, 10]), ("vtc-cls", [0, 10, 10, 10])])
def test_tiles_share_their_tokens(method, kept) -> None:
    """A method that reduces views one by one keeps as many of each."""
    made, _ = encoder(method, torch.tensor([-1.0, -2.0]), shares_keep=True)
    found, other = made.tiled([images(0, 1), images(2, 3)], [tiling(2), tiling(2)], [4, 4])
    assert found[:, 0].tolist() == kept
    assert other[:, 0].tolist() == [20, 20, 30, 30]
