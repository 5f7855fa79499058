"""`overlay`: kept patches are shown as they are, dropped ones are dark and grey, and the crop is the model's."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vtc.overlay import OUTLINE, SIDE, overlay

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
    ],
)
def test_errors_teach(change, words):
    good = {"image": Image.new("RGB", (336, 336)), "selection": selection([0])}
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        overlay(**{**good, **change})
