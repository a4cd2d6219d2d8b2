"""Any readable picture file becomes 8-bit RGB, or one clear sentence."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tapt.core.errors import InputError

MAX_PIXELS = 25_000_000  # decoded
MAX_JPEG = 64_000_000  # the decoder shrinks what is larger than MAX_PIXELS
KINDS = "PNG, JPEG, WebP, GIF, BMP or TIFF file"


def open_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """Reads a picture as RGB: EXIF rotation applied, transparency on white, 16-bit rescaled,
    the first frame of an animation; a JPEG above 25 megapixels at half its size or less. Raises
    `InputError` for what is missing, no picture, damaged or larger than 25 megapixels, 64 for a
    JPEG."""
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except (OSError, ValueError) as error:
        name = Path(os.fsdecode(source)).name
        raise InputError(f"There is no readable file {name!r}.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            pixels = image.width * image.height  # by its header, no pixel is decoded
            if pixels > (MAX_JPEG if image.format == "JPEG" else MAX_PIXELS):
                raise Image.DecompressionBombError
            if pixels > MAX_PIXELS:
                image.draft("RGB", (image.width // 2, image.height // 2))
            image.load()
            return to_rgb(image)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"This picture is too large: at most {MAX_PIXELS // 1_000_000} megapixels, or "
            f"{MAX_JPEG // 1_000_000} as a JPEG."
        ) from error
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise InputError(f"This file is not a readable picture. Use a {KINDS}.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a decoded picture in any mode; `InputError` for values that are not finite."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey, clipped by PIL's convert
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise InputError("This picture has values that are not finite.")
        deep = image.mode.startswith("I;16") or values.max(initial=0) > 255
        scale = 255 / 65535 if deep else 1.0
        image = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
