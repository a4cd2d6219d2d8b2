"""`python -m tapt convert CHECKPOINT`: packs from files of the method's published research code.

Its checkpoints are pickles and also hold the whole CLIP, optimiser and scheduler objects. They
are read by `tapt.checkpoint`, which executes nothing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tapt.backbone import Backbone, load_backbone
from tapt.checkpoint import StoredTensor, read_checkpoint
from tapt.errors import InputError, PackError
from tapt.losses import Statistics, TokenStatistics
from tapt.options import DownloadBar
from tapt.pack import Pack, base_model, save_pack, statistics_shapes
from tapt.prompts import DESIGNS, PromptConfig, Prompts
from tapt.tuning import TuneConfig

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


def research_names(config: PromptConfig) -> dict[str, list[str]]:
    """Per parameter of ours, the research code's names of its slices, in order of depth."""
    visual = [_VISUAL] + [_DEEP_VISUAL.format(d) for d in range(1, config.visual_depth)]
    if config.design == "V":
        return {"visual": visual}
    if config.design == "VLI":
        text = [_DEEP_TEXT.format(d) for d in range(1, config.text_depth)]
        return {"visual": visual, "text": [_CONTEXT, *text]}
    depth = max(config.visual_depth, config.text_depth)
    projections = ["prompt_learner.proj"] + [
        _PROJECTION.format(d) for d in range(config.visual_depth - 1)
    ]
    return {
        "text": [_CONTEXT, *(_COMPOUND.format(d) for d in range(depth - 1))],
        "projection.weight": [f"{name}.weight" for name in projections],
        "projection.bias": [f"{name}.bias" for name in projections],
    }


def from_research(state: Mapping[str, Tensor], config: PromptConfig) -> Prompts:
    """Prompts from a mapping of research names to tensors.

    Raises:
        PackError: a parameter of this design is missing; all missing names are listed.
    """
    names = research_names(config)
    missing = [name for slices in names.values() for name in slices if name not in state]
    if missing:
        raise PackError(f"The checkpoint lacks {', '.join(missing)} for design {config.design}.")
    return Prompts(config, {k: torch.stack([state[n] for n in v]) for k, v in names.items()})


def convert(
    state: Mapping[str, Tensor], design: str, statistics: list[Tensor], backbone: Backbone
) -> Pack:
    """A pack from a research `state_dict` and its statistics.

    state: the prompt parameters, no others.
    statistics: adversarial mean and variance, clean mean and variance, each
        (blocks, tokens, width).

    Raises:
        PackError: missing or unknown parameters, shapes of another backbone, or values that are
            not finite.
    """
    config = _config(state, design)
    names = {name for slices in research_names(config).values() for name in slices}
    if unknown := sorted(set(state) - names):
        raise PackError(
            f"The checkpoint has unknown parameters for design {design}: {', '.join(unknown)}."
        )
    try:
        shapes = config.shapes(backbone)
        prompts = from_research(state, config)
    except (InputError, RuntimeError) as error:  # slices of different shapes do not stack
        raise PackError(f"The checkpoint's prompts do not fit together: {error}") from error
    measured = dict(zip(statistics_shapes(backbone, config), statistics, strict=True))
    for wanted, given in (
        (shapes, prompts.tensors),
        (statistics_shapes(backbone, config), measured),
    ):
        for name, shape in wanted.items():
            if tuple(given[name].shape) != shape:
                raise PackError(
                    f"{name} must have shape {shape} for backbone {backbone.name!r}, "
                    f"got {tuple(given[name].shape)}."
                )
            if not torch.isfinite(given[name]).all():
                raise PackError(f"{name} has values that are not finite.")
    targets = Statistics(TokenStatistics(*statistics[:2]), TokenStatistics(*statistics[2:]))
    training = {"source": "checkpoint of the method's published research code"}
    return Pack(prompts, targets, TuneConfig(), "converted", base_model(backbone), training)


def _config(state: Mapping[str, Tensor], design: str) -> PromptConfig:
    """Tokens and depths, counted in the checkpoint."""

    def depth(pattern: str, first: int) -> int:
        number = first
        while pattern.format(number) in state:
            number += 1
        return 1 + number - first

    first = _CONTEXT if design == "VLJ" else _VISUAL
    if first not in state or state[first].ndim != 2:
        raise PackError(f"The checkpoint lacks {first} (tokens, width) for design {design}.")
    tokens = len(state[first])
    if design == "VLJ":
        depths = depth(_PROJECTION + ".weight", 0), depth(_COMPOUND, 0)
    else:
        depths = depth(_DEEP_VISUAL, 1), depth(_DEEP_TEXT, 1)
    return PromptConfig(design, tokens, *depths)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--design", required=True, choices=DESIGNS)
    parser.add_argument(
        "--base-model", required=True, help="the backbone: ViT-B-16, hf-hub:owner/repo, ..."
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub backbone")
    parser.add_argument(
        "--statistics",
        required=True,
        nargs=4,
        type=Path,
        metavar=("MEANS_ADV", "VARS_ADV", "MEANS_CLEAN", "VARS_CLEAN"),
        help="files with one tensor each, (blocks, tokens, width)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the pack")


def run(args: argparse.Namespace) -> int:
    content = read_checkpoint(args.checkpoint)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise PackError(f"{args.checkpoint.name!r} has no state_dict.")
    statistics = [read_checkpoint(path) for path in args.statistics]
    for path, value in zip(args.statistics, statistics, strict=True):
        if not isinstance(value, StoredTensor):
            raise PackError(f"{path.name!r} is not a file of one tensor.")
    backbone = load_backbone(
        args.base_model,
        revision=args.revision,
        device="cpu",
        token=None,
        progress=DownloadBar(),
    )
    prompts = {
        key.removeprefix("module."): value.read()
        for key, value in state.items()
        if isinstance(value, StoredTensor) and not _BACKBONE.fullmatch(key)
    }
    measured = [value.read() for value in statistics]
    save_pack(convert(prompts, args.design, measured, backbone), args.out)
    print(f"Pack written to {args.out}.")
    return 0
