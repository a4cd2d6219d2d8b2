"""The main job: one picture, attacked or not, vanilla CLIP beside TAPT."""

from __future__ import annotations

import platform
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from tapt.adaptive import DEPLOYED_THREATS, attack_deployed
from tapt.attacks import AttackConfig, attack_images, l2_norm, linf_255
from tapt.defense import DEFENSES, THREATS, Defended, Defender
from tapt.errors import Cancelled, InputError
from tapt.step import Losses
from tapt.tuning import Trace, TuneConfig

R = TypeVar("R")
T = TypeVar("T")
ALL_THREATS = (*THREATS, *DEPLOYED_THREATS)


@dataclass(eq=False)
class Comparison:
    """Results as far as they are there.

    clean, attacked: the 8-bit images that every model saw, uint8 (3, S, S).
    results: per defence (`clip`, `static`, `ensemble`, `tapt`) probabilities (C,) on the `clean`
        and the `attacked` image; a defence that has not answered yet has no entry.
    label: the true class as an index; `label_given` says whether a person named it, otherwise it
        is vanilla CLIP's own clean answer.
    seconds: per phase.
    """

    classes: tuple[str, ...]
    settings: dict
    clean: Tensor
    attacked: Tensor | None = None
    results: dict[str, dict[str, Tensor | None]] = field(default_factory=dict)
    label: int | None = None
    label_given: bool = False
    traces: dict[str, Trace | None] = field(
        default_factory=lambda: {"clean": None, "attacked": None}
    )
    seconds: dict[str, float] = field(default_factory=dict)
    finished: bool = False

    @property
    def linf_255(self) -> int | None:
        """Measured L-inf of the attack in 1/255; None without an attack."""
        if self.attacked is None:
            return None
        return int(linf_255(self.attacked[None], self.clean[None])[0])

    @property
    def l2(self) -> float | None:
        """Measured L2 size of the attack in [0, 1] pixels; None without an attack."""
        if self.attacked is None:
            return None
        return float(l2_norm(self.attacked[None], self.clean[None])[0])

    def answer(self, defense: str, image: str) -> tuple[str, float] | None:
        """Top class name and its probability, or None when there is no answer (yet)."""
        probabilities = self.results.get(defense, {}).get(image)
        if probabilities is None:
            return None
        value, index = probabilities.max(0)
        return self.classes[int(index)], float(value)

    def to_dict(self) -> dict:
        """The JSON object of `python -m tapt predict --json`."""
        results = {
            name: {
                image: _floats(self.results.get(name, {}).get(image))
                for image in ("clean", "attacked")
            }
            for name in DEFENSES
        }
        return {
            "settings": self.settings,
            "classes": list(self.classes),
            "label": None if self.label is None else self.classes[self.label],
            "label_given": self.label_given,
            "results": results,
            "linf_255": self.linf_255,
            "l2": self.l2,
            "trace": {k: None if v is None else trace_dict(v) for k, v in self.traces.items()},
            "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
            "versions": versions(),
        }

    def verdict(self) -> str:
        """One sentence or two that say what happened; plain text."""
        clean, tapt_clean = self.answer("clip", "clean"), self.answer("tapt", "clean")
        if clean is None:
            return ""
        truth = self.classes[self.label] if self.label_given else None
        if self.attacked is None:
            return _without_attack(clean[0], tapt_clean and tapt_clean[0], truth)
        return _with_attack(self, clean[0], truth)


def _without_attack(clip: str, tapt: str | None, truth: str | None) -> str:
    if tapt is None:
        return f"CLIP answers {clip}."
    if clip == tapt:
        both = f"Without an attack, CLIP and TAPT both answer {clip}"
        return f"{both}." if truth in (None, clip) else f"{both}; the true class is {truth}."
    sentence = f"Without an attack, CLIP answers {clip} and TAPT answers {tapt}"
    return f"{sentence}." if truth is None else f"{sentence}; the true class is {truth}."


def _with_attack(result: Comparison, clean: str, truth: str | None) -> str:
    attacked, tapt = result.answer("clip", "attacked"), result.answer("tapt", "attacked")
    tapt_clean = result.answer("tapt", "clean")
    if attacked is None:
        return f"CLIP answers {clean}; the attack is running."
    right = truth or clean
    seen = {"clip": "", "static": " on the static prompts"}
    aimed = "The attack" + seen.get(result.settings["threat"], " on TAPT itself")
    if clean != right:
        start = f"CLIP was wrong before the attack: it answers {clean} where {right} is true"
        start += "." if attacked[0] == clean else f", and {attacked[0]} after it."
        return start if tapt is None else f"{start} TAPT answers {tapt[0]} on the attacked image."
    if attacked[0] == clean:
        start = f"{aimed} failed to change CLIP's answer, {clean}"
        if tapt is None:
            return f"{start}."
        if tapt[0] == clean:
            return f"{start}; TAPT answers {clean} too."
        return f"{start}; TAPT, however, answers {tapt[0]}."
    start = f"{aimed} turned CLIP's answer from {clean} to {attacked[0]}"
    if tapt is None:
        return f"{start}."
    if tapt[0] == right:
        return f"{start}; TAPT answers {right}."
    if tapt_clean is not None and tapt_clean[0] != right:
        return f"{start}; TAPT answers {tapt[0]}, but it missed {right} before the attack too."
    return f"{start}; TAPT falls too and answers {tapt[0]}."


@dataclass(frozen=True)
class Progress:
    """phase: what is running now, in words. done, total: of this phase."""

    phase: str
    done: int
    total: int


def compare_steps(
    defender: Defender,
    image: Image.Image,
    *,
    attack: AttackConfig | None = None,
    threat: str = "clip",
    label: str | None = None,
    target: str | None = None,
    config: TuneConfig | None = None,
    seed: int = 0,
    draws: int = 4,
) -> Iterator[tuple[Progress, Comparison]]:
    """Runs the main job and yields (progress, results so far); the last pair is complete.

    Vanilla CLIP's answers come first. Closing the generator stops the computation between two
    steps of the attack or two passes of the tuning.

    image: any RGB picture; it is resized and cropped to the model's input.
    threat: the model that the attack sees: `clip`, `static`, or the deployed TAPT, by queries
        (`square`) or by gradients (`adaptive`).
    draws: view sets per gradient under the threat `adaptive`.
    label: the true class; default vanilla CLIP's clean answer.
    target: the class that the attack moves towards; default away from the true class.
    seed: of the views and the attack's random start (`attack.seed` wins for the latter).

    Raises:
        InputError: `label` or `target` is not one of the classes, or they are the same one, or
            `threat` is unknown.
    """
    check_compare(defender, attack, threat, label, target)
    pixels = defender.backbone.preprocess(image)
    config = config or defender.pack.test_time
    settings = _settings(defender, attack, threat, target, config, seed)
    if attack is not None and threat == "adaptive":
        settings["draws"] = draws
    result = Comparison(defender.classes, settings, pixels)
    start = time.perf_counter()

    began = time.perf_counter()
    result.results["clip"] = {"clean": defender.clip(pixels[None])[0], "attacked": None}
    result.seconds["clip"] = time.perf_counter() - began
    result.label_given = label is not None
    clean_answer = int(result.results["clip"]["clean"].argmax())
    result.label = clean_answer if label is None else defender.classes.index(label)
    yield Progress("vanilla CLIP", 1, 1), result

    if attack is not None:
        began = time.perf_counter()
        labels, targets = aims(defender, result.label, target)
        attacked = yield from watched(
            "attack",
            result,
            lambda report: attack_under(
                threat, defender, pixels[None], labels, targets, attack, config, draws, report
            ),
        )
        result.attacked = attacked[0]
        result.seconds["attack"] = time.perf_counter() - began
        result.results["clip"]["attacked"] = defender.clip(attacked)[0]
        yield Progress("attack", 1, 1), result

    for kind, seen in (("clean", result.clean), ("attacked", result.attacked)):
        if seen is None:
            continue
        began = time.perf_counter()
        defended: Defended = yield from watched(
            f"TAPT on the {kind} image",
            result,
            lambda report, seen=seen: defender.defend(
                seen[None], config=config, seeds=[seed], after=True, on_progress=report
            ),
        )
        for name, probabilities in defended.probabilities.items():
            result.results.setdefault(name, {"clean": None, "attacked": None})
            result.results[name][kind] = probabilities[0]
        result.traces[kind] = defended.trace
        result.seconds[f"tapt_{kind}"] = time.perf_counter() - began
        yield Progress(f"TAPT on the {kind} image", 1, 1), result
    result.seconds["total"] = time.perf_counter() - start
    result.finished = True
    yield Progress("finished", 1, 1), result


def check_compare(
    defender: Defender,
    attack: AttackConfig | None,
    threat: str,
    label: str | None,
    target: str | None,
) -> None:
    """Raises:
    InputError: `label` or `target` is not one of the classes, or `threat` is unknown or not for
        this attack.
    """
    for what, name in (("true class", label), ("target", target)):
        if name is not None and name not in defender.classes:
            raise InputError(f"The {what} {name!r} is not one of the class names.")
    if threat not in ALL_THREATS:
        raise InputError(f"threat must be one of {', '.join(ALL_THREATS)}, got {threat!r}.")
    if attack is not None and threat == "square" and attack.name != "square":
        raise InputError(f"The threat square needs the attack square, got {attack.name}.")


def aims(defender: Defender, label: int, target: str | None) -> tuple[Tensor, Tensor | None]:
    """What an attack on one image moves away from, and towards.

    Raises:
        InputError: the target is the true class.
    """
    if target == defender.classes[label]:
        raise InputError(f"The target {target!r} is the true class already.")
    targets = None
    if target is not None:
        targets = torch.tensor([defender.classes.index(target)], device="cpu")
    return torch.tensor([label], device="cpu"), targets


def attack_under(
    threat: str,
    defender: Defender,
    pixels: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    attack: AttackConfig,
    config: TuneConfig,
    draws: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    defense: str = "tapt",
) -> Tensor:
    """`attack_images` on a fixed model, or `attack_deployed` on a defence.

    draws: view sets per gradient under the threat `adaptive`.
    defense: the attacked one under a deployed threat.
    """
    common = {"targets": targets, "on_progress": on_progress}
    if threat in THREATS:
        return attack_images(defender.classifier(threat), pixels, labels, attack, **common)
    return attack_deployed(
        defender,
        defense,
        pixels,
        labels,
        attack,
        config=config,
        draws=1 if threat == "square" else draws,
        **common,
    )


def compare(defender: Defender, image: Image.Image, **options: object) -> Comparison:
    """`compare_steps` to its end."""
    *_, (_, result) = compare_steps(defender, image, **options)
    return result


def watched(
    phase: str, result: R, work: Callable[[Callable[[int, int], None]], T]
) -> Generator[tuple[Progress, R], None, T]:
    """Runs `work(report)` in a thread, yields its progress beside `result` and returns its value;
    closing stops it at its next report."""
    events: queue.SimpleQueue = queue.SimpleQueue()
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
            return value
    finally:
        stop.set()
        thread.join()


def versions() -> dict[str, str]:
    """What the numbers depend on, beside the settings."""
    packages = ("torch", "open_clip_torch", "torchattacks")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _settings(
    defender: Defender,
    attack: AttackConfig | None,
    threat: str,
    target: str | None,
    config: TuneConfig,
    seed: int,
) -> dict:
    pack = defender.pack
    return {
        "backbone": defender.backbone.name,
        "backbone_commit": defender.backbone.revision,
        "pack": pack.name,
        "pack_commit": pack.origin.commit if pack.origin else None,
        "trained": pack.trained,
        "prompts": pack.prompts.config.to_dict(),
        "test_time": config.to_dict(),
        "attack": None if attack is None else attack.to_dict(),
        "epsilon_255": None if attack is None else attack.epsilon_255,
        "threat": None if attack is None else threat,
        "target": None if attack is None else target,
        "seed": seed,
    }


def trace_dict(trace: Trace) -> dict:
    """A single image's trace as plain numbers."""
    return {
        "kept": trace.kept[0].tolist(),
        "entropies": _floats(trace.entropies[0]),
        "before": _losses_dict(trace.before),
        "after": None if trace.after is None else _losses_dict(trace.after),
        "seconds": {k: round(v, 4) for k, v in trace.seconds.items()},
    }


def _losses_dict(losses: Losses) -> dict:
    return {k: None if v is None else _floats(v[..., 0]) for k, v in vars(losses).items()}


def _floats(tensor: Tensor | None) -> list[float] | float | None:
    return None if tensor is None else tensor.double().tolist()
