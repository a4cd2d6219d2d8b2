"""`tapt statistics`: token statistics for trained prompts; makes the finished pack."""

from __future__ import annotations

import argparse
from typing import Any

from tapt.commands.options import (
    add_test_time,
    add_training_options,
    filled,
    test_time,
    training_inputs,
)
from tapt.core.errors import InputError
from tapt.files import check_output
from tapt.packs.format import load_pack
from tapt.training.statistics import statistics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_options(parser, "folder for the finished pack")
    parser.add_argument(
        "--adversarial", required=True, type=filled, help="folder with adversarially tuned prompts"
    )
    parser.add_argument(
        "--clean", required=True, type=filled, help="folder with clean-tuned prompts"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use a class-balanced subset of this many images"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random")
    add_test_time(parser)


def run(args: argparse.Namespace) -> int:
    """Says where the pack is."""
    if args.limit is not None and args.limit < 2:
        raise InputError(f"--limit must be at least 2, got {args.limit}.")
    changes, out = test_time(args), check_output(args.out, folder=True)
    state, backbone, data = training_inputs(args)
    adversarial, clean = (
        load_pack(folder, backbone, statistics=False) for folder in (args.adversarial, args.clean)
    )
    settings: dict[str, dict[str, Any]] = {k: {**v} for k, v in adversarial.test_time.items()}
    for key, value in changes.items():
        defense, _, name = key.partition(".")
        settings.setdefault(defense, {})[name] = value
    statistics(
        backbone,
        data,
        adversarial,
        clean,
        out,
        limit=args.limit,
        seed=args.seed,
        test_time=settings,
        resume=args.resume,
    )
    if state.is_main_process:
        print(f"Pack written to {out}.")
    return 0
