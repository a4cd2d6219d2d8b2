"""Defences whose strength is known, to check an attack by."""

from __future__ import annotations

import torch
from torch import Tensor

from tapt.core.clip import PromptedClip
from tapt.core.losses import log_mean_probability
from tapt.defenses import ImageBatch, PreparedDefense
from tapt.defenses.base import State
from tapt.defenses.features import encode_unit, similarity
from tapt.progress import Progress, quiet


class Masked(PreparedDefense):
    """Vanilla CLIP with features rounded to a coarse grid, which has no gradient."""

    def rounding(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of length 1, and what rounding adds to them, (M, E)."""
        features = encode_unit(self.clip.backbone, images[:, None])[:, 0]
        grid = features.shape[-1] ** -0.5 / 2  # half of what a feature measures
        return features, (features / grid).round() * grid - features

    def answer(self, features: Tensor) -> Tensor:
        text = self.clip.vanilla.text_features
        return similarity(self.clip.backbone, features[:, None], text)[:, 0]

    def logits(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Tensor:
        features, added = self.rounding(batch.images)
        return self.answer(features + added)


class Unmasked(Masked):
    """The same, as an attacker who knows it treats it: what rounding adds is held constant."""

    @torch.no_grad()
    def freeze(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> State:
        return {"added": self.rounding(batch.images)[1]}

    def frozen_logits(self, batch: ImageBatch, state: State) -> Tensor:
        return self.answer(self.rounding(batch.images)[0] + state["added"])


class NoDefense(PreparedDefense):
    """The mean answer of vanilla CLIP over noise of size 0; notes the seeds of its draws."""

    randomised = True

    def __init__(self, clip: PromptedClip, settings: object = None) -> None:
        super().__init__(clip, settings)
        self.seeds: set[int] = set()

    def logits(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Tensor:
        self.seeds.update(batch.seeds)
        noise = [torch.randn(batch.images.shape[1:], generator=g) for g in batch.generators("no")]
        noisy = batch.images + 0 * torch.stack(noise).to(batch.images)
        return log_mean_probability(torch.stack([self.clip.vanilla(noisy)] * 2, 1))
