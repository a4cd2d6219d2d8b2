"""TAPT (Wang et al., CVPR 2025, arXiv 2411.13136): prompts tuned for every single image."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from tapt.core.clip import PromptedClip
from tapt.core.losses import kept_views_count
from tapt.core.prompts import Prompts, init_prompts, logits
from tapt.core.tuning import Losses, TuneConfig, Tuned, tune
from tapt.defenses.base import (
    Defense,
    ImageBatch,
    Prediction,
    PreparedDefense,
    State,
    Trace,
    crops,
    images_per_pass,
    register,
)
from tapt.defenses.surrogates import smooth_tuning
from tapt.progress import Progress, quiet


class TaptSettings(TuneConfig):
    """The test-time step, and where it starts."""

    random_start: bool = Field(
        False, description="start from random prompts, as the published code resets to"
    )


class Tapt(PreparedDefense):
    """One step on the prompts for each image, then the answer to the image itself."""

    settings: TaptSettings
    randomised = True

    def __init__(self, clip: PromptedClip, settings: TaptSettings) -> None:
        super().__init__(clip, settings)
        if settings.random_start:
            start = init_prompts(clip.backbone, clip.prompts.config)
            self.clip = replace(clip, prompts=start)
        self.surrogate = "smooth step" if settings.steps else None
        self.images_per_pass = images_per_pass(clip.backbone, self.attacked_views, clip.texts)

    @property
    def attacked_views(self) -> int:
        """How many views per image an attacker's gradients pass."""
        return kept_views_count(self.settings.views, self.settings.keep)

    def freeze(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> State:
        """The tuned prompts, their text features, and the kept views."""
        tuned = self.tune(batch, False, on_progress)
        texts = tuned.text_features.expand(len(batch), -1, -1)  # V shares them
        return {**tuned.prompts.tensors, "text features": texts, "kept": tuned.kept}

    def frozen_logits(self, batch: ImageBatch, state: State) -> Tensor:
        text_features = state["text features"]
        return logits(self.clip.backbone, batch.images, text_features, self.prompts_of(state))

    def prompts_of(self, state: State) -> Prompts:
        """The tuned prompts of each image."""
        start = self.clip.prompts
        return Prompts(start.config, {name: state[name] for name in start.tensors})

    def surrogate_logits(self, batch: ImageBatch) -> Tensor:
        prompts, text, _ = smooth_tuning(self.clip, self.settings, batch)
        return logits(self.clip.backbone, batch.images, text, prompts)

    def predict(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Prediction:
        tuned = self.tune(batch, True, on_progress)
        return Prediction(tuned.logits.softmax(-1).cpu(), trace_of(tuned))

    def tune(self, batch: ImageBatch, after: bool, on_progress: Progress) -> Tuned:
        """The step, done once for all defences that take the same one.

        after: also the loss terms after it.
        """
        clip, settings = self.clip, self.settings

        def make() -> Tuned:
            return tune(
                clip.backbone,
                clip.prompts,
                batch.views(settings.views),
                clip.texts,
                statistics=clip.statistics,
                config=settings,
                text_features=clip.text_features,
                view_logits=batch.view_logits(clip, settings.views, on_progress),
                after=after,
                on_progress=on_progress,
            )

        choices = [getattr(settings, name) for name in TuneConfig.model_fields]
        return batch.shared(("tuned", clip, after, *choices), make)


def trace_of(tuned: Tuned) -> Trace:
    """What happened in the step."""
    return {
        "entropies": tuned.entropies,
        "kept": tuned.kept,
        "before": _by_image(tuned.before),
        "after": None if tuned.after is None else _by_image(tuned.after),
    }


def _by_image(losses: Losses) -> dict[str, Tensor | None]:
    """Loss terms with the images first."""
    return {k: v if v is None or v.ndim == 1 else v.T for k, v in vars(losses).items()}


register(
    Defense(
        "tapt",
        "TAPT",
        "prompts tuned for this one picture",
        Tapt,
        TaptSettings,
        views=crops,
        search={"lr": (0.005, 0.01, 0.02, 0.04)},
    )
)
