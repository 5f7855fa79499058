"""`overlay`: kept patches are as they are, dropped ones dark and grey, the crop is the model's. `heatmap`: scores."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vtc.overlay import COLOURS, OUTLINE, SIDE, STRENGTH, heatmap, overlay

RED = (200, 40, 30)


def selection(*rows, grid=(24, 24)):
    return SimpleNamespace(indices=torch.tensor(rows), scores=None, grid=grid, counts=None)


def patches(picture, grid=(24, 24)):
    """Overlay -> [rows, columns, patch, patch, 3]."""
    pixels = np.asarray(picture).astype(int)
    side = picture.width // grid[1]
    return pixels.reshape(grid[0], side, grid[1], side, 3).swapaxes(1, 2)


def is_outline(pixels):
    return (pixels == OUTLINE).all(-1)


def test_the_module_imports_nothing_heavy():
    """`import vtc` imports it."""
    import vtc

    tree = ast.parse((Path(vtc.__file__).parent / "overlay.py").read_text())
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"__future__", "typing"}


def test_kept_patches_are_untouched_inside_their_outline():
    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    kept = [0, 25, 26, 575]
    got, want = patches(overlay(Image.fromarray(noise), selection(kept))), patches(Image.fromarray(noise))
    for n in kept:
        assert (got[divmod(n, 24)][2:-2, 2:-2] == want[divmod(n, 24)][2:-2, 2:-2]).all()


def test_dropped_patches_are_dark_and_grey():
    got = patches(overlay(Image.new("RGB", (336, 336), "white"), selection([30])))
    dropped = np.delete(got.reshape(576, -1, 3), 30, axis=0)
    assert dropped.max() < 100
    assert (np.ptp(dropped, axis=-1) == 0).all()
    assert not is_outline(dropped).any()


def test_indices_are_row_major():
    got = patches(overlay(Image.new("RGB", (336, 336), RED), selection([24 * 5 + 7])))
    assert (got[5, 7][4:-4, 4:-4] == RED).all()
    assert got[7, 5].max() < 100


def test_outline_surrounds_the_region_not_each_patch():
    got = patches(overlay(Image.new("RGB", (336, 336), RED), selection([100, 101, 125])))  # 101 above 125
    left, right, below = got[4, 4], got[4, 5], got[5, 5]
    assert is_outline(left)[:, 0].all()
    assert is_outline(left)[0].all()
    assert not is_outline(left)[5:-5, -1].any()
    assert not is_outline(right)[5:-5, 0].any()
    assert not is_outline(right)[-1, 5:-5].any()
    assert is_outline(below)[-1].all()


def test_everything_kept_is_outlined_at_the_edge_of_the_image_only():
    got = np.asarray(overlay(Image.new("RGB", (336, 336), RED), selection(list(range(576)))))
    assert is_outline(got)[0].all()
    assert is_outline(got)[:, -1].all()
    assert (got[3:-3, 3:-3] == RED).all()


@pytest.mark.parametrize("size", [(600, 300), (300, 600)])
def test_the_centre_is_cropped_as_the_processor_does(size):
    wide = Image.new("RGB", size, "blue")
    left, top = (size[0] - 300) // 2, (size[1] - 300) // 2
    wide.paste(RED, (left, top, left + 300, top + 300))
    got = np.asarray(overlay(wide, selection(list(range(576)))))
    assert got.shape == (SIDE, SIDE, 3)
    assert (got[4:-4, 4:-4] == RED).all()


def test_the_crop_agrees_with_the_clip_processor():
    from transformers import CLIPImageProcessor

    smooth = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    photo = Image.fromarray(smooth).resize((720, 480), Image.Resampling.BICUBIC)
    size = {"height": 336, "width": 336}
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size, do_normalize=False)
    seen = np.asarray(processor(photo, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0) * 255
    drawn = np.asarray(overlay(photo, selection(list(range(576))), side=336)).astype(float)
    assert np.abs(drawn - seen)[4:-4, 4:-4].mean() < 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_mode(mode):
    assert overlay(Image.new(mode, (50, 40)), selection([1])).mode == "RGB"


def test_index_chooses_the_image_of_the_batch():
    red = Image.new("RGB", (336, 336), RED)
    both = selection([3], [500])
    assert overlay(red, both, index=1).tobytes() == overlay(red, selection([500])).tobytes()
    assert overlay(red, both).tobytes() == overlay(red, selection([3])).tobytes()


def test_grid_that_is_not_square():
    picture = overlay(Image.new("RGB", (336, 336), RED), selection([5], grid=(2, 3)), side=300)
    assert picture.size == (300, 200)
    assert (patches(picture, (2, 3))[1, 2][20:-20, 20:-20] == RED).all()


def test_the_input_is_not_changed():
    red = Image.new("RGB", (336, 336), RED)
    before = red.tobytes()
    overlay(red, selection([1]))
    assert red.tobytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": np.zeros((3, 3, 3))}, ["ndarray", "PIL image", "load_image"]),
        ({"index": 1}, ["index is 1", "1 image(s)", "[0, 1)"]),
        ({"index": -1}, ["index is -1"]),
        ({"selection": selection([576])}, ["576", "24 x 24", "0..575"]),
        ({"selection": selection([-1, 3])}, ["-1..3"]),
        ({"side": 5}, ["side is 5", "at least 24"]),
        ({"selection": torch.tensor([[1, 2]])}, ["is a Tensor", "pass the Selection that vtc.select returned"]),
        ({"selection": [3, 4]}, ["is a list", "pass the Selection"]),
    ],
)
def test_errors_teach(change, words):
    good = {"image": Image.new("RGB", (336, 336)), "selection": selection([0])}
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        overlay(**{**good, **change})


def scored(*rows, grid=(2, 4)):
    return SimpleNamespace(indices=torch.zeros(len(rows), 1).long(), scores=torch.tensor(rows), grid=grid, counts=None)


def blended(colour, grey):
    return [round(STRENGTH * channel + (1 - STRENGTH) * grey) for channel in colour]


def test_heat_is_the_cube_root_of_a_patches_share():
    """The middle of the scale is an eighth of the way from the lowest score to the highest."""
    picture = heatmap(Image.new("RGB", (80, 40), (90, 90, 90)), scored([-2.0, -1.0, 6.0, -2 + 27 / 64] + 4 * [-2.0]))
    assert picture.size == (672, 336)
    assert picture.mode == "RGB"
    got = patches(picture, (2, 4))
    assert (got == got[:, :, :1, :1]).all()  # one colour a patch
    colours = got[:, :, 0, 0].reshape(8, 3).tolist()
    assert colours[0] == blended(COLOURS[0], 90)
    assert colours[1] == blended(COLOURS[4], 90)
    assert colours[2] == blended(COLOURS[8], 90)
    assert colours[3] == blended(COLOURS[3], 90)
    assert colours[4:] == 4 * [blended(COLOURS[0], 90)]


def test_heat_lies_over_the_image_as_the_model_saw_it():
    halves = Image.new("RGB", (600, 300), "blue")  # the blue is cropped
    halves.paste((0, 0, 0), (150, 0, 300, 300))
    halves.paste((200, 200, 200), (300, 0, 450, 300))
    got = patches(heatmap(halves, scored([1.0, 1.0, 1.0, 1.0], grid=(2, 2)), side=100), (2, 2))
    assert got[:, 0, 25, 5].tolist() == 2 * [blended(COLOURS[0], 0)]
    assert got[:, 1, 25, -5].tolist() == 2 * [blended(COLOURS[0], 200)]


def test_steps_of_the_colour_scale_look_equal():
    """CIE lightness from sRGB: about linear, from black to nearly white."""
    linear = ((np.array(COLOURS) / 255 + 0.055) / 1.055) ** 2.4
    lightness = 116 * np.cbrt(np.maximum(linear @ [0.2126, 0.7152, 0.0722], 0.0087)) - 16
    steps = np.diff(lightness)[1:]
    assert lightness[0] < 8
    assert lightness[-1] > 95
    assert (abs(steps - steps.mean()) < 0.25 * steps.mean()).all()


def test_heat_of_registers_is_not_drawn_and_the_index_chooses_the_image():
    black = Image.new("RGB", (40, 40))
    want = heatmap(black, scored([1.0, 2.0, 3.0, 4.0], grid=(2, 2)))
    with_registers = scored([9.0, 9.0, 4.0, 3.0, 2.0, 1.0], [9.0, -9.0, 1.0, 2.0, 3.0, 4.0], grid=(2, 2))
    assert heatmap(black, with_registers, index=1).tobytes() == want.tobytes()
    assert heatmap(black, with_registers).tobytes() != want.tobytes()


def test_infinite_scores_are_the_ends_of_the_scale():
    black, inf = Image.new("RGB", (40, 40)), float("inf")
    want = heatmap(black, scored([1.0, 1.0, 5.0, 5.0], grid=(2, 2)))
    assert heatmap(black, scored([1.0, -inf, inf, 5.0], grid=(2, 2))).tobytes() == want.tobytes()
    heatmap(black, scored([inf, -inf, inf, inf], grid=(2, 2)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": "a.png"}, ["is a str", "PIL image"]),
        ({"index": 1}, ["index is 1", "1 image(s)"]),
        ({"selection": torch.ones(1, 4)}, ["is a Tensor", "pass the Selection"]),
        ({"selection": selection([1])}, ["no scores"]),
        ({"selection": scored([1.0, float("nan"), 2.0, float("nan")], grid=(2, 2))}, ["2 of the 4 scores are NaN"]),
    ],
)
def test_errors_of_heat_maps_teach(change, words):
    good = {"image": Image.new("RGB", (40, 40)), "selection": scored([1.0, 2.0, 3.0, 4.0], grid=(2, 2))}
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        heatmap(**{**good, **change})
