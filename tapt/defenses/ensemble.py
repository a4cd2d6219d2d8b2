"""The untuned view ensemble: mean probability of the most confident views, no step."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from tapt.core.losses import entropy, log_mean_probability, select_views
from tapt.core.settings import Settings
from tapt.core.tuning import Progress
from tapt.defenses.base import Defense, ImageBatch, Prediction, PreparedDefense, register


class EnsembleSettings(Settings):
    """How many views there are, and how many of them answer."""

    views: int = Field(64, ge=1, le=1024, description="the image and random crops of it")
    keep: float = Field(0.1, ge=0, le=1, description="share of the most confident views")


class Ensemble(PreparedDefense):
    """Answers under the static prompts; what TAPT gains beyond it is due to the tuning."""

    settings: EnsembleSettings
    randomised = True
    images_per_pass = 16

    def logits(
        self,
        batch: ImageBatch,
        *,
        surrogate: str | None = None,
        on_progress: Progress = lambda done, total: None,
    ) -> Tensor:
        return self._answer(batch, on_progress)[0]

    def predict(
        self, batch: ImageBatch, *, on_progress: Progress = lambda done, total: None
    ) -> Prediction:
        with torch.no_grad():
            log_p, entropies, kept = self._answer(batch, on_progress)
        return Prediction(log_p.exp().cpu(), {"entropies": entropies, "kept": kept})

    def _answer(self, batch: ImageBatch, on_progress: Progress) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the mean probability (M, C), entropies (M, V) and kept views (M, K)."""
        count = self.settings.views
        logits = batch.view_logits(self.clip, count, on_progress)
        entropies = entropy(logits)
        kept = select_views(entropies, self.settings.keep)
        rows = torch.arange(len(batch), device=kept.device)[:, None]
        if torch.is_grad_enabled() or self.clip.selection_model is not None:
            chosen = batch.views(count)[rows, kept]
            chosen_logits = self.clip.static(chosen.flatten(0, 1)).view(*kept.shape, -1)
        else:
            chosen_logits = logits[rows, kept]
        return log_mean_probability(chosen_logits), entropies, kept


register(
    Defense(
        "ensemble",
        "Untuned view ensemble",
        "the kept views under the static prompts, no step",
        Ensemble,
        EnsembleSettings,
        search={"keep": (0.05, 0.1, 0.2, 0.5)},
    )
)
