"""`python -m tapt sweep IMAGE`: what a stronger attack does to every defence on one picture."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from tapt.attacks import ATTACKS, AttackConfig
from tapt.compare import (
    ALL_THREATS,
    Progress,
    aims,
    attack_under,
    check_compare,
    versions,
    watched,
)
from tapt.defense import DEFENSES, Defender, make_defender, parse_classes
from tapt.errors import InputError
from tapt.files import write_file
from tapt.images import open_image
from tapt.options import (
    add_model_options,
    add_tuning_options,
    fraction,
    model_of,
    tuning_config,
)
from tapt.tuning import TuneConfig

EPSILONS = tuple(range(9))


@dataclass(eq=False)
class Sweep:
    """Curves as far as they are there.

    epsilons: in 1/255; 0 is the clean picture.
    probabilities: per defence, of the true class, for the first of the `epsilons`.
    answers: per defence, the top class name.
    """

    label: str
    label_given: bool
    epsilons: tuple[int, ...]
    settings: dict
    probabilities: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in DEFENSES}
    )
    answers: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in DEFENSES})

    def to_dict(self) -> dict:
        """A JSON object."""
        return {**vars(self), "versions": versions()}


def sweep_steps(
    defender: Defender,
    image: Image.Image,
    *,
    attack: AttackConfig | None = None,
    threat: str = "clip",
    label: str | None = None,
    target: str | None = None,
    epsilons: Sequence[int] = EPSILONS,
    config: TuneConfig | None = None,
    seed: int = 0,
    draws: int = 4,
) -> Iterator[tuple[Progress, Sweep]]:
    """Attacks one picture at every epsilon and yields (progress, curves so far).

    Closing the generator stops the computation as in `compare_steps`.

    attack: its epsilon is replaced; default PGD.
    threat, label, target, config, seed, draws: as for `compare_steps`.
    epsilons: in 1/255, from 0 on.

    Raises:
        InputError: an argument is outside what is allowed, or CW, which has no epsilon.
    """
    attack = attack or AttackConfig(seed=seed)
    if attack.attack.norm != "Linf":
        raise InputError(
            f"A sweep needs an attack with an epsilon; {attack.attack.title} has none."
        )
    check_compare(defender, attack, threat, label, target)
    config = config or defender.pack.test_time
    pixels = defender.backbone.preprocess(image)[None]
    clean = defender.clip(pixels)[0]
    index = int(clean.argmax()) if label is None else defender.classes.index(label)
    settings = {
        "attack": {k: v for k, v in attack.to_dict().items() if k not in ("epsilon", "step_size")},
        "threat": threat,
        "target": target,
        "backbone": defender.backbone.name,
        "pack": defender.pack.name,
        "trained": defender.pack.trained,
        "test_time": config.to_dict(),
        "seed": seed,
    }
    given = label is not None
    result = Sweep(defender.classes[index], given, tuple(epsilons), settings)
    labels, targets = aims(defender, index, target)
    for done, epsilon in enumerate(epsilons):
        phase, seen = f"epsilon {epsilon}/255", pixels
        if epsilon:
            now = replace(attack, epsilon=epsilon / 255)
            seen = yield from watched(
                f"{phase}, attack",
                result,
                lambda report, now=now: attack_under(
                    threat, defender, pixels, labels, targets, now, config, draws, report
                ),
            )
        defended = yield from watched(
            f"{phase}, defences",
            result,
            lambda report, seen=seen: defender.defend(
                seen, config=config, seeds=[seed], on_progress=report
            ),
        )
        told = {"clip": defender.clip(seen), **defended.probabilities}
        for name in DEFENSES:
            result.probabilities[name].append(float(told[name][0, index]))
            result.answers[name].append(defender.classes[int(told[name][0].argmax())])
        yield Progress("sweep", done + 1, len(epsilons)), result


def curve_png(result: Sweep) -> bytes:
    """The curves as a PNG file."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, values), marker in zip(result.probabilities.items(), "os^D", strict=True):
        axes.plot(result.epsilons[: len(values)], values, marker=marker, label=name)
    attack = result.settings["attack"]
    title = f"{ATTACKS[attack['name']].title}-{attack['steps']} on {result.settings['threat']}"
    axes.set_title(title if result.settings["trained"] else f"{title}, untrained prompts")
    axes.set_xlabel("epsilon, 1/255")
    axes.set_ylabel(f"probability of {result.label}")
    axes.set_ylim(-0.02, 1.02)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="any picture file")
    parser.add_argument("--classes", required=True, help="class names, by commas")
    add_model_options(parser)
    parser.add_argument("--attack", default="pgd", choices=tuple(ATTACKS))
    parser.add_argument("--steps", type=int, help="attack steps; default: the attack's own")
    parser.add_argument("--step-size", type=fraction, help="default 2.5 * epsilon / steps")
    parser.add_argument(
        "--threat", default="clip", choices=ALL_THREATS, help="model the attack sees"
    )
    parser.add_argument("--max-epsilon", type=int, default=8, help="in 1/255, default 8")
    parser.add_argument("--eot", type=int, default=4, help="view sets per adaptive gradient")
    parser.add_argument("--label", help="true class; default: vanilla CLIP's clean answer")
    parser.add_argument("--seed", type=int, default=0)
    add_tuning_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="PNG file for the curves")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.max_epsilon <= 255:
        raise InputError(f"--max-epsilon must be from 1 to 255, got {args.max_epsilon}.")
    image, classes = open_image(args.image), parse_classes(args.classes)
    attack = AttackConfig(args.attack, 1 / 255, args.steps, args.step_size, seed=args.seed)
    backbone, pack = model_of(args)
    *_, (_, result) = sweep_steps(
        make_defender(backbone, pack, classes),
        image,
        attack=attack,
        threat=args.threat,
        label=args.label,
        epsilons=range(args.max_epsilon + 1),
        config=tuning_config(args, pack.test_time),
        seed=args.seed,
        draws=args.eot,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(args.out, curve_png(result))
    print(json.dumps(result.to_dict()) if args.json else table(result))
    return 0


def table(result: Sweep) -> str:
    """Probability of the true class in percent, a row per epsilon."""
    lines = [f"probability of {result.label}, %", f"{'epsilon':<9}" + _cells(DEFENSES)]
    for i, epsilon in enumerate(result.epsilons):
        values = [f"{100 * result.probabilities[name][i]:.1f}" for name in DEFENSES]
        lines.append(f"{f'{epsilon}/255':<9}" + _cells(values))
    return "\n".join(lines)


def _cells(values: Sequence[str]) -> str:
    return "".join(f"{value:>10}" for value in values)
