"""Tries training settings of prompts on images held out of the training data.

    python prompts/scripts/choose_prompts.py --data cifar10-train.zip --design VLI --tokens 2,4,8

Every combination of the lists is trained for a few batches. Scored are the static prompts on the
validation split of `python -m tapt train`: clean, and under PGD-5 at 1, 2 and 4/255, whatever the
training epsilon was. One JSON line per combination.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tapt.commands.options import fractions
from tapt.core.prompts import PromptConfig
from tapt.data import load_data
from tapt.packs.backbones import load_backbone
from tapt.training.batches import TrainConfig, split_data
from tapt.training.prompts import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="the training data, as for the prompts")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--design", default="VLI", choices=("V", "VLI", "VLJ"))
    parser.add_argument("--shots", type=int, default=700, help="images per class")
    parser.add_argument("--text-depth", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    for name, default in (
        ("tokens", "4"),
        ("depth", "6"),
        ("epsilon", "2/255"),
        ("clean-share", "0.25"),
        ("lr", "0.01"),
    ):
        parser.add_argument(f"--{name}", type=fractions, default=fractions(default))
    args = parser.parse_args()

    backbone, _ = load_backbone(args.backbone)
    fixed = TrainConfig(
        shots=args.shots,
        epochs=1,
        batch_size=128,
        optimizer="adamw",
        min_crop=0.3,
        validation=0.02,
        precision="bfloat16",
        seed=args.seed,
    )
    data = split_data(load_data(args.data, "train"), backbone, fixed)
    fields = ("tokens", "depth", "epsilon", "clean_share", "lr")
    for values in itertools.product(*(getattr(args, field) for field in fields)):
        setting = dict(zip(fields, values, strict=True))
        prompts = PromptConfig(
            design=args.design,
            tokens=int(setting.pop("tokens")),
            visual_depth=int(setting.pop("depth")),
            text_depth=None if args.design == "V" else args.text_depth,
        )
        trainer = Trainer(backbone, prompts, data, fixed.updated(**setting))
        while trainer.step < trainer.total:
            trainer.train_step()
        row = {"design": args.design, **dict(zip(fields, values, strict=True))}
        row["epsilon"] = f"{255 * row['epsilon']:.0f}/255"
        for epsilon in (1, 2, 4):
            scores = trainer.validate(epsilon=epsilon / 255)
            row["clean"] = scores["clean_accuracy"]
            row[f"pgd {epsilon}/255"] = scores["robust_accuracy"]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
