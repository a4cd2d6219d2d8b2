"""A backbone with its pack, behind one call: load, predict, attack, compare."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from tapt.comparison import Answer, Answers, Comparison, plain
from tapt.core.attacks import Attack, attack_images
from tapt.core.backbone import Backbone
from tapt.core.clip import PromptedClip
from tapt.core.errors import Cancelled, InputError, PackError
from tapt.core.images import open_image, to_float, to_picture
from tapt.core.settings import Settings
from tapt.core.tuning import Progress as Report
from tapt.core.views import image_seeds
from tapt.data.names import parse_classes
from tapt.defenses import Defense, ImageBatch, Prediction, PreparedDefense, find_defenses
from tapt.defenses.deployed import attack_deployed
from tapt.packs.backbones import is_public, load_backbone
from tapt.packs.format import Pack, default_pack, open_pack
from tapt.packs.hub import Origin, Token

ATTACKED_MODELS = ("clip", "static", "deployed")
DEFAULT = "tiny/vli"
VICTIM = "tapt"  # the defence that `deployed` attacks where a picture is compared
DRAWS = 4  # of a deployed defence, for each gradient
REMEMBERED = 8  # class lists
T = TypeVar("T")
R = TypeVar("R")
Changes = Mapping[str, Any] | Settings | None
Selection = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Progress:
    """phase: what is running now, in words. done, total: of this phase."""

    phase: str
    done: int
    total: int


class Model:
    """A backbone with a pack; safe to share between threads, since nothing of it changes.

    origins: what of backbone and pack was fetched from the Hub.
    """

    def __init__(
        self, backbone: Backbone, pack: Pack, origins: Sequence[Origin | None] = (None, None)
    ) -> None:
        self.backbone, self.pack, self.origins = backbone, pack, tuple(origins)
        self._prepared: OrderedDict[tuple, PromptedClip] = OrderedDict()
        self._lock = threading.Lock()
        try:
            for defense in find_defenses():
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
        with self._lock:
            if key in self._prepared:
                self._prepared.move_to_end(key)
                return self._prepared[key]
        fast = self.backbone.in_bfloat16() if selection == "bfloat16" else None
        parts = self.backbone, self.pack.prompts, self.pack.statistics
        clip = PromptedClip(*parts, names, key[1], fast)
        clip.vanilla_texts.features(self.backbone)  # refuses a sentence that is too long
        if not clip.text_features.isfinite().all():
            raise PackError(f"The prompts of pack {self.pack.name!r} give no finite answers.")
        with self._lock:
            self._prepared[key] = clip
            while len(self._prepared) > REMEMBERED:
                self._prepared.popitem(last=False)
        return clip

    def settings(self, defense: Defense, changes: Changes = None) -> Any:
        """A defence's settings: its own defaults, the pack's choice, then `changes`.

        changes: by name for every defence that has such a setting, or `DEFENCE.NAME` for one; None
            leaves a setting as it is.
        """
        fields = defense.settings.model_fields
        given = dict(self.pack.test_time.get(defense.name, {}))
        for key, value in as_mapping(changes).items():
            owner, _, name = key.rpartition(".")
            if name in fields and owner in ("", defense.name) and value is not None:
                given[name] = value
        return defense.settings(**given)

    def prepare_defenses(
        self, clip: PromptedClip, defenses: Sequence[str] | None = None, changes: Changes = None
    ) -> dict[str, PreparedDefense]:
        """The named defences, default all, ready for a class list.

        Raises:
            InputError: unknown defences or settings, or values outside their range.
        """
        rows = find_defenses(defenses)
        known = {name for row in find_defenses() for name in row.settings.model_fields}
        for key in as_mapping(changes):
            if key.rpartition(".")[2] not in known:
                raise InputError(f"{key!r} is a setting of no defence; there are {sorted(known)}.")
        return {row.name: row.prepare(clip, self.settings(row, changes)) for row in rows}

    def predict(self, image: Picture, classes: str | Sequence[str], **options: Any) -> Comparison:
        """Every defence's answer to a picture as it is; options as for `compare_steps`."""
        return self.compare(image, classes, **options)

    def attack(
        self,
        image: Picture,
        classes: str | Sequence[str],
        attack: Attack,
        *,
        attacked: str = "clip",
        **options: Any,
    ) -> Image.Image:
        """The attacked picture, 8-bit, at the model's size; options as for `compare_steps`."""
        result = self.compare(
            image, classes, attack=attack, attacked=attacked, defenses=["clip"], **options
        )
        assert result.attacked is not None
        return to_picture(result.attacked)

    def compare(self, image: Picture, classes: str | Sequence[str], **options: Any) -> Comparison:
        """`compare_steps` to its end."""
        *_, (_, result) = self.compare_steps(image, classes, **options)
        return result

    def compare_steps(
        self,
        image: Picture,
        classes: str | Sequence[str],
        *,
        attack: Attack | None = None,
        attacked: str = "clip",
        label: str | None = None,
        target: str | None = None,
        defenses: Sequence[str] | None = None,
        settings: Changes = None,
        seed: int = 0,
        draws: int = DRAWS,
    ) -> Iterator[tuple[Progress, Comparison]]:
        """Attacks one picture, asks every defence, and yields (progress, results so far).

        Vanilla CLIP's answers come first. Closing the generator stops the computation between two
        steps of the attack or two passes of a defence.

        image: a picture or its file; it is resized and cropped to the model's input.
        attacked: the model that the attack sees: `clip`, `static`, or a defence as deployed,
            `deployed:NAME` (`deployed` alone is TAPT).
        label: the true class; default vanilla CLIP's clean answer.
        target: the class that the attack moves towards; default away from the true class.
        defenses: names, default all that are registered.
        settings: changes to the pack's own, as for `Model.settings`.
        seed: of everything random in the defences; `attack.seed` is the attack's.
        draws: of a deployed defence, for each gradient or query.

        Raises:
            InputError: an argument is outside what is allowed; the message names it.
        """
        clip = self.prepare(classes)
        task = Task(self, clip, attack, attacked, label, target, settings, draws)
        prepared = self.prepare_defenses(clip, defenses, settings)
        picture = image if isinstance(image, Image.Image) else open_image(image)
        pixels = self.backbone.preprocess(picture)[None]
        described = self.describe(task, prepared, seed)
        result = Comparison(clip.classes, described, pixels[0], {n: Answers() for n in prepared})
        start = time.perf_counter()
        index = result.label = task.true_class(pixels)
        result.label_given = label is not None

        batches = {"clean": ImageBatch(self.floats(pixels), image_seeds(seed, [0]))}
        first = next(iter(prepared))
        yield from self._answer(result, first, prepared[first], "clean", batches["clean"])

        if attack is not None:
            began = time.perf_counter()
            moved = yield from in_thread(
                "attack", result, lambda report: task.attack(pixels, index, report)
            )
            result.attacked = moved[0]
            result.seconds["attack"] = time.perf_counter() - began
            batches["attacked"] = ImageBatch(self.floats(moved), image_seeds(seed, [0]))
            yield Progress("attack", 1, 1), result

        for name, defense in prepared.items():
            for kind, batch in batches.items():
                if getattr(result[name], kind) is None:
                    yield from self._answer(result, name, defense, kind, batch)
        result.seconds["total"] = time.perf_counter() - start
        result.finished = True
        yield Progress("finished", 1, 1), result

    def _answer(
        self,
        result: Comparison,
        name: str,
        defense: PreparedDefense,
        kind: str,
        batch: ImageBatch,
    ) -> Iterator[tuple[Progress, Comparison]]:
        """Asks one defence about one image, and yields beside its progress."""
        title = find_defenses([name])[0].title
        prediction, seconds = yield from in_thread(
            title, result, lambda report: timed(defense, batch, self, report)
        )
        trace = {key: plain(value, 0) for key, value in prediction.trace.items()}
        answer = Answer(result.classes, prediction.probabilities[0], trace, seconds)
        setattr(result.answers[name], kind, answer)
        yield Progress(title, 1, 1), result

    def floats(self, pixels: Tensor) -> Tensor:
        """uint8 images in [0, 1], in the backbone's place and type."""
        return to_float(pixels.to(self.backbone.device), self.backbone.dtype)

    def describe(
        self, task: Task, prepared: Mapping[str, PreparedDefense], seed: int
    ) -> dict[str, Any]:
        attack = task.method
        return {
            "backbone": self.backbone.name,
            "backbone_commit": self.backbone.revision,
            "pack": self.pack.name,
            "pack_commit": self.pack.origin.commit if self.pack.origin else None,
            "trained": self.pack.trained,
            "prompts": self.pack.prompts.config.model_dump(mode="json"),
            "test_time": {n: d.settings.model_dump(mode="json") for n, d in prepared.items()},
            "attack": None if attack is None else attack.to_dict(),
            "epsilon_255": None if attack is None else attack.epsilon_255,
            "attacked_model": None if attack is None else task.attacked,
            "draws": task.draws if attack is not None and task.victim else None,
            "target": None if attack is None else task.target,
            "seed": seed,
        }


Picture = Image.Image | str | os.PathLike[str] | bytes


class Task:
    """What an attack on one picture does, checked before any work.

    attacked: with the defence's name where it is one as deployed; `victim` is that name.
    """

    def __init__(
        self,
        model: Model,
        clip: PromptedClip,
        method: Attack | None,
        attacked: str,
        label: str | None,
        target: str | None,
        settings: Changes,
        draws: int,
    ) -> None:
        for what, name in (("true class", label), ("target", target)):
            if name is not None and name not in clip.classes:
                raise InputError(f"The {what} {name!r} is not one of the class names.")
        if target is not None and target == label:
            raise InputError(f"The target {target!r} is the true class already.")
        if draws < 1:
            raise InputError(f"draws must be a whole number of at least 1, got {draws}.")
        kind, _, name = attacked.partition(":")
        if kind not in ATTACKED_MODELS or (name and kind != "deployed"):
            raise InputError(
                f"The attacked model must be clip, static, deployed or deployed:NAME of a "
                f"defence, got {attacked!r}."
            )
        self.victim = (name or VICTIM) if kind == "deployed" else ""
        self.attacked = f"{kind}:{self.victim}" if self.victim else kind
        self.model, self.clip, self.method, self.draws = model, clip, method, draws
        self.label, self.target = label, target
        if self.victim:
            self.prepared = model.prepare_defenses(clip, [self.victim], settings)[self.victim]

    def true_class(self, pixels: Tensor) -> int:
        """The given label as an index, else vanilla CLIP's answer to the first image.

        Raises:
            InputError: the target is that answer.
        """
        if self.label is not None:
            return self.clip.classes.index(self.label)
        with torch.no_grad():
            index = int(self.clip.vanilla(self.model.floats(pixels))[0].argmax())
        if self.clip.classes[index] == self.target:
            raise InputError(f"The target {self.target!r} is the true class already.")
        return index

    def attack(
        self, pixels: Tensor, label: int, report: Report, method: Attack | None = None
    ) -> Tensor:
        """The attacked images, uint8 (1, 3, S, S)."""
        attack = method or self.method
        assert attack is not None
        labels = torch.tensor([label], device="cpu")
        targets = None
        if self.target is not None:
            targets = torch.tensor([self.clip.classes.index(self.target)], device="cpu")
        return attack_batch(
            self.clip,
            self.attacked,
            pixels,
            labels,
            attack,
            targets=targets,
            prepared=self.prepared if self.victim else None,
            draws=self.draws,
            on_progress=report,
        )


def attack_batch(
    clip: PromptedClip,
    attacked: str,
    pixels: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    prepared: PreparedDefense | None = None,
    draws: int = DRAWS,
    **options: Any,
) -> Tensor:
    """Attacks 8-bit images (N, 3, S, S) on vanilla CLIP, on the static prompts, or on a defence as
    it is deployed.

    attacked: of `ATTACKED_MODELS`.
    prepared: the defence that is attacked as deployed.
    options: as for `attack_images`.
    """
    if prepared is not None:
        draws = draws if attack.method.gradients else 1  # a query is one answer
        return attack_deployed(prepared, pixels, labels, attack, draws=draws, **options)
    fixed = {"clip": clip.vanilla, "static": clip.static}[attacked]
    return attack_images(fixed, pixels, labels, attack, **options)


def timed(
    defense: PreparedDefense,
    batch: ImageBatch,
    model: Model,
    report: Report = lambda done, total: None,
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


def in_thread(
    phase: str, result: R, work: Callable[[Report], T]
) -> Generator[tuple[Progress, R], None, T]:
    """Runs `work(report)` in a thread, yields its progress beside `result` and returns its value;
    closing stops it at its next report."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()

    def report(done: int, total: int) -> None:
        if stop.is_set():
            raise Cancelled("Stopped.")
        events.put(Progress(phase, done, total))

    def run() -> None:
        try:
            events.put(("value", work(report)))
        except BaseException as error:
            events.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            event = events.get()
            if isinstance(event, Progress):
                yield event, result
                continue
            kind, value = event
            if kind == "error":
                raise value
            done: T = value
            return done
    finally:
        stop.set()
        thread.join()


def as_mapping(changes: Changes) -> Mapping[str, Any]:
    """Changes as names and values."""
    return changes.model_dump() if isinstance(changes, Settings) else changes or {}


def load(
    name: str | None = None,
    *,
    backbone: str | None = None,
    pack: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    device: str | None = None,
    token: Token = False,
    progress: Report | None = None,
) -> Model:
    """Loads a model.

    name: a pack (embedded, `tiny/vli`; a Hub id, `owner/repo@v1`; a folder), which brings its
        backbone along, or a backbone (`ViT-B-16`, `hf-hub:owner/repo`, `random:ViT-B-32`, ...),
        with its embedded pack or else untrained prompts. Default `tiny/vli`.
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
        backbone, pack = (name, None) if _is_backbone(name) else (None, name)
    if backbone is None and pack is None:
        pack = DEFAULT
    options: dict[str, Any] = {"device": device, "token": token, "progress": progress}
    files = None if pack is None else open_pack(pack, token=token, progress=progress)
    if files is None:
        assert backbone is not None
        loaded, origin = load_backbone(backbone, revision=revision, **options)
        return Model(loaded, default_pack(loaded), (origin, None))
    if backbone is None:
        wanted = files.config.base_model
        backbone, revision = wanted.source, revision or wanted.revision
    unreachable = files.origin.unreachable if files.origin else None
    loaded, origin = load_backbone(backbone, revision=revision, unreachable=unreachable, **options)
    return Model(loaded, files.read(loaded), (origin, files.origin))


def _is_backbone(name: str) -> bool:
    return is_public(name) or (":" in name and not os.path.isdir(name))
