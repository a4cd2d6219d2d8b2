"""`tapt evaluate`: accuracy of every defence on data sets, with intervals."""

from __future__ import annotations

import argparse
from typing import get_args

from tapt.commands.bars import ProgressBar
from tapt.commands.options import (
    ATTACKED_HELP,
    DATA_HELP,
    add_attack_options,
    add_model_options,
    add_test_time,
    attack_of,
    filled,
    fractions,
    given,
    join_processes,
    model_of,
    names,
    positive,
    test_time,
)
from tapt.core.attacks import METHODS
from tapt.core.errors import InputError
from tapt.defenses import find_defenses, list_defenses
from tapt.defenses.adaptive import Adaptive
from tapt.evaluation import check_record, evaluate, record
from tapt.files import check_output
from tapt.model import Selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Accuracy of every defence with and without attack, with Wilson 95 % intervals and exact "
        "McNemar tests. Outcomes are appended per batch: killed and started again, with any number "
        "of processes, the same command goes on and ends with the same table; further attacks and "
        "defences may be added to a folder."
    )
    parser.add_argument("--data", required=True, nargs="+", type=filled, help=DATA_HELP)
    add_model_options(parser)
    parser.add_argument("--defenses", type=names, help=f"of {', '.join(list_defenses())}")
    parser.add_argument(
        "--attacked",
        type=names,
        default=["clip", "static"],
        help=f"{ATTACKED_HELP}; several by commas (default clip,static)",
    )
    parser.add_argument(
        "--attack", type=names, default=["pgd"], help=f"of {', '.join(METHODS)}; several by commas"
    )
    parser.add_argument(
        "--epsilon", type=fractions, default=[1 / 255], help="such as 1/255,2/255 (default 1/255)"
    )
    add_attack_options(parser, "steps", "seed")
    parser.set_defaults(steps=100, queries=1000)
    parser.add_argument(
        "--rescore",
        type=positive,
        default=20,
        metavar="N",
        help="fresh draws that score a randomised defence as deployed (default 20)",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="a class-balanced subset of this many images"
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="images per pass; the result is the same"
    )
    parser.add_argument(
        "--precision",
        default="float32",
        choices=get_args(Selection),
        help="of the view selection; attacks and answers are float32. bfloat16 also reports how "
        "far it agrees with float32, and both speeds",
    )
    parser.add_argument("--out", type=filled, required=True, help="folder for the results")
    parser.add_argument(
        "--record", action="store_true", help="also write the rows into the pack and its card"
    )
    add_test_time(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    attacks = [attack_of(args, name, epsilon=e) for name in args.attack for e in args.epsilon]
    find_defenses(args.defenses)
    settings = test_time(args)
    check_output(args.out, folder=True)
    if args.record and not args.pack:
        raise InputError("--record needs --pack: the pack that the rows belong to.")
    state = join_processes(args)
    model = model_of(args)
    if args.record:
        check_record(model.pack)
    results = evaluate(
        model,
        args.data,
        attacks=attacks,
        attacked=args.attacked,
        defenses=args.defenses,
        settings=settings,
        out=args.out,
        limit=args.limit,
        seed=attacks[0].seed,
        adaptive=Adaptive(**given(args, Adaptive)),
        score_draws=args.rescore,
        batch_size=args.batch_size,
        selection=args.precision,
        progress=ProgressBar(unit="image", disable=not state.is_main_process),
    )
    if state.is_main_process:
        if args.record:
            record(model.pack, results.rows)
        print(results)
    return 0
