"""Packs: trained prompts with their statistics and settings, as JSON and safetensors.

config.json             what the prompts are, for which backbone, how they were made
prompts.safetensors     the prompt parameters
statistics.safetensors  token statistics under adversarially and clean-tuned prompts
README.md               the model card
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tapt.backbone import ARCHITECTURE, EMBEDDED, Backbone, hub_repo, is_public, load_backbone
from tapt.card import TAG, model_card, notes_of, weights_tag
from tapt.errors import InputError, PackError
from tapt.files import write_file
from tapt.hub import Origin, Progress, Token, list_models, parse_id, snapshot
from tapt.losses import Statistics, TokenStatistics
from tapt.prompts import PromptConfig, Prompts, init_prompts
from tapt.tuning import TuneConfig

FORMAT, VERSION = "tapt-pack", 1
CONFIG, PROMPTS, STATISTICS, CARD = (
    "config.json",
    "prompts.safetensors",
    "statistics.safetensors",
    "README.md",
)
MAX_CONFIG_BYTES = 1_000_000
MAX_HUB_BYTES = {CONFIG: MAX_CONFIG_BYTES, PROMPTS: 1_000_000_000, STATISTICS: 1_000_000_000}


@dataclass(frozen=True, eq=False)
class Pack:
    """prompts: the static prompts that every image starts from.
    statistics: None for untrained prompts, and before `python -m tapt statistics`; the alignment
        term is then left out.
    test_time: settings that were chosen for these prompts.
    name: as asked for, `tiny/vli`, a folder or a Hub id.
    base_model: source, revision, sha256, architecture, mean and std of the backbone.
    training, evaluation: how the prompts were made, and their measured accuracy.
    origin: what was fetched from the Hub, None for other packs.
    """

    prompts: Prompts
    statistics: Statistics | None
    test_time: TuneConfig
    name: str
    base_model: dict
    training: dict = field(default_factory=dict)
    evaluation: list = field(default_factory=list)
    trained: bool = True
    origin: Origin | None = None


def base_model(backbone: Backbone) -> dict:
    """The backbone as a pack's config names it."""
    cfg = backbone.visual.preprocess_cfg
    return {
        "source": backbone.source,
        "revision": backbone.revision,
        "sha256": backbone.sha256,
        "architecture": backbone.architecture,
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
    }


def untrained_pack(backbone: Backbone, design: str = "VLI") -> Pack:
    """Untrained prompts with the published layout, as far as the backbone has blocks, and the
    entropy term alone: what there is to show before somebody trained prompts."""
    depth = min(9, backbone.visual_blocks, backbone.text_blocks)
    prompts = init_prompts(backbone, PromptConfig(design, 2, depth))
    return Pack(
        prompts, None, TuneConfig(), "untrained prompts", base_model(backbone), trained=False
    )


def embedded_packs(backbone_name: str) -> list[str]:
    """Names of the packs that come with the project for a backbone."""
    # a name such as local-dir:/path has nothing to do with the embedded folders
    return _embedded_names(backbone_name) if (EMBEDDED / backbone_name).is_dir() else []


def default_pack(backbone: Backbone) -> Pack:
    """The embedded VLI pack of a backbone, else its first one, else untrained prompts."""
    names = embedded_packs(backbone.name)
    if not names:
        return untrained_pack(backbone)
    preferred = f"{backbone.name}/vli"
    return load_pack(preferred if preferred in names else names[0], backbone)


def _embedded_names(backbone: str = "*") -> list[str]:
    folders = sorted(path.parent for path in EMBEDDED.glob(f"{backbone}/*/{CONFIG}"))
    return [folder.relative_to(EMBEDDED).as_posix() for folder in folders]


def pack_folder(name: str) -> Path:
    """The folder of an embedded name (`tiny/vli`), otherwise the name as a path."""
    return EMBEDDED / name if name in _embedded_names() else Path(name).expanduser()


def pack_name(folder: str | os.PathLike) -> str:
    """What a pack in this folder is called: `tiny/vli` where it is embedded."""
    folder = Path(folder).resolve()
    if folder.is_relative_to(EMBEDDED):
        return folder.relative_to(EMBEDDED).as_posix()
    return folder.name


def load_pack(
    source: str | os.PathLike,
    backbone: Backbone,
    *,
    statistics: bool = True,
    token: Token = False,
    progress: Progress | None = None,
) -> Pack:
    """Loads and checks a pack.

    source: an embedded name (`tiny/vli`), a folder, or a Hub id
        `owner/repo[/subfolder][@revision]`; tried in this order.
    statistics: False reads the prompts alone, as `python -m tapt train` leaves them.
    token, progress: for the Hub, see `tapt.hub`.

    Raises:
        PackError: missing, malformed, or made for another backbone; the message says which.
        HubError: cannot be fetched, and is not in the local cache.
    """
    return _fit(_find(source, statistics, token, progress), backbone, statistics)


def load_model(
    backbone: str | None = None,
    pack: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    device: str | None = None,
    token: Token = False,
    progress: Progress | None = None,
) -> tuple[Backbone, Pack]:
    """A backbone with its pack.

    backbone: default the one that the pack names, at the commit that it names.
    pack: default the backbone's embedded one, see `default_pack`.

    Raises:
        BackboneError, PackError, HubError: unknown, malformed, or not made for each other.
    """
    options = {"device": device, "token": token, "progress": progress}
    if pack is None:
        loaded = load_backbone(backbone or "tiny", revision=revision, **options)
        return loaded, default_pack(loaded)
    found = _find(pack, True, token, progress)
    if backbone is None:
        made = found.config["base_model"]
        backbone, revision = made["source"], revision or made["revision"]
    fault = found.origin and found.origin.fault
    loaded = load_backbone(backbone, revision=revision, fault=fault, **options)
    return loaded, _fit(found, loaded, True)


def check_pack(folder: str | os.PathLike) -> Pack:
    """Reads a finished pack against the architecture that it names, without that backbone.

    Raises:
        PackError: missing or malformed.
    """
    if not pack_folder(str(folder)).is_dir():
        raise PackError(f"There is no folder {str(folder)!r} with a pack.")
    found = _find(folder, True, False, None)
    wanted = found.config["base_model"]["architecture"]
    return _read(found, SimpleNamespace(**wanted), True)


def hub_packs(backbone: Backbone) -> list[str]:
    """Ids of the Hub's public packs for these weights, the most downloaded first.

    Raises:
        HubError: the Hub cannot be asked.
    """
    repo = hub_repo(backbone.source)
    fits = {weights_tag(backbone.sha256)} | ({f"base_model:{repo}"} if repo else set())
    return [model["id"] for model in list_models(TAG) if fits & set(model["tags"])]


@dataclass(frozen=True)
class _Found:
    """A pack's folder with its config, before its tensors are read."""

    name: str
    folder: Path
    config: dict
    origin: Origin | None


def _find(
    source: str | os.PathLike, statistics: bool, token: Token, progress: Progress | None
) -> _Found:
    name, origin = str(source), None
    folder = pack_folder(name)
    if not folder.is_dir():
        where = parse_id(name)
        # a mistyped tiny/vli must not fetch a stranger's repo
        if where is None or (EMBEDDED / name.partition("/")[0]).is_dir():
            known = ", ".join([*_embedded_names(), "a folder"])
            raise PackError(
                f"There is no pack {name!r}: use {known}, or a Hub id such as owner/repo."
            )
        files = {k: v for k, v in MAX_HUB_BYTES.items() if statistics or k != STATISTICS}
        fetched = snapshot(where, files, token=token, progress=progress)
        folder, origin = fetched.folder, fetched.origin
    config = _read_config(folder, name)
    if origin and not is_public(config["base_model"]["source"]):
        raise PackError(
            f"Pack {name!r} names a backbone that is not on the Hub; a pack from the Hub may only "
            "name hf-hub:owner/repo or a built-in backbone."
        )
    return _Found(name, folder, config, origin)


def _fit(found: _Found, backbone: Backbone, statistics: bool) -> Pack:
    _check_backbone(found.config["base_model"], backbone, found.name)
    pack = _read(found, backbone, statistics)
    return replace(pack, prompts=pack.prompts.map(lambda t: t.to(backbone.device, backbone.dtype)))


def _read(found: _Found, backbone: Backbone | SimpleNamespace, statistics: bool) -> Pack:
    config, name = found.config, found.name
    try:
        prompt_config = PromptConfig(**config["prompts"])
        test_time = TuneConfig(**config["test_time"])
        shapes = prompt_config.shapes(backbone)
    except (TypeError, InputError) as error:
        raise PackError(f"{CONFIG} of pack {name!r}: {error}") from error
    prompts = Prompts(prompt_config, _read_tensors(found.folder / PROMPTS, shapes, name))
    targets = _read_statistics(found, backbone, prompt_config) if statistics else None
    made = config["base_model"], config["training"], config["evaluation"]
    return Pack(prompts, targets, test_time, name, *made, origin=found.origin)


def _read_statistics(
    found: _Found, backbone: Backbone | SimpleNamespace, config: PromptConfig
) -> Statistics:
    shapes = statistics_shapes(backbone, config)
    values = _read_tensors(found.folder / STATISTICS, shapes, found.name)
    return Statistics(
        TokenStatistics(values["adversarial.mean"], values["adversarial.var"]),
        TokenStatistics(values["clean.mean"], values["clean.var"]),
    )


def save_pack(pack: Pack, folder: str | os.PathLike) -> None:
    """Writes a pack; each file is written aside, then renamed, config.json last. Of an older
    card in this folder, the section `## Notes` is kept.

    Without statistics, those of an older pack in this folder and its card are removed: they do
    not belong to these prompts.
    """
    config = {
        "format": FORMAT,
        "version": VERSION,
        "base_model": pack.base_model,
        "prompts": pack.prompts.config.to_dict(),
        "test_time": pack.test_time.to_dict(),
        "training": pack.training,
        "evaluation": pack.evaluation,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if pack.statistics is None:
        for stale in (STATISTICS, CARD):
            (folder / stale).unlink(missing_ok=True)
    write_file(folder / PROMPTS, save(_storable(dict(pack.prompts.tensors))))
    if pack.statistics is not None:
        statistics = {
            f"{part}.{key}": getattr(getattr(pack.statistics, part), key)
            for part in ("adversarial", "clean")
            for key in ("mean", "var")
        }
        write_file(folder / STATISTICS, save(_storable(statistics)))
        card = model_card(pack, pack_name(folder), notes=read_notes(folder))
        write_file(folder / CARD, card.encode())
    write_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def read_notes(folder: Path) -> str:
    """The section `## Notes` of the card in a folder, if there is one."""
    card = folder / CARD
    return notes_of(card.read_text(encoding="utf-8")) if card.exists() else ""


def statistics_shapes(backbone: Backbone, config: PromptConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the four statistics tensors."""
    tokens = backbone.image_tokens + config.tokens
    shape = (backbone.visual_blocks, tokens, backbone.visual_width)
    return {f"{part}.{key}": shape for part in ("adversarial", "clean") for key in ("mean", "var")}


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in tensors.items()}


def _read_config(folder: Path, name: str) -> dict:
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise PackError(f"{CONFIG} of pack {name!r} is larger than 1 MB.")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PackError(f"Pack {name!r} has no {CONFIG}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PackError(f"{CONFIG} of pack {name!r} is not valid JSON.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise PackError(f'{CONFIG} of pack {name!r} does not say "format": "{FORMAT}".')
    if config.get("version") != VERSION:
        raise PackError(
            f"Pack {name!r} has format version {config.get('version')!r}; "
            f"this program reads version {VERSION}."
        )
    for key, kind in (
        ("base_model", dict),
        ("prompts", dict),
        ("test_time", dict),
        ("training", dict),
        ("evaluation", list),
    ):
        if not isinstance(config.get(key), kind):
            raise PackError(f"{CONFIG} of pack {name!r} lacks {key!r}.")
    _check_base_model(config["base_model"], name)
    for row in config["evaluation"]:
        if not _is_result(row):
            raise PackError(
                f"{CONFIG} of pack {name!r} has an evaluation row that is none: {row!r}."
            )
    allowed = {f.name for f in fields(TuneConfig)}
    unknown = sorted(set(config["test_time"]) - allowed)
    if unknown:
        raise PackError(f"{CONFIG} of pack {name!r} has unknown test_time keys {unknown}.")
    return config


def _check_base_model(made: dict, name: str) -> None:
    texts = made.get("source"), made.get("revision") or "", made.get("sha256") or ""
    sizes = made.get("architecture")
    if not (
        all(isinstance(text, str) for text in texts)
        and isinstance(sizes, dict)
        and set(sizes) == set(ARCHITECTURE)
        and all(isinstance(size, int) and 0 < size < 100_000 for size in sizes.values())
        and all(_are_numbers(made.get(key), 3, -10, 10) for key in ("mean", "std"))
    ):
        raise PackError(
            f"{CONFIG} of pack {name!r}: base_model must have source, revision, sha256, mean and "
            f"std of three numbers, and architecture with {', '.join(ARCHITECTURE)}."
        )


def _are_numbers(values: object, count: int, low: float, high: float) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, (int, float)) and low <= value <= high for value in values)
    )


def _is_result(row: object) -> bool:
    """Whether a row has what cards and charts show of it."""
    if not isinstance(row, dict):
        return False
    shares = [row.get("clean_accuracy"), row.get("accuracy")]
    sizes = [row.get(key) for key in ("epsilon_255", "steps") if row.get(key, 0) is not None]
    return (
        all(isinstance(row.get(key), str) for key in ("defense", "threat", "attack"))
        and _are_numbers(shares, 2, 0, 1)
        and _are_numbers(row.get("ci95"), 2, 0, 1)
        and _are_numbers([row.get("n"), *sizes], 1 + len(sizes), 0, math.inf)
    )


def _check_backbone(wanted: dict, backbone: Backbone, name: str) -> None:
    right = wanted["source"]
    if right.startswith("hf-hub:") and wanted.get("revision"):
        right += f"@{wanted['revision']}"
    if wanted.get("architecture") != backbone.architecture:
        raise PackError(
            f"Pack {name!r} was made for backbone {right!r}; "
            f"{backbone.name!r} has another architecture."
        )
    if wanted.get("sha256") != backbone.sha256:
        raise PackError(
            f"Pack {name!r} was made for backbone {right!r}; "
            f"the weights of {backbone.name!r} are different ones."
        )
    if any(wanted[key] != base_model(backbone)[key] for key in ("mean", "std")):
        raise PackError(
            f"Pack {name!r} was made for backbone {right!r}; "
            f"{backbone.name!r} normalises its images otherwise."
        )


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]], name: str) -> dict[str, Tensor]:
    """Reads exactly the tensors of `shapes`; header first, values after."""
    where = f"{path.name} of pack {name!r}"
    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for word, wrong in (("lacks", set(shapes) - keys), ("has unknown", keys - set(shapes))):
                if wrong:
                    raise PackError(f"{where} {word} {', '.join(sorted(wrong))}.")
            for key, shape in shapes.items():
                entry = file.get_slice(key)
                if entry.get_dtype() != "F32":
                    raise PackError(f"{where}: {key} must be F32, got {entry.get_dtype()}.")
                if tuple(entry.get_shape()) != shape:
                    raise PackError(
                        f"{where}: {key} must have shape {shape}, got {tuple(entry.get_shape())}."
                    )
            tensors = {key: file.get_tensor(key) for key in shapes}
    except FileNotFoundError as error:
        raise PackError(f"Pack {name!r} has no {path.name}.") from error
    except (SafetensorError, OSError) as error:
        raise PackError(f"{where} is not a complete safetensors file.") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PackError(f"{where}: {key} has values that are not finite.")
    return tensors
