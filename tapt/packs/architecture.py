"""What an open_clip configuration describes, judged before anything of that size is built."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from safetensors import SafetensorError, safe_open

from tapt.core.errors import BackboneError

BAD_CONFIG: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError)
BAD_CONFIG += (LookupError, RuntimeError, TypeError, ValueError)
"""What open_clip may raise for values that it does not expect."""
_UNREADABLE: tuple[type[Exception], ...] = (OSError, *BAD_CONFIG)
MAX_BLOCKS, MAX_PIXELS = 200, 2048  # per tower; per side of the picture
VOCABULARY = 49408  # tokens of open_clip's tokenizer


def read_config(path: Path, name: str) -> Mapping:
    """The `model_cfg` of a configuration that prompts can work with; `BackboneError` for no CLIP, a
    tower that prompts cannot enter, or unusable preprocessing."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        config, preprocess = whole["model_cfg"], whole.get("preprocess_cfg") or {}
        config["vision_cfg"].items(), config["text_cfg"].items()
        right, stock = _is_preprocessing(preprocess), _is_stock_tokenizer(config["text_cfg"])
    except _UNREADABLE as error:
        raise BackboneError(f"{path.name} of {name!r} does not describe a CLIP.") from error
    if not right:
        raise BackboneError(
            f"{path.name} of {name!r}: preprocess_cfg must have a mean and a positive std of three "
            "numbers each, and an interpolation and resize_mode that open_clip knows."
        )
    if not stock:
        raise BackboneError(
            f"{path.name} of {name!r} asks for a tokenizer of its own; only open_clip's is used."
        )
    check_towers(config, name)
    return config


def _is_preprocessing(config: Mapping) -> bool:
    mean, std = config.get("mean") or (0, 0, 0), config.get("std") or (1, 1, 1)
    return (
        len(mean) == len(std) == 3
        and all(math.isfinite(value) for value in mean)
        and all(0 < value < math.inf for value in std)
        and (config.get("interpolation") or "bicubic") in ("bicubic", "bilinear", "random")
        and (config.get("resize_mode") or "shortest") in ("shortest", "longest", "squash")
    )


def _is_stock_tokenizer(text: Mapping) -> bool:
    # bpe_path, another option, would read any file of this computer
    options = set(text.get("tokenizer_kwargs") or {})
    return (
        options <= {"clean", "reduction_mask"} and text.get("vocab_size", VOCABULARY) >= VOCABULARY
    )


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
            keys = file.keys()
            return sum(math.prod(file.get_slice(key).get_shape()) for key in keys)
    except (SafetensorError, OSError) as error:
        message = f"{path.name} of {name!r} is not a complete safetensors file."
        raise BackboneError(message) from error


def check_size(config: Mapping, stored: int, name: str) -> None:
    """Refuses a model that cannot be built, or is much larger than its weights, before its memory
    is taken.

    stored: numbers in the weight file. Twice as many may be built: position embeddings of another
        image size are resized.
    """
    try:
        fits = not _is_absurd(config, stored) and _values(config) <= 2 * stored
    except BAD_CONFIG as error:
        raise BackboneError(f"The weights of {name!r} do not fit its architecture.") from error
    if not fits:
        raise BackboneError(
            f"The weights of {name!r} do not fit its architecture, which is far larger than they."
        )


def _is_absurd(config: Mapping, stored: int) -> bool:
    """What takes time or memory even where only shapes are computed."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    towers = (vision, text, config.get("multimodal_cfg") or {})
    size = vision.get("image_size", 224)
    pixels = max(size) if isinstance(size, (list, tuple)) else size
    patches = (pixels // vision.get("patch_size", 16)) ** 2
    return (
        any(tower.get("layers", 12) > MAX_BLOCKS for tower in towers)
        or pixels > MAX_PIXELS
        or patches * vision.get("width", 768) > 2 * stored
    )


def _values(config: Mapping) -> int:
    """Numbers in the model that open_clip builds of a configuration; their memory is not taken."""
    sizes = {key: value for key, value in config.items() if key != "custom_text"}
    kind = CLIP
    if config.get("custom_text"):
        kind = CoCa if "multimodal_cfg" in config else CustomTextCLIP
    with torch.device("meta"):
        model = kind(**sizes)
    return sum(value.numel() for value in (*model.parameters(), *model.buffers()))
