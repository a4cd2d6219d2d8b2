"""The untuned view ensemble: mean probability of the most confident views, no step."""

from __future__ import annotations

import torch
from torch import Tensor

from tapt.core.losses import entropy, kept_of, log_mean_probability, select_views
from tapt.core.settings import Settings
from tapt.core.tuning import Keep, Views
from tapt.defenses.base import (
    Defense,
    ImageBatch,
    Prediction,
    PreparedDefense,
    State,
    crops,
    register,
)
from tapt.progress import Progress, quiet


class EnsembleSettings(Settings):
    """How many views there are, and how many of them answer."""

    views: Views = 64
    keep: Keep = 0.1


class Ensemble(PreparedDefense):
    """Answers under the static prompts; what TAPT gains beyond it is due to the tuning."""

    settings: EnsembleSettings
    randomised = True
    images_per_pass = 16

    def freeze(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> State:
        """The selection."""
        return self._select(batch, on_progress)[1]

    def frozen_logits(self, batch: ImageBatch, state: State) -> Tensor:
        """Log of the mean probability, (M, C)."""
        views = kept_of(batch.views(self.settings.views), state["kept"])
        logits = self.clip.static(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return log_mean_probability(logits)

    @torch.no_grad()
    def predict(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Prediction:
        logits, state = self._select(batch, on_progress)
        if self.clip.selection_model is None:  # the kept views have answered already
            log_p = log_mean_probability(kept_of(logits, state["kept"]))
        else:
            log_p = self.frozen_logits(batch, state)
        return Prediction(log_p.exp().cpu(), state)

    def _select(self, batch: ImageBatch, on_progress: Progress) -> tuple[Tensor, State]:
        """Logits (M, V, C) of all views, and which are kept."""
        logits = batch.view_logits(self.clip, self.settings.views, on_progress)
        entropies = entropy(logits)
        kept = select_views(entropies, self.settings.keep)
        return logits, {"entropies": entropies, "kept": kept}


register(
    Defense(
        "ensemble",
        "Untuned view ensemble",
        "the kept views under the static prompts, no step",
        Ensemble,
        EnsembleSettings,
        views=crops,
        search={"keep": (0.05, 0.1, 0.2, 0.5)},
    )
)
