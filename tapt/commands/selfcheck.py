"""`tapt selfcheck`: sanity rules that an attack harness must pass."""

from __future__ import annotations

import argparse

from tapt.commands.options import DATA_HELP, add_model_options, filled, model_of
from tapt.data import load_data
from tapt.evaluation.selfcheck import selfcheck


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sanity rules that an attack harness must pass. An image counts as right where a model "
        "keeps its own clean answer, so no labels are needed."
    )
    add_model_options(parser)
    parser.add_argument(
        "--data", type=filled, help=f"{DATA_HELP}; default: crops of the example pictures"
    )


def run(args: argparse.Namespace) -> int:
    """Prints each rule as soon as it is decided; the exit status is 1 where one fails."""
    data = load_data(args.data) if args.data else None
    verdicts = []
    for sentence, passed, measured, seconds in selfcheck(model_of(args), data):
        verdicts.append(passed)
        word = "pass" if passed else "FAIL"
        print(f"{word}  {sentence}\n      {measured} ({seconds:.0f} s)", flush=True)
    failed = verdicts.count(False)
    print(f"{failed} of {len(verdicts)} rules fail." if failed else "All rules hold.")
    return 1 if failed else 0
