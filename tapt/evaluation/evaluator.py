"""What an evaluation measures: conditions, and every defence's outcome for each image.

Randomness belongs to (seed, image): how the images are cut into batches changes nothing but speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tapt.core.attacks import Attack, l2_norm, linf_255
from tapt.core.clip import PromptedClip
from tapt.core.views import image_seeds
from tapt.data import LabelledImages
from tapt.defenses import ImageBatch, PreparedDefense
from tapt.defenses.adaptive import Adaptive
from tapt.defenses.deployed import ask, attack_batch
from tapt.evaluation.outcomes import CONDITION, Key, Outcome
from tapt.model import Model, timed

AGREEMENT_IMAGES = 500
DEPLOYED = "deployed"


@dataclass(frozen=True)
class Condition:
    """What the images go through.

    attacked_model, attack: None for clean images.
    defenses: whose answers count; of a deployed defence its own.
    """

    attacked_model: str | None
    attack: Attack | None
    defenses: tuple[str, ...]

    def key(self, dataset: str) -> Key:
        """Values of `outcomes.CONDITION`."""
        attack = self.attack
        spent = (attack.name, attack.epsilon_255, attack.budget_steps) if attack else (None,) * 3
        return (dataset, self.attacked_model, *spent)


def make_conditions(
    attacks: Sequence[Attack], attacked: Sequence[str], defenses: Sequence[str]
) -> list[Condition]:
    """Clean images first, then every attack on every attacked model; on `deployed` each defence
    is attacked for itself."""
    conditions = [Condition(None, None, tuple(defenses))]
    for model, attack in product(attacked, attacks):
        groups = [(name,) for name in defenses] if model == DEPLOYED else [tuple(defenses)]
        conditions += [Condition(model, attack, names) for names in groups]
    unique = {(each.key(""), each.defenses): each for each in conditions}  # CW has no epsilon
    return list(unique.values())


@dataclass(frozen=True, eq=False)
class Evaluator:
    """All wanted defences of one data set.

    seed: of everything random.
    adaptive: what an attack on a deployed defence may spend.
    score_draws: fresh ones that score a randomised defence as deployed.
    """

    model: Model
    clip: PromptedClip
    defenses: dict[str, PreparedDefense]
    data: LabelledImages
    seed: int
    adaptive: Adaptive
    score_draws: int

    def pixels(self, images: Sequence[int]) -> Tensor:
        """Preprocessed images, uint8 (N, 3, S, S)."""
        preprocess = self.model.backbone.preprocess
        return torch.stack([preprocess(self.data.read(i)) for i in images])

    def batch(self, images: Sequence[int]) -> ImageBatch:
        """The images as they are, for the defences."""
        pixels = self.model.floats(self.pixels(images))
        return ImageBatch(pixels, image_seeds(self.seed, images))

    def outcomes(
        self, condition: Condition, images: Sequence[int], tick: Callable[[], None] = lambda: None
    ) -> list[Outcome]:
        """The outcome of each image; `tick` is called often and may raise to stop."""
        pixels = shown = self.pixels(images)
        labels = torch.tensor([self.data.labels[i] for i in images], device="cpu")
        began = time.perf_counter()
        if condition.attack is not None:
            shown = attack_batch(
                self.clip,
                str(condition.attacked_model),
                pixels,
                labels,
                condition.attack,
                prepared=self._deployed(condition),
                adaptive=self.adaptive,
                images=images,
                on_progress=lambda done, total: tick(),
            )
        spent = (time.perf_counter() - began) / len(images)
        answers, seconds = self._answers(condition, shown, image_seeds(self.seed, images), tick)
        right = {name: (a == labels).float().mean(0).tolist() for name, a in answers.items()}
        largest, sizes = linf_255(shown, pixels).tolist(), l2_norm(shown, pixels).tolist()
        return [
            Outcome(
                **dict(zip(CONDITION, condition.key(self.data.name), strict=True)),
                image=image,
                label=int(labels[i]),
                answers={name: int(a[:, i].mode().values) for name, a in answers.items()},
                right={name: shares[i] for name, shares in right.items()},
                linf_255=largest[i],
                l2=round(sizes[i], 5),
                budget=self._budget(condition),
                seconds=seconds,
                attack_seconds=spent,
            )
            for i, image in enumerate(images)
        ]

    def _deployed(self, condition: Condition) -> PreparedDefense | None:
        """The defence that is attacked as deployed, where one is."""
        (first, *_), deployed = condition.defenses, condition.attacked_model == DEPLOYED
        return self.defenses[first] if deployed else None

    def _budget(self, condition: Condition) -> str:
        attack, deployed = condition.attack, self._deployed(condition)
        if attack is None:
            return ""
        if deployed is None:
            return attack.budget
        scored = f", scored on {self.score_draws} fresh draws" if deployed.randomised else ""
        return self.adaptive.budget(deployed, attack) + scored

    def _answers(
        self, condition: Condition, pixels: Tensor, seeds: Sequence[int], tick: Callable[[], None]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Answers (draws, N), and the seconds per image that each defence takes alone. A deployed
        one answers over draws that neither the attack nor its choice knows."""
        batch, answers, seconds = ImageBatch(self.model.floats(pixels), seeds), {}, {}
        for name in condition.defenses:
            prepared, began = self.defenses[name], time.perf_counter()
            if self._deployed(condition):
                draws = self.score_draws if prepared.randomised else 1
                probabilities = ask(prepared, pixels, seeds, "score", draws, tick=tick)
                spent = (time.perf_counter() - began) / draws
            else:
                prediction, spent = timed(prepared, batch, self.model, lambda *_: tick())
                probabilities = prediction.probabilities[None]
            answers[name], seconds[name] = probabilities.argmax(-1), spent / len(pixels)
        return answers, seconds


def default_batch_size(evaluator: Evaluator) -> int:
    """Images per pass that every defence can take at once; more of them on a large GPU."""
    backbone = evaluator.model.backbone
    size = min(prepared.images_per_pass for prepared in evaluator.defenses.values())
    if backbone.device.type != "cuda":
        return size
    # a block keeps about 16 float32 values per channel for the gradient
    bytes_per_token = 64 * backbone.visual_width * backbone.visual_blocks
    free = torch.cuda.mem_get_info(backbone.device)[0] / 2
    return max(1, int(size * min(16.0, free / bytes_per_token / 8192)))


def selection_agreement(
    chosen: Evaluator, exact: Evaluator, batch_size: int
) -> list[dict[str, Any]]:
    """Randomised defences whose views one evaluator selects in bfloat16 beside the same ones in
    float32, on the first 500 clean images."""
    n = min(AGREEMENT_IMAGES, len(chosen.data))
    batches = [range(start, min(n, start + batch_size)) for start in range(0, n, batch_size)]

    def ask_all(evaluator: Evaluator, name: str) -> tuple[Tensor, float]:
        prepared = evaluator.defenses[name]
        answers = [timed(prepared, evaluator.batch(images), chosen.model) for images in batches]
        probabilities = [prediction.probabilities for prediction, _ in answers]
        return torch.cat(probabilities), sum(spent for _, spent in answers) / n

    entries = []
    for name in (name for name, prepared in chosen.defenses.items() if prepared.randomised):
        (fast, fast_seconds), (slow, seconds) = ask_all(chosen, name), ask_all(exact, name)
        entries.append(
            {
                "dataset": chosen.data.name,
                "defense": name,
                "n": n,
                "top1_agreement": int((fast.argmax(-1) == slow.argmax(-1)).sum()) / n,
                "largest_probability_difference": float((fast - slow).abs().max()),
                "seconds_per_image": {"bfloat16": fast_seconds, "float32": seconds},
            }
        )
    return entries
