"""Every odd or broken picture a person can upload."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from tapt.core.errors import InputError
from tapt.core.images import to_float, to_picture, to_uint8
from tapt.data.pictures import MAX_PIXELS, open_image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 12, height: int = 9) -> Image.Image:
    values = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header names a size and whose pixels are missing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
        for c in (chunk, body, b"IEND")
    )


def test_rgb_comes_back_bit_for_bit_from_bytes_and_from_a_path(tmp_path: Path):
    image = noise()
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes()):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), np.asarray(image))


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    opened = open_image(encoded(image))
    assert opened.getpixel((0, 0)) == (200, 0, 0)
    assert opened.getpixel((1, 0)) == (255, 255, 255)
    half = open_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))
    assert half.getpixel((0, 0)) == (127, 127, 127)


def test_grey_with_alpha_lies_on_white():
    assert open_image(encoded(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == (255,) * 3


def test_a_palette_with_a_transparent_colour_lies_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    opened = open_image(encoded(image, transparency=1))
    assert opened.getpixel((0, 0)) == (10, 20, 30)
    assert opened.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_rescaled_not_clipped(kind: str):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    opened = open_image(encoded(Image.fromarray(values), kind))
    assert [opened.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_dark_sixteen_bit_grey_stays_dark():
    opened = open_image(encoded(Image.fromarray(np.full((1, 1), 255, dtype=np.uint16))))
    assert opened.getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str):
    image = noise().convert(mode)
    opened = open_image(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg():
    opened = open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = opened.getpixel((4, 4))
    assert red > 200 > 60 > max(green, blue)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (8, 4))
    image.paste((255, 0, 0), (0, 0, 4, 4))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise: left becomes top
    opened = open_image(encoded(image, exif=exif))
    assert opened.size == (4, 8)
    assert opened.getpixel((1, 1)) == (255, 0, 0)
    assert opened.getpixel((1, 6)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red, green, _ = open_image(data).getpixel((3, 3))
    assert red > 200 > 50 > green


def test_values_that_are_not_finite_are_refused():
    data = encoded(Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32)), "TIFF")
    with pytest.raises(InputError, match=r"values that are not finite\.$"):
        open_image(data)


def test_a_huge_text_chunk_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    info = PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    data = encoded(noise(), pnginfo=info)
    monkeypatch.setattr("PIL.PngImagePlugin.MAX_TEXT_CHUNK", 1_000_000)
    with pytest.raises(InputError, match="not a readable picture"):
        open_image(data)


def test_one_pixel():
    assert open_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"just some words",
        encoded(noise(64, 64))[:-3000],
        encoded(noise(64, 64), "JPEG")[:600],
        encoded(noise(64, 64), "WEBP")[:100],
        encoded(noise(64, 64), "GIF")[:900],
        png_header(4, 4),
        png_header(0, 4),
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a\x00\x00\x00\x00",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
    ids=[
        "empty",
        "text",
        "half-a-png",
        "half-a-jpeg",
        "half-a-webp",
        "half-a-gif",
        "no-pixels",
        "no-width",
        "png-signature",
        "gif-signature",
        "svg",
    ],
)
def test_what_is_not_a_whole_picture_is_refused(data: bytes):
    with pytest.raises(InputError, match="not a readable picture") as error:
        open_image(data)
    assert "PNG, JPEG" in str(error.value)


def test_any_failure_of_a_decoder_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    for failure in (struct.error("x"), IndexError("x"), UnidentifiedImageError("x")):

        def fail(*_: object, failure: Exception = failure) -> None:
            raise failure

        monkeypatch.setattr(Image.Image, "load", fail)
        with pytest.raises(InputError, match="not a readable picture"):
            open_image(png_header(4, 4))


@pytest.mark.parametrize("side", [20_000, 13_000, 5_001])
def test_a_huge_picture_is_refused_before_a_pixel_is_decoded(
    side: int, monkeypatch: pytest.MonkeyPatch
):
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    assert side * side > MAX_PIXELS
    with pytest.raises(InputError, match="at most 25 megapixels"):
        open_image(png_header(side, side))


def test_a_missing_file_is_named_without_its_folder(tmp_path: Path):
    with pytest.raises(InputError, match=r"no readable file 'cat\.png'") as error:
        open_image(tmp_path / "cat.png")
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(InputError, match="no readable file"):
        open_image(tmp_path)


def test_tensor_and_picture_are_each_others_inverse():
    image = noise()
    pixels = to_uint8(image)
    assert pixels.shape == (3, 9, 12)
    assert pixels.dtype == torch.uint8
    assert pixels[:, 2, 5].tolist() == list(image.getpixel((5, 2)))
    assert np.array_equal(np.asarray(to_picture(pixels)), np.asarray(image))
    assert torch.equal((to_float(pixels) * 255).round().to(torch.uint8), pixels)
    assert to_float(pixels, torch.float64).dtype == torch.float64
