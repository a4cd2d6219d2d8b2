"""`tapt bench`: seconds and memory per image, of both paths or of every defence."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from tapt.commands.options import add_settings, given, names, value_of
from tapt.defenses import list_defenses
from tapt.evaluation.bench import Job, bench, mistakes, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Seconds and memory per image, each measurement in a process of its own: TAPT's step "
        "beside a second, plain implementation that keeps the gradients of all views and passes "
        "whole class sentences (the exit status is 1 where their answers differ), or defences "
        "beside vanilla CLIP."
    )
    parser.add_argument(
        "--defenses", type=names, help=f"all, or of {', '.join(list_defenses())}, by commas"
    )
    parser.add_argument(
        "--classes",
        dest="counts",
        type=names,
        help="how many, by commas (default 10,100; for defences 100)",
    )
    parser.add_argument(
        "--designs", type=names, help="V, VLI, VLJ, by commas (default V,VLI; for defences VLI)"
    )
    options = "backbone", "views", "selection", "repeats", "threads", "device"
    add_settings(parser, Job, only=options)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints each row as soon as it is measured, or one JSON object at the end."""
    rows: list[dict[str, Any]] = []
    defenses = list_defenses() if args.defenses == ["all"] else args.defenses
    counts = args.counts and [value_of(Job.model_fields["classes"], n) for n in args.counts]
    for row in bench(
        defenses=defenses,
        designs=args.designs,
        classes=counts,
        **given(args, Job),
    ):
        rows.append(row)
        if not args.json:
            print(table(row), end="\n\n", flush=True)
    if args.json:
        print(json.dumps({"rows": rows}))
    wrong = mistakes(rows)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0
