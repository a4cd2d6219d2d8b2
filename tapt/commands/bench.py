"""`tapt bench`: seconds and memory per image, beside the straightforward path."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from tapt.commands.options import add_precision, add_settings, filled, names, positive
from tapt.core.tuning import TuneConfig
from tapt.evaluation.bench import bench, mistakes, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Seconds and memory per image, each path in a process of its own. The straightforward path "
        "is a second, plain implementation: it keeps the gradients of all views and passes whole "
        "class sentences. The exit status is 1 where their answers differ."
    )
    parser.add_argument("--backbone", type=filled, default="random:ViT-B-16")
    parser.add_argument(
        "--classes", type=counts, default=[10, 100], help="how many, by commas; up to 1000"
    )
    parser.add_argument(
        "--designs", type=names, default=["V", "VLI"], help="of V, VLI and VLJ, by commas"
    )
    add_settings(parser, TuneConfig, only=("views",))
    parser.add_argument(
        "--repeats", type=positive, default=1, metavar="N", help="both paths in turn (default 1)"
    )
    add_precision(parser, "of the fast path's view selection")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="of the processor; default torch's choice"
    )
    parser.add_argument("--device", type=filled, help="default: cuda, mps or cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def counts(text: str) -> list[int]:
    """Whole numbers, by commas."""
    return [positive(part) for part in names(text)]


def run(args: argparse.Namespace) -> int:
    """Prints each row as soon as it is measured, or one JSON object at the end."""
    rows: list[dict[str, Any]] = []
    for row in bench(
        args.backbone,
        classes=args.classes,
        designs=args.designs,
        views=64 if args.views is None else args.views,
        repeats=args.repeats,
        selection=args.precision,
        threads=args.threads,
        device=args.device,
    ):
        rows.append(row)
        if not args.json:
            lines = table([row]).splitlines()
            print(*lines[4 if len(rows) > 1 else 0 :], sep="\n", flush=True)  # one header
    if args.json:
        print(json.dumps({"rows": rows}))
    wrong = mistakes(rows)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0
