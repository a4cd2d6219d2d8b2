"""Prompts under the parameter names of the method's published research code."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tapt.errors import PackError
from tapt.prompts import PromptConfig, Prompts

_CONTEXT = "prompt_learner.ctx"


def research_names(config: PromptConfig) -> dict[str, list[str]]:
    """Per parameter of ours, the research code's names of its slices, in order of depth."""
    visual = ["image_encoder.VPT"] + [
        f"image_encoder.transformer.resblocks.{d}.VPT_shallow"
        for d in range(1, config.visual_depth)
    ]
    if config.design == "V":
        return {"visual": visual}
    if config.design == "VLI":
        text = [
            f"text_encoder.transformer.resblocks.{d}.VPT_shallow"
            for d in range(1, config.text_depth)
        ]
        return {"visual": visual, "text": [_CONTEXT, *text]}
    depth = max(config.visual_depth, config.text_depth)
    projections = ["prompt_learner.proj"] + [
        f"prompt_learner.compound_prompt_projections.{d}" for d in range(config.visual_depth - 1)
    ]
    return {
        "text": [
            _CONTEXT,
            *(f"prompt_learner.compound_prompts_text.{d}" for d in range(depth - 1)),
        ],
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
