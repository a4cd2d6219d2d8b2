"""The learnable vectors of the three prompt designs, as plain values.

V tunes visual prompts only; VLI tunes visual and text prompts independently; VLJ tunes text
prompts and the linear maps that turn them into visual prompts (MaPLe).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from tapt.core.backbone import Backbone
from tapt.core.errors import InputError
from tapt.core.settings import Settings
from tapt.core.towers import encode_image, encode_text

WORDS = "a photo of a"
DEFAULT_TEMPLATE = "a photo of a {}."


class PromptConfig(Settings):
    """Which prompts there are."""

    design: Literal["V", "VLI", "VLJ"] = Field("VLI", description="which prompts there are")
    tokens: int = Field(2, ge=1, le=1000, description="prompt tokens per block, n")
    visual_depth: int = Field(
        9,
        ge=1,
        le=1000,
        description="image blocks with prompts, D",
        json_schema_extra={"option": "depth"},
    )
    text_depth: int | None = Field(None, ge=0, le=1000, description="text blocks with prompts")
    template: str = Field(DEFAULT_TEMPLATE, description="class sentence of V, with one {}")
    # the first n words become vectors; by default "a photo of a", for n > 4 placeholders "X"
    context: str | None = Field(None, description="words before the class name of VLI and VLJ")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        if not isinstance(given, dict):  # of a pack's file
            return given
        if given.get("design") == "V":
            return {**given, "text_depth": 0, "context": None}
        values = dict(given)
        if values.get("text_depth") is None:
            values["text_depth"] = values.get("visual_depth", 9)
        count = values.get("tokens", 2)
        if values.get("context") is None and isinstance(count, int) and count <= 1000:
            values["context"] = WORDS if count <= 4 else " ".join(["X"] * count)
        return values

    @model_validator(mode="after")
    def _check(self) -> PromptConfig:
        if self.template.count("{}") != 1:
            raise InputError(f"template must contain one {{}}, got {self.template!r}")
        if self.design == "V":
            return self
        if self.text_depth == 0:
            raise InputError("text_depth must be a whole number from 1 to 1000, got 0")
        if len(str(self.context).split()) < self.tokens:
            raise InputError(
                f"context {self.context!r} has fewer words than the {self.tokens} prompt tokens"
            )
        return self

    def sentences(self, classes: Sequence[str]) -> list[str]:
        """One sentence per class; underscores become spaces."""
        names = [name.replace("_", " ") for name in classes]
        if self.context is None:
            return [self.template.replace("{}", name) for name in names]
        return [f"{self.context} {name}." for name in names]

    def shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter; `InputError` where there are fewer blocks than prompts
        are to go into.

        sizes: as `Backbone.architecture` names them.
        """
        for tower, depth in (("visual", self.visual_depth), ("text", self.text_blocks)):
            if depth > (most := sizes[f"{tower}_blocks"]):
                raise InputError(
                    f"{tower}_depth must be at most {most} on this backbone, got {depth}."
                )
        n, image, text = self.tokens, sizes["visual_width"], sizes["text_width"]
        depth = self.visual_depth
        if self.design == "V":
            return {"visual": (depth, n, image)}
        if self.design == "VLI":
            return {"visual": (depth, n, image), "text": (self.text_blocks, n, text)}
        weight, bias = (depth, image, text), (depth, image)
        texts = max(self.text_blocks, depth), n, text
        return {"text": texts, "projection.weight": weight, "projection.bias": bias}

    @property
    def text_blocks(self) -> int:
        """Text blocks with prompts of their own; 0 for V."""
        return self.text_depth or 0


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompt parameters by name, shaped as `PromptConfig.shapes`, or with one more leading
    dimension for a batch of images that each have prompts of their own."""

    config: PromptConfig
    tensors: Mapping[str, Tensor]

    def visual(self) -> Tensor:
        """Visual prompts, ([G,] D, n, visual width)."""
        if self.config.design != "VLJ":
            return self.tensors["visual"]
        text = self.tensors["text"][..., : self.config.visual_depth, :, :]
        weight, bias = self.tensors["projection.weight"], self.tensors["projection.bias"]
        return text @ weight.mT + bias.unsqueeze(-2)

    def text(self) -> Tensor | None:
        """Text prompts, ([G,] D, n, text width), or None where the text is fixed (V)."""
        if self.config.design == "V":
            return None
        return self.tensors["text"][..., : self.config.text_blocks, :, :]

    def map(self, function: Callable[[Tensor], Tensor]) -> Prompts:
        """New prompts with `function` applied to every tensor."""
        return Prompts(self.config, {k: function(v) for k, v in self.tensors.items()})

    def batch(self, size: int) -> Prompts:
        """`size` independent copies, as a leading dimension."""
        return self.map(lambda t: t.expand(size, *t.shape).clone())


def init_prompts(backbone: Backbone, config: PromptConfig, *, seed: int = 0) -> Prompts:
    """Untrained prompts, which the published V and VLI code also resets to before every image:
    normal with std 0.02, projections as `torch.nn.Linear` makes them; the first text vectors are
    the embeddings of the first words of `config.context`, where those are no placeholders."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.shapes(backbone.architecture).items():
        if name.startswith("projection"):
            bound = backbone.text_width**-0.5
            values = (torch.rand(shape, generator=generator, device="cpu") * 2 - 1) * bound
        else:
            values = torch.randn(shape, generator=generator, device="cpu") * 0.02
        tensors[name] = values.to(backbone.device, backbone.dtype)
    if config.context is not None and not config.context.startswith("X"):
        tokens = backbone.tokenize([config.context])
        embedding = backbone.text.token_embedding(tokens)[0, 1 : 1 + config.tokens]
        tensors["text"][0] = embedding.detach().to(backbone.dtype)
    return Prompts(config, tensors)


@dataclass(frozen=True, eq=False)
class ClassTexts:
    """A class list, tokenised once for vanilla CLIP or for one prompt design.

    tokens: (C, L).
    fixed: text features where no prompt changes them (vanilla and V), (C, E), normalised.
    """

    tokens: Tensor
    fixed: Tensor | None

    def features(self, backbone: Backbone, prompts: Prompts | None = None) -> Tensor:
        """Normalised text features, (C, E), or (G, C, E) for a batch of prompts."""
        if self.fixed is not None:
            return self.fixed
        features = encode_text(backbone, self.tokens, None if prompts is None else prompts.text())
        return normalize(features, dim=-1)


def class_texts(
    backbone: Backbone,
    classes: Sequence[str],
    config: PromptConfig | None = None,
    *,
    template: str = DEFAULT_TEMPLATE,
    cut: bool = True,
) -> ClassTexts:
    """Tokenises `classes`; for vanilla CLIP (`config=None`, with `template`) and V also encodes
    them, once. Raises `InputError` for no classes, or a name that does not fit the context."""
    if not classes:
        raise InputError("Give at least one class name.")
    config = config or PromptConfig(design="V", template=template)
    tokens = backbone.tokenize(config.sentences(classes), cut=cut)
    if config.context is not None:
        return ClassTexts(tokens, None)
    with torch.no_grad():
        return ClassTexts(tokens, normalize(encode_text(backbone, tokens), dim=-1))


def logits(
    backbone: Backbone, images: Tensor, text_features: Tensor, prompts: Prompts | None = None
) -> Tensor:
    """Class logits (N, C) of images in [0, 1] for normalised text features, (C, E), or (G, C, E)
    where N is a multiple of G."""
    features, _ = encode_image(backbone, images, None if prompts is None else prompts.visual())
    return image_logits(backbone, features, text_features)


def image_logits(backbone: Backbone, features: Tensor, text_features: Tensor) -> Tensor:
    """Scaled cosine similarity of image features (N, E) and text features ([G,] C, E)."""
    features = normalize(features, dim=-1)
    if text_features.ndim == 3:
        groups = features.view(len(text_features), -1, features.shape[-1])
        return (backbone.logit_scale * groups @ text_features.mT).flatten(0, 1)
    return backbone.logit_scale * features @ text_features.T
