"""Command-line options that several commands share."""

from __future__ import annotations

import argparse
import math
import sys

from tqdm import tqdm

from tapt.backbone import Backbone
from tapt.pack import Pack, load_model
from tapt.tuning import TuneConfig

DATA_HELP = (
    "folder or zip of class folders, NAME:FOLDER, torchvision:NAME[:ROOT], split_zhou_*.json"
)


def fraction(text: str) -> float:
    """`4/255` or `0.0157` as a float."""
    try:
        over, _, under = text.partition("/")
        value = float(over) / float(under) if under else float(over)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 4/255")
    return value


def fractions(text: str) -> list[float]:
    """A list of fractions, by commas."""
    return [fraction(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """A list of names, by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="tiny", help="tiny, ViT-B-16, hf-hub:owner/repo, ...")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub backbone")
    parser.add_argument("--device", help="default: cuda, mps or cpu, the first that is there")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """A backbone, a pack, or both."""
    add_backbone_options(parser)
    parser.set_defaults(backbone=None)
    parser.add_argument(
        "--pack", help="tiny/vli, a folder or a Hub id owner/repo; default: the backbone's own"
    )


def model_of(args: argparse.Namespace) -> tuple[Backbone, Pack]:
    """The backbone and the pack that were asked for; says on stderr what came from the Hub."""
    backbone, pack = load_model(
        args.backbone,
        args.pack,
        revision=args.revision,
        device=args.device,
        token=None,
        progress=DownloadBar(),
    )
    for what, origin in (("Backbone", backbone.origin), ("Pack", pack.origin)):
        if origin:
            print(f"{what} {origin}", file=sys.stderr)
    return backbone, pack


class DownloadBar:
    """Shows a download's progress on stderr."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            options = {"unit": "B", "unit_scale": True, "dynamic_ncols": True}
            self.bar = tqdm(total=total, desc="Download", **options)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
            self.bar = None


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0, help="between checkpoints")


def add_tuning_options(parser: argparse.ArgumentParser) -> None:
    """Test-time settings; what is not given comes from the pack."""
    parser.add_argument("--views", type=int)
    parser.add_argument("--keep", type=float, help="share of the views that is kept")
    parser.add_argument("--tune-steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--alpha", type=float, help="share of the adversarial statistics")
    parser.add_argument("--alignment-weight", type=float)


def tuning_config(args: argparse.Namespace, default: TuneConfig) -> TuneConfig:
    return default.updated(
        views=args.views,
        keep=args.keep,
        steps=args.tune_steps,
        lr=args.lr,
        alpha=args.alpha,
        alignment_weight=args.alignment_weight,
    )
