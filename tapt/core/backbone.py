"""A frozen CLIP: built from local files or from an architecture; preprocessing, tokenising."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, ToTensor

from tapt.core.errors import BackboneError, InputError
from tapt.core.images import to_uint8

Tokenizer = Callable[..., Tensor]
ARCHITECTURE: tuple[str, ...] = ("image_size", "image_tokens", "visual_width", "visual_blocks")
ARCHITECTURE += ("text_width", "text_blocks", "context_length")
_VALUES = (ArithmeticError, AssertionError, AttributeError, LookupError)
BAD_CONFIG: tuple[type[Exception], ...] = (*_VALUES, RuntimeError, TypeError, ValueError)
"""What open_clip may raise for values that it does not expect."""


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen CLIP in eval mode. It takes [0, 1] pixels; normalisation happens inside.

    name: what was asked for.
    model: the open_clip model, no parameter requires grad.
    tokenizer: sentences -> (N, context) token ids.
    source: where the weights come from (`hf-hub:owner/repo`, `tiny`, `random:ViT-B-16`, ...).
    revision: commit of that source, None when it has none.
    sha256: of the weight file, None for random weights.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    source: str
    revision: str | None = None
    sha256: str | None = None

    @property
    def visual(self) -> Any:
        """The image tower."""
        return self.model.visual

    @property
    def text(self) -> Any:
        """The module that holds the text tower (plain CLIP keeps it on the model itself)."""
        return getattr(self.model, "text", self.model)

    @property
    def image_size(self) -> int:
        size = self.visual.image_size
        return int(size[0] if isinstance(size, (tuple, list)) else size)

    @property
    def context_length(self) -> int:
        return int(self.text.context_length)

    @property
    def visual_width(self) -> int:
        return int(self.visual.transformer.width)

    @property
    def text_width(self) -> int:
        return int(self.text.transformer.width)

    @property
    def visual_blocks(self) -> int:
        return len(self.visual.transformer.resblocks)

    @property
    def text_blocks(self) -> int:
        return len(self.text.transformer.resblocks)

    @property
    def image_tokens(self) -> int:
        """Class token and patch tokens, without prompts."""
        return len(self.visual.positional_embedding)

    @property
    def architecture(self) -> dict[str, int]:
        """What prompts and statistics depend on; two backbones that differ here never share."""
        return {name: getattr(self, name) for name in ARCHITECTURE}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Mean, std, interpolation and resize mode, as open_clip keeps them."""
        return dict(self.visual.preprocess_cfg)

    @property
    def device(self) -> torch.device:
        return torch.device(self.visual.positional_embedding.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.visual.positional_embedding.dtype
        return dtype

    @property
    def logit_scale(self) -> Tensor:
        scale: Tensor = self.model.logit_scale.exp()
        return scale

    def in_bfloat16(self) -> Backbone:
        """A copy with bfloat16 weights, for passes without gradients."""
        model = deepcopy(self.model).to(torch.bfloat16)
        model.logit_scale = self.model.logit_scale  # rounded, it would shift every entropy
        return replace(self, model=model)

    @cached_property
    def _normalization(self) -> list[Tensor]:
        exact = torch.promote_types(self.dtype, torch.float32)  # bfloat16 would blur the pixels
        return [
            torch.tensor(self.preprocessing[key], device=self.device, dtype=exact)[:, None, None]
            for key in ("mean", "std")
        ]

    def normalize(self, images: Tensor) -> Tensor:
        """[0, 1] pixels -> what the first convolution expects, (N, 3, H, W)."""
        mean, std = self._normalization
        return ((images.to(mean.dtype) - mean) / std).to(self.dtype)

    @cached_property
    def _resize_and_crop(self) -> Compose:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        steps = image_transform_v2(PreprocessCfg(**self.preprocessing), is_train=False)
        return Compose([s for s in steps.transforms if not isinstance(s, (ToTensor, Normalize))])

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resizes and crops with PIL to the model's input: uint8, (3, S, S), so that L-inf can be
        checked in integers and a PNG keeps an attack."""
        image = image.convert("RGB")
        if self.preprocessing.get("resize_mode", "shortest") == "shortest":
            image = _limit_aspect(image)
        return to_uint8(self._resize_and_crop(image))

    def tokenize(self, sentences: Sequence[str], *, cut: bool = True) -> Tensor:
        """Token ids, (N, L); `InputError` for a sentence that does not fit the context.

        cut: end after the longest sentence instead of padding to the full context, which is
            exact where attention is causal and features come from the EOT position.
        """
        context = self.context_length
        with torch.device("cpu"):  # the tokenizer makes its ids on the default device
            tokens = self.tokenizer(list(sentences), context_length=4 * context)
            # counted to the last token that is not padding: id 0 is also a piece of "!%"
            ends = torch.arange(1, 4 * context + 1)
        lengths = (ends * (tokens != getattr(self.text, "pad_id", 0))).amax(1)
        length = int(lengths.max())
        if length > context:
            worst = sentences[int(lengths.argmax())]
            name = worst if len(worst) <= 80 else worst[:77] + "..."
            # the tokenizer stops at four contexts
            count = f"{'at least ' * (length == 4 * context)}{length - 2}"
            raise InputError(
                f'"{name}" has {count} tokens; this model reads at most {context - 2} per sentence.'
            )
        return tokens[:, : length if cut and self._may_cut else context].to(self.device)

    @property
    def _may_cut(self) -> bool:
        text = self.text
        pool = getattr(text, "pool_type", None) or getattr(self.model, "text_pool_type", "argmax")
        causal = text.attn_mask is not None
        return causal and getattr(text, "cls_emb", None) is None and pool in ("argmax", "eos")


def _limit_aspect(image: Image.Image, limit: int = 8) -> Image.Image:
    """Cuts the far ends off a very elongated image, so that resizing its short side cannot
    exhaust memory; the central crop that follows never sees those ends."""
    width, height = image.size
    short = min(width, height)
    if max(width, height) <= limit * short:
        return image
    w, h = min(width, limit * short), min(height, limit * short)
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))


def random_model(architecture: str) -> tuple[nn.Module, Tokenizer]:
    """An open_clip model with random weights, always the same ones; `BackboneError` where
    open_clip does not know the architecture."""
    import open_clip

    if architecture not in open_clip.list_models():
        raise BackboneError(
            f"open_clip has no architecture {architecture!r}; open_clip.list_models() names them."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.create_model(architecture), _tokenizer(architecture)


def pretrained_model(source: str, name: str, **options: Any) -> tuple[nn.Module, Tokenizer]:
    """An open_clip model with weights of this computer; `BackboneError` where they do not fit or
    are not finite, or there is no tokenizer.

    source: `local-dir:FOLDER`, or an architecture whose weights `options["pretrained"]` names.
    name: of the backbone in messages.
    """
    import open_clip

    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
        try:
            model, _ = open_clip.create_model_from_pretrained(source, **options)
        except BAD_CONFIG as error:
            message = f"The weights of {name!r} do not fit its architecture."
            raise BackboneError(message) from error
    if not all(torch.isfinite(weights).all() for weights in model.parameters()):
        raise BackboneError(f"The weights of {name!r} have values that are not finite.")
    return model, _tokenizer(source)


def freeze(
    model: nn.Module, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The model in eval mode, without gradients, on `usable_device`, by default in float32."""
    model.requires_grad_(False).eval()
    return model.to(device=usable_device(device), dtype=dtype or torch.float32)


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """The device that was asked for, else the first of `cuda`, `mps` and `cpu` that is there;
    `BackboneError` where it cannot hold and compute values."""
    if device is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else mps
    try:
        place = torch.zeros(1, device=device)
        place.item()  # the meta device has no values
        return place.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BackboneError(f"PyTorch has no device {str(device)!r} on this computer.") from error


def _tokenizer(name: str) -> Tokenizer:
    import open_clip

    try:
        tokenizer: Tokenizer = open_clip.get_tokenizer(name)
        return tokenizer
    except BAD_CONFIG as error:
        raise BackboneError(f"The tokenizer of {name!r} could not be loaded.") from error
