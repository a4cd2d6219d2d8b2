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
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tapt.core.clip import PromptedClip
from tapt.core.losses import entropy, kept_views_count
from tapt.core.prompts import DEFAULT_TEMPLATE, class_texts
from tapt.core.tuning import Progress, counted
from tapt.defenses.base import (
    Defense,
    ImageBatch,
    Prediction,
    PreparedDefense,
    Trace,
    images_per_pass,
    register,
)
from tapt.defenses.changes import augmix, slight_change
from tapt.defenses.context import (
    CONTEXT,
    RtptSettings,
    SstptSettings,
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


@dataclass(frozen=True, eq=False)
class Plan:
    """loss: of the kept views' logits.
    weights: of all views in the answer, (M, V); None answers by view 0 alone.
    trace: how they came about.
    """

    loss: Callable[[Tensor], Terms]
    weights: Tensor | None = None
    trace: Trace = field(default_factory=dict)


class TextPrompts(PreparedDefense):
    """What the three share; vanilla CLIP's image tower, no prompts of a pack.

    An attacker's gradients pass the image features and the views' weights; the tuned context is
    held constant, or in the surrogate follows smoothly.
    """

    randomised = True
    weighs_views = True

    def __init__(self, clip: PromptedClip, settings: Any) -> None:
        super().__init__(clip, settings)
        self.surrogates = ("smooth step",) if settings.steps else ()
        self.texts = class_texts(clip.backbone, clip.classes, CONTEXT)
        self.start = start_context(clip.backbone)

    @cached_property
    def images_per_pass(self) -> int:  # type: ignore[override]
        return images_per_pass(self.clip.backbone, self.attacked_views, self.texts)

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
        count = self.settings.views
        views = batch.views(count)
        if not self.settings.augmix:
            return views

        def make() -> Tensor:
            pairs = zip(views, batch.generators("augmix"), strict=True)
            return torch.stack(
                [torch.stack([v[0], *(augmix(x, g) for x in v[1:])]) for v, g in pairs]
            )

        return batch.shared(("augmix", count), make)

    def plan(self, batch: ImageBatch, features: Tensor, logits: Tensor, kept: Tensor) -> Plan:
        """The loss, and how the views answer.

        features: of all views, of length 1, (M, V, E). logits: (M, V, C). kept: (M, K).
        """
        raise NotImplementedError

    def logits(
        self,
        batch: ImageBatch,
        *,
        surrogate: str | None = None,
        on_progress: Progress = lambda done, total: None,
    ) -> Tensor:
        return self._answer(batch, surrogate is not None, on_progress)[0]

    def predict(
        self, batch: ImageBatch, *, on_progress: Progress = lambda done, total: None
    ) -> Prediction:
        with torch.no_grad():
            logits, trace = self._answer(batch, False, on_progress)
        return Prediction(logits.softmax(-1).cpu(), trace)

    def _answer(
        self, batch: ImageBatch, smooth: bool, on_progress: Progress
    ) -> tuple[Tensor, Trace]:
        backbone, settings = self.clip.backbone, self.settings
        attacked, views = torch.is_grad_enabled(), self.views(batch)
        total = len(batch) * (settings.views + 1)
        advance = counted(on_progress, total)
        with torch.set_grad_enabled(attacked and self.weighs_views):
            kind = "augmix" if settings.augmix else ""
            features = view_features(batch, backbone, views, kind=kind, advance=advance)
            logits = similarity(backbone, features, self.text_features)
        entropies = entropy(logits.detach())
        kept = entropies.topk(self.kept_count, dim=-1, largest=False).indices
        rows = torch.arange(len(batch), device=kept.device)[:, None]
        plan = self.plan(batch, features, logits, kept)

        tuning, answering = features[rows, kept], features
        if not self.weighs_views:  # the other views are needed without gradients alone
            answering = encode_unit(backbone, views[:, :1]) if attacked else features[:, :1]
            tuning = encode_unit(backbone, views[rows, kept]) if smooth else tuning
        text, steps = tune_context(
            backbone,
            self.texts,
            tuning if smooth else tuning.detach(),
            plan.loss,
            settings,
            start=self.start,
            smooth=smooth,
        )
        tuned = similarity(backbone, answering, text)
        answer = tuned[:, 0] if plan.weights is None else weighted(plan.weights, tuned)
        on_progress(total, total)
        terms = [step.terms for step in steps]
        losses = {name: torch.stack([t[name] for t in terms], 1) for name in (terms or [{}])[0]}
        trace = {"entropies": entropies, "kept": kept, "weights": plan.weights}
        return answer, {**trace, **plan.trace, **losses}


class Tpt(TextPrompts):
    """Lowers the entropy of the kept views' mean; answers to the image itself."""

    settings: TptSettings
    weighs_views = False

    def plan(self, batch: ImageBatch, features: Tensor, logits: Tensor, kept: Tensor) -> Plan:
        return Plan(marginal_entropy)


class Rtpt(TextPrompts):
    """Lowers each kept view's entropy; every view answers, those with near neighbours most."""

    settings: RtptSettings

    def plan(self, batch: ImageBatch, features: Tensor, logits: Tensor, kept: Tensor) -> Plan:
        near = reliability(features, self.settings.neighbours)
        weights = (near / self.settings.temperature).softmax(-1)
        return Plan(pointwise_entropy, weights, {"reliability": near})


class Sstpt(TextPrompts):
    """Lowers each kept view's entropy and their disagreement; every view answers, those most that
    lie near the others and that a slight change does not move."""

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


register(
    Defense(
        "tpt",
        "TPT",
        "text context tuned for this one picture, entropy of the mean",
        Tpt,
        TptSettings,
        uses_prompts=False,
        paper="arXiv 2209.07511",
        by_default=False,
        search={"lr": (0.005, 0.05, 0.5), "keep": (0.1, 0.3)},
    )
)
register(
    Defense(
        "rtpt",
        "R-TPT",
        "text context tuned for this one picture, views weighted by their neighbours",
        Rtpt,
        RtptSettings,
        uses_prompts=False,
        paper="arXiv 2504.11195",
        by_default=False,
        search={"lr": (0.005, 0.05, 0.5), "temperature": (0.01, 0.03, 0.1)},
    )
)
register(
    Defense(
        "sstpt",
        "SS-TPT",
        "text context tuned for this one picture, views weighted by stability and suitability",
        Sstpt,
        SstptSettings,
        uses_prompts=False,
        paper="arXiv 2606.06943",
        by_default=False,
        search={"lr": (0.005, 0.05, 0.5), "temperature": (0.1, 0.25, 1.0)},
    )
)
