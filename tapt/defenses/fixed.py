"""No test-time defence at all: vanilla CLIP, and CLIP under the static prompts."""

from __future__ import annotations

from torch import Tensor

from tapt.defenses.base import Defense, ImageBatch, PreparedDefense, register
from tapt.progress import Progress, quiet


class VanillaClip(PreparedDefense):
    """CLIP without any prompts."""

    uses_prompts = False

    def logits(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Tensor:
        answer: Tensor = self.clip.vanilla(batch.images)
        return answer


class StaticPrompts(PreparedDefense):
    """The prompts before any test-time step; in float32, whatever selects the views."""

    def logits(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Tensor:
        answer: Tensor = self.clip.static(batch.images)
        return answer


register(Defense("clip", "Vanilla CLIP", "no defence", VanillaClip))
register(Defense("static", "Static prompts", "before the test-time step", StaticPrompts))
