"""The learnable vectors of the three prompt designs, as plain values.

V tunes visual prompts only; VLI tunes visual and text prompts independently; VLJ tunes text
prompts and the linear maps that turn them into visual prompts (MaPLe).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tapt.backbone import Backbone
from tapt.errors import InputError
from tapt.towers import encode_image, encode_text

DESIGNS = ("V", "VLI", "VLJ")
WORDS = "a photo of a"
DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class PromptConfig:
    """Which prompts there are.

    design: `V`, `VLI` or `VLJ`.
    tokens: prompt tokens per block, n.
    visual_depth: image blocks with prompts of their own, D.
    text_depth: the same for the text tower; 0 for V.
    template: class sentence of V, with one `{}`.
    context: words before the class name of VLI and VLJ; the first n of them become vectors.
        Default "a photo of a" for n <= 4, otherwise n placeholders "X".
    """

    design: str = "VLI"
    tokens: int = 2
    visual_depth: int = 9
    text_depth: int | None = None
    template: str = DEFAULT_TEMPLATE
    context: str | None = None

    def __post_init__(self) -> None:
        if self.design not in DESIGNS:
            raise InputError(f"design must be one of {', '.join(DESIGNS)}, got {self.design!r}.")
        text = self.design != "V"
        if not text:
            object.__setattr__(self, "text_depth", 0)
            object.__setattr__(self, "context", None)
        elif self.text_depth is None:
            object.__setattr__(self, "text_depth", self.visual_depth)
        for name in ("tokens", "visual_depth") + (("text_depth",) if text else ()):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
                raise InputError(f"{name} must be a whole number from 1 to 1000, got {value!r}.")
        if not isinstance(self.template, str) or self.template.count("{}") != 1:
            raise InputError(f"template must contain one {{}}, got {self.template!r}.")
        if text and self.context is None:
            words = WORDS if self.tokens <= 4 else " ".join(["X"] * self.tokens)
            object.__setattr__(self, "context", words)
        if text and not isinstance(self.context, str):
            raise InputError(f"context must be text, got {self.context!r}.")
        if text and len(self.context.split()) < self.tokens:
            raise InputError(
                f"context {self.context!r} has fewer words than the {self.tokens} prompt tokens."
            )

    def sentences(self, classes: list[str]) -> list[str]:
        """One sentence per class; underscores become spaces."""
        names = [name.replace("_", " ") for name in classes]
        if self.context is None:
            return [self.template.replace("{}", name) for name in names]
        return [f"{self.context} {name}." for name in names]

    def shapes(self, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter on this backbone.

        Raises:
            InputError: the backbone has fewer blocks than the depth.
        """
        for tower, depth, blocks in (
            ("visual_depth", self.visual_depth, backbone.visual_blocks),
            ("text_depth", self.text_depth, backbone.text_blocks),
        ):
            if depth > blocks:
                raise InputError(f"{tower} must be at most {blocks} on this backbone, got {depth}.")
        n, image, text = self.tokens, backbone.visual_width, backbone.text_width
        if self.design == "V":
            return {"visual": (self.visual_depth, n, image)}
        if self.design == "VLI":
            return {
                "visual": (self.visual_depth, n, image),
                "text": (self.text_depth, n, text),
            }
        return {
            "text": (max(self.text_depth, self.visual_depth), n, text),
            "projection.weight": (self.visual_depth, image, text),
            "projection.bias": (self.visual_depth, image),
        }

    def to_dict(self) -> dict:
        return asdict(self)


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
        return self.tensors["text"][..., : self.config.text_depth, :, :]

    def map(self, function: Callable[[Tensor], Tensor]) -> Prompts:
        """New prompts with `function` applied to every tensor."""
        return Prompts(self.config, {k: function(v) for k, v in self.tensors.items()})

    def batch(self, size: int) -> Prompts:
        """`size` independent copies, as a leading dimension."""
        return self.map(lambda t: t.expand(size, *t.shape).clone())

    def __getitem__(self, index: int) -> Prompts:
        """The prompts of one image of a batch."""
        return self.map(lambda t: t[index])


def init_prompts(
    backbone: Backbone, config: PromptConfig, *, words: bool = True, seed: int = 0
) -> Prompts:
    """Untrained prompts: normal with std 0.02, projections as `torch.nn.Linear` makes them.

    words: the first text vectors are the embeddings of the first words of `config.context`
        where that is real words ("a photo of a"); placeholders stay random.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.shapes(backbone).items():
        if name.startswith("projection"):
            bound = backbone.text_width**-0.5
            values = (torch.rand(shape, generator=generator, device="cpu") * 2 - 1) * bound
        else:
            values = torch.randn(shape, generator=generator, device="cpu") * 0.02
        tensors[name] = values.to(backbone.device, backbone.dtype)
    if words and config.context is not None and not config.context.startswith("X"):
        tokens = backbone.tokenize([config.context])
        embedding = backbone.text.token_embedding(tokens)[0, 1 : 1 + config.tokens]
        tensors["text"][0] = embedding.detach().to(backbone.dtype)
    return Prompts(config, tensors)


def random_prompts(backbone: Backbone, config: PromptConfig, *, seed: int = 0) -> Prompts:
    """The start that the published V and VLI code resets to before every image: word vectors in
    the first text set, random values everywhere else."""
    return init_prompts(backbone, config, words=True, seed=seed)


@dataclass(frozen=True, eq=False)
class ClassTexts:
    """A class list, tokenised once for vanilla CLIP or for one prompt design.

    tokens: (C, L).
    fixed: text features where no prompt changes them (vanilla and V), (C, E), normalised.
    """

    classes: tuple[str, ...]
    tokens: Tensor
    fixed: Tensor | None

    def features(self, backbone: Backbone, prompts: Prompts | None = None) -> Tensor:
        """Normalised text features, (C, E), or (G, C, E) for a batch of prompts."""
        if self.fixed is not None:
            return self.fixed
        features = encode_text(backbone, self.tokens, prompts.text())
        return torch.nn.functional.normalize(features, dim=-1)


def class_texts(
    backbone: Backbone,
    classes: list[str],
    config: PromptConfig | None = None,
    *,
    template: str = DEFAULT_TEMPLATE,
    cut: bool = True,
) -> ClassTexts:
    """Tokenises `classes`; for vanilla CLIP (`config=None`) and V also encodes them, once.

    Raises:
        InputError: no classes, or a class name that does not fit the text context.
    """
    if not classes:
        raise InputError("Give at least one class name.")
    if config is None:
        config = PromptConfig("V", template=template)
    tokens = backbone.tokenize(config.sentences(classes), cut=cut)
    fixed = None
    if config.context is None:
        with torch.no_grad():
            fixed = torch.nn.functional.normalize(encode_text(backbone, tokens), dim=-1)
    return ClassTexts(tuple(classes), tokens, fixed)


def logits(
    backbone: Backbone, images: Tensor, text_features: Tensor, prompts: Prompts | None = None
) -> Tensor:
    """Class logits of images in [0, 1], (N, C).

    text_features: normalised, (C, E), or (G, C, E) where N is a multiple of G.
    """
    features, _ = encode_image(backbone, images, None if prompts is None else prompts.visual())
    return image_logits(backbone, features, text_features)


def image_logits(backbone: Backbone, features: Tensor, text_features: Tensor) -> Tensor:
    """Scaled cosine similarity of image features (N, E) and text features ([G,] C, E)."""
    features = torch.nn.functional.normalize(features, dim=-1)
    if text_features.ndim == 3:
        groups = features.view(len(text_features), -1, features.shape[-1])
        return (backbone.logit_scale * groups @ text_features.mT).flatten(0, 1)
    return backbone.logit_scale * features @ text_features.T
