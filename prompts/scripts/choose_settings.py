"""Chooses a pack's test-time settings on images held out of the training data.

    python prompts/scripts/choose_settings.py --data cifar10-train.zip --pack tiny/vli

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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tapt.commands.options import fraction, fractions
from tapt.core.attacks import Attack, attack_images
from tapt.core.views import image_seeds
from tapt.data import load_data
from tapt.defenses import ImageBatch, PreparedDefense, find_defenses
from tapt.model import Model, load
from tapt.training.batches import TrainConfig, split_data

FIELDS = {
    "lr": "0.0005,0.005,0.01,0.02,0.04",
    "alignment_weight": "0",
    "alpha": "0,1",
    "steps": "3",
    "views": "32",
    "keep": "0.05,0.2",
}
BATCH = 20


def make_grid(model: Model, args: argparse.Namespace) -> list[dict[str, float]]:
    """The pack's own settings, then each listed value with the others as they are."""
    (tapt,) = find_defenses(["tapt"])
    base = model.settings(tapt).model_dump()
    own = {field: base[field] for field in FIELDS}
    grid = [own]
    for field in FIELDS:
        for value in getattr(args, field):
            changed = {**own, field: type(own[field])(value)}
            grid += [] if changed in grid else [changed]
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="the training data, as for the prompts")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--pack", required=True)
    parser.add_argument("--validation", type=float, default=0.02, help="as for the prompts")
    parser.add_argument("--epsilon", type=fraction, default=2 / 255)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--limit", type=int, default=200)
    for name, values in FIELDS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=fractions, default=fractions(values), help="by commas")
    args = parser.parse_args()

    model = load(backbone=args.backbone, pack=args.pack)
    split = TrainConfig(shots=None, validation=args.validation)
    data = split_data(load_data(args.data, "train"), model.backbone, split)
    clip = model.prepare(data.classes)
    grid = make_grid(model, args)
    fixed = model.prepare_defenses(clip, ["static", "ensemble"])
    rows: list[tuple[object, PreparedDefense]] = list(fixed.items())
    for settings in grid:
        changes = {f"tapt.{name}": value for name, value in settings.items()}
        rows.append((settings, model.prepare_defenses(clip, ["tapt"], changes)["tapt"]))

    attack = Attack(name="pgd", epsilon=args.epsilon, steps=args.attack_steps)
    right = torch.zeros(len(rows), 3)
    count = min(args.limit, len(data.held_out))
    for start in range(0, count, BATCH):
        images = range(start, min(start + BATCH, count))
        pixels, truth = data.held_out.batch(images), data.held_out_labels[list(images)]
        for column, attacked in enumerate((None, clip.vanilla, clip.static)):
            shown = pixels
            if attacked is not None:
                shown = attack_images(attacked, pixels, truth, attack, images=images)
            batch = ImageBatch(model.floats(shown), image_seeds(0, images))
            answers = [row.predict(batch).probabilities.argmax(-1) for _, row in rows]
            right[:, column] += torch.stack([(answer == truth).sum() for answer in answers])
        print(f"{images[-1] + 1}/{count} images", file=sys.stderr)
    right /= count
    for i in right.mean(1).argsort(descending=True).tolist():
        shares = zip(("clean", "clip", "static", "mean"), [*right[i], right[i].mean()], strict=True)
        print(json.dumps({"settings": rows[i][0], **{k: round(float(v), 4) for k, v in shares}}))


if __name__ == "__main__":
    main()
