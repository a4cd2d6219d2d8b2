"""A frozen CLIP: its sizes, the normalisation of its images, the tokens of its sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from tapt.core.errors import InputError

Tokenizer = Callable[..., Tensor]
ARCHITECTURE: tuple[str, ...] = ("image_size", "image_tokens", "visual_width", "visual_blocks")
ARCHITECTURE += ("text_width", "text_blocks", "context_length")


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen CLIP in eval mode. It takes [0, 1] pixels; normalisation happens inside.

    name: what was asked for.
    model: the open_clip model, no parameter requires grad.
    tokenizer: sentences -> (N, context) token ids.
    preprocess: a picture of any size -> uint8, (3, S, S), so that L-inf can be checked in integers
        and a PNG keeps an attack.
    source: where the weights come from (`hf-hub:owner/repo`, `tiny`, `random:ViT-B-16`, ...).
    revision: commit of that source, None when it has none.
    sha256: of the weight file, None for random weights.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    preprocess: Callable[[Image], Tensor]
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
