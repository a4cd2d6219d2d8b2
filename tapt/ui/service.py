"""What the handlers share: the models that were asked for last, and how long their runs took."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

from tapt.comparison import UNTRAINED, Comparison
from tapt.core.backbone import Backbone
from tapt.core.errors import InputError
from tapt.core.prompts import PromptConfig
from tapt.defenses import find_defense, find_defenses
from tapt.defenses.adaptive import is_adaptive
from tapt.model import QUICK, VICTIM, Changes, Model, load
from tapt.packs.backbones import OPENAI_NAMES, embedded_backbones, is_public, load_backbone
from tapt.packs.format import Pack, hub_packs, list_packs, load_pack, untrained_pack
from tapt.packs.hub import Origin, Token, parse_id
from tapt.progress import Progress
from tapt.ui.inputs import Request

REMEMBERED_BACKBONES = 2  # beside the first
REMEMBERED_PACKS = 4  # of each backbone
MAX_NAME = 200  # file systems take no more than 255
SPEED = {"cuda": 2e12}  # weights times tokens per second, before a run has shown it
TOGETHER = "all parts"  # among the timings
T = TypeVar("T")


class Remembered(Generic[T]):
    """Values by key: the last `size` of those that were made, and `kept` for ever. While one is
    made, only those who want the same one wait."""

    def __init__(self, size: int, kept: Mapping[str, T]) -> None:
        self._size, self._kept, self._guard = size, kept, threading.Lock()
        self._values: OrderedDict[str, T] = OrderedDict()
        self._making: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def find(self, key: str) -> T | None:
        """The value of a key where it is there."""
        with self._guard:
            if key in self._values:
                self._values.move_to_end(key)
            return self._kept.get(key) or self._values.get(key)

    def get(self, key: str, make: Callable[[], T]) -> T:
        """The value of a key, from `make` where it is not there."""
        with self._guard:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            value = self.find(key)
            if value is None:
                value = make()
                with self._guard:
                    self._values[key] = value
                    while len(self._values) > self._size:
                        self._values.popitem(last=False)
        return value


@dataclass(frozen=True, eq=False)
class Shelf:
    """A backbone and all that was made for it, which goes when it goes.

    rates: seconds of a pass, by the number of classes (its bits) and what ran; and the share of
        these that a whole run takes, since defences share some of their work.
    """

    backbone: Backbone
    origin: Origin | None
    models: Remembered[Model]
    rates: dict[tuple[int, str], float] = field(default_factory=dict)

    def seconds(self, classes: int, passes: Mapping[str, float]) -> float:
        """How long so many passes of each will take together, by what ran here before."""
        sizes, rates, bits = self.backbone.architecture, dict(self.rates), classes.bit_length()
        weights = 12 * sizes["visual_blocks"] * sizes["visual_width"] ** 2
        rough = weights * sizes["image_tokens"] / SPEED.get(self.backbone.device.type, 2e10)
        near = {what: rate for (_, what), rate in rates.items()}
        parts = [n * rates.get((bits, w), near.get(w, rough)) for w, n in passes.items()]
        return sum(parts) * rates.get((0, TOGETHER), 1.0)


class Service:
    """Loads models when they are asked for and remembers the last ones; safe to share between
    requests, since a loaded model never changes. The names in its models are those that visitors
    see, without folders of the server.

    first: the model that the page starts with; on a Space all that are named are loaded now.
    backbones: those that the page offers, by the names that visitors see.
    open_backbones, open_packs: whether any public one may be asked for, too.
    """

    def __init__(
        self,
        backbone: str | None = None,
        pack: str | None = None,
        device: str | None = None,
        *,
        token: Token = False,
        progress: Progress | None = None,
        allow_backbones: str = "none",
        allow_packs: str = "none",
    ) -> None:
        """Loads the first model.

        backbone, pack: as for `tapt.load`; of the backbone several names by commas, too.
        token, progress: for the Hub, as for `tapt.load`.
        allow_backbones, allow_packs: what visitors may load beside these and the embedded ones:
            names by commas, `any` or `none`.

        Raises:
            BackboneError, PackError, HubError: unknown, malformed, or not made for each other.
        """
        own = _names(backbone or "")
        options: dict[str, Any] = {"device": device, "token": token, "progress": progress}
        first = load(backbone=own[0] if own else None, pack=pack, **options)
        name = first.pack.name
        if first.pack.trained and not first.pack.origin and name not in list_packs():
            name = Path(name).name
        self.first = _model(first.backbone, replace(first.pack, name=name), first.origins[0])
        offered, self._packs = _names(allow_backbones), _names(allow_packs)
        self.open_backbones, self.open_packs = allow_backbones == "any", allow_packs == "any"
        more = OPENAI_NAMES if self.open_backbones else ()
        names = dict.fromkeys((first.backbone.name, *own, *embedded_backbones(), *offered, *more))
        self.backbones = {_visible(name): name for name in names}
        self._device, seen = device, self.first.backbone
        shelf = Shelf(seen, first.origins[0], Remembered(REMEMBERED_PACKS, {name: self.first}))
        size = max(REMEMBERED_BACKBONES, len(own))
        self._shelves = Remembered(size, {seen.name: shelf})
        for name in own if "SPACE_ID" in os.environ else ():
            self.model(_visible(name))  # ZeroGPU wants it before the first visitor comes

    def model(self, backbone: str = "", pack: str = "", progress: Progress | None = None) -> Model:
        """A loaded model; empty names stand for the page's own choice. What visitors ask for is
        fetched without the server's token.

        Raises:
            TaptError: not offered here, missing, or not made for each other.
        """
        backbone, pack = self._checked(backbone, pack)
        shelf = self._shelves.get(backbone, partial(self._load_shelf, backbone, progress))
        return shelf.models.get(pack, partial(_load_model, shelf, pack, progress))

    def at_hand(self, backbone: str = "", pack: str = "") -> Model | None:
        """The model where it is loaded already; never waits.

        Raises:
            InputError: not offered here.
        """
        found = self._find(backbone, pack)
        return found[1] if found else None

    def seconds(self, backbone: str, defense: str) -> float | None:
        """About how long one answer takes, with the defence's own settings; None while the
        backbone is not loaded."""
        if (found := self._find(backbone, "")) is None:
            return None
        shelf, model = found
        return shelf.seconds(1, {defense: _passes(model, defense, None)})

    def estimate(self, request: Request, attacks: int = 1) -> float | None:
        """About how many seconds a run will take, told without running; None while its model is
        not loaded.

        attacks: how many epsilons a sweep tries.
        """
        found = self._find(request.fields.backbone, request.fields.pack)
        if found is None:
            return None
        return found[0].seconds(len(request.classes), _parts(found[1], request, attacks))

    def remember(self, request: Request, result: Comparison) -> None:
        """Learns from a finished run how long the next one will take."""
        found = self._find(request.fields.backbone, request.fields.pack)
        if found is None:
            return
        rates, seconds, bits = found[0].rates, [], len(request.classes).bit_length()
        for what, passes in _parts(found[1], request).items():
            answers = vars(result.answers[what]).values() if what in result.answers else ()
            own = sum(answer.seconds for answer in answers if answer)
            seconds.append(own if answers else result.seconds["attack"])
            rates[bits, what] = seconds[-1] / passes
        rates[0, TOGETHER] = result.seconds["total"] / sum(seconds)

    def too_long(self, names: Sequence[str], backbone: str) -> list[str]:
        """The class names whose sentences are too long for a backbone that is loaded."""
        model = self.at_hand(backbone)
        if model is None:
            return []
        own = model.pack.prompts.config
        configs = PromptConfig(design="V", template=own.template), own

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
        """The packs of the Hub that may be asked for, those for a backbone where any may.

        Raises:
            TaptError: the Hub cannot be asked, or the backbone not be loaded.
        """
        found = hub_packs(self.model(backbone).backbone) if self.open_packs else []
        return [*self._packs, *found]

    def _find(self, backbone: str, pack: str) -> tuple[Shelf, Model] | None:
        backbone, pack = self._checked(backbone, pack)
        shelf = self._shelves.find(backbone)
        model = shelf.models.find(pack) if shelf else None
        return (shelf, model) if shelf and model else None

    def _checked(self, backbone: str, pack: str) -> tuple[str, str]:
        """The names of a backbone and a pack that may be asked for."""
        if max(len(backbone), len(pack)) > MAX_NAME:
            raise InputError(f"The name of a backbone or pack has at most {MAX_NAME} characters.")
        backbone = backbone or self.first.backbone.name
        if backbone not in self.backbones and not (self.open_backbones and is_public(backbone)):
            others = " and any public one" if self.open_backbones else ""
            names = ", ".join(self.backbones)
            raise InputError(f"This page offers the backbones {names}{others}; got {backbone!r}.")
        own = self.packs(backbone)
        pack = pack or own[0]
        asked = pack in self._packs or pack.partition("@")[0] in self._packs or self.open_packs
        on_hub = asked and parse_id(pack) is not None and not Path(pack).exists()
        if pack not in own and pack not in list_packs() and not on_hub:
            others = " and those of the Hub, as owner/repo" if self.open_packs else ""
            names = ", ".join([*own, *self._packs])
            raise InputError(f"This page offers the packs {names}{others}; got {pack!r}.")
        return backbone, pack

    def _load_shelf(self, name: str, progress: Progress | None) -> Shelf:
        source = self.backbones.get(name, name)
        backbone, origin = load_backbone(source, device=self._device, progress=progress)
        return Shelf(replace(backbone, name=name), origin, Remembered(REMEMBERED_PACKS, {}))


def _load_model(shelf: Shelf, pack: str, progress: Progress | None) -> Model:
    backbone = shelf.backbone
    if pack == UNTRAINED:
        return _model(backbone, untrained_pack(backbone), shelf.origin)
    return _model(backbone, load_pack(pack, backbone, progress=progress), shelf.origin)


def _model(backbone: Backbone, pack: Pack, origin: Origin | None) -> Model:
    named = replace(backbone, name=_visible(backbone.name))
    return Model(named, pack, (origin, pack.origin))


def _visible(backbone: str) -> str:
    """A backbone as visitors see it; of a folder, only the last part."""
    kind, _, rest = backbone.partition(":")
    return f"{kind}:{Path(rest).name}" if kind == "local-dir" else backbone


def _names(text: str) -> tuple[str, ...]:
    """Names by commas; `any` and `none` are none."""
    names = (name.strip() for name in text.split(","))
    return tuple(name for name in names if name not in ("", "any", "none"))


def _passes(model: Model, defense: str, changes: Changes) -> int:
    """About how many passes an answer takes: its views, again at every step."""
    own = model.settings(find_defense(defense), changes).model_dump()
    views, steps = own.get("views"), own.get("steps")
    seen = views if isinstance(views, int) else 1
    return seen * (1 + (steps if isinstance(steps, int) else 0))


def _parts(model: Model, request: Request, attacks: int = 1) -> dict[str, float]:
    """About how many passes each part of a run takes."""
    attack, changes = request.attack, request.fields.settings
    answers = 1 if attack is None else 1 + attacks
    rows = find_defenses(request.fields.defenses)
    parts: dict[str, float] = {r.name: answers * _passes(model, r.name, changes) for r in rows}
    if attack is not None:
        kind, _, name = request.fields.attacked_model.partition(":")
        own = 1.0
        if kind == "deployed":
            own = _passes(model, name or VICTIM, changes)
            own = QUICK.pool + own / QUICK.refresh if is_adaptive(attack) else QUICK.draws * own
        passes = attack.method.passes(attack.budget_steps, len(request.classes))
        parts[f"{attack.name} on {request.fields.attacked_model}"] = attacks * own * passes
    return parts
