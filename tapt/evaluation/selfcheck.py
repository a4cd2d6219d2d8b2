"""Sanity rules that an attack harness must pass.

An image counts as right where a model keeps its own clean answer, so no labels are needed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import tapt
from tapt.core.attacks import METHODS, Attack, attack_images, linf_255
from tapt.core.clip import Classifier, PromptedClip
from tapt.core.images import to_float
from tapt.core.views import generators, image_seeds, random_view
from tapt.data import LabelledImages, benchmarks
from tapt.data.pictures import open_image
from tapt.defenses import ImageBatch, PreparedDefense, find_defenses
from tapt.defenses.adaptive import Adaptive
from tapt.defenses.deployed import Deployed, ask, attack_deployed
from tapt.evaluation.probes import Masked, NoDefense, Unmasked
from tapt.model import VICTIM, Model

EXAMPLES = Path(tapt.__file__).with_name("examples")
IMAGES, FEW, DRAWS = 16, 4, 4
LARGE, MIDDLE, SMALL = 128 / 255, 8 / 255, 1 / 255
LEAN = Adaptive(pool=2, refresh=2, judging=4, draws=1)
FEWER_VIEWS = {"views": 16, "keep": 0.25}  # it is the harness that is checked, not the defence


@dataclass(frozen=True)
class Lab:
    """The harness under test; its parts can be replaced by broken ones.

    pixels: uint8, (N, 3, S, S).
    """

    clip: PromptedClip
    defenses: Mapping[str, PreparedDefense]
    pixels: Tensor
    attack: Callable[..., Tensor] = attack_images
    deployed: Callable[..., Tensor] = attack_deployed
    ask: Callable[..., Tensor] = ask

    @torch.no_grad()
    def answers(self, model: Classifier, pixels: Tensor) -> Tensor:
        """What a fixed model answers, (N,)."""
        images = to_float(pixels.to(self.clip.backbone.device), self.clip.backbone.dtype)
        return model(images).argmax(-1).cpu()

    def attacked(self, model: Classifier, attack: Attack) -> Tensor:
        """White-box on a fixed model, uint8 (N, 3, S, S)."""
        return self.attack(model, self.pixels, self.answers(model, self.pixels), attack)

    def accuracy(self, model: Classifier, attack: Attack) -> float:
        """Share of the answers of a fixed model that a white-box attack leaves."""
        attacked = self.answers(model, self.attacked(model, attack))
        return float((attacked == self.answers(model, self.pixels)).float().mean())

    def deployed_accuracy(
        self,
        prepared: PreparedDefense,
        attack: Attack,
        replayed: Classifier | None = None,
        **changes: object,
    ) -> float:
        """The same on the first few images for a defence as it is deployed, over fresh draws.

        replayed: the model whose attack is shown to it; default its own. changes: to `LEAN`.
        """
        pixels, adaptive = self.pixels[:FEW], LEAN.updated(**changes)
        seeds = image_seeds(0, range(len(pixels)))
        labels = self.ask(prepared, pixels, seeds, "label", DRAWS).mean(0).argmax(-1)
        if replayed is None:
            attacked = self.deployed(prepared, pixels, labels, attack, adaptive=adaptive)
        else:
            attacked = self.attack(replayed, pixels, labels, attack)
        answers = self.ask(prepared, attacked, seeds, "score", DRAWS).argmax(-1)
        return float((answers == labels).float().mean())


Verdict = tuple[bool, str]


def large_epsilon(lab: Lab) -> Verdict:
    """A large epsilon leaves no model right."""
    fixed = {"clip": lab.clip.vanilla, "static": lab.clip.static}
    left = {name: lab.accuracy(model, Attack("pgd", LARGE, 20)) for name, model in fixed.items()}
    if max(left.values()) <= 0.1:  # the deployed ones take longer
        for name, prepared in lab.defenses.items():
            if prepared.randomised:
                left[name] = lab.deployed_accuracy(prepared, Attack("pgd", LARGE, 8))
    return max(left.values()) <= 0.1, _percent(left)


def more_steps(lab: Lab) -> Verdict:
    """More attack steps never help the defender."""
    left = {n: lab.accuracy(lab.clip.static, Attack("pgd", SMALL, n)) for n in (1, 5, 20, 50)}
    values, noise = list(left.values()), max(0.05, 1.5 / len(lab.pixels))
    never = all(more <= fewer + noise for fewer, more in itertools.pairwise(values))
    return never, _percent({f"{n} steps": value for n, value in left.items()})


def rounding(lab: Lab) -> Verdict:
    """Every attacked image, rounded to 8 bits, is within epsilon and reaches it on both sides."""
    wrong, few = [], replace(lab, pixels=lab.pixels[:FEW])
    for name in (name for name, row in METHODS.items() if row.norm == "Linf"):
        attacked = few.attacked(lab.clip.static, Attack(name, 3 / 255, 2))
        if attacked.dtype != torch.uint8 or linf_255(attacked, few.pixels).max() > 3:
            wrong.append(f"{name} leaves the ball")
        change = attacked.int() - few.pixels.int()
        if name == "pgd" and (int(change.max()), int(change.min())) != (3, -3):
            wrong.append(f"{name} moves from {change.min()} to {change.max()} of 3")
    return not wrong, ", ".join(wrong) or "L-inf <= 3/255 for every attack"


def autoattack(lab: Lab) -> Verdict:
    """AutoAttack is at least as strong as PGD on the static prompts, within 2 points."""
    names = ("pgd", "autoattack")
    left = {name: lab.accuracy(lab.clip.static, Attack(name, SMALL, 10)) for name in names}
    return left["autoattack"] <= left["pgd"] + 0.02, _percent(left)


def black_box(lab: Lab) -> Verdict:
    """A black-box attack on the deployed defence is not stronger than the adaptive one."""
    left = {
        "square": lab.deployed_accuracy(lab.defenses[VICTIM], Attack("square", MIDDLE, 60)),
        "adaptive": lab.deployed_accuracy(lab.defenses[VICTIM], Attack("pgd", MIDDLE, 10)),
    }
    return left["adaptive"] <= left["square"] + 0.1, _percent(left)


def no_weaker_than_replays(lab: Lab) -> Verdict:
    """The attack on a deployed defence is not weaker than any attack that is replayed on it."""
    attack, prepared = Attack("pgd", MIDDLE, 10), lab.defenses[VICTIM]
    left = {"adaptive": lab.deployed_accuracy(prepared, attack)}
    for name, model in (("clip", lab.clip.vanilla), ("static", lab.clip.static)):
        left[f"from {name}"] = lab.deployed_accuracy(prepared, attack, model)
    return left["adaptive"] <= min(left.values()) + 0.1, _percent(left)


def more_pool(lab: Lab) -> Verdict:
    """More steps and more states in the pool never help the deployed defender."""
    left = {}
    for pool, steps in ((1, 2), (1, 8), (4, 8)):
        attack = Attack("pgd", MIDDLE, steps)
        left[f"pool of {pool}, {steps} steps"] = lab.deployed_accuracy(
            lab.defenses[VICTIM], attack, pool=pool, starts=False
        )
    fewer, *more = left.values()
    return max(more) <= fewer + 0.15, _percent(left)


def masked_gradient(lab: Lab) -> Verdict:
    """BPDA breaks a defence that masks its gradient on purpose; the plain gradient does not."""
    left = {
        name: lab.deployed_accuracy(kind(lab.clip, None), Attack("pgd", MIDDLE, 10), starts=False)
        for name, kind in (("plain gradient", Masked), ("BPDA", Unmasked))
    }
    return left["plain gradient"] >= 0.9 and left["BPDA"] <= 0.3, _percent(left)


def no_defence(lab: Lab) -> Verdict:
    """The attack breaks a defence that does nothing at random down to vanilla CLIP."""
    attack, few = Attack("pgd", SMALL, 10), replace(lab, pixels=lab.pixels[:FEW])
    left = {
        "noise of 0": lab.deployed_accuracy(NoDefense(lab.clip), attack, starts=False),
        "clip": few.accuracy(lab.clip.vanilla, attack),
    }
    return left["noise of 0"] <= left["clip"] + 1 / FEW, _percent(left)


def other_draws(lab: Lab) -> Verdict:
    """What scores a defence is neither what the attack saw nor what judged it."""
    noted = [NoDefense(lab.clip) for _ in range(2)]
    pixels, seeds = lab.pixels[:1], image_seeds(0, [0])
    label = lab.answers(lab.clip.vanilla, pixels)
    lab.deployed(noted[0], pixels, label, Attack("pgd", SMALL, 2), adaptive=LEAN)
    lab.ask(noted[1], pixels, seeds, "score", DRAWS)
    attack, score = (each.seeds for each in noted)
    shared, enough = len(attack & score), len(score) == DRAWS and len(attack) > DRAWS
    return enough and not shared, f"{shared} of {len(score)} are shared"


def same_model(lab: Lab) -> Verdict:
    """The attack sees the model that is scored, in float32: same classes, sentences and views."""
    backbone, seed = lab.clip.backbone, 3
    images = to_float(lab.pixels[:1].to(backbone.device), backbone.dtype)
    fresh = replace(lab.clip)  # reads its sentences anew
    farthest = {}
    for row in find_defenses(list(lab.defenses)):
        prepared = lab.defenses[row.name]
        first = int(torch.randint(2**62, (), generator=generators([seed])[0], device="cpu"))
        scored = row.prepare(fresh, prepared.settings).predict(ImageBatch(images, [first]))
        with torch.no_grad():
            attacked = Deployed(prepared, generators([seed]))(images)
        farthest[row.name] = float((attacked.exp().cpu() - scored.probabilities).abs().max())
    shown = ", ".join(f"{name} {value:.1g}" for name, value in farthest.items())
    exact = backbone.dtype == torch.float32
    return exact and max(farthest.values()) < 1e-3, f"largest difference of a probability: {shown}"


RULES = (
    large_epsilon,
    more_steps,
    rounding,
    autoattack,
    black_box,
    no_weaker_than_replays,
    more_pool,
    masked_gradient,
    no_defence,
    other_draws,
    same_model,
)


def _nothing(model: Classifier, pixels: Tensor, labels: Tensor, attack: Attack) -> Tensor:
    return pixels


def _wrong_way(model: Classifier, pixels: Tensor, labels: Tensor, attack: Attack) -> Tensor:
    targets = labels if attack.method.targeted else None
    return attack_images(model, pixels, labels, attack, targets=targets)


def _floored(model: Classifier, pixels: Tensor, labels: Tensor, attack: Attack) -> Tensor:
    change = attack_images(model, pixels, labels, attack).int() - pixels.int()
    return (pixels.int() + change - 1).clamp(0, 255).to(torch.uint8)


BROKEN = {"does nothing": _nothing, "goes the wrong way": _wrong_way, "rounds down": _floored}


def broken_attack(lab: Lab) -> Verdict:
    """An attack that is broken on purpose is caught."""
    few = replace(lab, pixels=lab.pixels[:FEW])
    labs = {name: replace(few, attack=attack) for name, attack in BROKEN.items()}
    missed = [name for name, each in labs.items() if rounding(each)[0] and large_epsilon(each)[0]]
    return not missed, f"missed: {', '.join(missed)}" if missed else f"{len(BROKEN)} caught"


def _percent(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.0f} %" for name, value in values.items())


def selfcheck(
    model: Model, data: LabelledImages | None = None
) -> Iterator[tuple[str, bool, str, float]]:
    """Runs every rule: what it says, whether it holds, what was measured, seconds.

    data: some of its images and its classes, instead of crops of the example pictures.
    """
    if data is None:
        clip = model.prepare(benchmarks()["CIFAR10"].classes)
        pixels = example_pixels(model)
    else:
        data = data.balanced(IMAGES)
        clip = model.prepare(data.classes, template=data.template, as_listed=True)
        pixels = torch.stack([model.backbone.preprocess(image) for image, _ in data])
    lab = Lab(clip, model.prepare_defenses(clip, changes=FEWER_VIEWS), pixels)
    for rule in (*RULES, broken_attack):
        began = time.perf_counter()
        passed, measured = rule(lab)
        yield (rule.__doc__ or "").splitlines()[0], passed, measured, time.perf_counter() - began


def example_pixels(model: Model, count: int = IMAGES) -> Tensor:
    """Random crops of the example pictures, uint8, (count, 3, S, S)."""
    (generator,) = generators([0])
    pictures = [model.backbone.preprocess(open_image(p)) for p in sorted(EXAMPLES.rglob("*.png"))]
    crops = [
        random_view(to_float(picture), generator, min_scale=0.5)
        for picture in itertools.islice(itertools.cycle(pictures), count)
    ]
    return (torch.stack(crops) * 255).round().to(torch.uint8)
