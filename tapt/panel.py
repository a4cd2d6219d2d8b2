"""What an evaluation measures: conditions, batches, and every defence's outcome per image."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import psutil
import torch
from torch import Tensor

from tapt.adaptive import DEPLOYED_THREATS, RANDOM_DEFENSES, ask
from tapt.attacks import AttackConfig, l2_norm, linf_255
from tapt.backbone import Backbone
from tapt.compare import attack_under
from tapt.data import LabelledImages
from tapt.defense import Defender, make_defender
from tapt.prompts import ClassTexts, random_prompts
from tapt.tuning import TuneConfig, tokens_per_image

AGREEMENT_IMAGES = 500


@dataclass(frozen=True)
class Condition:
    """What the images go through: `threat` is None for clean images.

    defenses: whose answers count; under a deployed threat the one that is attacked.
    """

    threat: str | None
    attack: AttackConfig | None
    defenses: tuple[str, ...]

    @property
    def key(self) -> dict:
        """The condition's fields in a record."""
        if self.attack is None:
            return {"threat": None, "attack": None, "epsilon_255": None, "steps": None}
        return {
            "threat": self.threat,
            "attack": self.attack.name,
            "epsilon_255": self.attack.epsilon_255,
            "steps": self.attack.steps,
        }


@dataclass(frozen=True)
class Unit:
    """A batch of images under one condition: what one process does at once.

    number: of the batch; it seeds the attack.
    """

    condition: Condition
    number: int
    images: range


class Panel:
    """All wanted defences of one data set."""

    def __init__(
        self, defender: Defender, config: TuneConfig, *, seed: int, draws: int, rescore: int
    ) -> None:
        self.defender, self.config, self.seed = defender, config, seed
        self.draws, self.rescore = draws, rescore

    @cached_property
    def random_start(self) -> Defender:
        """TAPT from random prompts, as the published code resets to."""
        known = self.defender
        prompts = random_prompts(known.backbone, known.pack.prompts.config, seed=self.seed)
        return make_defender(
            known.backbone,
            replace(known.pack, prompts=prompts),
            known.classes,
            template=known.template,
            coarse=known.coarse,
        )

    def records(self, unit: Unit, pixels: Tensor, labels: Tensor) -> Iterator[dict]:
        """One record per image of the unit."""
        condition, attack = unit.condition, unit.condition.attack
        began = time.perf_counter()
        seen, budget = pixels, ""
        if attack is not None:
            attack = replace(attack, seed=attack.seed * 1_000_003 + unit.number)
            seen, budget = self._attacked(condition, attack, pixels, labels)
        attack_seconds = (time.perf_counter() - began) / len(pixels)
        if condition.threat in DEPLOYED_THREATS:
            answers, seconds = self._rescored(condition.defenses[0], seen, attack)
        else:
            answers, seconds = self._answers(condition.defenses, seen, unit.images.start)
        largest, size = linf_255(seen, pixels), l2_norm(seen, pixels)
        memory = peak_memory_mb(self.defender.backbone.device)
        for i, image in enumerate(unit.images):
            told = {name: values[:, i] for name, values in answers.items()}
            yield {
                **condition.key,
                "image": image,
                "label": int(labels[i]),
                "linf_255": int(largest[i]),
                "l2": round(float(size[i]), 5),
                "answers": {name: int(values.mode().values) for name, values in told.items()},
                "right": {
                    name: float((values == labels[i]).float().mean())
                    for name, values in told.items()
                },
                "budget": budget,
                "seconds": seconds,
                "attack_seconds": attack_seconds,
                "peak_memory_mb": memory,
            }

    def _attacked(
        self, condition: Condition, attack: AttackConfig, pixels: Tensor, labels: Tensor
    ) -> tuple[Tensor, str]:
        defender, defense = self.defender, condition.defenses[0]
        deployed = condition.threat in DEPLOYED_THREATS
        if deployed:
            defender, defense = self._deployed(defense)
        attacked = attack_under(
            condition.threat,
            defender,
            pixels,
            labels,
            None,
            attack,
            self.config,
            self.draws,
            defense=defense,
        )
        if not deployed or defense not in RANDOM_DEFENSES:
            return attacked, attack.budget
        draws = self.draws if condition.threat == "adaptive" else 1
        twice = ", stronger of BPDA and smooth surrogate" if defense == "tapt" else ""
        twice = twice if attack.name != "square" else ""
        return (
            attacked,
            f"{attack.budget}, EOT {draws}{twice}, scored on {self.rescore} fresh draws",
        )

    def _deployed(self, defense: str) -> tuple[Defender, str]:
        return (
            (self.random_start, "tapt") if defense == "random-start" else (self.defender, defense)
        )

    def _rescored(
        self, name: str, pixels: Tensor, attack: AttackConfig
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Answers over draws that neither the attack nor its choice has seen, (draws, N)."""
        defender, defense = self._deployed(name)
        draws = self.rescore if defense in RANDOM_DEFENSES else 1
        began = time.perf_counter()
        probabilities = ask(defender, defense, pixels, draws, attack.seed + 7, self.config)
        spent = (time.perf_counter() - began) / len(pixels) / draws
        return {name: probabilities.argmax(-1)}, {name: spent}

    def _answers(
        self, defenses: Sequence[str], pixels: Tensor, first: int
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """One answer each, (1, N), with views seeded by the image's index; seconds per image."""
        seeds = [self.seed * 1_000_003 + first + i for i in range(len(pixels))]
        found: dict[str, tuple[Tensor, float]] = {}
        began = time.perf_counter()

        def spent() -> float:
            nonlocal began
            before, began = began, time.perf_counter()
            return began - before

        for name in ("clip", "static"):
            if name in defenses:
                found[name] = getattr(self.defender, name)(pixels), spent()
        if {"ensemble", "tapt"} & set(defenses):
            defended = self.defender.defend(pixels, config=self.config, seeds=seeds)
            elapsed, phases = spent(), defended.trace.seconds
            without_step = elapsed - phases.get("gradient", 0.0) - phases.get("predict", 0.0)
            found["ensemble"] = defended.probabilities["ensemble"], without_step
            found["tapt"] = defended.probabilities["tapt"], elapsed
        if "random-start" in defenses:
            defended = self.random_start.defend(pixels, config=self.config, seeds=seeds)
            found["random-start"] = defended.probabilities["tapt"], spent()
        answers = {name: found[name][0].argmax(-1)[None] for name in defenses}
        return answers, {name: found[name][1] / len(pixels) for name in defenses}


def make_units(conditions: Sequence[Condition], n: int, batch_size: int, draws: int) -> list[Unit]:
    """Batches by image index; those of a deployed threat are smaller by its draws."""
    units = []
    for condition in conditions:
        size = batch_size
        if condition.threat == "adaptive":
            size = max(1, batch_size // draws)
        starts = range(0, n, size)
        units += [
            Unit(condition, number, range(start, min(n, start + size)))
            for number, start in enumerate(starts)
        ]
    return units


def default_batch_size(
    backbone: Backbone, config: TuneConfig, texts: ClassTexts, processes: int = 1
) -> int:
    """Images per pass, by the memory that is free; on a processor at most 8,000 tokens."""
    device = backbone.device
    if device.type == "cuda":
        free, most = torch.cuda.mem_get_info(device)[0], 131_072
    else:
        free, most = psutil.virtual_memory().available // processes, 8192
    # a block keeps about 16 values per channel for the gradient
    bytes_per_token = 64 * backbone.visual_width * backbone.visual_blocks
    tokens = min(most, free / 2 / bytes_per_token)
    return max(1, int(tokens / tokens_per_image(backbone, config, texts)))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far: the GPU's where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    factor = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor / 1e6


def bfloat16_agreement(panel: Panel, data: LabelledImages, batch_size: int) -> dict:
    """TAPT with the selection in bfloat16 beside float32, on the first 500 clean images."""
    exact = replace(panel.defender, coarse=None)
    seconds, same, largest = {"bfloat16": 0.0, "float32": 0.0}, 0, 0.0
    n = min(AGREEMENT_IMAGES, len(data))
    for start in range(0, n, batch_size):
        pixels = read_pixels(data, range(start, min(n, start + batch_size)), exact.backbone)
        seeds, told = range(start, start + len(pixels)), {}
        for name, defender in (("bfloat16", panel.defender), ("float32", exact)):
            began = time.perf_counter()
            defended = defender.defend(pixels, config=panel.config, seeds=seeds)
            seconds[name] += time.perf_counter() - began
            told[name] = defended.probabilities["tapt"]
        same += int((told["bfloat16"].argmax(-1) == told["float32"].argmax(-1)).sum())
        largest = max(largest, float((told["bfloat16"] - told["float32"]).abs().max()))
    return {
        "dataset": data.name,
        "n": n,
        "top1_agreement": same / n,
        "largest_probability_difference": largest,
        "seconds_per_image": {name: value / n for name, value in seconds.items()},
    }


def read_pixels(data: LabelledImages, images: range, backbone: Backbone) -> Tensor:
    return torch.stack([backbone.preprocess(data.read(i)) for i in images])
