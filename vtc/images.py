"""Read any photograph as an upright 8-bit RGB image; a file that cannot be read is a one-line error."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 200_000_000  # larger ones are refused before they are decoded
MAX_PIXELS_IN_FULL = MAX_PIXELS // 4  # larger ones are halved in both directions
MAX_BYTES = 2**30  # of a stream
MAX_ASPECT = 100  # processors resize the shorter side: a 1 x 10,000 strip would become 336 x 3,360,000

# Pillow's formats of pixels. Its others are drawings (for EPS it runs Ghostscript), containers that may hold those, and
# data. "HEIF" is there if a plugin for Pillow has registered it.
FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "GIF", "BMP", "DIB"),
    *("JPEG2000", "PPM", "PCX", "TGA", "SGI", "QOI", "ICO", "PSD"),
)
DRAWINGS = {
    b"%!PS": "PostScript (EPS)",
    b"\xc5\xd0\xd3\xc6": "PostScript (EPS)",
    b"%PDF": "PDF",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"\x01\0\0\0": "EMF",
    b"<svg": "SVG",
    b"<?xm": "SVG, or other XML",
}
DECODERS_WITH_LIMIT = ("TIFF", "ICO")  # the formats for which Pillow reads its limit when it decodes, too

_LOCK = threading.Lock()  # around what changes globals of Pillow and Python


class ImageError(ValueError):
    """The file cannot be used as an image. The message is one line: what, why, what to do."""


def load_image(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Read an image file as RGB, upright, 8 bits per channel.

    EXIF rotation is applied, transparency is composited on white, and only the first frame of an animation is read.
    16-bit grey is scaled from 0..65535. 32-bit integers and floats have no defined white, so their finite minimum
    becomes black and their maximum white.

    Images of more than ``MAX_PIXELS`` (200 million) pixels are refused before they are decoded, and those of more than
    a quarter of it are halved in width and height: models see less than a megapixel. Decoding 12,000 x 9,000 pixels
    takes 0.3 GB of memory for a JPEG, 0.7 GB for a PNG, and 1.1 GB for a PNG with transparency.

    Parameters
    ----------
    source : str, os.PathLike or binary file object
        A local file in one of ``FORMATS``; or a stream of at most ``MAX_BYTES`` (1 GiB), such as ``sys.stdin.buffer``,
        which is read to its end.

    Returns
    -------
    PIL.Image.Image
        Mode ``"RGB"``.

    Raises
    ------
    ImageError
        If the file is missing, a directory, empty, truncated, not an image of pixels, too large, too elongated, or a
        URL.
    """
    name = _name_of(source)
    try:
        file = _read(source, name) if hasattr(source, "read") else _existing(source)
        return _decode(file, name)
    except ImageError:
        raise
    except PermissionError as error:
        raise ImageError(f"{name} may not be read (permission denied); change its permissions") from error
    except Exception as error:  # on a damaged file Pillow's decoders raise anything from OSError to IndexError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} is damaged or truncated ({reason}); copy or download it again") from error


def _name_of(source: Any) -> str:
    """What messages call the image."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    if not hasattr(source, "read"):
        raise ImageError(f"the image is a {type(source).__name__}; pass the path of a file, or a binary file object")
    name = getattr(source, "name", None)
    return "<standard input>" if name == "<stdin>" else name if isinstance(name, str) else "<stream>"


def _read(stream: Any, name: str) -> io.BytesIO:
    """All of a stream."""
    data = stream.read(MAX_BYTES + 1)
    if not isinstance(data, bytes):
        raise ImageError(f"{name} is a stream of text; open it as binary (sys.stdin.buffer for standard input)")
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); write an image to it")
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} has more than {MAX_BYTES:,} bytes; make the image smaller first")
    return io.BytesIO(data)


def _existing(path: Any) -> Path:
    """The path of a file that can be opened."""
    if not str(path):
        raise ImageError("the path of the image is empty; pass the path of an image file")
    if "://" in str(path):
        raise ImageError(f"{path} is a URL; download the image and pass the path of the file")
    file = Path(path)
    try:
        is_there = file.exists()
    except PermissionError:
        raise
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ImageError(f"{path} does not exist ({error}); check the spelling") from error
    if not is_there:
        raise ImageError(f"{path} does not exist; check the spelling and the current directory")
    if file.is_dir():
        raise ImageError(f"{path} is a directory; pass the path of one image file")
    if not file.is_file():
        raise ImageError(f"{path} is not a regular file; pass the path of an image file")
    if file.stat().st_size == 0:
        raise ImageError(f"{path} is empty (0 bytes); copy or download it again")
    return file


def _decode(file: Path | io.BytesIO, name: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    begin = file.getvalue()[:4] if isinstance(file, io.BytesIO) else _first_bytes(file)
    if begin in DRAWINGS:
        raise ImageError(f"{name} is {DRAWINGS[begin]}, a drawing and no pixels; convert it to PNG")
    try:
        with _own_limit():
            Image.init()
            image = Image.open(file, formats=[each for each in FORMATS if each in Image.OPEN])  # reads the header only
        with image:
            return _upright(_checked(image, name))
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has more than {MAX_PIXELS:,} pixels; make it smaller first") from error
    except UnidentifiedImageError as error:
        hint = f"convert it to JPEG or PNG if it is an image (VTC reads {', '.join(FORMATS)})"
        raise ImageError(f"{name} is not an image in a format that VTC reads; {hint}") from error


@contextlib.contextmanager
def _own_limit() -> Iterator[None]:
    """Replace Pillow's limit by `MAX_PIXELS`, and ignore warnings: in one thread at a time, so as briefly as possible.

    Pillow warns above its limit and raises above twice that. `_checked` replaces the warning; others are of odd
    metadata.
    """
    from PIL import Image

    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4)


def _checked(image: Any, name: str) -> Any:
    """The opened `image`, halved if it is large. Most formats are not decoded before that."""
    from PIL import ExifTags, Image

    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{name} is {width} x {height}, longer than {MAX_ASPECT} times its other side; crop it first")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} is {width} x {height}, more than {MAX_PIXELS:,} pixels; make it smaller first")
    with _own_limit():
        if "exif" in image.info:  # only one entry counts, and odd ones would be warned of again later
            exif, turned = Image.Exif(), image.getexif().get(ExifTags.Base.Orientation)
            exif.update({ExifTags.Base.Orientation: turned} if turned in range(2, 9) else {})
            image.info["exif"] = exif.tobytes()
        if image.format in DECODERS_WITH_LIMIT:
            image.load()
    if width * height <= MAX_PIXELS_IN_FULL:
        return image
    image.draft(None, (width // 2, height // 2))  # libjpeg decodes at half size; other formats ignore it
    if image.size != (width, height):
        return image
    image.load()
    half = (-(-image.width // 2), -(-image.height // 2))
    if image.has_transparency_data and image.mode in ("L", "RGB"):  # one colour is transparent; a mean has others
        image = image.convert("RGBA")
    halved = image.resize(half, Image.Resampling.BOX)
    halved.format = image.format
    return halved


def _upright(image: Any) -> Image.Image:
    from PIL import ImageOps

    return _to_rgb(ImageOps.exif_transpose(image), image.format)


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
    values *= scale  # in place, because the image may be large
    values += 0.5 - black * scale
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
