"""What the handlers share: the models that were asked for last, and how long their runs took."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from tapt.comparison import UNTRAINED, Comparison
from tapt.core.backbone import Backbone
from tapt.core.errors import Cancelled, InputError
from tapt.core.prompts import PromptConfig
from tapt.defenses import Defense, find_defenses
from tapt.model import DRAWS, VICTIM, Changes, Model, load
from tapt.packs.backbones import OPENAI_NAMES, embedded_backbones, is_public, load_backbone
from tapt.packs.format import Pack, hub_packs, list_packs, load_pack, untrained_pack
from tapt.packs.hub import Origin, Progress, Token, parse_id
from tapt.ui.inputs import Request

REMEMBERED_BACKBONES = 2  # beside the first
REMEMBERED_PACKS = 4  # of each backbone
MAX_NAME = 200  # file systems take no more than 255
SPEED = {"cpu": 3e10, "cuda": 3e12}  # operations per second, before a run has shown them
ATTACK = "attack on"
T = TypeVar("T")


class Remembered(Generic[T]):
    """The last `size` values by key. A value is made by the first who asks; others who want the
    same one wait for it, and nobody else does."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[str, Future[T]] = OrderedDict()
        self._guard = threading.Lock()

    def find(self, key: str) -> T | None:
        """The value of a key where it is there."""
        with self._guard:
            future = self._values.get(key)
        return future.result() if future and future.done() and not future.exception() else None

    def get(self, key: str, make: Callable[[], T]) -> T:
        """The value of a key, from `make` where it is not there."""
        while True:
            with self._guard:
                future = self._values.get(key)
                if mine := future is None:
                    future = self._values[key] = Future[T]()
                self._values.move_to_end(key)
                while len(self._values) > self._size:
                    self._values.popitem(last=False)
            if mine:
                self._make(key, future, make)
            try:
                return future.result()
            except Cancelled:
                if mine:
                    raise  # otherwise the one who made it has stopped, and the next one makes it

    def _make(self, key: str, future: Future[T], make: Callable[[], T]) -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            with self._guard:
                if self._values.get(key) is future:
                    del self._values[key]
            future.set_exception(error)


@dataclass(frozen=True, eq=False)
class Shelf:
    """A backbone and all that was made for it, which goes when it goes.

    rates: seconds of a pass, by the number of classes (its bits) and what ran.
    """

    backbone: Backbone
    origin: Origin | None
    models: Remembered[Model] = field(default_factory=lambda: Remembered(REMEMBERED_PACKS))
    rates: dict[tuple[int, str], float] = field(default_factory=dict)

    def seconds(self, classes: int, what: str) -> float:
        """How long a pass takes, by what ran here before."""
        known = {bits: rate for (bits, name), rate in [*self.rates.items()] if name == what}
        if known:
            return known.get(classes.bit_length(), max(known.values()))
        backbone, device = self.backbone, self.backbone.device.type
        weights = 12 * backbone.visual_blocks * backbone.visual_width**2
        return 2.0 * weights * backbone.image_tokens / SPEED.get(device, SPEED["cpu"])


class Service:
    """Loads models when they are asked for and remembers the last ones; safe to share between
    requests, since a loaded model never changes. The names in its models are those that visitors
    see, without folders of the server.

    first: the model that the page starts with.
    backbones: those that the page offers, by the names that visitors see.
    open_backbones, open_packs: whether any public one may be asked for, too.
    """

    def __init__(
        self,
        first: Model,
        backbones: Sequence[str],
        device: str | None = None,
        *,
        allow_backbones: str = "none",
        allow_packs: str = "none",
    ) -> None:
        backbone, pack = first.backbone, first.pack
        name = pack.name
        if pack.trained and not pack.origin and name not in list_packs(backbone.name):
            name = Path(name).name
        self.first = _model(backbone, replace(pack, name=name), first.origins[0])
        allowed, self.open_backbones = _names(allow_backbones)
        self._packs, self.open_packs = _names(allow_packs)
        if self.open_backbones:
            allowed += OPENAI_NAMES
        names = dict.fromkeys((backbone.name, *backbones, *embedded_backbones(), *allowed))
        self.backbones = {_visible(name): name for name in names}
        self._device = device
        self._first = Shelf(self.first.backbone, self.first.origins[0])
        self._first.models.get(name, lambda: self.first)
        self._shelves: Remembered[Shelf] = Remembered(max(REMEMBERED_BACKBONES, len(backbones)))

    def model(self, backbone: str = "", pack: str = "", progress: Progress | None = None) -> Model:
        """A loaded model; empty names stand for the page's own choice. What visitors ask for is
        fetched without the server's token.

        Raises:
            TaptError: not offered here, missing, or not made for each other.
        """
        backbone, pack = self._checked(backbone, pack)
        if (backbone, pack) == (self.first.backbone.name, self.first.pack.name):
            return self.first
        shelf = self._first
        if backbone != shelf.backbone.name:
            shelf = self._shelves.get(backbone, partial(self._load_shelf, backbone, progress))
        return shelf.models.get(pack, partial(_load_model, shelf, pack, progress))

    def at_hand(self, backbone: str = "", pack: str = "") -> Model | None:
        """The model where it is loaded already; never waits.

        Raises:
            InputError: not offered here.
        """
        backbone, pack = self._checked(backbone, pack)
        if (backbone, pack) == (self.first.backbone.name, self.first.pack.name):
            return self.first
        shelf = self._shelf(backbone)
        return shelf and shelf.models.find(pack)

    def seconds(self, backbone: str, defense: str) -> float | None:
        """About how long one answer takes, with the defence's own settings; None while the
        backbone is not loaded."""
        model = self.at_hand(backbone)
        shelf = model and self._shelf(model.backbone.name)
        if model is None or shelf is None:
            return None
        return _passes_of(model, find_defenses([defense])[0]) * shelf.seconds(1, defense)

    def estimate(self, request: Request, attacks: int = 1) -> float | None:
        """About how many seconds a run will take, told without running; None while its model is
        not loaded.

        attacks: how many epsilons a sweep tries.
        """
        model = self.at_hand(request.fields.backbone, request.fields.pack)
        shelf = model and self._shelf(model.backbone.name)
        if model is None or shelf is None:
            return None
        answers = 1 if request.attack is None else 1 + attacks
        return sum(
            (attacks if what.startswith(ATTACK) else answers)
            * passes
            * shelf.seconds(len(request.classes), what)
            for what, passes in _passes(model, request).items()
        )

    def remember(self, request: Request, result: Comparison) -> None:
        """Learns from a finished run how long the next one will take."""
        model = self.at_hand(request.fields.backbone, request.fields.pack)
        shelf = model and self._shelf(model.backbone.name)
        for what, passes in _passes(model, request).items() if model and shelf else ():
            answer = result.answers[what].clean if what in result.answers else None
            seconds = answer.seconds if answer else result.seconds.get("attack", 0.0)
            shelf.rates[len(request.classes).bit_length(), what] = seconds / passes

    def too_long(self, names: Sequence[str], backbone: str) -> list[str]:
        """The class names whose sentences are too long for a backbone that is loaded."""
        model = self.at_hand(backbone)
        if model is None:
            return []
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
        """The packs of the Hub that may be asked for, those for a backbone where any may.

        Raises:
            TaptError: the Hub cannot be asked, or the backbone not be loaded.
        """
        found = hub_packs(self.model(backbone).backbone) if self.open_packs else []
        return [*self._packs, *found]

    def _shelf(self, backbone: str) -> Shelf | None:
        first = backbone == self._first.backbone.name
        return self._first if first else self._shelves.find(backbone)

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
        return Shelf(replace(backbone, name=name), origin)


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


def _names(allowed: str) -> tuple[tuple[str, ...], bool]:
    """Names by commas, and whether `any` is among them; `none` is no name."""
    names = [name.strip() for name in allowed.split(",")]
    return tuple(n for n in names if n not in ("", "any", "none")), "any" in names


def _passes_of(model: Model, defense: Defense, changes: Changes = None) -> int:
    """About how many passes an answer takes: its views, again at every step."""
    own = model.settings(defense, changes).model_dump()
    views, steps = own.get("views"), own.get("steps")
    seen = views if isinstance(views, int) else 1
    return seen * (1 + (steps if isinstance(steps, int) else 0))


def _passes(model: Model, request: Request) -> dict[str, int]:
    """About how many passes each answer takes, and the attack."""
    attack, changes = request.attack, request.fields.settings
    kind, _, name = request.fields.attacked_model.partition(":")
    rows = find_defenses(request.fields.defenses)
    passes = {row.name: _passes_of(model, row, changes) for row in rows}
    if attack is not None:
        victim = find_defenses([name or VICTIM])[0]
        own = _passes_of(model, victim, changes) if kind == "deployed" else 1
        draws = DRAWS if kind == "deployed" and attack.method.gradients else 1
        steps = attack.method.passes(attack.budget_steps, len(request.classes))
        what = f"{ATTACK} {request.fields.attacked_model} by {attack.name}"
        passes[what] = steps * own * draws
    return passes


def load_service(
    backbone: str | None = None,
    pack: str | None = None,
    device: str | None = None,
    *,
    token: Token = False,
    progress: Progress | None = None,
    allow_backbones: str = "none",
    allow_packs: str = "none",
) -> Service:
    """A service with its first model loaded; on a Space all that are named.

    backbone: one name, or several by commas; default the one that the pack names, and `tiny`
        without a pack.
    pack: an embedded name, a folder or a Hub id; default the backbone's embedded pack, `vli`
        first, and untrained prompts where it has none.
    allow_backbones, allow_packs: what visitors may load beside these and the embedded ones: names
        by commas, `any` or `none`.

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
    options = {"allow_backbones": allow_backbones, "allow_packs": allow_packs}
    service = Service(first, names[1:], device, **options)
    if "SPACE_ID" in os.environ:  # ZeroGPU wants its models on the device before the first visitor
        for name in names[1:]:
            service.model(_visible(name))
    return service
