"""What the handlers share: loaded models and the class lists that were asked for last."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Generic, TypeVar

from tapt.backbone import OPENAI_NAMES, Backbone, is_public, load_backbone
from tapt.defense import Defender, make_defender
from tapt.errors import InputError, PackError
from tapt.hub import Progress, Token, parse_id
from tapt.pack import Pack, embedded_packs, hub_packs, load_model, load_pack, untrained_pack
from tapt.prompts import PromptConfig

EMBEDDED_BACKBONE = "tiny"
UNTRAINED_PACK = "untrained prompts"
REMEMBERED_BACKBONES = 2  # beside the first
REMEMBERED_PACKS = 4
REMEMBERED_CLASS_LISTS = 8
MAX_NAME = 200  # file systems take no more than 255
T = TypeVar("T")


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


class Kept(Generic[T]):
    """The last `size` values by key; whoever asks for one that is there never waits.

    making: held while a value is made.
    """

    def __init__(self, size: int, making: AbstractContextManager) -> None:
        self._size, self._making = size, making
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if (value := self._find(key)) is not None:
            return value
        with self._making:
            if (value := self._find(key)) is None:
                value = make()
                with self._guard:
                    self._values[key] = value
                    while len(self._values) > self._size:
                        self._values.popitem(last=False)
            return value

    def _find(self, key: Hashable) -> T | None:
        with self._guard:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)


class Service:
    """Loads models when they are asked for and keeps the last ones; safe to share between
    requests, since a loaded model never changes.

    first: the model that the page starts with.
    backbones: the others that the page offers.
    on_space: a public page offers these alone; elsewhere any public backbone may be typed.
    """

    def __init__(
        self, first: tuple[Backbone, Pack], backbones: list[str], device: str | None, on_space: bool
    ) -> None:
        backbone, pack = first
        embedded = not pack.trained or pack.origin or pack.name in embedded_packs(backbone.name)
        self.first = Model(
            backbone, pack, _visible(backbone.name), pack.name if embedded else Path(pack.name).name
        )
        names = dict.fromkeys((backbone.name, *backbones))
        self.backbones = {_visible(name): name for name in names}
        self.on_space = on_space
        self._device = device
        # one backbone at a time, for the memory; a pack keeps nobody waiting
        size = max(REMEMBERED_BACKBONES, on_space * len(names))
        self._backbones: Kept[Backbone] = Kept(size, threading.Lock())
        self._models: Kept[Model] = Kept(REMEMBERED_PACKS, nullcontext())
        self._defender = lru_cache(REMEMBERED_CLASS_LISTS)(
            lambda model, classes: make_defender(model.backbone, model.pack, classes)
        )

    def model(self, backbone: str = "", pack: str = "", progress: Progress | None = None) -> Model:
        """A loaded model; empty names stand for the page's own choice. What visitors ask for is
        fetched without the server's token.

        Raises:
            TaptError: not offered here, missing, or not made for each other.
        """
        if max(len(backbone), len(pack)) > MAX_NAME:
            raise InputError(f"The name of a backbone or pack has at most {MAX_NAME} characters.")
        backbone = backbone or self.first.backbone_name
        pack = pack or next(iter(self.packs(backbone)))
        if (backbone, pack) == (self.first.backbone_name, self.first.pack_name):
            return self.first
        make = partial(self._load_model, backbone, pack, progress)
        return self._models.get((backbone, pack), make)

    def defender(self, model: Model, classes: tuple[str, ...]) -> Defender:
        """The defender for a class list; its text features are computed once."""
        return self._defender(model, classes)

    def too_long(self, names: Sequence[str]) -> list[str]:
        """The class names whose sentences are too long for the embedded model."""
        model = self.model(EMBEDDED_BACKBONE)
        own = model.pack.prompts.config
        configs = PromptConfig("V", template=own.template), own

        def fit(names: Sequence[str]) -> bool:
            try:
                for config in configs:
                    model.backbone.tokenize(config.sentences(names))
            except InputError:
                return False
            return True

        return [] if not names or fit(names) else [name for name in names if not fit([name])]

    def packs(self, backbone: str) -> list[str]:
        """The packs at hand for a backbone, its default first."""
        embedded = sorted(embedded_packs(backbone), key=lambda name: not name.endswith("/vli"))
        own = [self.first.pack_name] if backbone == self.first.backbone_name else []
        return list(dict.fromkeys([*own, *embedded, UNTRAINED_PACK]))

    def hub_packs(self, backbone: str) -> list[str]:
        """The Hub's packs for a backbone.

        Raises:
            TaptError: the Hub cannot be asked, or the backbone not be loaded.
        """
        return hub_packs(self.model(backbone).backbone)

    def _load(self, name: str, progress: Progress | None) -> Backbone:
        if name not in self.backbones and (self.on_space or not is_public(name)):
            raise InputError(
                f"This page offers the backbones {', '.join(self.backbones)}; got {name!r}."
            )
        source = self.backbones.get(name, name)
        return load_backbone(source, device=self._device, progress=progress)

    def _load_model(self, backbone_name: str, name: str, progress: Progress | None) -> Model:
        if backbone_name == self.first.backbone_name:
            backbone = self.first.backbone
        else:
            load = partial(self._load, backbone_name, progress)
            backbone = self._backbones.get(backbone_name, load)
        if name == UNTRAINED_PACK:
            return Model(backbone, untrained_pack(backbone), backbone_name, name)
        if name not in embedded_packs(backbone_name) and (
            parse_id(name) is None or Path(name).exists()
        ):
            raise InputError(
                f"This page offers the packs {', '.join(self.packs(backbone_name))} and those of "
                f"the Hub, as owner/repo; got {name!r}."
            )
        try:
            pack = load_pack(name, backbone, progress=progress)
        except PackError as error:  # no folders of the server
            raise PackError(str(error).replace(backbone.name, backbone_name)) from error
        return Model(backbone, pack, backbone_name, name)


def _visible(backbone: str) -> str:
    """A backbone as visitors see it; of a folder, only the last part."""
    kind, _, rest = backbone.partition(":")
    return f"{kind}:{Path(rest).name}" if kind == "local-dir" else backbone


def load_service(
    backbone: str | None = None,
    pack: str | None = None,
    device: str | None = None,
    *,
    token: Token = False,
    progress: Progress | None = None,
) -> Service:
    """A service with its first model loaded; on a Space all of its backbones.

    backbone: one name, or several by commas; default the one that the pack names, and `tiny`
        without a pack.
    pack: an embedded name, a folder or a Hub id; default the backbone's embedded pack, `vli`
        first, and untrained prompts where it has none.

    Raises:
        BackboneError, PackError, HubError: unknown, malformed, or not made for each other.
    """
    names = [name.strip() for name in (backbone or "").split(",") if name.strip()]
    first = load_model(
        names[0] if names else None, pack, device=device, token=token, progress=progress
    )
    on_space = "SPACE_ID" in os.environ
    others = names[1:] if on_space else [*names[1:], EMBEDDED_BACKBONE, *OPENAI_NAMES]
    service = Service(first, others, device, on_space)
    if on_space:  # ZeroGPU wants its models on the device before the first visitor comes
        for name in service.backbones:
            service.model(name)
    return service
