"""`overlay`: an image with its kept patches.

numpy and Pillow are imported inside the function, because `import vtc` imports this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

SIDE = 672  # pixels on the longer side of an overlay
OUTLINE = (255, 196, 0)


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
        If `image` is not a PIL image, `index` is not in the batch, an index is not on the grid, or `side` is smaller
        than the grid.
    """
    import numpy as np
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        raise ValueError(f"image is a {type(image).__name__}; pass a PIL image, for instance vtc.load_image(path)")
    batch = len(selection.indices)
    if not 0 <= index < batch:
        raise ValueError(f"index is {index}; the selection holds {batch} image(s), so it must be in [0, {batch})")
    rows, columns = selection.grid
    patch = round(side / max(rows, columns))
    if patch < 1:
        raise ValueError(f"side is {side}; a grid of {rows} x {columns} patches needs at least {max(rows, columns)}")
    registers = 0 if selection.scores is None else selection.scores.shape[-1] - rows * columns
    count = len(selection.indices[index]) if selection.counts is None else int(selection.counts[index])
    indices = [int(i) - registers for i in selection.indices[index][:count] if not 0 <= i < registers]
    if indices and not 0 <= min(indices) <= max(indices) < rows * columns:
        raise ValueError(
            f"indices span {min(indices)}..{max(indices)}; a grid of {rows} x {columns} has patches "
            f"0..{rows * columns - 1}"
        )

    kept = np.zeros(rows * columns, dtype=bool)
    kept[indices] = True
    kept = kept.reshape(rows, columns)
    mask = kept.repeat(patch, 0).repeat(patch, 1)

    seen = ImageOps.fit(image.convert("RGB"), (columns * patch, rows * patch), Image.Resampling.BICUBIC)
    crisp = np.asarray(seen)
    grey = np.asarray(seen.convert("L"), np.float32)[..., None]
    pixels = np.where(mask[..., None], crisp, (18 + 0.28 * grey).astype(np.uint8))
    pixels[_rim(mask, max(1, patch // 12))] = OUTLINE
    return Image.fromarray(pixels)


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
