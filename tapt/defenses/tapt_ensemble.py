"""TAPT's tuned prompts, answer over the views: the union of its step and of the view ensemble.

Of this project; TAPT itself answers to the image alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tapt.core.losses import kept_of, log_mean_probability
from tapt.core.prompts import Prompts
from tapt.defenses.base import Defense, ImageBatch, Prediction, State, crops, register
from tapt.defenses.features import encode_unit, reliability, similarity, weighted
from tapt.defenses.surrogates import smooth_tuning
from tapt.defenses.tapt import Tapt, TaptSettings, trace_of
from tapt.progress import Progress, quiet


class TaptEnsembleSettings(TaptSettings):
    """TAPT's step, and how its views answer."""

    answer: Literal["kept", "similar"] = Field(
        "kept",
        description="mean probability of the kept views, or all views weighted by similarity",
    )
    neighbours: int = Field(20, ge=1, le=1023, description="views that a view is compared with")
    temperature: float = Field(0.01, gt=0, le=100, description="of the views' weights")


class TaptEnsemble(Tapt):
    """One step on the prompts for each image, then the answer of its views under them."""

    settings: TaptEnsembleSettings

    @property
    def attacked_views(self) -> int:
        every = self.settings.answer == "similar"
        return self.settings.views if every else super().attacked_views

    def frozen_logits(self, batch: ImageBatch, state: State) -> Tensor:
        views, prompts = batch.views(self.settings.views), self.prompts_of(state)
        return self._answer(views, prompts, state["text features"], state["kept"])[0]

    def surrogate_logits(self, batch: ImageBatch) -> Tensor:
        prompts, text, kept = smooth_tuning(self.clip, self.settings, batch)
        return self._answer(batch.views(self.settings.views), prompts, text, kept)[0]

    def predict(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Prediction:
        tuned = self.tune(batch, True, on_progress)
        views = batch.views(self.settings.views)
        with torch.no_grad():
            logits, weights = self._answer(views, tuned.prompts, tuned.text_features, tuned.kept)
        return Prediction(logits.softmax(-1).cpu(), {**trace_of(tuned), "weights": weights})

    def _answer(
        self, views: Tensor, prompts: Prompts, text_features: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits or log-probabilities (M, C), and the weights (M, V) of all views if they have.

        text_features: under `prompts`, ([M,] C, E). kept: (M, K).
        """
        backbone, settings = self.clip.backbone, self.settings
        if settings.answer == "kept":
            views = kept_of(views, kept)
        features = encode_unit(backbone, views, prompts.visual())
        logits = similarity(backbone, features, text_features)
        if settings.answer == "kept":
            return log_mean_probability(logits), None
        near = reliability(features, settings.neighbours)
        weights = (near / settings.temperature).softmax(-1)
        return weighted(weights, logits), weights


register(
    Defense(
        "tapt-ensemble",
        "TAPT + ensemble",
        "prompts tuned for this one picture, answered by its views",
        TaptEnsemble,
        TaptEnsembleSettings,
        views=crops,
        by_default=False,
        search={"answer": ("kept", "similar"), "lr": (0.005, 0.02)},
    )
)
