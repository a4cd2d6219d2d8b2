"""What an open_clip folder describes, judged before anything of that size is built."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor

from tapt.core.errors import BackboneError
from tapt.core.images import to_uint8
from tapt.core.settings import STRICT, sentence
from tapt.packs.schema import Mean, Size, Std

BAD_CONFIG: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError)
BAD_CONFIG += (LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What open_clip may raise for values that it does not expect."""
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
VOCABULARY = 49408  # tokens of open_clip's tokenizer


class _Part(BaseModel):
    model_config = ConfigDict(**{**STRICT, "extra": "ignore"})


class _Tower(_Part):
    layers: int = Field(12, ge=1, le=200)


class _Vision(_Tower):
    width: Size = 768
    patch_size: Size = 16
    image_size: Annotated[
        int,
        Field(ge=1, le=2048),
        BeforeValidator(lambda size: max(size) if isinstance(size, list) else size),
    ] = 224


class _Tokenizer(BaseModel):
    model_config = STRICT  # bpe_path, another option, would read any file of this computer

    clean: str = ""
    reduction_mask: str = ""


class _Text(_Tower):
    vocab_size: int = Field(VOCABULARY, ge=VOCABULARY)
    tokenizer_kwargs: _Tokenizer = _Tokenizer()


class _Model(_Part):
    vision_cfg: _Vision
    text_cfg: _Text
    multimodal_cfg: _Tower = _Tower()


class _Preprocessing(_Part):
    mean: Mean = [0, 0, 0]
    std: Std = [1, 1, 1]
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"


class _Config(_Part):
    model_cfg: _Model
    preprocess_cfg: _Preprocessing = _Preprocessing()


def check_folder(folder: Path, name: str) -> None:
    """Refuses a folder whose configuration is not that of a CLIP with room for prompts, or does
    not fit the size of its weights: before their memory is taken."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise BackboneError(f"Backbone {name!r} has no {file}.")
    try:
        whole = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        check_towers(whole["model_cfg"], name)
        vision = _Config(**whole).model_cfg.vision_cfg
    except BAD_CONFIG as error:
        fault = f": {sentence(error, _Config)}" if isinstance(error, ValidationError) else ""
        message = f"{CONFIG_FILE} of {name!r} does not describe a CLIP that can be used{fault}."
        raise BackboneError(message) from error
    stored = stored_values(folder / WEIGHTS_FILE, name)
    needed = (vision.image_size // vision.patch_size) ** 2 * vision.width  # of positions, at least
    try:
        if needed <= 2 * stored:  # position embeddings of another image size are resized
            needed = _values(**whole["model_cfg"])
    except BAD_CONFIG as error:
        raise BackboneError(f"The weights of {name!r} do not fit its architecture.") from error
    if needed > 2 * stored:
        raise BackboneError(
            f"The weights of {name!r} do not fit its architecture, which is far larger than they."
        )


def _values(custom_text: bool = False, **sizes: Any) -> int:
    """Numbers in the model that open_clip builds of a configuration; their memory is not taken."""
    kind = (CoCa if "multimodal_cfg" in sizes else CustomTextCLIP) if custom_text else CLIP
    with torch.device("meta"):
        model = kind(**sizes)
    return sum(value.numel() for value in (*model.parameters(), *model.buffers()))


def check_towers(config: Mapping, name: str) -> None:
    """Refuses, before anything is fetched or built, a tower that prompts cannot enter."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if vision.get("timm_model_name"):
        tower, what = "image", f"timm's {vision['timm_model_name']}"
    elif isinstance(vision.get("layers"), (list, tuple)):
        tower, what = "image", "a ResNet"
    elif text.get("hf_model_name"):
        tower, what = "text", f"transformers' {text['hf_model_name']}"
    else:
        return
    raise BackboneError(
        f"The {tower} tower of {name!r} is {what}, without open_clip transformer blocks; "
        "prompts cannot go in. Choose a CLIP with ViT towers."
    )


def stored_values(path: Path, name: str) -> int:
    """How many numbers a safetensors file holds, by its header; `BackboneError` for anything that
    is not a complete one, which open_clip would try as a pickle."""
    try:
        with safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        message = f"{path.name} of {name!r} is not a complete safetensors file."
        raise BackboneError(message) from error


def preprocessor(config: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """Resizes and crops with PIL as open_clip does: a picture of any size to uint8, (3, S, S).

    config: as open_clip keeps it, `model.visual.preprocess_cfg`.
    """
    steps = image_transform_v2(PreprocessCfg(**config), is_train=False).transforms
    resize = Compose([step for step in steps if not isinstance(step, (ToTensor, Normalize))])
    by_short_side = config.get("resize_mode", "shortest") == "shortest"

    def preprocess(image: Image.Image) -> Tensor:
        image = image.convert("RGB")
        return to_uint8(resize(_limit_aspect(image) if by_short_side else image))

    return preprocess


def _limit_aspect(image: Image.Image, limit: int = 8) -> Image.Image:
    """Cuts the far ends off a very elongated image, so that resizing its short side cannot
    exhaust memory; the central crop that follows never sees those ends."""
    width, height = image.size
    longest = limit * min(width, height)
    w, h = min(width, longest), min(height, longest)
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))
