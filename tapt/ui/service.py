"""What the handlers share: the models that were asked for last."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from tapt.comparison import UNTRAINED
from tapt.core.backbone import Backbone
from tapt.core.errors import InputError
from tapt.core.prompts import PromptConfig
from tapt.model import Model, load
from tapt.packs.backbones import OPENAI_NAMES, is_public, load_backbone
from tapt.packs.format import Pack, hub_packs, list_packs, load_pack, untrained_pack
from tapt.packs.hub import Origin, Progress, Token, parse_id

EMBEDDED_BACKBONE = "tiny"  # it knows ten kinds only
REMEMBERED_BACKBONES = 2  # beside the first
REMEMBERED_PACKS = 4
MAX_NAME = 200  # file systems take no more than 255
T = TypeVar("T")


class Remembered(Generic[T]):
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
    """Loads models when they are asked for and remembers the last ones; safe to share between
    requests, since a loaded model never changes. The names in its models are those that visitors
    see, without folders of the server.

    first: the model that the page starts with.
    backbones: the others that the page offers.
    on_space: a public page offers these alone; elsewhere any public backbone may be typed.
    """

    def __init__(
        self, first: Model, backbones: Sequence[str], device: str | None, on_space: bool
    ) -> None:
        backbone, pack = first.backbone, first.pack
        name = pack.name
        if pack.trained and not pack.origin and name not in list_packs(backbone.name):
            name = Path(name).name
        self.first = _model(backbone, replace(pack, name=name), first.origins[0])
        names = dict.fromkeys((backbone.name, *backbones))
        self.backbones = {_visible(name): name for name in names}
        self.on_space = on_space
        self._device = device
        # one backbone at a time, for the memory; a pack keeps nobody waiting
        size = max(REMEMBERED_BACKBONES, on_space * len(names))
        self._backbones: Remembered[tuple[Backbone, Origin | None]]
        self._backbones = Remembered(size, threading.Lock())
        self._models: Remembered[Model] = Remembered(REMEMBERED_PACKS, nullcontext())

    def model(self, backbone: str = "", pack: str = "", progress: Progress | None = None) -> Model:
        """A loaded model; empty names stand for the page's own choice. What visitors ask for is
        fetched without the server's token.

        Raises:
            TaptError: not offered here, missing, or not made for each other.
        """
        if max(len(backbone), len(pack)) > MAX_NAME:
            raise InputError(f"The name of a backbone or pack has at most {MAX_NAME} characters.")
        first = self.first
        backbone = backbone or first.backbone.name
        pack = pack or next(iter(self.packs(backbone)))
        if (backbone, pack) == (first.backbone.name, first.pack.name):
            return first
        make = partial(self._load_model, backbone, pack, progress)
        return self._models.get((backbone, pack), make)

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
        embedded = sorted(list_packs(backbone), key=lambda name: not name.endswith("/vli"))
        own = [self.first.pack.name] if backbone == self.first.backbone.name else []
        return list(dict.fromkeys([*own, *embedded, UNTRAINED]))

    def hub_packs(self, backbone: str) -> list[str]:
        """The Hub's packs for a backbone.

        Raises:
            TaptError: the Hub cannot be asked, or the backbone not be loaded.
        """
        return hub_packs(self.model(backbone).backbone)

    def _load_backbone(
        self, name: str, progress: Progress | None
    ) -> tuple[Backbone, Origin | None]:
        if name not in self.backbones and (self.on_space or not is_public(name)):
            raise InputError(
                f"This page offers the backbones {', '.join(self.backbones)}; got {name!r}."
            )
        source = self.backbones.get(name, name)
        return load_backbone(source, device=self._device, progress=progress)

    def _load_model(self, backbone_name: str, name: str, progress: Progress | None) -> Model:
        if backbone_name == self.first.backbone.name:
            backbone, origin = self.first.backbone, self.first.origins[0]
        else:
            make = partial(self._load_backbone, backbone_name, progress)
            backbone, origin = self._backbones.get(backbone_name, make)
        backbone = replace(backbone, name=backbone_name)
        if name == UNTRAINED:
            return _model(backbone, untrained_pack(backbone), origin)
        if name not in list_packs(backbone_name) and (
            parse_id(name) is None or Path(name).exists()
        ):
            raise InputError(
                f"This page offers the packs {', '.join(self.packs(backbone_name))} and those of "
                f"the Hub, as owner/repo; got {name!r}."
            )
        return _model(backbone, load_pack(name, backbone, progress=progress), origin)


def _model(backbone: Backbone, pack: Pack, origin: Origin | None) -> Model:
    named = replace(backbone, name=_visible(backbone.name))
    return Model(named, pack, (origin, pack.origin))


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
    first = load(
        backbone=names[0] if names else None,
        pack=pack,
        device=device,
        token=token,
        progress=progress,
    )
    on_space = "SPACE_ID" in os.environ
    others = names[1:] if on_space else [*names[1:], EMBEDDED_BACKBONE, *OPENAI_NAMES]
    service = Service(first, others, device, on_space)
    if on_space:  # ZeroGPU wants its models on the device before the first visitor comes
        for name in service.backbones:
            service.model(name)
    return service
