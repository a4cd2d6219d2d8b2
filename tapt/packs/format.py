"""Packs: trained prompts with their statistics and settings, as JSON and safetensors.

config.json             what the prompts are, for which backbone, how they were made
prompts.safetensors     the prompt parameters
statistics.safetensors  token statistics under adversarially and clean-tuned prompts
README.md               the model card
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tapt.core.backbone import Backbone
from tapt.core.errors import InputError, PackError
from tapt.core.losses import Statistics, TokenStatistics
from tapt.core.prompts import PromptConfig, Prompts, init_prompts
from tapt.files import write_file
from tapt.packs import backbones
from tapt.packs.backbones import hub_repo, is_public
from tapt.packs.hub import Origin, Token, list_models, parse_id, snapshot
from tapt.packs.schema import (
    FORMAT,
    MAX_CONFIG_BYTES,
    VERSION,
    PackConfig,
    Shape,
    read_config,
    read_tensors,
)
from tapt.progress import Progress

CONFIG, CARD = "config.json", "README.md"
PROMPTS, STATISTICS = "prompts.safetensors", "statistics.safetensors"
STATISTICS_KEYS = ("adversarial.mean", "adversarial.var", "clean.mean", "clean.var")
MAX_HUB_BYTES = {CONFIG: MAX_CONFIG_BYTES, PROMPTS: 1_000_000_000, STATISTICS: 1_000_000_000}
TAG = "tapt"


@dataclass(frozen=True, eq=False)
class Pack:
    """prompts: the static prompts that every image starts from.
    statistics: None for untrained prompts, and before `python -m tapt statistics`; the alignment
        term is then left out.
    test_time: settings that were chosen for these prompts, by defence.
    name: as asked for, `tiny/vli`, a folder or a Hub id.
    base_model: source, revision, sha256, architecture, mean and std of the backbone.
    training: how the prompts were made.
    evaluation: rows with their measured accuracy, see `tapt.packs.schema.Row`.
    origin: what was fetched from the Hub, None for other packs.
    """

    prompts: Prompts
    statistics: Statistics | None
    test_time: dict[str, dict[str, Any]]
    name: str
    base_model: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    trained: bool = True
    origin: Origin | None = None

    def statistics_tensors(self) -> dict[str, Tensor]:
        """The statistics by their names in the file; empty where there are none."""
        if self.statistics is None:
            return {}
        parts = self.statistics.adversarial, self.statistics.clean
        values = [tensor for part in parts for tensor in (part.mean, part.var)]
        return dict(zip(STATISTICS_KEYS, values, strict=True))


@dataclass(frozen=True)
class PackFiles:
    """A pack's folder with its checked config, before its tensors are read."""

    name: str
    folder: Path
    config: PackConfig
    origin: Origin | None = None

    def read(self, backbone: Backbone | None = None, *, statistics: bool = True) -> Pack:
        """The pack, its prompts in the backbone's place and type; without a backbone, checked
        against the architecture that it names. `PackError` says what does not fit."""
        config, place = self.config, (torch.device("cpu"), torch.float32)
        named = config.base_model.model_dump()
        if backbone is not None:
            self._check_backbone(backbone, named)
            place = backbone.device, backbone.dtype
        try:
            shapes = config.prompts.shapes(named["architecture"])
        except InputError as error:
            raise PackError(f"{CONFIG} of pack {self.name!r}: {error}") from error
        tensors = read_tensors(self.folder / PROMPTS, shapes, self.name)
        prompts = Prompts(config.prompts, tensors).map(lambda t: t.to(*place))
        measured = None
        if statistics:
            shapes = statistics_shapes(named["architecture"], config.prompts)
            values = [*read_tensors(self.folder / STATISTICS, shapes, self.name).values()]
            measured = Statistics(TokenStatistics(*values[:2]), TokenStatistics(*values[2:]))
        rows = [row.model_dump(exclude_unset=True) for row in config.evaluation]
        made = named, config.training, rows
        return Pack(prompts, measured, config.test_time, self.name, *made, origin=self.origin)

    def _check_backbone(self, backbone: Backbone, wanted: dict[str, Any]) -> None:
        own, right = base_model(backbone), wanted["source"]
        if right.startswith("hf-hub:") and wanted["revision"]:
            right += f"@{wanted['revision']}"
        for key, difference in (
            ("architecture", "has another architecture"),
            ("sha256", "has other weights"),
            ("mean", "normalises its images otherwise"),
            ("std", "normalises its images otherwise"),
        ):
            if wanted[key] != own[key]:
                raise PackError(
                    f"Pack {self.name!r} was made for backbone {right!r}; "
                    f"{backbone.name!r} {difference}."
                )


def base_model(backbone: Backbone) -> dict[str, Any]:
    """The backbone as a pack's config names it."""
    colours = {key: list(backbone.preprocessing[key]) for key in ("mean", "std")}
    names = ("source", "revision", "sha256", "architecture")
    return {name: getattr(backbone, name) for name in names} | colours


def untrained_pack(backbone: Backbone, design: str = "VLI") -> Pack:
    """Untrained prompts with the published layout, as far as the backbone has blocks, and the
    entropy term alone: what there is to show before somebody trained prompts."""
    depth = min(9, backbone.visual_blocks, backbone.text_blocks)
    prompts = init_prompts(backbone, PromptConfig(design=design, tokens=2, visual_depth=depth))
    return Pack(prompts, None, {}, "untrained prompts", base_model(backbone), trained=False)


def list_packs(backbone: str | None = None) -> list[str]:
    """Names of the packs that come with the project, of one backbone or of all: `tiny/vli`."""
    root = backbones.EMBEDDED
    folders = sorted(path.parent for path in root.glob(f"*/*/{CONFIG}"))
    names = [folder.relative_to(root).as_posix() for folder in folders]
    return [name for name in names if backbone in (None, name.partition("/")[0])]


def hub_packs(backbone: Backbone) -> list[str]:
    """Ids of the Hub's public packs for these weights, the most downloaded first; `HubError` where
    it cannot be asked."""
    repo = hub_repo(backbone.source)
    fits = {weights_tag(backbone.sha256)} | ({f"base_model:{repo}"} if repo else set())
    return [model["id"] for model in list_models(TAG) if fits & set(model["tags"])]


def weights_tag(sha256: str | None) -> str:
    """The Hub's tag of packs for one set of weights."""
    return f"tapt-weights-{(sha256 or 'random')[:16]}"


def default_pack(backbone: Backbone) -> Pack:
    """The embedded VLI pack of a backbone, else its first one, else untrained prompts."""
    names = sorted(list_packs(backbone.name), key=lambda name: not name.endswith("/vli"))
    return load_pack(names[0], backbone) if names else untrained_pack(backbone)


def pack_folder(name: str) -> Path:
    """The folder of an embedded name (`tiny/vli`), otherwise the name as a path."""
    return backbones.EMBEDDED / name if name in list_packs() else Path(name).expanduser()


def pack_name(folder: str | os.PathLike) -> str:
    """What a pack in this folder is called: `tiny/vli` where it is embedded."""
    folder = Path(folder).resolve()
    if folder.is_relative_to(backbones.EMBEDDED):
        return folder.relative_to(backbones.EMBEDDED).as_posix()
    return folder.name


def load_pack(
    source: str | os.PathLike, backbone: Backbone, *, statistics: bool = True, **options: Any
) -> Pack:
    """Loads and checks a pack; arguments and errors as `open_pack` has them, and `PackError` for a
    pack that was made for another backbone."""
    return open_pack(source, statistics=statistics, **options).read(backbone, statistics=statistics)


def open_pack(
    source: str | os.PathLike,
    *,
    statistics: bool = True,
    token: Token = False,
    progress: Progress | None = None,
) -> PackFiles:
    """Finds a pack and checks its config, before there is a backbone.

    source: an embedded name (`tiny/vli`), a folder, or a Hub id
        `owner/repo[/subfolder][@revision]`; tried in this order.
    statistics: False reads the prompts alone, as `python -m tapt train` leaves them.
    token, progress: for the Hub, see `tapt.packs.hub.snapshot`.

    Raises `PackError` where it is missing or malformed, `HubError` where it can neither be fetched
    nor is in the local cache.
    """
    name, origin = str(source), None
    folder = pack_folder(name)
    if not folder.is_dir():
        where = parse_id(name)
        # a mistyped tiny/vli must not fetch a stranger's repo
        if where is None or (backbones.EMBEDDED / name.partition("/")[0]).is_dir():
            known = ", ".join([*list_packs(), "a folder"])
            raise PackError(
                f"There is no pack {name!r}: use {known}, or a Hub id such as owner/repo."
            )
        files = {k: v for k, v in MAX_HUB_BYTES.items() if statistics or k != STATISTICS}
        fetched = snapshot(where, files, token=token, progress=progress)
        folder, origin = fetched.folder, fetched.origin
    config = read_config(folder / CONFIG, name)
    if origin and not is_public(config.base_model.source):
        raise PackError(
            f"Pack {name!r} names a backbone that is not on the Hub; a pack from the Hub may only "
            "name hf-hub:owner/repo or a built-in backbone."
        )
    return PackFiles(name, folder, config, origin)


def save_pack(pack: Pack, folder: str | os.PathLike) -> None:
    """Writes a pack; each file is written aside, then renamed, config.json last.

    Without statistics, those of an older pack in this folder and its card are removed: they do
    not belong to these prompts. `tapt.packs.card.write_pack` also writes the card.
    """
    files = {PROMPTS: pack.prompts.tensors}
    config, folder = config_bytes(pack), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if measured := pack.statistics_tensors():
        files[STATISTICS] = measured
    else:
        for stale in (STATISTICS, CARD):
            (folder / stale).unlink(missing_ok=True)
    for name, tensors in files.items():
        stored = {k: v.detach().to("cpu", torch.float32) for k, v in tensors.items()}
        write_file(folder / name, save({k: v.contiguous() for k, v in stored.items()}))
    write_file(folder / CONFIG, config)


def config_bytes(pack: Pack) -> bytes:
    """The content of config.json, in the newest version."""
    config = {
        "format": FORMAT,
        "version": VERSION,
        "base_model": pack.base_model,
        "prompts": pack.prompts.config.model_dump(mode="json"),
        "test_time": pack.test_time,
        "training": pack.training,
        "evaluation": pack.evaluation,
    }
    return (json.dumps(config, indent=2, allow_nan=False) + "\n").encode()


def statistics_shapes(sizes: Mapping[str, int], config: PromptConfig) -> dict[str, Shape]:
    """Name and shape of the four statistics tensors; sizes: as `Backbone.architecture`."""
    tokens = sizes["image_tokens"] + config.tokens
    shape = (sizes["visual_blocks"], tokens, sizes["visual_width"])
    return dict.fromkeys(STATISTICS_KEYS, shape)
