"""Files of a pack, read with distrust: one sentence for everything that can be wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tapt.core.errors import PackError
from tapt.packs.schema import PackConfig, parse_config

MAX_CONFIG_BYTES = 1_000_000
Shape = tuple[int, ...]


def read_config(path: Path, name: str) -> PackConfig:
    """A checked config.json; `name` is the pack's in messages.

    Raises:
        PackError: missing, too large or malformed.
    """
    where = f"{path.name} of pack {name!r}"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise PackError(f"{where} is larger than 1 MB.")
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError as error:
        raise PackError(f"Pack {name!r} has no {path.name}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PackError(f"{where} is not valid JSON.") from error
    return parse_config(config, where)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("JSON has no such number")
    return value


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Tensor]:
    """Reads exactly the tensors of `shapes`, finite and in float32; header first, values after.

    Raises:
        PackError: missing or malformed.
    """
    where = f"{path.name} of pack {name!r}"
    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for word, wrong in (("lacks", set(shapes) - keys), ("has unknown", keys - set(shapes))):
                if wrong:
                    raise PackError(f"{where} {word} {', '.join(sorted(wrong))}.")
            for key, shape in shapes.items():
                entry = file.get_slice(key)
                if entry.get_dtype() != "F32":
                    raise PackError(f"{where}: {key} must be F32, got {entry.get_dtype()}.")
                if tuple(entry.get_shape()) != shape:
                    raise PackError(
                        f"{where}: {key} must have shape {shape}, got {tuple(entry.get_shape())}."
                    )
            tensors = {key: file.get_tensor(key) for key in shapes}
    except FileNotFoundError as error:
        raise PackError(f"Pack {name!r} has no {path.name}.") from error
    except (SafetensorError, OSError) as error:
        raise PackError(f"{where} is not a complete safetensors file.") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PackError(f"{where}: {key} has values that are not finite.")
    return tensors
