"""Pictures in and out: any readable file becomes 8-bit RGB, or one clear sentence."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tapt.core.errors import InputError

MAX_PIXELS = 25_000_000
KINDS = "PNG, JPEG, WebP, GIF, BMP or TIFF file"


def open_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """Reads a picture as RGB: EXIF rotation applied, transparency on white, 16-bit rescaled,
    the first frame of an animation. Raises `InputError` for what is missing, no picture, damaged
    or larger than 25 megapixels."""
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except (OSError, ValueError) as error:
        name = Path(os.fsdecode(source)).name
        raise InputError(f"There is no readable file {name!r}.") from error
    too_large = f"This picture is too large: at most {MAX_PIXELS // 1_000_000} megapixels."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:  # by its header, no pixel is decoded
                raise InputError(too_large)
            image.load()
            return to_rgb(image)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(too_large) from error
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


def to_uint8(image: Image.Image) -> Tensor:
    """An RGB picture as a uint8 tensor, (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def to_float(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 -> [0, 1]."""
    return pixels.to(dtype) / 255


def to_picture(pixels: Tensor) -> Image.Image:
    """A uint8 tensor (3, H, W) as a PIL picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def amplified_difference(attacked: Tensor, clean: Tensor) -> tuple[Image.Image, int]:
    """The change from one uint8 image (3, H, W) to the other around mid-grey, scaled so that its
    largest entry reaches full range, and that scale."""
    delta = attacked.int() - clean.int()
    scale = max(1, 127 // max(1, int(delta.abs().max())))
    return to_picture((delta * scale + 128).clamp(0, 255).to(torch.uint8)), scale
