"""Text prompts tuned for every single image: TPT, R-TPT and SS-TPT, one loop.

They need no trained prompts: 4 context vectors start as the embeddings of "a photo of a", whatever
the template, and are tuned by AdamW, anew for every image; the image features of the views never
change. What the published code gets wrong is done right here:

- TPT keeps no view at all below 10 views (its loss is NaN); here at least one is kept.
- TPT runs in float16 with a gradient scale that lives on from image to image; here in float32.
- R-TPT leaves a view out of its own neighbours only where rounding makes its cosine 1 or more;
  here always. With 20 views or fewer all others are neighbours.
- SS-TPT's divergence may fall below 0 by rounding, its inverse then is a huge negative; here it is
  at least 0.
- R-TPT and SS-TPT attack the prompts that the image before left behind, and cut decimals off the
  attacked image; here attacks see the starting prompts, and 8-bit images are rounded.

The views are TAPT's crops of the preprocessed image, the same for all defences. `augmix` puts
their papers' AugMix chain on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tapt.core.clip import PromptedClip
from tapt.core.losses import entropy, kept_of, kept_views_count
from tapt.core.prompts import DEFAULT_TEMPLATE, class_texts
from tapt.core.settings import Settings
from tapt.defenses.base import (
    Defense,
    ImageBatch,
    Prediction,
    PreparedDefense,
    State,
    Trace,
    images_per_pass,
    register,
)
from tapt.defenses.changes import augmix, slight_change
from tapt.defenses.context import (
    CONTEXT,
    RtptSettings,
    SstptSettings,
    Step,
    Terms,
    TptSettings,
    consistent_entropy,
    divergence,
    marginal_entropy,
    pointwise_entropy,
    start_context,
    suitability,
    tune_context,
    view_weights,
)
from tapt.defenses.features import encode_unit, reliability, similarity, view_features, weighted
from tapt.progress import Progress, counted, quiet


def views_of(batch: ImageBatch, settings: Any) -> Tensor:
    """The image and crops of it, changed by AugMix where the settings say so, (M, V, 3, S, S)."""
    views = batch.views(settings.views)
    if not settings.augmix:
        return views

    def make() -> Tensor:
        pairs = zip(views, batch.generators("augmix"), strict=True)
        return torch.stack([torch.stack([v[0], *(augmix(x, g) for x in v[1:])]) for v, g in pairs])

    return batch.shared(("augmix", settings.views), make)


@dataclass(frozen=True, eq=False)
class Plan:
    """loss: of the kept views' logits.
    weights: of all views in the answer, (M, V); None answers by view 0 alone.
    trace: how they came about.
    """

    loss: Callable[[Tensor], Terms]
    weights: Tensor | None = None
    trace: Trace = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Look:
    """What is known of a batch before the step.

    features: of the views that answer, of length 1, (M, V, E); tuning: of the kept, (M, K, E).
    entropies: of all views under the starting context, (M, V). kept: (M, K).
    """

    features: Tensor
    tuning: Tensor
    entropies: Tensor
    kept: Tensor
    plan: Plan


class TextPrompts(PreparedDefense):
    """What the three share; vanilla CLIP's image tower, no prompts of a pack.

    An attacker's gradients pass the image features and the views' weights; the text features under
    the tuned context are held constant, or in the surrogate follow smoothly.
    """

    uses_prompts = False
    randomised = True
    weighs_views = True

    def __init__(self, clip: PromptedClip, settings: Any) -> None:
        super().__init__(clip, settings)
        self.surrogate = "smooth step" if settings.steps else None
        self.texts = class_texts(clip.backbone, clip.classes, CONTEXT)
        self.start = start_context(clip.backbone)
        self.images_per_pass = images_per_pass(clip.backbone, self.attacked_views, self.texts)

    @property
    def attacked_views(self) -> int:
        """How many views per image an attacker's gradients pass."""
        return self.settings.views if self.weighs_views else 1 + self.kept_count

    @cached_property
    def text_features(self) -> Tensor:
        """Under the starting context, (C, E)."""
        if self.clip.template == DEFAULT_TEMPLATE:
            return self.clip.vanilla.text_features
        with torch.no_grad():
            return self.texts.features(self.clip.backbone, self.start)

    @property
    def kept_count(self) -> int:
        """How many views are kept, at least one."""
        return kept_views_count(self.settings.views, self.settings.keep)

    def views(self, batch: ImageBatch) -> Tensor:
        """(M, V, 3, S, S); view 0 is the image itself."""
        return views_of(batch, self.settings)

    def plan(self, batch: ImageBatch, features: Tensor, logits: Tensor, kept: Tensor) -> Plan:
        """The loss, and how the views answer.

        features: of all views, of length 1, (M, V, E). logits: (M, V, C). kept: (M, K).
        """
        raise NotImplementedError

    @torch.no_grad()
    def freeze(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> State:
        """The text features."""
        return {"text features": self._tuned(batch, self._look(batch, on_progress))[0]}

    def frozen_logits(self, batch: ImageBatch, state: State) -> Tensor:
        text = state["text features"]
        if self.weighs_views:
            return self._answer(self._look(batch), text)
        features = encode_unit(self.clip.backbone, batch.images[:, None])
        return similarity(self.clip.backbone, features, text)[:, 0]

    def surrogate_logits(self, batch: ImageBatch) -> Tensor:
        look = self._look(batch if self.weighs_views else batch.detached())
        if not self.weighs_views:  # gradients pass the kept views and the image alone
            chosen = torch.cat([batch.images[:, None], kept_of(self.views(batch), look.kept)], 1)
            features = encode_unit(self.clip.backbone, chosen)
            look = replace(look, features=features[:, :1], tuning=features[:, 1:])
        return self._answer(look, self._tuned(batch, look, smooth=True)[0])

    @torch.no_grad()
    def predict(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Prediction:
        look = self._look(batch, on_progress)
        text, steps = self._tuned(batch, look)
        logits, total = self._answer(look, text), len(batch) * (self.settings.views + 1)
        on_progress(total, total)
        terms = [step.terms for step in steps]
        losses = {name: torch.stack([t[name] for t in terms], 1) for name in (terms or [{}])[0]}
        trace = {"entropies": look.entropies, "kept": look.kept, "weights": look.plan.weights}
        return Prediction(logits.softmax(-1).cpu(), {**trace, **look.plan.trace, **losses})

    def _look(self, batch: ImageBatch, on_progress: Progress = quiet) -> Look:
        """All that comes before the step; with gradients where they are enabled."""
        backbone, views = self.clip.backbone, self.views(batch)
        advance = counted(on_progress, len(batch) * (self.settings.views + 1))
        kind = "augmix" if self.settings.augmix else ""
        features = view_features(batch, backbone, views, kind=kind, advance=advance)
        logits = similarity(backbone, features, self.text_features)
        entropies = entropy(logits.detach())
        kept = entropies.topk(self.kept_count, dim=-1, largest=False).indices
        plan = self.plan(batch, features, logits, kept)
        return Look(features, kept_of(features, kept), entropies, kept, plan)

    def _tuned(
        self, batch: ImageBatch, look: Look, *, smooth: bool = False
    ) -> tuple[Tensor, list[Step]]:
        """Text features of every image, (M, C, E), and the steps."""
        tuning = look.tuning if smooth else look.tuning.detach()
        parts = self.clip.backbone, self.texts, tuning, look.plan.loss, self.settings
        return tune_context(*parts, start=self.start, smooth=smooth)

    def _answer(self, look: Look, text: Tensor) -> Tensor:
        """Logits (M, C)."""
        tuned, weights = similarity(self.clip.backbone, look.features, text), look.plan.weights
        return tuned[:, 0] if weights is None else weighted(weights, tuned)


class Tpt(TextPrompts):
    """TPT (arXiv 2209.07511): lowers the entropy of the kept views' mean; the image answers."""

    settings: TptSettings
    weighs_views = False

    def plan(self, batch: ImageBatch, features: Tensor, logits: Tensor, kept: Tensor) -> Plan:
        return Plan(marginal_entropy)


class Rtpt(TextPrompts):
    """R-TPT (arXiv 2504.11195): lowers each kept view's entropy; every view answers, those with
    near neighbours most."""

    settings: RtptSettings

    def plan(self, batch: ImageBatch, features: Tensor, logits: Tensor, kept: Tensor) -> Plan:
        near = reliability(features, self.settings.neighbours)
        weights = (near / self.settings.temperature).softmax(-1)
        return Plan(pointwise_entropy, weights, {"reliability": near})


class Sstpt(TextPrompts):
    """SS-TPT (arXiv 2606.06943): lowers each kept view's entropy and their disagreement; every view
    answers, those most that lie near the others and that a slight change does not move."""

    settings: SstptSettings

    @property
    def attacked_views(self) -> int:
        return 2 * self.settings.views  # they are changed, too

    @property
    def kept_count(self) -> int:
        return min(max(2, self.settings.select), self.settings.views)

    def plan(self, batch: ImageBatch, features: Tensor, logits: Tensor, kept: Tensor) -> Plan:
        settings, backbone = self.settings, self.clip.backbone

        def encoded() -> Tensor:
            pairs = zip(self.views(batch), batch.generators("slight change"), strict=True)
            return encode_unit(backbone, torch.stack([slight_change(x, g) for x, g in pairs]))

        choices = settings.views, settings.augmix, torch.is_grad_enabled()
        changed = batch.shared(("slight change", backbone, *choices), encoded)
        changed_logits = similarity(backbone, changed, self.text_features)
        moved, near = divergence(logits, changed_logits), suitability(features)
        steady = 1 / (moved + 1e-8)
        chosen = view_weights(near.gather(1, kept), steady.gather(1, kept), settings).detach()
        return Plan(
            lambda z: consistent_entropy(z, chosen, settings.consistency_weight),
            view_weights(near, steady, settings),
            {
                "divergence": moved,
                "stability": steady,
                "suitability": near,
                "kept_weights": chosen,
            },
        )


def _register(
    name: str,
    title: str,
    how: str,
    prepare: type[TextPrompts],
    settings: type[Settings],
    **search: Any,
) -> None:
    about = f"text context tuned for this one picture, {how}"
    search = {"lr": (0.005, 0.05, 0.5), **search}
    options: Any = {"views": views_of, "by_default": False, "search": search}
    register(Defense(name, title, about, prepare, settings, **options))


_register("tpt", "TPT", "entropy of the mean", Tpt, TptSettings, keep=(0.1, 0.3))
_register(
    "rtpt",
    "R-TPT",
    "views weighted by their neighbours",
    Rtpt,
    RtptSettings,
    temperature=(0.01, 0.03, 0.1),
)
_register(
    "sstpt",
    "SS-TPT",
    "views weighted by stability and suitability",
    Sstpt,
    SstptSettings,
    temperature=(0.1, 0.25, 1.0),
)
