"""Read any image file as an upright 8-bit RGB image; a file that cannot be read is a one-line error."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 89_478_485  # decoded in full up to here (Pillow's own threshold for a decompression bomb)
MAX_ASPECT = 100  # processors resize the shorter side: a 1 x 10,000 strip would become 336 x 3,360,000


class ImageError(ValueError):
    """The file cannot be used as an image. The message is one line: what, why, what to do."""


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as RGB, upright, 8 bits per channel.

    EXIF rotation is applied, transparency is composited on white, and only the first frame of an animation is read.
    16-bit grey is scaled from 0..65535. 32-bit integers and floats have no defined white, so their finite minimum
    becomes black and their maximum white.

    Up to ``MAX_PIXELS`` (89 million) pixels are decoded in full. Larger JPEGs, up to twice that, are decoded
    at a reduced size, which their format allows; other larger files are refused before they are decoded.

    Parameters
    ----------
    path : str or os.PathLike
        A local file in any format that Pillow reads.

    Returns
    -------
    PIL.Image.Image
        Mode ``"RGB"``.

    Raises
    ------
    ImageError
        If the file is missing, a directory, empty, truncated, not an image, too large, too elongated, or a URL.
    """
    if "://" in str(path):
        raise ImageError(f"{path} is a URL; download the image and pass the path of the file")
    file = Path(path)
    if file.is_dir():
        raise ImageError(f"{path} is a directory; pass the path of one image file")
    if not file.exists():
        raise ImageError(f"{path} does not exist; check the spelling and the current directory")
    if not file.is_file():
        raise ImageError(f"{path} is not a regular file; pass the path of an image file")
    try:
        if file.stat().st_size == 0:
            raise ImageError(f"{path} is empty (0 bytes); copy or download it again")
        return _decode(file)
    except ImageError:
        raise
    except PermissionError as error:
        raise ImageError(f"{path} may not be read (permission denied); change its permissions") from error
    except Exception as error:  # on a damaged file Pillow's decoders raise anything from OSError to IndexError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path} is damaged or truncated ({reason}); copy or download it again") from error


def _decode(file: Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    # Pillow warns above MAX_PIXELS and raises above twice that, both before decoding. `_check_size` replaces the
    # warning; other warnings (odd metadata) are ignored.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file)
        except Image.DecompressionBombError as error:
            raise ImageError(f"{file} has more than {2 * MAX_PIXELS:,} pixels; make it smaller first") from error
        except UnidentifiedImageError as error:
            hint = "convert it to JPEG or PNG if it is an image"
            raise ImageError(f"{file} is not an image that Pillow can read; {hint}") from error
        with image:
            _check_size(file, image)
            return _to_rgb(ImageOps.exif_transpose(image), image.format)


def _check_size(file: Path, image: Image.Image) -> None:
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{file} is {width} x {height}, longer than {MAX_ASPECT} times its other side; crop it first")
    if width * height > MAX_PIXELS and image.format in ("JPEG", "MPO"):
        image.draft(None, (width // 2, height // 2))  # libjpeg then decodes at half size
        width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{file} is {width} x {height}, more than {MAX_PIXELS:,} pixels; make it smaller first")


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    from PIL import Image

    # Pillow's own conversion of these three modes clips at 255 instead of scaling.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return _grey(image, white=65535)
    if image.mode in ("I", "F"):
        return _grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _grey(image: Image.Image, white: float | None = None) -> Image.Image:
    import numpy as np
    from PIL import Image

    values = np.array(image, dtype=np.float32)
    black = 0.0
    if white is None:
        finite = values[np.isfinite(values)]
        black, white = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        np.nan_to_num(values, copy=False, nan=black, posinf=white, neginf=black)
    scale = 255 / ((white - black) or 1.0)
    values *= scale  # in place: the largest accepted image already takes 360 MB as float32
    values += 0.5 - black * scale
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
