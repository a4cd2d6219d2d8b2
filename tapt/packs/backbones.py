"""Backbones by name: from the embedded folders, the Hub, a folder, or untrained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from tapt.core.backbone import Backbone, Tokenizer
from tapt.core.errors import BackboneError
from tapt.files import file_sha256
from tapt.packs.architecture import (
    BAD_CONFIG,
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_folder,
    check_towers,
    preprocessor,
    stored_values,
)
from tapt.packs.hub import Origin, Snapshot, Token, parse_id, snapshot
from tapt.progress import Progress

_INSTALLED = Path(__file__).resolve().parents[1] / "_prompts"
EMBEDDED = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[2] / "prompts"
OPENAI_NAMES = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
NAMES_FILE = "names.json"
MAX_CONFIG_BYTES, MAX_BYTES = 1_000_000, 16_000_000_000  # of a backbone's files on the Hub

Loaded = tuple[nn.Module, Tokenizer]


def embedded_backbones() -> list[str]:
    """Names of the backbones that come with the project."""
    return sorted(path.parents[1].name for path in EMBEDDED.glob(f"*/backbone/{CONFIG_FILE}"))


def known_names(backbone: str) -> dict[str, list[str]]:
    """What an embedded backbone has seen: names with their synonyms and everyday words; empty for
    every other one, which may know anything."""
    path = EMBEDDED / backbone / "backbone" / NAMES_FILE
    if backbone not in embedded_backbones() or not path.is_file():
        return {}
    names: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return names


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    token: Token = False,
    progress: Progress | None = None,
    unreachable: str | None = None,
) -> tuple[Backbone, Origin | None]:
    """Loads a CLIP, frozen and in eval mode; with it what was fetched, None without the Hub.

    name: an embedded one such as `tiny`; `ViT-B-32`, `ViT-B-16` or `ViT-L-14` with OpenAI's
        weights; any `architecture:tag` of open_clip; `hf-hub:owner/repo[@revision]`;
        `local-dir:path`; `random:architecture` for untrained weights, on purpose.
    revision: branch, tag or commit of a Hub repo.
    device: default CUDA, then MPS, then CPU, whichever is there.
    dtype: default float32.
    token, progress, unreachable: for the Hub, see `snapshot`.

    Raises `BackboneError` for an unknown name or device, missing weights, a revision of what has
    none and a tower that cannot take prompts; `HubError` where the weights can neither be fetched
    nor are in the local cache.
    """
    place = usable_device(device)
    kind, _, rest = name.partition(":")
    embedded = name in embedded_backbones()
    if revision and (embedded or kind in ("random", "local-dir")):
        raise BackboneError(
            f"Backbone {name!r} does not come from the Hub and has no revision {revision!r}."
        )
    fetch = partial(
        _fetch, revision=revision, token=token, progress=progress, unreachable=unreachable
    )
    source, sha256, origin = name, None, None
    if kind == "random":
        model, tokenizer = random_model(rest)
    elif embedded or kind == "local-dir":
        folder = EMBEDDED / name / "backbone" if embedded else Path(rest).expanduser()
        model, tokenizer = _load_folder(folder, name)
        sha256 = file_sha256(folder / WEIGHTS_FILE)
    elif kind == "hf-hub":
        fetched = fetch(rest, (CONFIG_FILE, WEIGHTS_FILE))
        model, tokenizer = _load_folder(fetched.folder, name)
        source, origin = name.partition("@")[0], fetched.origin
        sha256 = fetched.sha256(WEIGHTS_FILE)
    else:
        (model, tokenizer), sha256, origin = _load_tag(name, fetch)
    model = model.requires_grad_(False).eval().to(place, dtype or torch.float32)
    commit = origin.commit if origin else None
    visual: Any = model.visual
    preprocess = preprocessor(visual.preprocess_cfg)
    return Backbone(name, model, tokenizer, preprocess, source, commit, sha256), origin


def is_public(name: str) -> bool:
    """Whether a backbone comes from the Hub, with open_clip or with the project; not a folder."""
    kind, _, rest = name.partition(":")
    if kind == "hf-hub":
        where = parse_id(rest)
        return where is not None and not where.subfolder
    return name in embedded_backbones() or kind in open_clip.list_models()


def hub_repo(name: str) -> str | None:
    """The Hub's repo of a backbone, None for one that is not there."""
    kind, _, rest = name.partition(":")
    if kind == "hf-hub":
        return rest.partition("@")[0]
    tag = open_clip.get_pretrained_cfg(kind, rest or "openai") or {}
    return tag.get("hf_hub", "").rpartition("/")[0] or None


def _fetch(name: str, files: Sequence[str], *, revision: str | None, **options: Any) -> Snapshot:
    where = parse_id(f"{name}@{revision}" if revision else name)
    if where is None or where.subfolder:
        raise BackboneError(f"{name!r} is not a Hub id; write owner/name or owner/name@revision.")
    sizes = {file: MAX_CONFIG_BYTES if file == CONFIG_FILE else MAX_BYTES for file in files}
    return snapshot(where, sizes, **options)


def _load_folder(folder: Path, name: str) -> Loaded:
    check_folder(folder, name)
    return _pretrained(f"local-dir:{folder}", name)


def _load_tag(name: str, fetch: Callable[..., Snapshot]) -> tuple[Loaded, str, Origin]:
    architecture, _, tag = name.partition(":")
    tag = tag or "openai"
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        known = ", ".join(tags) or "none; see open_clip.list_pretrained()"
        names = ", ".join((*embedded_backbones(), *OPENAI_NAMES))
        raise BackboneError(
            f"Backbone {name!r} is unknown. Use {names}, architecture:tag, hf-hub:owner/repo, "
            f"local-dir:path or random:architecture. Tags of {architecture!r}: {known}."
        )
    full = f"{architecture}:{tag}"
    check_towers(open_clip.get_model_config(architecture) or {}, full)
    cfg = open_clip.get_pretrained_cfg(architecture, tag)
    repo, _, file = cfg.get("hf_hub", "").rpartition("/")
    file = file if file.endswith(".safetensors") else WEIGHTS_FILE
    fetched = fetch(repo, (file,))
    weights = fetched.folder / file
    stored_values(weights, full)
    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocessing: dict[str, Any] = {f"image_{key}": cfg.get(key) for key in keys}
    # OpenAI's weights were trained with QuickGELU; the plain architecture would only warn
    quick = bool(cfg.get("quick_gelu"))
    loaded = _pretrained(
        architecture, full, pretrained=str(weights), force_quick_gelu=quick, **preprocessing
    )
    return loaded, fetched.sha256(file), fetched.origin


def random_model(architecture: str) -> Loaded:
    """An open_clip model with random weights, always the same ones; `BackboneError` where
    open_clip does not know the architecture, or prompts cannot enter it."""
    if architecture not in open_clip.list_models():
        raise BackboneError(
            f"open_clip has no architecture {architecture!r}; open_clip.list_models() names them."
        )
    check_towers(open_clip.get_model_config(architecture) or {}, f"random:{architecture}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.create_model(architecture), open_clip.get_tokenizer(architecture)


def _pretrained(source: str, name: str, **options: Any) -> Loaded:
    """An open_clip model with weights of this computer, by `local-dir:FOLDER` or an architecture
    whose weights `options["pretrained"]` names."""
    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
            model, _ = open_clip.create_model_from_pretrained(source, **options)
        tokenizer: Tokenizer = open_clip.get_tokenizer(source)
    except BAD_CONFIG as error:
        raise BackboneError(f"The weights of {name!r} do not fit its architecture.") from error
    if not all(torch.isfinite(weights).all() for weights in model.parameters()):
        raise BackboneError(f"The weights of {name!r} have values that are not finite.")
    return model, tokenizer


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
