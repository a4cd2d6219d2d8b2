"""Pictures as tensors, and tensors as pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_uint8(image: Image.Image) -> Tensor:
    """An RGB picture as a uint8 tensor, (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def to_float(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 -> [0, 1]."""
    return pixels.to(dtype) / 255


def to_picture(pixels: Tensor) -> Image.Image:
    """A uint8 tensor (3, H, W) as a PIL picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
