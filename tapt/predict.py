"""`python -m tapt predict IMAGE`: the main job in a terminal."""

from __future__ import annotations

import argparse
import json

from tapt.attacks import ATTACKS, AttackConfig
from tapt.compare import ALL_THREATS, Comparison, compare
from tapt.defense import DEFENSES, make_defender, parse_classes
from tapt.errors import InputError
from tapt.images import open_image, save_png, to_picture
from tapt.options import (
    add_model_options,
    add_tuning_options,
    fraction,
    model_of,
    tuning_config,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="any picture file")
    parser.add_argument("--classes", required=True, help="class names, by commas")
    add_model_options(parser)
    parser.add_argument("--attack", default="none", choices=("none", *ATTACKS))
    parser.add_argument("--epsilon", type=fraction, default=4 / 255, help="such as 4/255")
    parser.add_argument("--steps", type=int, help="attack steps; default: the attack's own")
    parser.add_argument("--step-size", type=fraction, help="default 2.5 * epsilon / steps")
    parser.add_argument(
        "--threat", default="clip", choices=ALL_THREATS, help="model the attack sees"
    )
    parser.add_argument("--eot", type=int, default=4, help="view sets per adaptive gradient")
    parser.add_argument("--label", help="true class; default: vanilla CLIP's clean answer")
    parser.add_argument("--seed", type=int, default=0)
    add_tuning_options(parser)
    parser.add_argument("--save", help="write the attacked image to this PNG file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    image = open_image(args.image)
    classes = parse_classes(args.classes)
    attack = None
    if args.attack != "none":
        attack = AttackConfig(args.attack, args.epsilon, args.steps, args.step_size, seed=args.seed)
    elif args.save:
        raise InputError("--save writes the attacked image: choose an --attack.")
    backbone, pack = model_of(args)
    result = compare(
        make_defender(backbone, pack, classes),
        image,
        attack=attack,
        threat=args.threat,
        label=args.label,
        config=tuning_config(args, pack.test_time),
        seed=args.seed,
        draws=args.eot,
    )
    if args.save:
        save_png(to_picture(result.attacked), args.save)
    print(json.dumps(result.to_dict()) if args.json else table(result))
    return 0


def table(result: Comparison) -> str:
    """The answers of every defence, for people."""
    label = "untrained prompts" if not result.settings["trained"] else None
    names = {
        "clip": "vanilla CLIP",
        "static": label or "static prompts",
        "ensemble": "view ensemble, untuned",
        "tapt": "TAPT" if label is None else "TAPT, untrained prompts, entropy only",
    }
    width = max(map(len, names.values()))
    columns = ["clean"] if result.attacked is None else ["clean", "attacked"]
    lines = ["  ".join([" " * width, *(f"{c:<26}" for c in columns)]).rstrip()]
    for name in DEFENSES:
        cells = []
        for column in columns:
            answer = result.answer(name, column)
            cells.append(f"{answer[0][:17]:<17} {100 * answer[1]:5.1f} %  ")
        lines.append("  ".join([f"{names[name]:<{width}}", *cells]).rstrip())
    if result.attacked is not None:
        attack, epsilon = result.settings["attack"], result.settings["epsilon_255"]
        lines.append(
            f"{ATTACKS[attack['name']].title}-{attack['steps']} on "
            f"{names.get(result.settings['threat'], 'the deployed TAPT')}, "
            + ("no epsilon, " if epsilon is None else f"epsilon {epsilon}/255, ")
            + f"measured L-inf {result.linf_255}/255, L2 {result.l2:.2f}"
        )
    return "\n".join([*lines, result.verdict()])
