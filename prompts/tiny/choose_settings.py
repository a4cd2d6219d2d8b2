"""Chooses a pack's test-time settings on images held out of the training data.

    python prompts/tiny/choose_settings.py --data cifar10-train.zip --pack prompts/tiny/vli

Tried are the pack's own settings and each listed value with the others as they are, on the same
images, clean and attacked by PGD (on vanilla CLIP, and on the static prompts); the best mean of the
three accuracies is printed first. The images are the validation split of `python -m tapt train`, so
no prompt was trained on them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tapt.attacks import AttackConfig, attack_images
from tapt.backbone import load_backbone
from tapt.data import load_data
from tapt.defense import Defender, make_defender
from tapt.images import to_float
from tapt.losses import entropy, mean_probability, select_views
from tapt.options import fraction
from tapt.pack import load_pack
from tapt.prompts import logits
from tapt.train import TrainConfig, load_training_data
from tapt.tuning import TuneConfig, tune
from tapt.views import make_views


def scored_views(
    defender: Defender, pixels: Tensor, count: int, first: int
) -> tuple[Tensor, Tensor]:
    """Views (M, V, 3, S, S) of each image and their logits under the static prompts, (M, V, C)."""
    views, scores = [], []
    for i, image in enumerate(to_float(pixels)):
        generator = torch.Generator().manual_seed(first + i)
        views.append(make_views(image, count, generator=generator))
        with torch.no_grad():
            text, prompts = defender.static_features, defender.pack.prompts
            scores.append(logits(defender.backbone, views[-1], text, prompts))
    return torch.stack(views), torch.stack(scores)


def kept_rows(scores: Tensor, config: TuneConfig) -> tuple[Tensor, Tensor]:
    """Index of the kept views of each image, as `scores[kept_rows(...)]` takes it."""
    kept = select_views(entropy(scores[:, : config.views]), config.keep)
    return torch.arange(len(scores))[:, None], kept


def answers(defender: Defender, kept_views: Tensor, pixels: Tensor, config: TuneConfig) -> Tensor:
    """TAPT's answers, (M,), when the views are selected already."""
    tuned = tune(
        defender.backbone,
        defender.pack.prompts,
        kept_views,
        defender.prompted,
        statistics=defender.pack.statistics,
        config=config.updated(keep=1.0),
    )
    with torch.no_grad():
        text = defender.prompted.features(defender.backbone, tuned.prompts)
        return logits(defender.backbone, to_float(pixels), text, tuned.prompts).argmax(-1)


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="the training data, as for the prompts")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--pack", required=True)
    parser.add_argument("--validation", type=float, default=0.02, help="as for the prompts")
    parser.add_argument("--epsilon", type=fraction, default=2 / 255)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--limit", type=int, default=200)
    for name, values in (
        ("lr", "0.0005,0.005,0.01,0.02,0.04"),
        ("alignment-weight", "0"),
        ("alpha", "0,1"),
        ("steps", "3"),
        ("views", "32"),
        ("keep", "0.05,0.2"),
    ):
        parser.add_argument(f"--{name}", type=numbers, default=numbers(values), help="by commas")
    args = parser.parse_args()

    backbone = load_backbone(args.backbone)
    split = TrainConfig(shots=None, validation=args.validation)
    data = load_training_data(load_data(args.data, "train"), backbone, split)
    images, labels = data.held_images[: args.limit], data.held_labels[: args.limit]
    defender = make_defender(backbone, load_pack(args.pack, backbone), data.classes)
    base = defender.pack.test_time
    fields = ("lr", "alignment_weight", "alpha", "steps", "views", "keep")
    own = {field: getattr(base, field) for field in fields}
    settings = [own]
    for field in fields:
        for value in getattr(args, field):
            changed = {**own, field: type(own[field])(value)}
            settings += [] if changed in settings else [changed]
    grid = [base.updated(**row) for row in settings]
    most_views = max(config.views for config in grid)
    attack = AttackConfig("pgd", args.epsilon, args.attack_steps)
    right = torch.zeros(len(grid) + 2, 3)  # rows: settings, then static and ensemble
    for start in range(0, len(images), 20):
        pixels, truth = images[start : start + 20], labels[start : start + 20]
        for column, threat in enumerate((None, "clip", "static")):
            seen = pixels
            if threat is not None:
                seen = attack_images(defender.classifier(threat), pixels, truth, attack)
            views, scores = scored_views(defender, seen, most_views, start)
            told = [
                answers(defender, views[kept_rows(scores, config)], seen, config) for config in grid
            ]
            told.append(defender.static(seen).argmax(-1))
            told.append(mean_probability(scores[kept_rows(scores, base)]).argmax(-1))
            right[:, column] += torch.stack([(t == truth).sum() for t in told])
        print(f"{start + len(pixels)}/{len(images)} images", file=sys.stderr)
    right /= len(images)
    table = [
        {
            "settings": name,
            "clean": round(float(row[0]), 4),
            "clip": round(float(row[1]), 4),
            "static": round(float(row[2]), 4),
            "mean": round(float(row.mean()), 4),
        }
        for name, row in zip([*settings, "static prompts", "untuned ensemble"], right, strict=True)
    ]
    for row in sorted(table, key=lambda row: -row["mean"]):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
