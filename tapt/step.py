"""One step of the test-time tuning: its losses, its gradients, and the move (TAPT, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tapt.backbone import Backbone
from tapt.losses import (
    Statistics,
    TokenStatistics,
    alignment,
    multi_view_entropy,
    view_statistics,
)
from tapt.prompts import ClassTexts, Prompts, image_logits
from tapt.towers import encode_image

if TYPE_CHECKING:
    from tapt.tuning import TuneConfig


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


@dataclass(frozen=True, eq=False)
class Step:
    """One step's losses and gradients, for a batch of images with prompts of their own.

    blocks: whose input statistics are aligned.
    smooth: gradients keep their graph, for attackers.
    apart: gradients to the text prompts are taken in a pass of their own, when the views' graph
        is gone; their peaks in memory do not add up.
    """

    backbone: Backbone
    texts: ClassTexts
    statistics: Statistics | None
    config: TuneConfig
    blocks: range
    smooth: bool
    apart: bool

    def text_features(self, prompts: Prompts) -> Tensor:
        """Normalised text features, ([M,] C, E)."""
        with torch.set_grad_enabled(not self.apart):
            features = self.texts.features(self.backbone, prompts)
        return features if self.texts.fixed is not None else features.requires_grad_()

    def forward(
        self,
        prompts: Prompts,
        views: Tensor,
        text_features: Tensor,
        tap: Sequence[int] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits (M, K, C) of (M, K) views, and the inputs of the aligned blocks."""
        images, count = views.shape[:2]
        tap = self.blocks if tap is None else tap
        features, taps = encode_image(self.backbone, views.flatten(0, 1), prompts.visual(), tap=tap)
        logits = image_logits(self.backbone, features, text_features)
        return logits.view(images, count, -1), taps

    def losses(
        self, prompts: Prompts, logits: Tensor, taps: Sequence[Tensor]
    ) -> tuple[Losses, TokenStatistics]:
        """Loss terms of the kept views, and their statistics without a graph."""
        images = len(logits)
        term = multi_view_entropy(logits)
        if not taps:
            empty = logits.new_zeros(0, images)
            return Losses(term, term), TokenStatistics(empty, empty)
        observed = view_statistics(taps, images)
        seen = TokenStatistics(observed.mean.detach(), observed.var.detach())
        if self.statistics is None:
            return Losses(term, term), seen
        adversarial = alignment(observed, self.statistics.adversarial, self.blocks)
        clean = alignment(observed, self.statistics.clean, self.blocks)
        alpha, weight = self.config.alpha, self.config.alignment_weight
        mixed = alpha * adversarial.sum(0) + (1 - alpha) * clean.sum(0)
        total = term + weight / prompts.config.visual_depth * mixed
        return Losses(term, total, adversarial.sum(0), clean.sum(0), adversarial, clean), seen

    def gradients(
        self,
        prompts: Prompts,
        views: Tensor,
        text_features: Tensor,
        graph: tuple[Tensor, list[Tensor]] | None,
    ) -> tuple[Losses, TokenStatistics, list[Tensor | None]]:
        """Loss terms, statistics, and the gradient of every prompt tensor.

        graph: what `forward` gives for these views, where it is there already.
        """
        with torch.enable_grad():
            logits, taps = graph or self.forward(prompts, views, text_features)
            losses, seen = self.losses(prompts, logits, taps)
            told = _detached(losses)
            if self.config.steps == 0:
                return told, seen, []
            leaf = [text_features] if self.apart and text_features.requires_grad else []
            gradients = torch.autograd.grad(
                losses.total.sum(),
                [*prompts.tensors.values(), *leaf],
                allow_unused=True,
                create_graph=self.smooth,
            )
            del logits, taps, losses, graph
            if leaf:
                gradients = self._through_text(prompts, gradients)
        return told, seen, list(gradients)

    def _through_text(
        self, prompts: Prompts, gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of the prompts from their own and, last in `gradients`, the text features'."""
        *direct, of_text = gradients
        through = torch.autograd.grad(
            self.texts.features(self.backbone, prompts),
            list(prompts.tensors.values()),
            of_text,
            allow_unused=True,
        )
        return [
            a if b is None else b if a is None else a + b
            for a, b in zip(direct, through, strict=True)
        ]


def kept_graph(
    graph: tuple[Tensor, list[Tensor]], kept: Tensor, count: int
) -> tuple[Tensor, list[Tensor]]:
    """Logits and block inputs of the kept views out of a pass over all of them."""
    logits, taps = graph
    rows = torch.arange(len(kept), device=kept.device)[:, None]
    flat = (rows * count + kept).flatten()
    with torch.enable_grad():
        return logits[rows, kept], [tap[flat] for tap in taps]


def adamw(prompts: Prompts, config: TuneConfig) -> torch.optim.AdamW:
    """A fresh optimiser for the prompts of a batch."""
    return torch.optim.AdamW(
        list(prompts.tensors.values()),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def assign(prompts: Prompts, gradients: Sequence[Tensor | None]) -> None:
    """Hands the optimiser its gradients."""
    for tensor, gradient in zip(prompts.tensors.values(), gradients, strict=True):
        tensor.grad = gradient


def descended(prompts: Prompts, gradients: Sequence[Tensor | None], config: TuneConfig) -> Prompts:
    """One differentiable step of gradient descent; each tensor of each image moves by lr on
    average, as AdamW's first step does."""

    def step(tensor: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return tensor
        size = gradient.abs().flatten(1).mean(1).clamp(min=1e-30)
        size = size.view(-1, *[1] * (gradient.ndim - 1))
        return tensor * (1 - config.lr * config.weight_decay) - config.lr * gradient / size

    pairs = zip(prompts.tensors.items(), gradients, strict=True)
    return Prompts(prompts.config, {name: step(t, g) for (name, t), g in pairs})


def _detached(losses: Losses) -> Losses:
    values = {k: None if v is None else v.detach() for k, v in vars(losses).items()}
    return Losses(**values)
