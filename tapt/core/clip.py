"""CLIP as a classifier, and CLIP with prompts and one class list: all that a defence is given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from tapt.core.backbone import Backbone
from tapt.core.losses import Statistics
from tapt.core.prompts import DEFAULT_TEMPLATE, ClassTexts, Prompts, class_texts, logits


class Classifier(nn.Module):
    """A model that an attack sees: pixels in [0, 1], (N, 3, S, S), to logits (N, C).

    classes: how many; randomised: two passes over the same images differ.
    """

    backbone: Backbone
    classes: int
    randomised: bool = False

    def rows(self, index: Tensor) -> Classifier:
        """The same model for a part of the images, whose randomness goes with them."""
        return self


class FixedClassifier(Classifier):
    """CLIP with fixed text features and fixed visual prompts."""

    def __init__(
        self, backbone: Backbone, text_features: Tensor, prompts: Prompts | None = None
    ) -> None:
        super().__init__()
        self.model = backbone.model  # torchattacks asks its parameters for the device
        self.backbone, self.classes = backbone, len(text_features)
        self.text_features, self.prompts = text_features, prompts
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return logits(self.backbone, images, self.text_features, self.prompts)


@dataclass(frozen=True, eq=False)
class PromptedClip:
    """A backbone with prompts, ready for one class list; text features are computed once.

    prompts: that every image starts from; may be untrained.
    statistics: None where there are none.
    template: class sentence of vanilla CLIP and V; VLI and VLJ keep their own context.
    selection_model: the backbone in bfloat16, where views are to be selected by it.
    """

    backbone: Backbone
    prompts: Prompts
    statistics: Statistics | None
    classes: tuple[str, ...]
    template: str = DEFAULT_TEMPLATE
    selection_model: Backbone | None = None

    @cached_property
    def vanilla_texts(self) -> ClassTexts:
        """The class sentences of vanilla CLIP."""
        return class_texts(self.backbone, self.classes, template=self.template)

    @cached_property
    def texts(self) -> ClassTexts:
        """The class sentences of the prompts' design."""
        if self.prompts.config.design == "V":
            return self.vanilla_texts
        return class_texts(self.backbone, self.classes, self.prompts.config)

    @cached_property
    def text_features(self) -> Tensor:
        """Normalised text features under the prompts, (C, E)."""
        with torch.no_grad():
            return self.texts.features(self.backbone, self.prompts)

    @cached_property
    def vanilla(self) -> FixedClassifier:
        """CLIP without any prompts."""
        return FixedClassifier(self.backbone, self.vanilla_texts.features(self.backbone))

    @cached_property
    def static(self) -> FixedClassifier:
        """CLIP under the prompts, before any test-time step."""
        return FixedClassifier(self.backbone, self.text_features, self.prompts)
