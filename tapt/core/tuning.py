"""The test-time step: AdamW on the prompts of every single image (TAPT, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from pydantic.config import JsonDict
from torch import Tensor

from tapt.core.backbone import Backbone
from tapt.core.errors import InputError
from tapt.core.losses import (
    Statistics,
    alignment,
    entropy,
    kept_of,
    kept_views_count,
    multi_view_entropy,
    select_views,
    view_statistics,
)
from tapt.core.prompts import ClassTexts, Prompts, image_logits, logits
from tapt.core.settings import Settings
from tapt.core.towers import encode_image
from tapt.progress import Clock, Progress, counted, quiet

# settings that several defences have
Views = Annotated[int, Field(ge=1, le=1024, description="the image and random crops of it")]
Keep = Annotated[float, Field(ge=0, le=1, description="share of the most confident views")]
TUNE_STEPS: JsonDict = {"option": "tune-steps"}
Steps = Annotated[
    int, Field(ge=0, le=100, description="AdamW steps per image", json_schema_extra=TUNE_STEPS)
]
LearningRate = Annotated[float, Field(ge=0, le=10, description="learning rate of the steps")]
WeightDecay = Annotated[float, Field(ge=0, le=10, description="of AdamW")]
Beta = Annotated[float, Field(ge=0, lt=1)]
TWO_BETAS: JsonDict = {"rule": "two numbers from 0 to below 1"}


class TuneConfig(Settings):
    """Test-time settings; the defaults are the published ones."""

    views: Views = 64
    keep: Keep = 0.1
    steps: Steps = 1
    lr: LearningRate = 5e-4
    weight_decay: WeightDecay = 0.01
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), strict=False, description="of AdamW", json_schema_extra=TWO_BETAS
    )
    eps: float = Field(1e-8, ge=1e-12, le=1, description="of AdamW")
    alignment_weight: float = Field(
        100.0, ge=0, le=1e6, description="of the alignment term, before the depth divides it"
    )
    alpha: float = Field(
        0.5, ge=0, le=1, description="share of the adversarial statistics; the clean get the rest"
    )
    align_from: int = Field(0, ge=0, le=1000, description="first aligned block")
    align_to: int | None = Field(
        None, ge=0, le=1000, description="behind the last aligned block; default depth - 1"
    )

    def aligned_blocks(self, visual_depth: int) -> range:
        """The blocks whose input statistics are aligned."""
        end = visual_depth - 1 if self.align_to is None else self.align_to
        return range(self.align_from, end)


@dataclass(frozen=True, eq=False)
class Losses:
    """Loss terms, one value per image, (M,); alignment terms are summed over the blocks, and
    `per_block_*` are (blocks, M). Without statistics the alignment terms are None."""

    entropy: Tensor
    total: Tensor
    adversarial: Tensor | None = None
    clean: Tensor | None = None
    per_block_adversarial: Tensor | None = None
    per_block_clean: Tensor | None = None


class Objective:
    """The loss of section 3.3 for one backbone and one depth of prompts; without statistics its
    entropy term alone. Raises `InputError` for statistics of other shapes, or aligned blocks that
    are not there."""

    def __init__(
        self,
        backbone: Backbone,
        prompts: Prompts,
        statistics: Statistics | None,
        config: TuneConfig,
    ) -> None:
        depth = prompts.config.visual_depth
        self.backbone, self.alpha = backbone, config.alpha
        self.weight, self.blocks = config.alignment_weight / depth, config.aligned_blocks(depth)
        if self.blocks and self.blocks[-1] >= backbone.visual_blocks:
            raise InputError(
                f"align_to must be at most {backbone.visual_blocks} on this backbone, "
                f"got {config.align_to}."
            )
        self.statistics = statistics and _on(backbone, prompts, statistics)

    def __call__(self, prompts: Prompts, views: Tensor, text_features: Tensor) -> Losses:
        """Loss terms of the kept views (M, K, 3, S, S)."""
        features, hidden = encode_image(
            self.backbone, views.flatten(0, 1), prompts.visual(), hidden=self.blocks
        )
        logits = image_logits(self.backbone, features, text_features)
        uncertainty = multi_view_entropy(logits.view(*views.shape[:2], -1))
        if self.statistics is None or not hidden:
            return Losses(uncertainty, uncertainty)
        observed = view_statistics(hidden, len(views))
        adversarial = alignment(observed, self.statistics.adversarial, self.blocks)
        clean = alignment(observed, self.statistics.clean, self.blocks)
        terms = adversarial.sum(0), clean.sum(0)
        total = uncertainty + self.weight * (self.alpha * terms[0] + (1 - self.alpha) * terms[1])
        return Losses(uncertainty, total, *terms, adversarial, clean)


@dataclass(frozen=True, eq=False)
class Tuned:
    """prompts: one set per image, as a leading dimension M.
    text_features: under them, ([M,] C, E).
    logits: of view 0 under them, (M, C).
    view_logits: of every view under the starting prompts, (M, V, C).
    entropies: of every view, (M, V), in nats.
    kept: indices of the kept views, most confident first, (M, K).
    before, after: loss terms around the step(s); `after` is None unless asked for.
    seconds: per phase, for the whole batch.
    """

    prompts: Prompts
    text_features: Tensor
    logits: Tensor
    view_logits: Tensor
    entropies: Tensor
    kept: Tensor
    before: Losses
    after: Losses | None
    seconds: dict[str, float]


def tune(
    backbone: Backbone,
    prompts: Prompts,
    views: Tensor,
    texts: ClassTexts,
    *,
    statistics: Statistics | None = None,
    config: TuneConfig | None = None,
    text_features: Tensor | None = None,
    view_logits: Tensor | None = None,
    after: bool = False,
    on_progress: Progress = quiet,
) -> Tuned:
    """Tunes prompts for each image and predicts its view 0 with them.

    prompts: the start, the same for every image; they are not changed.
    views: (M, V, 3, S, S) in [0, 1]; view 0 is the image itself.
    texts: from `class_texts` for the design of `prompts`.
    statistics: None leaves the entropy term alone.
    text_features, view_logits: under `prompts`, where they are there already.
    after: also compute the loss terms after the step (one more pass over the kept views).
    on_progress: called with (views or passes done, total).
    """
    config, views = config or TuneConfig(), views.detach()
    objective = Objective(backbone, prompts, statistics, config)
    images, count = views.shape[:2]
    passes, clock = kept_views_count(count, config.keep), Clock(backbone.device)
    advance = counted(on_progress, images * (count + passes * (config.steps + after) + 1))

    # section 3.2: keep the views that the starting prompts are most confident about
    with torch.no_grad():
        text = texts.features(backbone, prompts) if text_features is None else text_features
    clock.lap("text")
    if view_logits is None:
        view_logits = encode_views(backbone, prompts, views, text, advance=advance)
    else:
        advance(images * count)
    entropies = entropy(view_logits)
    kept = select_views(entropies, config.keep)
    kept_views = kept_of(views, kept)
    clock.lap("select")

    # section 3.3: lower their joint entropy and the distance of their statistics; every image
    # starts from the same prompts, with an optimiser of its own
    tuned = prompts.batch(images).map(lambda t: t.detach().requires_grad_())
    options = config.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    optimizer = torch.optim.AdamW(list(tuned.tensors.values()), **options)
    before: Losses | None = None
    for _ in range(config.steps):
        losses = backward(objective, tuned, texts, text, kept_views)
        before = before or losses
        with torch.no_grad(), torch.device("cpu"):  # AdamW makes its counter on the default
            optimizer.step()
            text = texts.features(backbone, tuned)
        advance(images * passes)
    clock.lap("gradient")

    # section 3.4: the answer to the image itself under its own prompts
    tuned = tuned.map(Tensor.detach)
    with torch.no_grad():
        answer = logits(backbone, views[:, 0], text, tuned)
        clock.lap("predict")
        before = before or objective(tuned, kept_views, text)
        final = objective(tuned, kept_views, text) if after else None
        clock.lap("after")
    advance(images * (passes * after + 1))
    return Tuned(tuned, text, answer, view_logits, entropies, kept, before, final, clock.seconds)


def backward(
    objective: Objective, prompts: Prompts, texts: ClassTexts, text_features: Tensor, views: Tensor
) -> Losses:
    """Loss terms of kept views; their gradient becomes that of every prompt tensor. The part of
    the text prompts is taken in a pass of its own, when the views' graph is gone: the two peaks in
    memory do not add up."""
    tensors, text = list(prompts.tensors.values()), text_features.detach()
    for tensor in tensors:
        tensor.grad = None
    with torch.enable_grad():
        if texts.fixed is None:
            text = text.expand(len(views), -1, -1).clone().requires_grad_()
        losses = objective(prompts, views, text)
        losses.total.sum().backward()
        losses = Losses(**{k: v.detach() for k, v in vars(losses).items() if v is not None})
        if texts.fixed is None:
            texts.features(objective.backbone, prompts).backward(text.grad)
    return losses


@torch.no_grad()
def encode_views(
    backbone: Backbone,
    prompts: Prompts,
    views: Tensor,
    text_features: Tensor,
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Logits (M, V, C) of all views under shared prompts, in passes of bounded memory.

    backbone: may be the copy in bfloat16; logits are then float32 all the same.
    text_features: under the same prompts, (C, E).
    """
    visual = prompts.visual().detach().to(backbone.dtype)
    rows = []
    for chunk in views.detach().flatten(0, 1).split(views_per_pass(backbone)):
        features, _ = encode_image(backbone, chunk, visual)
        rows.append(image_logits(backbone, features.to(text_features.dtype), text_features))
        advance(len(chunk))
    return torch.cat(rows).view(*views.shape[:2], -1)


def views_per_pass(backbone: Backbone) -> int:
    """Views in one pass without gradients, on a CPU about 1,600 tokens: with more, the activations
    outgrow what the allocator keeps, and their pages are mapped anew at every layer."""
    tokens = 1600 if backbone.device.type == "cpu" else 16_000
    return max(1, tokens // backbone.image_tokens)


def _on(backbone: Backbone, prompts: Prompts, statistics: Statistics) -> Statistics:
    """The statistics in the backbone's place and type, their shapes checked."""
    tokens = backbone.image_tokens + prompts.config.tokens
    expected = (backbone.visual_blocks, tokens, backbone.visual_width)
    for name, part in vars(statistics).items():
        for key, tensor in vars(part).items():
            if (shape := tuple(tensor.shape)) != expected:
                raise InputError(
                    f"statistics {name}.{key} must have shape {expected}, got {shape}."
                )
    place = backbone.device, backbone.dtype
    return Statistics(statistics.adversarial.to(*place), statistics.clean.to(*place))
