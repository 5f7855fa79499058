"""`load_image` on real files of every kind: the pixels are right, and bad files give one clear line."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

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
    refused(tmp_path / "notes.png", "not an image that Pillow can read", "convert it to JPEG or PNG")


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


@pytest.mark.parametrize("size", [(10_000, 10_000), (100_000, 100_000)])
def test_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch, size):
    (tmp_path / "bomb.png").write_bytes(png_that_claims(*size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    refused(tmp_path / "bomb.png", "pixels", "make it smaller")


def test_bomb_is_refused_even_if_pillows_guard_is_off(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png_that_claims(100_000, 100_000))
    refused(tmp_path / "bomb.png", "100000 x 100000", "make it smaller")


def test_large_jpeg_is_decoded_at_a_reduced_size(tmp_path, monkeypatch):
    two_halves(size=(640, 320)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(images, "MAX_PIXELS", 640 * 320 - 1)
    got = load_image(tmp_path / "a.jpg")
    assert got.size == (320, 160)
    assert near(got.getpixel((40, 80)), RED, 12)
    monkeypatch.setattr(images, "MAX_PIXELS", 640 * 320)
    assert load_image(tmp_path / "a.jpg").size == (640, 320)


@pytest.mark.parametrize("size", [(1, 101), (101, 1)])
def test_strip_is_refused(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "strip.png")
    refused(tmp_path / "strip.png", f"{size[0]} x {size[1]}", "crop it")
    Image.new("RGB", (100, 1)).save(tmp_path / "edge.png")
    assert load_image(tmp_path / "edge.png").size == (100, 1)
