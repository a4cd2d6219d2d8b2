"""`python -m tapt selfcheck`: sanity rules that an attack harness must pass.

An image counts as right where a model keeps its own clean answer, so no labels are needed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tapt.adaptive import Deployed, ask, attack_deployed
from tapt.attacks import ATTACKS, AttackConfig, attack_images, linf_255
from tapt.backbone import load_backbone
from tapt.data import load_data
from tapt.datasets import benchmarks
from tapt.defense import DEFENSES, Defender, make_defender
from tapt.images import open_image, to_float
from tapt.options import add_backbone_options
from tapt.pack import default_pack, load_pack
from tapt.tuning import TuneConfig
from tapt.views import random_view

EXAMPLES = Path(__file__).with_name("ui") / "examples"
IMAGES, FEW = 16, 4
LARGE, MIDDLE, SMALL = 128 / 255, 8 / 255, 1 / 255


@dataclass(frozen=True)
class Lab:
    """The harness under test; its parts can be replaced by broken ones.

    pixels: uint8, (N, 3, S, S).
    """

    defender: Defender
    pixels: Tensor
    attack: Callable[..., Tensor] = attack_images
    deployed: Callable[..., Tensor] = attack_deployed

    @property
    def config(self) -> TuneConfig:
        """Fewer views than usual: it is the harness that is checked, not the defence."""
        return self.defender.pack.test_time.updated(views=16, keep=0.25)

    def attacked(self, threat: str, config: AttackConfig) -> Tensor:
        classifier = self.defender.classifier(threat)
        return self.attack(classifier, self.pixels, self.answers(threat), config)

    def answers(self, threat: str, pixels: Tensor | None = None) -> Tensor:
        """What a fixed model answers, (N,)."""
        pixels = self.pixels if pixels is None else pixels
        return getattr(self.defender, threat)(pixels).argmax(-1)

    def accuracy(self, threat: str, config: AttackConfig) -> float:
        """Share of the answers of a fixed model that a white-box attack leaves."""
        kept = self.answers(threat, self.attacked(threat, config)) == self.answers(threat)
        return float(kept.float().mean())

    def deployed_accuracy(self, defense: str, config: AttackConfig, draws: int = 1) -> float:
        """The same on the first few images for a defence as it is deployed, over fresh draws."""
        pixels = self.pixels[:FEW]
        labels = ask(self.defender, defense, pixels, 4, 1, self.config).mean(0).argmax(-1)
        attacked = self.deployed(
            self.defender, defense, pixels, labels, config, config=self.config, draws=draws
        )
        told = ask(self.defender, defense, attacked, 4, 2, self.config).argmax(-1)
        return float((told == labels).float().mean())


Verdict = tuple[bool, str]


def large_epsilon(lab: Lab) -> Verdict:
    """A large epsilon leaves no model right."""
    left = {t: lab.accuracy(t, AttackConfig("pgd", LARGE, 20)) for t in ("clip", "static")}
    if max(left.values()) <= 0.1:  # the deployed ones take longer
        for defense in ("ensemble", "tapt"):
            left[defense] = lab.deployed_accuracy(defense, AttackConfig("pgd", LARGE, 8))
    return max(left.values()) <= 0.1, _percent(left)


def more_steps(lab: Lab) -> Verdict:
    """More attack steps never help the defender."""
    left = {n: lab.accuracy("static", AttackConfig("pgd", SMALL, n)) for n in (1, 5, 20, 50)}
    values, noise = list(left.values()), max(0.05, 1.5 / len(lab.pixels))
    never = all(more <= fewer + noise for fewer, more in itertools.pairwise(values))
    return never, _percent({f"{n} steps": value for n, value in left.items()})


def rounding(lab: Lab) -> Verdict:
    """Every attacked image, rounded to 8 bits, is within epsilon and reaches it on both sides."""
    wrong = []
    for name in (name for name, row in ATTACKS.items() if row.norm == "Linf"):
        config = AttackConfig(name, 3 / 255, 2)
        few = replace(lab, pixels=lab.pixels[:FEW])
        attacked = few.attacked("static", config)
        if attacked.dtype != torch.uint8 or linf_255(attacked, few.pixels).max() > 3:
            wrong.append(f"{name} leaves the ball")
        change = attacked.int() - few.pixels.int()
        if name == "pgd" and (int(change.max()), int(change.min())) != (3, -3):
            wrong.append(f"{name} moves from {change.min()} to {change.max()} of 3")
    return not wrong, ", ".join(wrong) or "L-inf <= 3/255 for every attack"


def autoattack(lab: Lab) -> Verdict:
    """AutoAttack is at least as strong as PGD on the static prompts, within 2 points."""
    left = {
        name: lab.accuracy("static", AttackConfig(name, SMALL, 10))
        for name in ("pgd", "autoattack")
    }
    return left["autoattack"] <= left["pgd"] + 0.02, _percent(left)


def black_box(lab: Lab) -> Verdict:
    """A black-box attack on the deployed defence is not stronger than the adaptive one."""
    left = {
        "square": lab.deployed_accuracy("tapt", AttackConfig("square", MIDDLE, 60)),
        "adaptive": lab.deployed_accuracy("tapt", AttackConfig("pgd", MIDDLE, 10), draws=2),
    }
    return left["adaptive"] <= left["square"] + 0.1, _percent(left)


def same_model(lab: Lab) -> Verdict:
    """The attack sees the model that is scored, in float32: same classes, sentences and views."""
    pixels, seed = lab.pixels[:FEW], 3
    images = to_float(pixels.to(lab.defender.backbone.device))
    scored = {"clip": lab.defender.clip(pixels[:1])}
    scored.update(lab.defender.defend(pixels[:1], config=lab.config, seeds=[seed]).probabilities)
    farthest = {}
    for name in DEFENSES:
        with torch.no_grad():
            seen = Deployed(lab.defender, name, config=lab.config, seed=seed)(images[:1])
        farthest[name] = float((seen.exp().cpu() - scored[name]).abs().max())
    told = ", ".join(f"{name} {value:.1g}" for name, value in farthest.items())
    exact = lab.defender.backbone.dtype == torch.float32
    return exact and max(farthest.values()) < 1e-3, f"largest difference of a probability: {told}"


RULES = (large_epsilon, more_steps, rounding, autoattack, black_box, same_model)


def _nothing(classifier, pixels: Tensor, labels: Tensor, config: AttackConfig) -> Tensor:
    return pixels


def _wrong_way(classifier, pixels: Tensor, labels: Tensor, config: AttackConfig) -> Tensor:
    targets = labels if config.attack.targeted else None
    return attack_images(classifier, pixels, labels, config, targets=targets)


def _floored(classifier, pixels: Tensor, labels: Tensor, config: AttackConfig) -> Tensor:
    change = attack_images(classifier, pixels, labels, config).int() - pixels.int()
    return (pixels.int() + change - 1).clamp(0, 255).to(torch.uint8)


BROKEN = {"does nothing": _nothing, "goes the wrong way": _wrong_way, "rounds down": _floored}


def broken_attack(lab: Lab) -> Verdict:
    """An attack that is broken on purpose is caught."""
    few = replace(lab, pixels=lab.pixels[:FEW])
    missed = [
        name
        for name, attack in BROKEN.items()
        if all(rule(replace(few, attack=attack))[0] for rule in (rounding, large_epsilon))
    ]
    return not missed, f"missed: {', '.join(missed)}" if missed else f"{len(BROKEN)} caught"


def _percent(values: dict) -> str:
    return ", ".join(f"{name} {100 * value:.0f} %" for name, value in values.items())


def check(lab: Lab) -> Iterator[tuple[str, bool, str, float]]:
    """Runs every rule: what it says, whether it holds, what was seen, seconds."""
    for rule in (*RULES, broken_attack):
        began = time.perf_counter()
        passed, seen = rule(lab)
        yield rule.__doc__.splitlines()[0], passed, seen, time.perf_counter() - began


def example_pixels(defender: Defender, count: int = IMAGES) -> Tensor:
    """Random crops of the page's example pictures, uint8, (count, 3, S, S)."""
    generator = torch.Generator().manual_seed(0)
    pictures = [
        defender.backbone.preprocess(open_image(path)) for path in sorted(EXAMPLES.rglob("*.png"))
    ]
    crops = [
        random_view(to_float(pictures[i % len(pictures)]), generator, min_scale=0.5)
        for i in range(count)
    ]
    return (torch.stack(crops) * 255).round().to(torch.uint8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_backbone_options(parser)
    parser.add_argument("--pack", help="tiny/vli or a folder; default: the backbone's own")
    parser.add_argument("--data", help="images instead of crops of the page's examples")


def run(args: argparse.Namespace) -> int:
    backbone = load_backbone(args.backbone, revision=args.revision, device=args.device)
    pack = load_pack(args.pack, backbone) if args.pack else default_pack(backbone)
    if args.data:
        data = load_data(args.data).balanced(IMAGES)
        defender = make_defender(backbone, pack, data.classes, template=data.template)
        pixels = torch.stack([backbone.preprocess(image) for image, _ in data])
    else:
        defender = make_defender(backbone, pack, benchmarks()["CIFAR10"].classes)
        pixels = example_pixels(defender)
    failed = 0
    for sentence, passed, seen, seconds in check(Lab(defender, pixels)):
        failed += not passed
        word = "pass" if passed else "FAIL"
        print(f"{word}  {sentence}\n      {seen} ({seconds:.0f} s)", flush=True)
    print("All rules hold." if not failed else f"{failed} of {len(RULES) + 1} rules fail.")
    return 1 if failed else 0
