"""`tapt predict IMAGE`: the main job in a terminal."""

from __future__ import annotations

import argparse
import io
import json
from typing import Any

from tapt.commands.options import (
    ATTACKED_HELP,
    add_attack_options,
    add_model_options,
    add_test_time,
    attack_of,
    filled,
    given,
    model_of,
    names,
    png_output,
    test_time,
)
from tapt.core.attacks import METHODS, Attack
from tapt.core.errors import InputError
from tapt.core.images import to_picture
from tapt.data.names import parse_classes
from tapt.data.pictures import open_image
from tapt.defenses import find_defenses
from tapt.defenses.adaptive import Adaptive
from tapt.files import write_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_picture_options(parser)
    parser.add_argument("--attack", default="none", choices=("none", *METHODS))
    add_attack_options(parser, "epsilon", "steps", "step_size", "seed")
    parser.add_argument("--save", help="write the attacked image to this PNG file")
    add_test_time(parser)


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """What every command on one picture takes."""
    parser.add_argument("image", metavar="IMAGE", help="any picture file")
    parser.add_argument("--classes", required=True, help="class names, by commas")
    add_model_options(parser)
    parser.add_argument("--defenses", type=names, metavar="A,B", help="default: all")
    parser.add_argument(
        "--attacked", type=filled, default="clip", help=f"{ATTACKED_HELP} (deployed:NAME)"
    )
    parser.add_argument("--label", help="true class; default: vanilla CLIP's clean answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def picture_options(args: argparse.Namespace, attack: Attack) -> dict[str, Any]:
    """What `tapt.model.Task` takes of them; wrong values end here, before a model is loaded."""
    find_defenses(args.defenses)
    return {
        "image": open_image(args.image),
        "classes": parse_classes(args.classes),
        "attacked": args.attacked,
        "label": args.label,
        "defenses": args.defenses,
        "settings": test_time(args),
        "seed": attack.seed,
        "adaptive": Adaptive(**given(args, Adaptive)),
    }


def run(args: argparse.Namespace) -> int:
    """Prints a table, or one JSON object."""
    attacking = args.attack != "none"
    attack = attack_of(args, args.attack if attacking else "pgd")
    if args.save is not None and not attacking:
        raise InputError("--save writes the attacked image: choose an --attack.")
    save = None if args.save is None else png_output(args.save, "--save")
    options = picture_options(args, attack)
    result = model_of(args).compare(**options, attack=attack if attacking else None)
    if save is not None and result.attacked is not None:
        png = io.BytesIO()
        to_picture(result.attacked).save(png, format="png")
        write_file(save, png.getvalue())
    print(json.dumps(result.to_dict()) if args.json else result)
    return 0
