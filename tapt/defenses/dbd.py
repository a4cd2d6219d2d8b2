"""DBD (Liu et al., ICLR 2026, arXiv 2606.06186): the direction in which changed views lead.

Nothing is tuned and no gradient is needed: the features of an attacked image lie beside those of
its changed views, all to the same side, and the answer is taken far on that side.

Done right here, unlike the published code: every image is changed at the model's size (there, clean
photos at full size and attacked ones at 224 pixels, so that the score also sees the image size),
and bit reduction ends at 255 (there, near-white wraps to black). No descriptions of the classes are
shipped: the class sentence alone, and `class_features` takes descriptions. Filters are OpenCV's,
bit for bit, without OpenCV.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, conv2d, normalize, pad

from tapt.core.backbone import Backbone
from tapt.core.clip import PromptedClip
from tapt.core.images import to_picture, to_uint8
from tapt.core.losses import entropy, kept_of
from tapt.core.prompts import DEFAULT_TEMPLATE, PromptConfig
from tapt.core.settings import Settings
from tapt.core.towers import encode_text
from tapt.core.views import random_view
from tapt.defenses.base import (
    Defense,
    ImageBatch,
    Prediction,
    PreparedDefense,
    images_per_pass,
    register,
)
from tapt.defenses.changes import straight_through
from tapt.defenses.features import encode_unit, similarity
from tapt.progress import Progress, counted, quiet

CROPS, NOISES, QUALITIES = 16, 6, (50, 60, 75)
VIEWS = 32
"""The image itself and 31 changed views."""


class DbdSettings(Settings):
    """Which views point the way, and how far it is followed."""

    references: int = Field(16, ge=1, le=VIEWS - 1, description="most confident changed views")
    alpha: float = Field(2.5, ge=0, le=100, description="how far the direction is followed")
    threshold: float = Field(
        0.8, ge=-1, le=1, description="of the views' agreement, above which alpha counts"
    )
    filter: bool = Field(True, description="keep the most confident views; else all")


@dataclass(frozen=True, eq=False)
class Direction:
    """references: indices of the views, most confident first, (M, R).
    directions: from the image's features to theirs, (M, R, E), and their mean, (M, E).
    similarities: cosines of each with the mean, (M, R).
    score: their mean, (M,). factor: how far the direction is followed, (M,).
    features: the answer's, not of length 1, (M, E).
    """

    references: Tensor
    directions: Tensor
    direction: Tensor
    similarities: Tensor
    score: Tensor
    factor: Tensor
    features: Tensor


def direction(features: Tensor, logits: Tensor, settings: DbdSettings) -> Direction:
    """Where the changed views lead.

    features: of length 1, (M, V, E), view 0 the image itself. logits: of them, (M, V, C).
    """
    others = logits.shape[1] - 1
    count = min(settings.references, others) if settings.filter else others
    entropies = entropy(logits[:, 1:].detach())
    kept = 1 + entropies.topk(count, dim=-1, largest=False).indices
    directions = kept_of(features, kept) - features[:, :1]
    mean = directions.mean(1)
    lengths = directions.norm(dim=-1) + 1e-8, mean.norm(dim=-1, keepdim=True) + 1e-8
    similarities = (directions * mean[:, None]).sum(-1) / (lengths[0] * lengths[1])
    score = similarities.mean(-1)
    factor = torch.where(score > settings.threshold, settings.alpha, 1.0).to(features.dtype)
    answer = features[:, 0] + factor[:, None] * mean
    return Direction(kept, directions, mean, similarities, score, factor, answer)


def class_features(
    backbone: Backbone,
    classes: Sequence[str],
    template: str = DEFAULT_TEMPLATE,
    descriptions: Mapping[str, Sequence[str]] | None = None,
) -> Tensor:
    """Mean of the features of the class sentence and of the descriptions, of length 1, (C, E)."""
    sentences = PromptConfig(design="V", template=template).sentences(classes)
    every = [
        [sentence, *(descriptions or {}).get(name, ())]
        for name, sentence in zip(classes, sentences, strict=True)
    ]
    with torch.no_grad():
        tokens = backbone.tokenize([text for texts in every for text in texts])
        features = normalize(encode_text(backbone, tokens), dim=-1)
    means = [part.mean(0) for part in features.split([len(texts) for texts in every])]
    return normalize(torch.stack(means), dim=-1)


def changed_views(image: Tensor, generator: Generator) -> Tensor:
    """The 31 changed views, (31, 3, S, S), of an image (3, S, S), both in [0, 1].

    In the order of the page: crops, bit reductions, JPEG, noise, median, mean, Gaussian. Gradients
    pass crops, noise and means; rounding, JPEG and the median are the identity to them.
    """
    scaled = image * 255
    levels = straight_through(scaled.round(), scaled)
    exact = levels.detach()
    picture = to_picture(exact.to(torch.uint8))

    def crop() -> Tensor:
        view = random_view(levels / 255, generator, min_scale=0.5) * 255
        return straight_through(view.round(), view)

    def noisy() -> Tensor:
        noise = torch.randn(image.shape, generator=generator, device="cpu").to(image)
        view = (levels / 255 + 0.1 * noise).clamp(0, 1) * 255
        return straight_through(view.floor(), view)

    def like(changed: Image.Image) -> Tensor:
        return straight_through(to_uint8(changed).to(levels), levels)

    reduced = [
        (cut(exact / 32) * 32).clamp(max=255) for cut in (torch.floor, torch.round, torch.ceil)
    ]
    views = [
        *(crop() for _ in range(CROPS)),
        *(straight_through(values, levels) for values in reduced),
        *(like(jpeg(picture, quality)) for quality in QUALITIES),
        *(noisy() for _ in range(NOISES)),
        like(picture.filter(ImageFilter.MedianFilter(5))),
        *blurred(levels),
    ]
    return torch.stack(views) / 255


def views_of(batch: ImageBatch, settings: DbdSettings | None = None) -> Tensor:
    """The images and their changed views, (M, 32, 3, S, S)."""
    pairs = zip(batch.images, batch.generators("dbd"), strict=True)
    return torch.stack([torch.cat([x[None], changed_views(x, g)]) for x, g in pairs])


def blurred(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Gaussian over 5 x 5 pixels, in whole levels as OpenCV rounds them, (3, S, S)."""
    padded = pad(levels[:, None], (2, 2, 2, 2), mode="reflect")
    mean = avg_pool2d(padded, 5, stride=1)[:, 0]
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).to(levels)
    total = conv2d(conv2d(padded, line.view(1, 1, 1, 5)), line.view(1, 1, 5, 1))[:, 0]
    gauss = straight_through(((total + 128) / 256).floor(), total / 256)
    return straight_through(mean.round(), mean), gauss


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """A picture written as JPEG and read again."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality)
    return Image.open(data)


class Dbd(PreparedDefense):
    """Answers to the features beyond the image's own, on the side of its changed views."""

    settings: DbdSettings
    uses_prompts = False
    randomised = True

    def __init__(self, clip: PromptedClip, settings: DbdSettings) -> None:
        super().__init__(clip, settings)
        self.images_per_pass = images_per_pass(clip.backbone, VIEWS)

    def logits(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Tensor:
        return self._answer(batch, on_progress)[0]

    @torch.no_grad()
    def predict(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Prediction:
        logits, entropies, found = self._answer(batch, on_progress)
        trace = {
            "entropies": entropies,
            "kept": found.references,
            "similarities": found.similarities,
            "score": found.score,
            "factor": found.factor,
        }
        return Prediction(logits.softmax(-1).cpu(), trace)

    def _answer(self, batch: ImageBatch, on_progress: Progress) -> tuple[Tensor, Tensor, Direction]:
        """Logits (M, C), entropies of all views (M, V), and the direction."""
        backbone, text = self.clip.backbone, self.clip.vanilla.text_features
        advance = counted(on_progress, len(batch) * VIEWS)

        def encoded() -> Tensor:
            return encode_unit(backbone, views_of(batch), advance=advance)

        features = batch.shared(("dbd", backbone, torch.is_grad_enabled()), encoded)
        logits = similarity(backbone, features, text)
        found = direction(features, logits, self.settings)
        answer = similarity(backbone, normalize(found.features, dim=-1)[:, None], text)[:, 0]
        return answer, entropy(logits), found


register(
    Defense(
        "dbd",
        "DBD",
        "features moved towards those of changed views, no prompts",
        Dbd,
        DbdSettings,
        views=views_of,
        by_default=False,
        search={"threshold": (0.4, 0.6, 0.7, 0.8, 0.9), "alpha": (1.5, 2.5, 4.0)},
    )
)
