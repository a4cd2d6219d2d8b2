"""Packs from files of the method's published research code.

Its checkpoints are pickles, which also hold the whole CLIP, optimiser and scheduler objects.
`torch.load(weights_only=True)` reads them, with an inert stand-in for every foreign class.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from tapt.core.backbone import Backbone
from tapt.core.errors import InputError, PackError
from tapt.core.losses import Statistics, TokenStatistics
from tapt.core.prompts import PromptConfig, Prompts
from tapt.packs.format import Pack, base_model, statistics_shapes
from tapt.packs.schema import check_values

_CONTEXT = "prompt_learner.ctx"
_VISUAL = "image_encoder.VPT"
_DEEP_VISUAL = "image_encoder.transformer.resblocks.{}.VPT_shallow"
_DEEP_TEXT = "text_encoder.transformer.resblocks.{}.VPT_shallow"
_COMPOUND = "prompt_learner.compound_prompts_text.{}"
_PROJECTION = "prompt_learner.compound_prompt_projections.{}"
_BLOCK = r"transformer\.resblocks\.\d+\.(attn|mlp|ln_1|ln_2)\..+"
_TOWER = rf"({_BLOCK}|positional_embedding|class_embedding|proj|(conv1|ln_\w+)\.(weight|bias))"
_BACKBONE = re.compile(
    rf"(module\.)?(logit_scale|prompt_learner\.token_(prefix|suffix)|image_encoder\.{_TOWER}"
    rf"|text_encoder\.({_TOWER}|text_projection|token_embedding\.weight))"
)


class Foreign:
    """Stands for an object of a class that tensors do not need; takes whatever a pickle has."""

    def __init__(self, *_: object) -> None:
        pass

    __setstate__ = __init__


def _dictionary(*_: object) -> dict:
    """Stands for `defaultdict`, which the optimiser inside a scheduler has."""
    return {}


def read_checkpoint(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, with `Foreign` for other objects; no code of the file
    runs, and values of tensors are read when they are used. `PackError` where there is no such
    file, or not a whole one."""
    kinds = {"collections.defaultdict": _dictionary}
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type for info in archive.infolist()):
                raise ValueError("torch.save does not compress")
        names = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([(kinds.get(name, Foreign), name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise PackError(f"There is no file {path.name!r}.") from error
    except Exception as error:  # a hostile file can fail in any way that pickle and zip have
        raise PackError(
            f"{path.name!r} is not a whole checkpoint in the zip format of torch.save."
        ) from error


def _copied(tensor: Tensor, file: str) -> Tensor:
    """In float32; `PackError` for a tensor that claims more memory than it has in its file."""
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise PackError(f"{file!r} has a tensor that is larger than its storage.")
    return tensor.to(torch.float32, copy=True)


def research_names(config: PromptConfig) -> dict[str, list[str]]:
    """Per parameter of ours, the research code's names of its slices, in order of depth."""
    visual = [_VISUAL] + [_DEEP_VISUAL.format(d) for d in range(1, config.visual_depth)]
    if config.design == "V":
        return {"visual": visual}
    if config.design == "VLI":
        text = [_DEEP_TEXT.format(d) for d in range(1, config.text_blocks)]
        return {"visual": visual, "text": [_CONTEXT, *text]}
    depth = max(config.visual_depth, config.text_blocks)
    projections = ["prompt_learner.proj"]
    projections += [_PROJECTION.format(d) for d in range(config.visual_depth - 1)]
    return {
        "text": [_CONTEXT, *(_COMPOUND.format(d) for d in range(depth - 1))],
        "projection.weight": [f"{name}.weight" for name in projections],
        "projection.bias": [f"{name}.bias" for name in projections],
    }


def from_research(state: Mapping[str, Tensor], config: PromptConfig) -> Prompts:
    """Prompts from a mapping of research names to tensors; `PackError` lists all missing names."""
    names = research_names(config)
    missing = [name for slices in names.values() for name in slices if name not in state]
    if missing:
        raise PackError(f"The checkpoint lacks {', '.join(missing)} for design {config.design}.")
    return Prompts(config, {k: torch.stack([state[n] for n in v]) for k, v in names.items()})


def convert_files(
    checkpoint: Path, design: str, statistics: Sequence[Path], backbone: Backbone
) -> Pack:
    """A pack from a research checkpoint and its statistics.

    statistics: files of one tensor each, (blocks, tokens, width): adversarial mean and variance,
        clean mean and variance.

    Raises `PackError` for files that are missing or damaged, missing or unknown parameters, shapes
    of another backbone, and values that are not finite.
    """
    state = _prompts(checkpoint)
    config = _config(state, design)
    names = {name for slices in research_names(config).values() for name in slices}
    if unknown := sorted(set(state) - names):
        raise PackError(
            f"The checkpoint has unknown parameters for design {design}: {', '.join(unknown)}."
        )
    try:
        shapes = config.shapes(backbone.architecture)
        prompts = from_research(state, config)
    except (InputError, RuntimeError) as error:  # slices of different shapes do not stack
        raise PackError(f"The checkpoint's prompts do not fit together: {error}") from error
    measured = []
    for path in statistics:
        if not isinstance(value := read_checkpoint(path), Tensor):
            raise PackError(f"{path.name!r} is not a file of one tensor.")
        measured.append(_copied(value, path.name))
    expected = statistics_shapes(backbone.architecture, config)
    given = {**prompts.tensors, **dict(zip(expected, measured, strict=True))}
    for name, shape in (shapes | expected).items():
        if tuple(given[name].shape) != shape:
            raise PackError(
                f"{name} must have shape {shape} for backbone {backbone.name!r}, "
                f"got {tuple(given[name].shape)}."
            )
    check_values(given)
    targets = Statistics(TokenStatistics(*measured[:2]), TokenStatistics(*measured[2:]))
    training = {"source": "checkpoint of the method's published research code"}
    return Pack(prompts, targets, {}, "converted", base_model(backbone), training)


def _prompts(checkpoint: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint that are not the backbone's, by their research names."""
    content = read_checkpoint(checkpoint)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise PackError(f"{checkpoint.name!r} has no state_dict.")
    return {
        key.removeprefix("module."): _copied(value, checkpoint.name)
        for key, value in state.items()
        if isinstance(value, Tensor) and not _BACKBONE.fullmatch(key)
    }


def _config(state: Mapping[str, Tensor], design: str) -> PromptConfig:
    """Tokens and depths, counted in the checkpoint."""

    def count(start: str, end: str) -> int:
        return sum(key.startswith(start) and key.endswith(end) for key in state)

    if design == "VLJ":
        first, text = _CONTEXT, 1 + count(_COMPOUND.format(""), "")
        visual = 1 + count(_PROJECTION.format(""), ".weight")
    else:
        first, text = _VISUAL, 1 + count("text_encoder.", ".VPT_shallow")
        visual = 1 + count("image_encoder.", ".VPT_shallow")
    if first not in state or state[first].ndim != 2:
        raise PackError(f"The checkpoint lacks {first} (tokens, width) for design {design}.")
    tokens = len(state[first])
    return PromptConfig(design=design, tokens=tokens, visual_depth=visual, text_depth=text)
