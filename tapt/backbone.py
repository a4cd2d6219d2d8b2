"""Frozen CLIP models: loading, preprocessing and tokenising."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, ToTensor

from tapt.architecture import BAD_CONFIG, check_size, check_towers, read_config, stored_values
from tapt.errors import BackboneError, InputError
from tapt.files import file_sha256
from tapt.hub import Origin, Progress, Snapshot, Token, parse_id, snapshot
from tapt.images import to_uint8

EMBEDDED = Path(__file__).resolve().parents[1] / "prompts"
OPENAI_NAMES = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
ARCHITECTURE = (
    "image_size",
    "image_tokens",
    "visual_width",
    "visual_blocks",
    "text_width",
    "text_blocks",
    "context_length",
)
MAX_CONFIG_BYTES, MAX_BYTES = 1_000_000, 16_000_000_000  # of a backbone's files on the Hub


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen CLIP in eval mode. It takes [0, 1] pixels; normalisation happens inside.

    name: what `load_backbone` was asked for.
    model: the open_clip model, no parameter requires grad.
    tokenizer: sentences -> (N, context) token ids.
    source: where the weights come from (`hf-hub:owner/repo`, `tiny`, `random:ViT-B-16`, ...).
    revision: commit of that source, None when it has none.
    sha256: of the weight file, None for random weights.
    origin: what was fetched from the Hub, None for other sources.
    """

    name: str
    model: nn.Module
    tokenizer: Callable[..., Tensor]
    source: str
    revision: str | None
    sha256: str | None
    origin: Origin | None = None

    @property
    def visual(self) -> VisionTransformer:
        return self.model.visual

    @property
    def text(self) -> nn.Module:
        """The module that holds the text tower (plain CLIP keeps it on the model itself)."""
        return getattr(self.model, "text", self.model)

    @property
    def image_size(self) -> int:
        size = self.visual.image_size
        return size[0] if isinstance(size, (tuple, list)) else size

    @property
    def context_length(self) -> int:
        return self.text.context_length

    @property
    def visual_width(self) -> int:
        return self.visual.transformer.width

    @property
    def text_width(self) -> int:
        return self.text.transformer.width

    @property
    def visual_blocks(self) -> int:
        return len(self.visual.transformer.resblocks)

    @property
    def text_blocks(self) -> int:
        return len(self.text.transformer.resblocks)

    @property
    def image_tokens(self) -> int:
        """Class token and patch tokens, without prompts."""
        return self.visual.positional_embedding.shape[0]

    @property
    def architecture(self) -> dict[str, int]:
        """What prompts and statistics depend on; two backbones that differ here never share."""
        return {name: getattr(self, name) for name in ARCHITECTURE}

    @property
    def device(self) -> torch.device:
        return self.visual.positional_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.positional_embedding.dtype

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale.exp()

    @cached_property
    def _normalization(self) -> tuple[Tensor, Tensor]:
        cfg = self.visual.preprocess_cfg
        exact = torch.promote_types(self.dtype, torch.float32)  # bfloat16 would blur the pixels
        return tuple(
            torch.tensor(cfg[key], device=self.device, dtype=exact)[:, None, None]
            for key in ("mean", "std")
        )

    def in_bfloat16(self) -> Backbone:
        """A copy with bfloat16 weights, for passes without gradients."""
        return replace(self, model=deepcopy(self.model).to(torch.bfloat16))

    def normalize(self, images: Tensor) -> Tensor:
        """[0, 1] pixels -> what the first convolution expects, (N, 3, H, W)."""
        mean, std = self._normalization
        return ((images.to(mean.dtype) - mean) / std).to(self.dtype)

    @cached_property
    def _resize_and_crop(self) -> Compose:
        steps = image_transform_v2(PreprocessCfg(**self.visual.preprocess_cfg), is_train=False)
        return Compose([s for s in steps.transforms if not isinstance(s, (ToTensor, Normalize))])

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resizes and crops with PIL to the model's input: uint8, (3, S, S).

        It stays 8-bit so that L-inf can be checked in integers and a PNG keeps an attack.
        """
        image = image.convert("RGB")
        if self.visual.preprocess_cfg.get("resize_mode", "shortest") == "shortest":
            image = _limit_aspect(image)
        return to_uint8(self._resize_and_crop(image))

    def tokenize(self, sentences: Sequence[str], *, cut: bool = True) -> Tensor:
        """Token ids, (N, L).

        cut: end after the longest sentence instead of padding to the full context, which is
            exact where attention is causal and features come from the EOT position.

        Raises:
            InputError: a sentence does not fit the context; nothing is ever truncated.
        """
        context = self.context_length
        with torch.device("cpu"):  # the tokenizer makes its ids on the default device
            tokens = self.tokenizer(list(sentences), context_length=4 * context)
            # counted to the last token that is not padding: id 0 is also a piece of "!%"
            ends = torch.arange(1, 4 * context + 1)
        lengths = (ends * (tokens != getattr(self.text, "pad_id", 0))).amax(1)
        if int(lengths.max()) > context:
            worst = sentences[int(lengths.argmax())]
            shown = worst if len(worst) <= 80 else worst[:77] + "..."
            raise InputError(
                f'"{shown}" has {_tokens(int(lengths.max()), 4 * context)} tokens; '
                f"this model reads at most {context - 2} per sentence."
            )
        length = int(lengths.max()) if cut and self._may_cut else context
        return tokens[:, :length].to(self.device)

    @property
    def _may_cut(self) -> bool:
        text = self.text
        pool = getattr(text, "pool_type", None) or getattr(self.model, "text_pool_type", "argmax")
        causal = text.attn_mask is not None
        return causal and getattr(text, "cls_emb", None) is None and pool in ("argmax", "eos")


def _tokens(length: int, longest: int) -> str:
    # the tokenizer stops at `longest`
    return f"at least {length - 2}" if length == longest else str(length - 2)


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


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    token: Token = False,
    progress: Progress | None = None,
    fault: str | None = None,
) -> Backbone:
    """Loads a CLIP, frozen and in eval mode.

    name: `tiny` (embedded); `ViT-B-32`, `ViT-B-16` or `ViT-L-14` with OpenAI's weights; any
        `architecture:tag` of open_clip; `hf-hub:owner/repo[@revision]`; `local-dir:path`;
        `random:architecture` for untrained weights, on purpose.
    revision: branch, tag or commit of a Hub repo.
    device: default CUDA, then MPS, then CPU, whichever is there.
    dtype: default float32.
    token, progress, fault: for the Hub, see `tapt.hub`.

    Raises:
        BackboneError: unknown name or device, missing weights, or a tower that cannot take
            prompts.
        HubError: the weights cannot be fetched, and are not in the local cache.
    """
    place = _usable_device(device or default_device())
    kind, _, rest = name.partition(":")
    fetch = partial(_fetch, revision=revision, token=token, progress=progress, fault=fault)
    source, sha256, origin = name, None, None
    if kind == "random":
        model, tokenizer = _build_random(rest, name), _tokenizer(rest)
    elif kind in ("tiny", "local-dir"):
        folder = EMBEDDED / "tiny" / "backbone" if kind == "tiny" else Path(rest).expanduser()
        model, tokenizer = _load_folder(folder, name)
        sha256 = file_sha256(folder / WEIGHTS_FILE)
    elif kind == "hf-hub":
        found = fetch(rest, (CONFIG_FILE, WEIGHTS_FILE))
        model, tokenizer = _load_folder(found.folder, name)
        source, sha256, origin = name.partition("@")[0], found.sha256(WEIGHTS_FILE), found.origin
    else:
        model, tokenizer, sha256, origin = _load_tag(kind, rest or "openai", fetch)
    model.requires_grad_(False).eval()
    model.to(device=place, dtype=dtype or torch.float32)
    commit = origin.commit if origin else None
    return Backbone(name, model, tokenizer, source, commit, sha256, origin)


def is_public(name: str) -> bool:
    """Whether a backbone comes from the Hub, with open_clip or with the project; not a folder."""
    kind, _, rest = name.partition(":")
    if kind == "hf-hub":
        where = parse_id(rest)
        return where is not None and not where.subfolder
    return name == "tiny" or kind in open_clip.list_models()


def hub_repo(name: str) -> str | None:
    """The Hub's repo of a backbone, None for one that is not there."""
    kind, _, rest = name.partition(":")
    if kind == "hf-hub":
        return rest.partition("@")[0]
    tag = open_clip.get_pretrained_cfg(kind, rest or "openai") or {}
    return tag.get("hf_hub", "").rpartition("/")[0] or None


def _fetch(
    name: str,
    files: Sequence[str],
    *,
    revision: str | None,
    **options: Any,
) -> Snapshot:
    where = parse_id(f"{name}@{revision}" if revision else name)
    if where is None or where.subfolder:
        raise BackboneError(f"{name!r} is not a Hub id; write owner/name or owner/name@revision.")
    sizes = {file: MAX_CONFIG_BYTES if file == CONFIG_FILE else MAX_BYTES for file in files}
    return snapshot(where, sizes, **options)


def default_device() -> str:
    """`cuda`, `mps` or `cpu`, the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"PyTorch has no device {str(device)!r} on this computer.") from error


def _build_random(architecture: str, name: str) -> nn.Module:
    if architecture not in open_clip.list_models():
        raise BackboneError(
            f"open_clip has no architecture {architecture!r}; open_clip.list_models() names them."
        )
    check_towers(open_clip.get_model_config(architecture), name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.create_model(architecture)


def _tokenizer(name: str) -> Callable[..., Tensor]:
    try:
        return open_clip.get_tokenizer(name)
    except (ImportError, OSError, *BAD_CONFIG) as error:
        raise BackboneError(f"The tokenizer of {name!r} could not be loaded.") from error


def _load_folder(folder: Path, name: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise BackboneError(f"Backbone {name!r} has no {file}.")
    config = read_config(folder / CONFIG_FILE, name)
    check_size(config, stored_values(folder / WEIGHTS_FILE, name), name)
    return _build(f"local-dir:{folder}", name), _tokenizer(f"local-dir:{folder}")


def _build(model_name: str, name: str, **options: object) -> nn.Module:
    try:
        model, _ = open_clip.create_model_from_pretrained(model_name, **options)
    except BAD_CONFIG as error:
        raise BackboneError(f"The weights of {name!r} do not fit its architecture.") from error
    if not all(torch.isfinite(weights).all() for weights in model.parameters()):
        raise BackboneError(f"The weights of {name!r} have values that are not finite.")
    return model


def _load_tag(
    architecture: str, tag: str, fetch: Callable[..., Snapshot]
) -> tuple[nn.Module, Callable[..., Tensor], str, Origin]:
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        known = ", ".join(tags) or "none; see open_clip.list_pretrained()"
        raise BackboneError(
            f"Backbone '{architecture}:{tag}' is unknown. Use tiny, {', '.join(OPENAI_NAMES)}, "
            f"architecture:tag, hf-hub:owner/repo, local-dir:path or random:architecture. "
            f"Tags of {architecture!r}: {known}."
        )
    check_towers(open_clip.get_model_config(architecture), f"{architecture}:{tag}")
    cfg = open_clip.get_pretrained_cfg(architecture, tag)
    repo, _, file = cfg.get("hf_hub", "").rpartition("/")
    file = file if file.endswith(".safetensors") else WEIGHTS_FILE
    name = f"{architecture}:{tag}"
    found = fetch(repo, (file,))
    stored_values(found.folder / file, name)
    # OpenAI's weights were trained with QuickGELU; the plain architecture would only warn
    model = _build(
        architecture,
        name,
        pretrained=str(found.folder / file),
        force_quick_gelu=bool(cfg.get("quick_gelu")),
        image_mean=cfg.get("mean"),
        image_std=cfg.get("std"),
        image_interpolation=cfg.get("interpolation"),
        image_resize_mode=cfg.get("resize_mode"),
    )
    return model, _tokenizer(architecture), found.sha256(file), found.origin
