"""What the handlers share: loaded models and the class lists that were asked for last."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tapt.backbone import OPENAI_NAMES, Backbone, load_backbone
from tapt.defense import Defender, make_defender
from tapt.errors import InputError
from tapt.pack import Pack, embedded_packs, load_pack, untrained_pack

EMBEDDED_BACKBONE = "tiny"
UNTRAINED_PACK = "untrained prompts"
REMEMBERED_BACKBONES = 2
REMEMBERED_CLASS_LISTS = 8


@dataclass(frozen=True, eq=False)
class Model:
    """A backbone with a pack, under the names that visitors see."""

    backbone: Backbone
    pack: Pack
    backbone_name: str
    pack_name: str

    @property
    def embedded(self) -> bool:
        """Whether this is the backbone that knows ten kinds only."""
        return self.backbone_name == EMBEDDED_BACKBONE


class Service:
    """Loads models when they are asked for and keeps the last ones; safe to share between
    requests, since a loaded model never changes.

    backbones: what the page offers; the first is the one it starts with.
    pack: an embedded name or a folder for that first one; default its own, `vli` first, and
        untrained prompts where it has none.
    """

    def __init__(
        self, backbones: list[str], pack: str | None = None, device: str | None = None
    ) -> None:
        self.backbones = {_visible(name): name for name in backbones}
        self.default_backbone = _visible(backbones[0])
        self._pack, self._device = pack, device
        self._lock = threading.Lock()
        self._backbone = lru_cache(REMEMBERED_BACKBONES)(self._load_backbone)
        self._model = lru_cache(2 * REMEMBERED_BACKBONES)(self._load_model)
        self._defender = lru_cache(REMEMBERED_CLASS_LISTS)(
            lambda model, classes: make_defender(model.backbone, model.pack, classes)
        )

    def model(self, backbone: str = "", pack: str = "") -> Model:
        """A loaded model; empty names stand for the page's own choice.

        Raises:
            InputError, BackboneError, PackError: not offered here, missing, or not made for
                each other.
        """
        with self._lock:
            return self._model(backbone or self.default_backbone, pack)

    def defender(self, model: Model, classes: tuple[str, ...]) -> Defender:
        """The defender for a class list; its text features are computed once."""
        return self._defender(model, classes)

    def packs(self, backbone: str) -> dict[str, str]:
        """The packs that the page offers for a backbone, name to source, its default first."""
        embedded = sorted(embedded_packs(backbone), key=lambda name: not name.endswith("/vli"))
        own = [self._pack] if self._pack and backbone == self.default_backbone else []
        packs = {(name if name in embedded else Path(name).name): name for name in own + embedded}
        return {**packs, UNTRAINED_PACK: ""}

    def _load_backbone(self, name: str) -> Backbone:
        return load_backbone(self.backbones[name], device=self._device)

    def _load_model(self, backbone_name: str, pack_name: str) -> Model:
        if backbone_name not in self.backbones:
            raise InputError(
                f"This page offers the backbones {', '.join(self.backbones)}; "
                f"got {backbone_name!r}."
            )
        backbone, packs = self._backbone(backbone_name), self.packs(backbone_name)
        pack_name = pack_name or next(iter(packs))
        if pack_name not in packs:
            raise InputError(f"This page offers the packs {', '.join(packs)}; got {pack_name!r}.")
        source = packs[pack_name]
        pack = load_pack(source, backbone) if source else untrained_pack(backbone)
        return Model(backbone, pack, backbone_name, pack_name)


def _visible(backbone: str) -> str:
    """A backbone as visitors see it; of a folder, only the last part."""
    kind, _, rest = backbone.partition(":")
    return f"{kind}:{Path(rest).name}" if kind == "local-dir" else backbone


def load_service(backbone: str, pack: str | None = None, device: str | None = None) -> Service:
    """A service with its first model loaded.

    backbone: one name, or several by commas. On a Space the page offers these alone, elsewhere
        the embedded one and OpenAI's too.

    Raises:
        BackboneError, PackError: unknown, malformed, or not made for each other.
    """
    names = [name.strip() for name in backbone.split(",") if name.strip()] or [EMBEDDED_BACKBONE]
    if "SPACE_ID" not in os.environ:
        names += [EMBEDDED_BACKBONE, *OPENAI_NAMES]
    service = Service(list(dict.fromkeys(names)), pack, device)
    service.model()
    return service
