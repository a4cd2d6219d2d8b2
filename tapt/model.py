"""A backbone with its pack, behind one call: load, predict, attack, compare."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from tapt.comparison import Answer, Answers, Comparison, plain
from tapt.core.attacks import Attack
from tapt.core.backbone import Backbone
from tapt.core.clip import PromptedClip
from tapt.core.errors import InputError, PackError
from tapt.core.images import to_float, to_picture
from tapt.core.views import image_seeds
from tapt.data.names import parse_classes
from tapt.data.pictures import open_image
from tapt.defenses import (
    Defense,
    ImageBatch,
    Prediction,
    PreparedDefense,
    all_defenses,
    find_defense,
    find_defenses,
)
from tapt.defenses.adaptive import Adaptive
from tapt.defenses.deployed import attack_batch
from tapt.packs.backbones import is_public, load_backbone
from tapt.packs.format import Pack, default_pack, open_pack
from tapt.packs.hub import Origin, Token
from tapt.progress import Progress, quiet
from tapt.running import Phase, in_thread

ATTACKED_MODELS = ("clip", "static", "deployed")
DEFAULT = "small/vli"
VICTIM = "tapt"  # the defence that `deployed` attacks where a picture is compared
QUICK = Adaptive(pool=2, refresh=3, judging=4, draws=1)  # for one picture, somebody waits
REMEMBERED = 8  # class lists
Picture = Image.Image | str | os.PathLike[str] | bytes
Changes = Mapping[str, Any] | None
Selection = Literal["float32", "bfloat16"]


class Model:
    """A backbone with a pack; safe to share between threads, since nothing of it changes.

    origins: what of backbone and pack was fetched from the Hub.
    """

    def __init__(
        self, backbone: Backbone, pack: Pack, origins: Sequence[Origin | None] = (None, None)
    ) -> None:
        self.backbone, self.pack, self.origins = backbone, pack, tuple(origins)
        self._prepared: dict[tuple, PromptedClip] = {}  # replaced whole: threads need no lock
        try:
            for defense in all_defenses():
                self.settings(defense)
        except InputError as error:
            raise PackError(f"Pack {pack.name!r}, test_time of {defense.name}: {error}") from error

    def prepare(
        self,
        classes: str | Sequence[str],
        *,
        template: str | None = None,
        selection: Selection = "float32",
        as_listed: bool = False,
    ) -> PromptedClip:
        """CLIP with the pack's prompts, ready for a class list; the last few are remembered.

        template: class sentence of vanilla CLIP and V, default the pack's.
        selection: precision in which views are selected; everything else is float32.
        as_listed: take every name as it is, repetitions included, as labels count them.

        Raises:
            InputError: fewer than two classes or too many, or a name that is too long.
        """
        names = tuple(classes) if as_listed else tuple(parse_classes(classes))
        key = names, template or self.pack.prompts.config.template, selection
        if known := self._prepared.get(key):
            return known
        fast = self.backbone.in_bfloat16() if selection == "bfloat16" else None
        parts = self.backbone, self.pack.prompts, self.pack.statistics
        clip = PromptedClip(*parts, names, key[1], fast)
        clip.vanilla_texts.features(self.backbone)  # refuses a sentence that is too long
        if not clip.text_features.isfinite().all():
            raise PackError(f"The prompts of pack {self.pack.name!r} give no finite answers.")
        self._prepared = dict([*self._prepared.items(), (key, clip)][-REMEMBERED:])
        return clip

    def settings(self, defense: Defense, changes: Changes = None) -> Any:
        """A defence's settings: its own defaults, the pack's choice, then `changes`.

        changes: by name for every defence that has such a setting, or `DEFENCE.NAME` for one; None
            leaves a setting as it is.
        """
        fields = defense.settings.model_fields
        given = dict(self.pack.test_time.get(defense.name, {}))
        for key, value in (changes or {}).items():
            owner, _, name = key.rpartition(".")
            if name in fields and owner in ("", defense.name) and value is not None:
                given[name] = value
        return defense.settings(**given)

    def prepare_defenses(
        self, clip: PromptedClip, defenses: Sequence[str] | None = None, changes: Changes = None
    ) -> dict[str, PreparedDefense]:
        """The named defences, else those that answer by default, ready for a class list.

        Raises:
            InputError: unknown defences or settings, or values outside their range.
        """
        rows = find_defenses(defenses)
        known = {name for row in all_defenses() for name in row.settings.model_fields}
        for key in changes or {}:
            if key.rpartition(".")[2] not in known:
                raise InputError(f"{key!r} is a setting of no defence; there are {sorted(known)}.")
        return {row.name: row.prepare(clip, self.settings(row, changes)) for row in rows}

    def predict(self, image: Picture, classes: str | Sequence[str], **options: Any) -> Comparison:
        """Every defence's answer to a picture as it is; options as for `Task`."""
        return self.compare(image, classes, **options)

    def attack(
        self, image: Picture, classes: str | Sequence[str], attack: Attack, **options: Any
    ) -> Image.Image:
        """The attacked picture, 8-bit, at the model's size; options as for `Task`."""
        result = self.compare(image, classes, attack=attack, defenses=["clip"], **options)
        assert result.attacked is not None
        return to_picture(result.attacked)

    def compare(self, image: Picture, classes: str | Sequence[str], **options: Any) -> Comparison:
        """`compare_steps` to its end."""
        *_, (_, result) = self.compare_steps(image, classes, **options)
        return result

    def compare_steps(
        self, image: Picture, classes: str | Sequence[str], **options: Any
    ) -> Iterator[tuple[Phase, Comparison]]:
        """Attacks one picture, asks every defence, and yields (phase, results so far).

        Vanilla CLIP's answers come first. Closing the generator stops the computation between two
        steps of the attack or two passes of a defence.

        options: as for `Task`, whose errors it raises.
        """
        start = time.perf_counter()
        task = Task(self, image, classes, **options)
        result = Comparison(
            task.clip.classes,
            task.describe(),
            task.pixels[0],
            {name: Answers() for name in task.prepared},
            label=task.true_class,
            label_given=task.label is not None,
        )
        batches = {"clean": task.batch(task.pixels)}
        first = next(iter(task.prepared))
        yield from self._answer(result, task, first, "clean", batches["clean"])

        if task.attack is not None:
            began = time.perf_counter()
            attacked = yield from in_thread(
                "attack", result, partial(task.attacked_by, task.attack)
            )
            result.attacked = attacked[0]
            result.seconds["attack"] = time.perf_counter() - began
            batches["attacked"] = task.batch(attacked)
            yield Phase("attack", 1, 1), result

        for name in task.prepared:
            for kind, batch in batches.items():
                if getattr(result[name], kind) is None:
                    yield from self._answer(result, task, name, kind, batch)
        result.seconds["total"] = time.perf_counter() - start
        result.finished = True
        yield Phase("finished", 1, 1), result

    def _answer(
        self, result: Comparison, task: Task, name: str, kind: str, batch: ImageBatch
    ) -> Iterator[tuple[Phase, Comparison]]:
        """Asks one defence about one image, and yields beside its progress."""
        title = find_defense(name).title
        prediction, seconds = yield from in_thread(
            title, result, partial(timed, task.prepared[name], batch, self)
        )
        trace = {key: plain(value, 0) for key, value in prediction.trace.items()}
        answer = Answer(result.classes, prediction.probabilities[0], trace, seconds)
        setattr(result[name], kind, answer)
        yield Phase(title, 1, 1), result

    def floats(self, pixels: Tensor) -> Tensor:
        """uint8 images in [0, 1], in the backbone's place and type."""
        return to_float(pixels.to(self.backbone.device), self.backbone.dtype)


@dataclass(eq=False)
class Task:
    """One picture and what is asked about it, made ready and checked before the work begins.

    image: a picture or its file; it is resized and cropped to the model's input.
    attack: None leaves the picture as it is.
    attacked: the model that the attack sees: `clip`, `static`, or a defence as deployed,
        `deployed:NAME` (`deployed` alone is TAPT).
    label: the true class; default vanilla CLIP's clean answer.
    target: the class that the attack moves towards; default away from the true class.
    defenses: names of `list_defenses()`; default those that answer where nobody chose.
    settings: changes to the pack's own, as for `Model.settings`.
    seed: of everything random in the defences; `attack.seed` is the attack's.
    adaptive: what an attack on a deployed defence may spend.

    Raises:
        InputError: an argument is outside what is allowed; the message names it.
    """

    model: Model
    image: Picture
    classes: str | Sequence[str]
    attack: Attack | None = None
    attacked: str = "clip"
    label: str | None = None
    target: str | None = None
    defenses: Sequence[str] | None = None
    settings: Changes = None
    seed: int = 0
    adaptive: Adaptive = QUICK

    def __post_init__(self) -> None:
        model, clip = self.model, self.model.prepare(self.classes)
        for what, name in (("true class", self.label), ("target", self.target)):
            if name is not None and name not in clip.classes:
                raise InputError(f"The {what} {name!r} is not one of the class names.")
        kind, _, name = self.attacked.partition(":")
        if kind not in ATTACKED_MODELS or (name and kind != "deployed"):
            raise InputError(
                f"The attacked model must be clip, static, deployed or deployed:NAME of a "
                f"defence, got {self.attacked!r}."
            )
        self.victim: PreparedDefense | None = None
        if kind == "deployed":
            name = name or VICTIM
            self.attacked = f"deployed:{name}"
            self.victim = model.prepare_defenses(clip, [name], self.settings)[name]
        self.clip, self.prepared = clip, model.prepare_defenses(clip, self.defenses, self.settings)
        image = self.image if isinstance(self.image, Image.Image) else open_image(self.image)
        self.pixels = model.backbone.preprocess(image)[None]  # uint8 (1, 3, S, S)
        with torch.no_grad():
            answer = clip.vanilla(model.floats(self.pixels))[0].argmax()
        self.true_class = int(answer) if self.label is None else clip.classes.index(self.label)
        if clip.classes[self.true_class] == self.target:
            raise InputError(f"The target {self.target!r} is the true class already.")

    def batch(self, pixels: Tensor) -> ImageBatch:
        """The picture, attacked or not, for the defences."""
        return ImageBatch(self.model.floats(pixels), image_seeds(self.seed, [0]))

    def attacked_by(self, attack: Attack, on_progress: Progress) -> Tensor:
        """The attacked picture, uint8 (1, 3, S, S)."""
        targets = None
        if self.target is not None:
            targets = torch.tensor([self.clip.classes.index(self.target)], device="cpu")
        return attack_batch(
            self.clip,
            self.attacked,
            self.pixels,
            torch.tensor([self.true_class], device="cpu"),
            attack,
            targets=targets,
            prepared=self.victim,
            adaptive=self.adaptive,
            on_progress=on_progress,
        )

    def describe(self) -> dict[str, Any]:
        """What the answers depend on, as a JSON object."""
        backbone, pack, attack = self.model.backbone, self.model.pack, self.attack
        return {
            "backbone": backbone.name,
            "backbone_commit": backbone.revision,
            "pack": pack.name,
            "pack_commit": pack.origin and pack.origin.commit,
            "trained": pack.trained,
            "prompts": pack.prompts.config.model_dump(mode="json"),
            "test_time": {n: d.settings.model_dump(mode="json") for n, d in self.prepared.items()},
            "attack": attack and attack.to_dict(),
            "epsilon_255": attack and attack.epsilon_255,
            "attacked_model": attack and self.attacked,
            "adaptive": self.adaptive.model_dump() if attack and self.victim else None,
            "target": attack and self.target,
            "seed": self.seed,
        }


def timed(
    defense: PreparedDefense,
    batch: ImageBatch,
    model: Model,
    report: Progress = quiet,
) -> tuple[Prediction, float]:
    """A defence's answers, and the seconds that it would have taken alone.

    Raises:
        PackError: the answers are not finite.
    """
    began, before = time.perf_counter(), batch.reused
    prediction = defense.predict(batch, on_progress=report)
    if not prediction.probabilities.isfinite().all():
        raise PackError(f"The prompts of pack {model.pack.name!r} give no finite answers.")
    return prediction, time.perf_counter() - began + batch.reused - before


def load(
    name: str | None = None,
    *,
    backbone: str | None = None,
    pack: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    device: str | None = None,
    token: Token = False,
    progress: Progress | None = None,
) -> Model:
    """Loads a model.

    name: a pack (embedded, `small/vli`; a Hub id, `owner/repo@v1`; a folder), which brings its
        backbone along, or a backbone (`ViT-B-16`, `hf-hub:owner/repo`, `random:ViT-B-32`, ...),
        with its embedded pack or else untrained prompts. Default `small/vli`.
    backbone, pack: the same, one by one; with both, the pack must have been made for the backbone.
    revision: branch, tag or commit of a Hub backbone.
    device: default CUDA, then MPS, then CPU, whichever is there.
    token: of the Hub; False for none, None for the user's own.
    progress: called with the bytes of a download that have arrived and those to come in all.

    Raises:
        BackboneError, PackError, HubError: unknown, malformed, or not made for each other.
    """
    if name is not None:
        if backbone is not None or pack is not None:
            raise InputError("Give a name, or backbone and pack; not both.")
        is_backbone = is_public(name) or (":" in name and not os.path.isdir(name))
        backbone, pack = (name, None) if is_backbone else (None, name)
    if backbone is None and pack is None:
        pack = DEFAULT
    options: dict[str, Any] = {"device": device, "token": token, "progress": progress}
    files, unreachable = None, None
    if pack is not None:
        files = open_pack(pack, token=token, progress=progress)
        unreachable = files.origin.unreachable if files.origin else None
        if backbone is None:
            wanted = files.config.base_model
            backbone, revision = wanted.source, revision or wanted.revision
    assert backbone is not None
    loaded, origin = load_backbone(backbone, revision=revision, unreachable=unreachable, **options)
    if files is None:
        return Model(loaded, default_pack(loaded), (origin, None))
    return Model(loaded, files.read(loaded), (origin, files.origin))
