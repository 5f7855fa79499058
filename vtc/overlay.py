"""`overlay` and `heatmap`: an image with its kept patches, and with the scores of all patches.

numpy and Pillow are imported inside the functions, because `import vtc` imports this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

SIDE = 672  # pixels on the longer side of a picture
OUTLINE = (255, 196, 0)
# matplotlib's "inferno" at nine places at equal distances: equal steps look equal, and more is lighter.
COLOURS = (
    (0, 0, 4),
    (33, 12, 74),
    (87, 16, 110),
    (138, 34, 106),
    (188, 55, 84),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
)
STRENGTH = 0.7  # of the colours of a heat map over the grey image


def overlay(image: Image.Image, selection: Any, index: int = 0, side: int = SIDE) -> Image.Image:
    """The image as the model saw it: kept patches crisp and outlined, dropped ones dark and grey.

    Like the model's processor, it resizes the shorter side and crops the centre.

    Parameters
    ----------
    image : PIL.Image.Image
        The image that was given to the processor, of any size and mode.
    selection : Selection
        What `vtc.select` returned: `indices` [B, K] int64, row-major patch numbers; `grid` (rows, columns); `counts`
        [B], the number of valid indices of each image, or None. Register tokens, which come before the patches, are
        not drawn.
    index : int
        Which image of the batch.
    side : int
        Longer side of the result in pixels, rounded to whole patches.

    Returns
    -------
    PIL.Image.Image
        Mode ``"RGB"``; all patches are squares of one size.

    Raises
    ------
    ValueError
        If `image` is not a PIL image, `selection` is not a Selection, `index` is not in the batch, an index is not on
        the grid, or `side` is smaller than the grid.
    """
    import numpy as np
    from PIL import Image

    seen, patch = _seen(image, selection, index, side)
    rows, columns = selection.grid
    count = len(selection.indices[index]) if selection.counts is None else int(selection.counts[index])
    registers = _count_registers(selection)
    indices = [int(i) - registers for i in selection.indices[index][:count] if not 0 <= i < registers]
    if indices and not 0 <= min(indices) <= max(indices) < rows * columns:
        raise ValueError(
            f"indices span {min(indices)}..{max(indices)}; a grid of {rows} x {columns} has patches "
            f"0..{rows * columns - 1}"
        )
    kept = np.zeros(rows * columns, dtype=bool)
    kept[indices] = True
    mask = _enlarged(kept.reshape(rows, columns), patch)
    grey = np.asarray(seen.convert("L"), np.float32)[..., None]
    pixels = np.where(mask[..., None], np.asarray(seen), (18 + 0.28 * grey).astype(np.uint8))
    pixels[_rim(mask, max(1, patch // 12))] = OUTLINE
    return Image.fromarray(pixels)


def heatmap(image: Image.Image, selection: Any, index: int = 0, side: int = SIDE) -> Image.Image:
    """The image as the model saw it, in grey under the scores of its patches: black is low, light yellow is high.

    A score's place on the colour scale is the cube root of (score - lowest) / (highest - lowest), of this image: the
    middle of the scale is an eighth of the way from the lowest to the highest score, and a tenth of it a thousandth.
    Scores are heavy-tailed: without the root a few patches would be light and all others black, and ranks would show
    the differences between unimportant patches as large as those between important ones. The colours of two images
    cannot be compared.

    Parameters
    ----------
    image, index, side
        As of `overlay`, and with the same geometry.
    selection : Selection
        What `vtc.select` returned: `scores` [B, N] float32 and `grid` (rows, columns). Register tokens, which come
        before the patches, are not drawn.

    Returns
    -------
    PIL.Image.Image
        Mode ``"RGB"``, of the size of the overlay.

    Raises
    ------
    ValueError
        As `overlay`, and if the selection has no scores, or a score is NaN.
    """
    import numpy as np
    from PIL import Image

    seen, patch = _seen(image, selection, index, side)
    rows, columns = selection.grid
    if selection.scores is None:
        raise ValueError("the selection has no scores; pass what vtc.select returned")
    scores = np.array(selection.scores[index].tolist())[_count_registers(selection) :]
    if bad := int(np.isnan(scores).sum()):
        raise ValueError(f"{bad} of the {len(scores)} scores are NaN; look for NaN in the pixels and the weights")
    finite = scores[np.isfinite(scores)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    shares = np.cbrt((scores.clip(low, high) - low) / ((high - low) or 1))
    places = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(shares, places, channel) for channel in zip(*COLOURS, strict=True)], -1)
    grey = np.asarray(seen.convert("L"), np.float32)[..., None]
    pixels = STRENGTH * _enlarged(colours.reshape(rows, columns, 3), patch) + (1 - STRENGTH) * grey
    return Image.fromarray(pixels.round().astype(np.uint8))


def _seen(image: Any, selection: Any, index: int, side: int) -> tuple[Image.Image, int]:
    """The image as the model saw it, about `side` pixels on its longer side, and the side of a patch in it."""
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        raise ValueError(f"image is a {type(image).__name__}; pass a PIL image, for instance vtc.load_image(path)")
    if not all(hasattr(selection, name) for name in ("indices", "scores", "grid", "counts")):
        raise ValueError(
            f"selection is a {type(selection).__name__}; pass the Selection that vtc.select returned, and not its "
            "indices or scores alone"
        )
    batch = len(selection.indices)
    if not 0 <= index < batch:
        raise ValueError(f"index is {index}; the selection holds {batch} image(s), so it must be in [0, {batch})")
    rows, columns = selection.grid
    patch = round(side / max(rows, columns))
    if patch < 1:
        raise ValueError(f"side is {side}; a grid of {rows} x {columns} patches needs at least {max(rows, columns)}")
    size = (columns * patch, rows * patch)
    return ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC), patch


def _count_registers(selection: Any) -> int:
    """How many tokens before the patches have scores."""
    rows, columns = selection.grid
    return 0 if selection.scores is None else int(selection.scores.shape[-1]) - rows * columns


def _enlarged(values: Any, patch: int) -> Any:
    """Repeat the values [rows, columns, ...] of patches for each of their pixels."""
    return values.repeat(patch, 0).repeat(patch, 1)


def _rim(mask: Any, width: int) -> Any:
    """The outermost `width` pixels of the True regions of `mask` [H, W]; edges of the image count as edges."""
    import numpy as np

    padded = np.pad(mask, width)
    inner = np.ones_like(mask)
    height, breadth = mask.shape
    for dy in (0, width, 2 * width):
        for dx in (0, width, 2 * width):
            inner &= padded[dy : dy + height, dx : dx + breadth]
    return mask & ~inner
