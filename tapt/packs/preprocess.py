"""Pictures of any size as the input of a backbone, resized and cropped as open_clip does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor

from tapt.core.images import to_uint8


def preprocessor(config: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """Resizes and crops with PIL: a picture to uint8, (3, S, S).

    config: as open_clip keeps it, `model.visual.preprocess_cfg`.
    """
    steps = image_transform_v2(PreprocessCfg(**config), is_train=False).transforms
    resize = Compose([step for step in steps if not isinstance(step, (ToTensor, Normalize))])
    return partial(_preprocess, resize, config.get("resize_mode", "shortest") == "shortest")


def _preprocess(resize: Compose, by_short_side: bool, image: Image.Image) -> Tensor:
    image = image.convert("RGB")
    return to_uint8(resize(_limit_aspect(image) if by_short_side else image))


def _limit_aspect(image: Image.Image, limit: int = 8) -> Image.Image:
    """Cuts the far ends off a very elongated image, so that resizing its short side cannot
    exhaust memory; the central crop that follows never sees those ends."""
    width, height = image.size
    short = min(width, height)
    if max(width, height) <= limit * short:
        return image
    w, h = min(width, limit * short), min(height, limit * short)
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))
