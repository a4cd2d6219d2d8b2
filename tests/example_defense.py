"""A defence that somebody else might write: the median over random flips of the picture."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from tapt.core.settings import Settings
from tapt.defenses import Defense, ImageBatch, PreparedDefense
from tapt.progress import Progress, quiet


class FlipSettings(Settings):
    flips: int = Field(5, ge=1, le=64, description="how often a coin is thrown")


class Flips(PreparedDefense):
    settings: FlipSettings
    randomised = True

    def logits(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Tensor:
        coins = [torch.rand(self.settings.flips, generator=g) for g in batch.generators("flips")]
        flip = (torch.stack(coins) < 0.5)[..., None, None, None].to(batch.images.device)
        images = batch.images[:, None]
        views = torch.where(flip, images.flip(-1), images)  # (M, flips, 3, S, S)
        every = self.clip.static(views.flatten(0, 1)).softmax(-1)
        return every.unflatten(0, flip.shape[:2]).median(1).values.log()


FLIPS = Defense("flips", "Median over flips", "an example", Flips, FlipSettings)
