"""Every odd or broken picture a person can upload."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tapt.core.errors import InputError
from tapt.core.images import to_float, to_picture, to_uint8
from tapt.data.pictures import open_image


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


@pytest.mark.parametrize("mode", ["RGB", "1", "L", "P", "CMYK"])
def test_any_mode_becomes_rgb_bit_for_bit_from_bytes_and_from_a_path(mode: str, tmp_path: Path):
    image, path = noise().convert(mode), tmp_path / "a.png"
    path.write_bytes(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    for source in (path, str(path), path.read_bytes()):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


def palette() -> Image.Image:
    image = Image.new("P", (1, 1))
    image.putpalette([10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("image", "options", "pixel"),
    [
        (Image.new("RGBA", (1, 1), (200, 0, 0, 255)), {}, (200, 0, 0)),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 128)), {}, (127, 127, 127)),
        (Image.new("LA", (1, 1), (0, 0)), {}, (255, 255, 255)),
        (palette(), {}, (10, 20, 30)),
        (palette(), {"transparency": 0}, (255, 255, 255)),
    ],
)
def test_transparency_lies_on_white(image: Image.Image, options: dict, pixel: tuple):
    assert open_image(encoded(image, **options)).getpixel((0, 0)) == pixel


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_rescaled_not_clipped(kind: str):
    for values in ([0, 257, 128 * 257, 65535], [255]):  # a dark one stays dark
        image = Image.fromarray(np.array([values], dtype=np.uint16))
        opened = np.asarray(open_image(encoded(image, kind)))[0, :, 0]
        assert opened.tolist() == [round(value / 257) for value in values]


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


DAMAGED = {
    "empty": b"",
    "text": b"just some words",
    "half-a-png": encoded(noise(64, 64))[:-3000],
    "half-a-jpeg": encoded(noise(64, 64), "JPEG")[:600],
    "half-a-webp": encoded(noise(64, 64), "WEBP")[:100],
    "half-a-gif": encoded(noise(64, 64), "GIF")[:900],
    "no-pixels": png_header(4, 4),
    "no-width": png_header(0, 4),
    "png-signature": b"\x89PNG\r\n\x1a\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_not_a_whole_picture_is_refused(case: str):
    with pytest.raises(InputError, match=r"not a readable picture\. Use a PNG, JPEG"):
        open_image(DAMAGED[case])


@pytest.mark.parametrize("side", [20_000, 5_001])
def test_a_huge_picture_is_refused_before_a_pixel_is_decoded(side: int, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="at most 25 megapixels"):
        open_image(png_header(side, side))


def test_a_missing_file_is_named_without_its_folder(tmp_path: Path):
    for path in (tmp_path / "cat.png", tmp_path):
        with pytest.raises(InputError, match=f"^There is no readable file '{path.name}'"):
            open_image(path)


def test_tensor_and_picture_are_each_others_inverse():
    image = noise()
    pixels = to_uint8(image)
    assert (pixels.shape, pixels.dtype) == ((3, 9, 12), torch.uint8)
    assert pixels[:, 2, 5].tolist() == list(image.getpixel((5, 2)))
    assert np.array_equal(np.asarray(to_picture(pixels)), np.asarray(image))
    assert torch.equal((to_float(pixels) * 255).round().to(torch.uint8), pixels)
    assert to_float(pixels, torch.float64).dtype == torch.float64
