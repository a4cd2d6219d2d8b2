"""`tapt convert CHECKPOINT`: a checkpoint of the published research code as a pack."""

from __future__ import annotations

import argparse
from pathlib import Path

from tapt.commands.options import backbone_of, filled
from tapt.files import check_output
from tapt.packs.card import write_pack
from tapt.packs.convert import convert_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes a pack of a checkpoint of the method's research code. Nothing of the file is "
        "executed; it may also hold the whole CLIP, an optimiser and a scheduler. What is missing "
        "or unknown is listed."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--design", required=True, choices=("V", "VLI", "VLJ"))
    parser.add_argument(
        "--base-model",
        dest="backbone",
        required=True,
        type=filled,
        help="the backbone: ViT-B-16, hf-hub:owner/repo, ...",
    )
    parser.add_argument("--revision", type=filled, help="branch, tag or commit of a Hub backbone")
    parser.add_argument(
        "--statistics",
        required=True,
        nargs=4,
        type=Path,
        metavar=("MEANS_ADV", "VARS_ADV", "MEANS_CLEAN", "VARS_CLEAN"),
        help="files with one tensor each, (blocks, tokens, width)",
    )
    parser.add_argument("--out", required=True, type=filled, help="folder for the pack")
    parser.set_defaults(device="cpu")


def run(args: argparse.Namespace) -> int:
    """Says where the pack is."""
    out = check_output(args.out, folder=True)
    pack = convert_files(args.checkpoint, args.design, args.statistics, backbone_of(args))
    write_pack(pack, out)
    print(f"Pack written to {out}.")
    return 0
