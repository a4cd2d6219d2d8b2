"""`tapt sweep IMAGE`: what a stronger attack does to every defence on one picture."""

from __future__ import annotations

import argparse
import json

from tapt.commands.options import (
    add_attack_options,
    add_test_time,
    attack_of,
    model_of,
    png_output,
    positive,
)
from tapt.commands.predict import add_picture_options, picture_options
from tapt.core.attacks import METHODS
from tapt.core.errors import InputError
from tapt.evaluation.sweep import curve_png, sweep_steps
from tapt.files import write_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_picture_options(parser)
    parser.add_argument("--attack", default="pgd", choices=tuple(METHODS))
    add_attack_options(parser, "steps", "step_size", "seed")
    parser.add_argument(
        "--max-epsilon", type=positive, default=8, metavar="N", help="in 1/255 (default 8)"
    )
    parser.add_argument("--out", required=True, help="PNG file for the curves")
    add_test_time(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the curves, and prints a table or one JSON object."""
    if args.max_epsilon > 255:
        raise InputError(f"--max-epsilon must be from 1 to 255, got {args.max_epsilon}.")
    attack = attack_of(args, args.attack)
    options, out = picture_options(args, attack), png_output(args.out, "--out")
    epsilons = range(args.max_epsilon + 1)
    *_, (_, result) = sweep_steps(model_of(args), **options, attack=attack, epsilons=epsilons)
    write_file(out, curve_png(result))
    print(json.dumps(result.to_dict()) if args.json else result)
    return 0
