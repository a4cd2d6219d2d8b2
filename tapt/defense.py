"""Every defence's answer to a batch of preprocessed images, for one class list.

The page, the commands and the evaluation all ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tapt.attacks import Classifier
from tapt.backbone import Backbone
from tapt.errors import InputError
from tapt.images import to_float
from tapt.losses import mean_probability
from tapt.pack import Pack
from tapt.prompts import ClassTexts, class_texts
from tapt.tuning import Trace, TuneConfig, tune
from tapt.views import make_views

DEFENSES = ("clip", "static", "ensemble", "tapt")
THREATS = ("clip", "static")
MAX_CLASSES = 1000


def class_names(text: str) -> list[str]:
    """The names in a text, one per line or by commas; trimmed, empty ones left out."""
    names = (" ".join(part.split()) for line in text.splitlines() for part in line.split(","))
    return [name for name in names if name]


def parse_classes(text: str | Sequence[str]) -> list[str]:
    """Class names from text, one per line or by commas; trimmed, without repetitions.

    Raises:
        InputError: fewer than two names, or more than 1,000.
    """
    classes = list(dict.fromkeys(class_names(text if isinstance(text, str) else "\n".join(text))))
    if len(classes) < 2:
        raise InputError(
            f"Give at least two class names, one per line or separated by commas; "
            f"got {len(classes)}."
        )
    if len(classes) > MAX_CLASSES:
        raise InputError(f"Give at most {MAX_CLASSES:,} class names; got {len(classes):,}.")
    return classes


@dataclass(frozen=True, eq=False)
class Defended:
    """Probabilities (M, C) of `static`, `ensemble` and `tapt`, and what the step did."""

    probabilities: dict[str, Tensor]
    trace: Trace


@dataclass(frozen=True, eq=False)
class Defender:
    """A backbone and a pack, ready for one class list; text features are computed once.

    vanilla: class sentences of plain CLIP, in the same template as V.
    prompted: class sentences of the pack's design.
    template: of the vanilla class sentences.
    coarse: the backbone in bfloat16; it encodes the views for the selection.
    """

    backbone: Backbone
    pack: Pack
    classes: tuple[str, ...]
    vanilla: ClassTexts
    prompted: ClassTexts
    static_features: Tensor
    template: str
    coarse: Backbone | None = None

    @torch.no_grad()
    def clip(self, pixels: Tensor) -> Tensor:
        """Vanilla CLIP's probabilities, (M, C), for uint8 images (M, 3, S, S)."""
        return self._probabilities(self.classifier("clip"), pixels)

    @torch.no_grad()
    def static(self, pixels: Tensor) -> Tensor:
        """Probabilities under the prompts before the test-time step, (M, C)."""
        return self._probabilities(self.classifier("static"), pixels)

    def _probabilities(self, classifier: Classifier, pixels: Tensor) -> Tensor:
        return classifier(self._images(pixels)).softmax(-1).cpu()

    def _images(self, pixels: Tensor) -> Tensor:
        return to_float(pixels.to(self.backbone.device), self.backbone.dtype)

    def classifier(self, threat: str) -> Classifier:
        """The model that an attack sees."""
        if threat == "clip":
            return Classifier(self.backbone, self.vanilla.features(self.backbone))
        if threat == "static":
            return Classifier(self.backbone, self.static_features, self.pack.prompts)
        raise InputError(f"threat must be one of {', '.join(THREATS)}, got {threat!r}.")

    def defend(
        self,
        pixels: Tensor,
        *,
        config: TuneConfig | None = None,
        seeds: Sequence[int] = (0,),
        after: bool = False,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Defended:
        """Tunes the prompts for each image and answers under every defence.

        pixels: uint8, (M, 3, S, S).
        config: default the pack's own test-time settings.
        seeds: of each image's views, (M,).
        """
        config = config or self.pack.test_time
        views = torch.stack(
            [
                make_views(image, config.views, generator=torch.Generator().manual_seed(seed))
                for image, seed in zip(self._images(pixels), seeds, strict=True)
            ]
        )
        tuned = tune(
            self.backbone,
            self.pack.prompts,
            views,
            self.prompted,
            statistics=self.pack.statistics,
            config=config,
            after=after,
            coarse=self.coarse,
            on_progress=on_progress,
        )
        trace = tuned.trace
        rows = torch.arange(len(views), device=views.device)[:, None]
        probabilities = {
            "static": trace.logits[:, 0].softmax(-1).cpu(),
            "ensemble": mean_probability(trace.logits[rows, trace.kept]).cpu(),
            "tapt": tuned.logits.softmax(-1).cpu(),
        }
        return Defended(probabilities, trace)


def make_defender(
    backbone: Backbone,
    pack: Pack,
    classes: Sequence[str],
    *,
    template: str | None = None,
    coarse: Backbone | None = None,
) -> Defender:
    """Prepares a class list.

    template: class sentence of vanilla CLIP and V, default the pack's; VLI and VLJ keep their own
        context.
    coarse: `backbone.in_bfloat16()`, to select views faster.

    Raises:
        InputError: a class name does not fit the text context.
    """
    config = pack.prompts.config
    template = template or config.template
    vanilla = class_texts(backbone, list(classes), template=template)
    prompted = vanilla if config.design == "V" else class_texts(backbone, list(classes), config)
    with torch.no_grad():
        static = prompted.features(backbone, pack.prompts)
    return Defender(backbone, pack, tuple(classes), vanilla, prompted, static, template, coarse)
