"""One picture attacked with growing epsilon: every defence's probability of the true class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from tapt.adaptive import check_threat
from tapt.attacks import AttackConfig
from tapt.compare import Comparison, Progress, attack_under, compare_steps, watched
from tapt.defense import DEFENSES, Defender
from tapt.errors import InputError
from tapt.tuning import TuneConfig


@dataclass(eq=False)
class Sweep:
    """Results as far as they are there.

    clean: the comparison without an attack; its label is the true class.
    settings: those of the attack, without its epsilon.
    curves: per defence (epsilon in 1/255, probability of the true class, whether it is the
        answer), in the order of epsilon; 0 is the clean image.
    """

    clean: Comparison
    settings: dict
    epsilons_255: tuple[int, ...]
    curves: dict[str, list[tuple[int, float, bool]]] = field(
        default_factory=lambda: {name: [] for name in DEFENSES}
    )
    finished: bool = False

    def add(self, epsilon_255: int, probabilities: dict[str, torch.Tensor]) -> None:
        label = self.clean.label
        for name, curve in self.curves.items():
            p = probabilities[name]
            curve.append((epsilon_255, float(p[label]), int(p.argmax()) == label))

    def to_dict(self) -> dict:
        """A JSON object."""
        keys = ("settings", "classes", "label", "label_given", "versions")
        clean = {k: v for k, v in self.clean.to_dict().items() if k in keys}
        return {
            **clean,
            "settings": {**clean["settings"], **self.settings},
            "epsilons_255": list(self.epsilons_255),
            "curves": {
                name: [
                    {"epsilon_255": e, "probability": p, "right": right} for e, p, right in curve
                ]
                for name, curve in self.curves.items()
            },
        }


def sweep_steps(
    defender: Defender,
    image: Image.Image,
    *,
    epsilons_255: Sequence[int],
    attack: AttackConfig,
    threat: str = "clip",
    label: str | None = None,
    target: str | None = None,
    config: TuneConfig | None = None,
    seed: int = 0,
    draws: int = 4,
) -> Iterator[tuple[Progress, Sweep]]:
    """Attacks a picture once per epsilon and yields (progress, results so far).

    epsilons_255: rising, in 1/255; 0 is the clean image and always the first.
    The rest is as for `compare_steps`.

    Raises:
        InputError: an attack without epsilon, or as `compare_steps`.
    """
    if attack.attack.norm != "Linf":
        raise InputError(f"{attack.attack.title} knows no epsilon: choose another attack.")
    check_threat(threat, attack)
    config = config or defender.pack.test_time
    points = tuple(sorted({0, *epsilons_255}))
    settings = {"attack": attack.to_dict(), "threat": threat, "target": target}
    options = {"label": label, "target": target, "config": config, "seed": seed}
    with closing(compare_steps(defender, image, **options)) as steps:
        for progress, clean in steps:
            result = Sweep(clean, {**settings, "epsilon_255": None}, points)
            yield progress, result
    if target == defender.classes[clean.label]:
        raise InputError(f"The target {target!r} is the true class already.")
    result.add(0, {name: kinds["clean"] for name, kinds in clean.results.items()})
    labels = torch.tensor([clean.label], device="cpu")
    targets = None
    if target is not None:
        targets = torch.tensor([defender.classes.index(target)], device="cpu")
    for done, epsilon in enumerate(points[1:], 1):
        yield Progress(f"epsilon {epsilon}/255", done, len(points)), result
        stronger = replace(attack, epsilon=epsilon / 255)
        aims = threat, defender, clean.clean[None], labels, targets, stronger, config, draws
        attacked = yield from watched(
            f"attack at epsilon {epsilon}/255",
            result,
            lambda report, aims=aims: attack_under(*aims, report),
        )
        defended = yield from watched(
            f"TAPT at epsilon {epsilon}/255",
            result,
            lambda report, seen=attacked: defender.defend(
                seen, config=config, seeds=[seed], on_progress=report
            ),
        )
        answers = {"clip": defender.clip(attacked), **defended.probabilities}
        result.add(epsilon, {name: p[0] for name, p in answers.items()})
    result.finished = True
    yield Progress("finished", 1, 1), result
