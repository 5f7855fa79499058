"""`load_image` on real files of every kind: the pixels are right, and bad files give one clear line."""

import io
import os
import re
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from vtc import images
from vtc.images import ImageError, load_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def two_halves(left=RED, right=BLUE, size=(64, 32)):
    picture = Image.new("RGB", size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    return picture


def near(pixel, colour, tolerance=3):
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.jpg", "RGB"), ("a.png", "RGB"), ("a.webp", "RGB"), ("a.bmp", "RGB"), ("a.tif", "RGB"), ("a.gif", "P")],
)
def test_ordinary_files_keep_their_pixels(tmp_path, name, mode):
    two_halves().convert(mode).save(tmp_path / name)
    got = load_image(tmp_path / name)
    assert (got.mode, got.size) == ("RGB", (64, 32))
    assert near(got.getpixel((8, 16)), RED, 12)
    assert near(got.getpixel((56, 16)), BLUE, 12)
    assert load_image(str(tmp_path / name)).tobytes() == got.tobytes()


# What a viewer must show when the stored picture (red left, blue right) carries each EXIF orientation.
@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [
        (1, (64, 32), (8, 16)),
        (2, (64, 32), (56, 16)),
        (3, (64, 32), (56, 16)),
        (4, (64, 32), (8, 16)),
        (5, (32, 64), (16, 8)),
        (6, (32, 64), (16, 8)),
        (7, (32, 64), (16, 56)),
        (8, (32, 64), (16, 56)),
    ],
)
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_exif_rotation(tmp_path, orientation, size, red_at, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    two_halves().save(tmp_path / name, exif=exif)
    got = load_image(tmp_path / name)
    assert got.size == size
    assert near(got.getpixel(red_at), RED, 12)
    assert near(got.getpixel((size[0] - 1 - red_at[0], size[1] - 1 - red_at[1])), BLUE, 12)


def test_alpha_is_composited_on_white(tmp_path):
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)])
    picture.save(tmp_path / "a.png")
    assert list(load_image(tmp_path / "a.png").get_flattened_data()) == [RED, WHITE, (127, 127, 127)]


def test_grey_with_alpha(tmp_path):
    picture = Image.new("LA", (2, 1))
    picture.putdata([(10, 255), (10, 0)])
    picture.save(tmp_path / "a.png")
    assert list(load_image(tmp_path / "a.png").get_flattened_data()) == [(10, 10, 10), WHITE]


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_palette_with_transparency(tmp_path, name):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    picture.save(tmp_path / name, transparency=1)
    assert list(load_image(tmp_path / name).get_flattened_data()) == [RED, WHITE]


def test_one_bit(tmp_path):
    picture = Image.new("1", (2, 1))
    picture.putdata([0, 1])
    picture.save(tmp_path / "a.png")
    assert list(load_image(tmp_path / "a.png").get_flattened_data()) == [(0, 0, 0), WHITE]


def test_grey(tmp_path):
    Image.new("L", (2, 2), 77).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((1, 1)) == (77, 77, 77)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    values = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    got = np.asarray(load_image(tmp_path / name))[0, :, 0]
    assert got.tolist() == [0, 0, 1, 128, 255]


def test_16_bit_grey_opened_as_32_bit_by_older_pillow(tmp_path):
    values = np.array([[0, 257, 32768, 1000]], dtype=np.int32)  # its maximum is not white
    got = images._to_rgb(Image.fromarray(values), "PNG")
    assert np.asarray(got)[0, :, 0].tolist() == [0, 1, 128, 4]


def test_float_and_32_bit_tiff_span_black_to_white(tmp_path):
    Image.fromarray(np.array([[-2.0, 0.0, 2.0, np.nan, np.inf]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert np.asarray(load_image(tmp_path / "f.tif"))[0, :, 0].tolist() == [0, 128, 255, 0, 255]
    Image.fromarray(np.array([[-100, 0, 100]], dtype=np.int32)).save(tmp_path / "i.tif")
    assert np.asarray(load_image(tmp_path / "i.tif"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_constant_float_tiff(tmp_path, value):
    Image.fromarray(np.full((2, 2), value, dtype=np.float32)).save(tmp_path / "f.tif")
    assert load_image(tmp_path / "f.tif").getpixel((0, 0)) == (0, 0, 0)


def test_cmyk(tmp_path):
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "a.tif")
    assert near(load_image(tmp_path / "a.jpg").getpixel((4, 4)), RED)
    assert load_image(tmp_path / "a.tif").getpixel((4, 4)) == RED


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    assert load_image(tmp_path / "a.gif").getpixel((4, 4)) == RED


def refused(path, *words):
    with pytest.raises(ImageError) as caught:
        load_image(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message
    return message


def test_image_error_is_a_value_error():
    assert issubclass(ImageError, ValueError)


def test_missing_directory_empty_and_url(tmp_path):
    refused(tmp_path / "nowhere.png", "does not exist", "check the spelling")
    refused(tmp_path, "is a directory", "pass the path of one image file")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "is empty (0 bytes)")
    refused("https://example.org/cat.jpg", "is a URL", "download the image")
    refused("nul\0byte.png", "does not exist")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "not a regular file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path):
    two_halves().save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    refused(tmp_path / "a.png", "permission denied")


def test_not_an_image(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture\n" * 100)
    refused(tmp_path / "notes.png", "not an image in a format that VTC reads", "convert it to JPEG or PNG")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.tif", "a.bmp", "a.webp"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    refused(tmp_path / name)


def test_damaged_in_the_middle(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(data)
    refused(tmp_path / "a.png", "damaged or truncated")


def png_that_claims(width, height):
    """A few hundred bytes whose header promises a picture of the given size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 10_001), (16_000, 20_000), (100_000, 100_000)])
@pytest.mark.parametrize("limit", [None, 1000, Image.MAX_IMAGE_PIXELS])  # what the program has set for Pillow
def test_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch, size, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    (tmp_path / "bomb.png").write_bytes(png_that_claims(*size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    refused(tmp_path / "bomb.png", "more than 200,000,000 pixels; make it smaller first")
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.ico"])
def test_the_limit_of_the_program_for_pillow_does_not_count(tmp_path, monkeypatch, name):
    Image.new("RGB", (64, 64), RED).save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert load_image(tmp_path / name).size == (64, 64)


def test_threads_decode_at_the_same_time(tmp_path, monkeypatch):
    """Each waits in the middle of its decoding for the other. Meanwhile their warnings and Pillow's limit are own."""
    two_halves().save(tmp_path / "a.png")
    both, load, limit = threading.Barrier(2, timeout=10), PngImageFile.load, Image.MAX_IMAGE_PIXELS
    seen = []

    def waiting(self):
        both.wait()
        seen.append(Image.MAX_IMAGE_PIXELS)
        return load(self)

    monkeypatch.setattr(PngImageFile, "load", waiting)
    monkeypatch.setattr(images, "MAX_PIXELS", 10**6)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load_image, [tmp_path / "a.png"] * 2)
    assert first.tobytes() == second.tobytes() == two_halves().tobytes()
    assert set(seen) == {limit}


def test_warnings_of_odd_metadata_are_ignored(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # promises five entries, and has one
    two_halves().save(tmp_path / "a.jpg", exif=exif)
    with pytest.warns(UserWarning, match="Corrupt EXIF data"), Image.open(tmp_path / "a.jpg") as image:
        image.getexif()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(tmp_path / "a.jpg")


def test_images_of_108_and_200_megapixels_pass_the_size_check(tmp_path):
    for size in ((12_000, 9_000), (16_320, 12_240)):
        (tmp_path / "large.png").write_bytes(png_that_claims(*size))
        refused(tmp_path / "large.png", "damaged or truncated")  # its pixels are missing: they were about to be read


def test_a_photograph_of_108_megapixels_is_read_at_half_its_size(tmp_path):
    Image.new("RGB", (12_000, 9_000), RED).save(tmp_path / "phone.jpg")
    got = load_image(tmp_path / "phone.jpg")
    assert (got.size, got.mode) == ((6_000, 4_500), "RGB")
    assert near(got.getpixel((5_999, 4_499)), RED)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.gif"])
def test_a_large_image_is_halved(tmp_path, monkeypatch, name):
    two_halves(size=(640, 321)).save(tmp_path / name)
    monkeypatch.setattr(images, "MAX_PIXELS_IN_FULL", 640 * 321 - 1)
    got = load_image(tmp_path / name)
    assert got.size == (320, 161)
    assert near(got.getpixel((40, 80)), RED, 12)
    assert near(got.getpixel((280, 80)), BLUE, 12)
    monkeypatch.setattr(images, "MAX_PIXELS_IN_FULL", 640 * 321)
    assert load_image(tmp_path / name).size == (640, 321)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_a_halved_image_is_upright(tmp_path, monkeypatch, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    two_halves().save(tmp_path / name, exif=exif)
    monkeypatch.setattr(images, "MAX_PIXELS_IN_FULL", 1)
    got = load_image(tmp_path / name)
    assert got.size == (16, 32)
    assert near(got.getpixel((8, 4)), RED, 12)
    assert near(got.getpixel((8, 28)), BLUE, 12)


def test_a_halved_image_keeps_its_transparency_and_its_white(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS_IN_FULL", 1)
    Image.new("RGB", (4, 4), BLUE).save(tmp_path / "key.png", transparency=BLUE)
    assert load_image(tmp_path / "key.png").getpixel((1, 1)) == WHITE
    half = Image.new("RGB", (4, 2), BLUE)
    half.paste(RED, (1, 0, 4, 2))
    half.save(tmp_path / "edge.png", transparency=BLUE)
    assert load_image(tmp_path / "edge.png").getpixel((0, 0)) == (255, 127, 127)  # half of it is red, half transparent
    Image.fromarray(np.full((4, 4), 257, dtype=np.uint16)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((1, 1)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is PostScript (EPS), a drawing"),
        (b"\xc5\xd0\xd3\xc6" + bytes(60), "is PostScript (EPS), a drawing"),
        (b"%PDF-1.7\n", "is PDF, a drawing"),
        (b"\xd7\xcd\xc6\x9a\0\0" + bytes(60), "is WMF, a drawing"),
        (b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(60), "is EMF, a drawing"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG, a drawing"),
    ],
)
def test_drawings_are_refused_by_name_before_pillow_opens_them(tmp_path, monkeypatch, data, words):
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened"))
    (tmp_path / "a.png").write_bytes(data)
    refused(tmp_path / "a.png", words, "convert it to PNG")
    with pytest.raises(ImageError, match=re.escape(words)):
        load_image(io.BytesIO(data))


def test_no_format_that_may_run_a_program_or_hold_such_a_file_is_read():
    assert not {"EPS", "WMF", "IPTC", "PDF", "FPX", "MIC", "MPEG", "GRIB", "BUFR", "HDF5"} & set(images.FORMATS)


def test_a_file_of_iptc_with_a_drawing_in_it_is_refused(tmp_path, monkeypatch):
    """Pillow would open what it holds, with all of its formats."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("ran"))
    fields = [(3, 60, b"\x01\0"), (3, 20, b"\0\x40"), (3, 30, b"\0\x40"), (3, 120, b"\0"), (8, 10, b"%!PS-Adobe")]
    blocks = [b"\x1c" + bytes(key) + len(data).to_bytes(2, "big") + data for *key, data in fields]
    (tmp_path / "a.iim").write_bytes(b"".join(blocks))
    refused(tmp_path / "a.iim", "not an image in a format that VTC reads")


class Pipe(io.RawIOBase):
    """A stream that cannot seek, as standard input."""

    def __init__(self, data, name="<stdin>"):
        self.data, self.name = data, name

    def readable(self):
        return True

    def readinto(self, buffer):
        part, self.data = self.data[: len(buffer)], self.data[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def png_bytes():
    with io.BytesIO() as file:
        two_halves().save(file, "PNG")
        return file.getvalue()


def test_a_stream_gives_the_image_of_the_file():
    want = two_halves().tobytes()
    assert load_image(io.BytesIO(png_bytes())).tobytes() == want
    assert load_image(io.BufferedReader(Pipe(png_bytes()))).tobytes() == want


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (lambda: io.BufferedReader(Pipe(b"")), "<standard input> is empty (0 bytes)"),
        (lambda: io.BufferedReader(Pipe(png_bytes()[:-30])), "<standard input> is damaged or truncated"),
        (lambda: io.BufferedReader(Pipe(b"no image", "notes.txt")), "notes.txt is not an image"),
        (lambda: io.BytesIO(b"no image"), "<stream> is not an image"),
        (lambda: io.StringIO("text"), "<stream> is a stream of text; open it as binary"),
        (lambda: io.BytesIO(bytes(images.MAX_BYTES + 1)), "<stream> has more than 1,000 bytes"),
    ],
)
def test_a_stream_that_cannot_be_read_is_named(stream, words, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    with pytest.raises(ImageError, match=re.escape(words)):
        load_image(stream())


@pytest.mark.parametrize("source", [None, 3, b"a.png", Image.new("RGB", (2, 2))])
def test_what_is_no_path_and_no_stream_is_refused(source):
    with pytest.raises(ImageError, match=f"the image is a {type(source).__name__}; pass the path"):
        load_image(source)


def test_an_empty_path_and_one_that_is_too_long_are_refused(tmp_path):
    with pytest.raises(ImageError, match="the path of the image is empty"):
        load_image("")
    refused(tmp_path / ("a" * 300), "does not exist", "File name too long")


@pytest.mark.parametrize("size", [(1, 101), (101, 1)])
def test_strip_is_refused(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "strip.png")
    refused(tmp_path / "strip.png", f"{size[0]} x {size[1]}", "crop it")
    Image.new("RGB", (100, 1)).save(tmp_path / "edge.png")
    assert load_image(tmp_path / "edge.png").size == (100, 1)
