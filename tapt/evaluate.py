"""Accuracy of every defence with and without attack, with intervals.

Under the threats `clip` and `static` one attacked image is shown to every defence: a transfer
attack for all rows but the attacked model's own (method: "threat model").
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tapt.attacks import ATTACKS, AttackConfig, attack_images, linf_255
from tapt.backbone import Backbone
from tapt.data import in_memory, load_data
from tapt.defense import DEFENSES, THREATS, Defender, make_defender
from tapt.errors import InputError
from tapt.losses import kept_views_count
from tapt.options import (
    add_model_options,
    add_tuning_options,
    fractions,
    model_of,
    names,
    tuning_config,
)
from tapt.pack import Pack, pack_folder, save_pack, write_file
from tapt.prompts import random_prompts
from tapt.tuning import TuneConfig

ALL_DEFENSES = (*DEFENSES, "random-start")
Z95 = 1.959963984540054


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson 95 % interval of a proportion."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Condition:
    """What the images went through: `threat` is None for clean images."""

    threat: str | None
    attack: AttackConfig | None

    @property
    def name(self) -> str:
        if self.attack is None:
            return "clean"
        return f"{self.threat} {self.attack.name} {self.attack.epsilon_255}/255"


class Answers:
    """All wanted defences' top-1 answers for batches of images, and the seconds they took."""

    def __init__(
        self, defender: Defender, defenses: Sequence[str], config: TuneConfig, seed: int
    ) -> None:
        self.defender, self.defenses, self.config, self.seed = defender, defenses, config, seed
        self.seconds = dict.fromkeys(defenses, 0.0)
        self.images = 0
        self.random_start: Defender | None = None
        if "random-start" in defenses:
            prompts = random_prompts(defender.backbone, defender.pack.prompts.config, seed=seed)
            pack = replace(defender.pack, prompts=prompts)
            self.random_start = make_defender(defender.backbone, pack, defender.classes)

    def __call__(self, pixels: Tensor, first: int) -> dict[str, Tensor]:
        """Per defence, answers (M,) for uint8 images (M, 3, S, S); `first` is the index of the
        first one, which seeds the views."""
        seeds = [self.seed * 1_000_003 + first + i for i in range(len(pixels))]
        self.images += len(pixels)
        answers: dict[str, Tensor] = {}
        for name in ("clip", "static"):
            if name in self.defenses:
                began = time.perf_counter()
                answers[name] = getattr(self.defender, name)(pixels)
                self.seconds[name] += time.perf_counter() - began
        if {"ensemble", "tapt"} & set(self.defenses):
            began = time.perf_counter()
            defended = self.defender.defend(pixels, config=self.config, seeds=seeds)
            elapsed = time.perf_counter() - began
            phases = defended.trace.seconds
            without_step = elapsed - phases.get("gradient", 0.0) - phases.get("predict", 0.0)
            for name, spent in (("ensemble", without_step), ("tapt", elapsed)):
                if name in self.defenses:
                    answers[name] = defended.probabilities[name]
                    self.seconds[name] += spent
        if self.random_start is not None:
            began = time.perf_counter()
            defended = self.random_start.defend(pixels, config=self.config, seeds=seeds)
            answers["random-start"] = defended.probabilities["tapt"]
            self.seconds["random-start"] += time.perf_counter() - began
        return {name: p.argmax(-1) for name, p in answers.items()}


def evaluation_batches(
    answers: Answers,
    images: Tensor,
    labels: Tensor,
    conditions: Sequence[Condition],
    batch_size: int,
) -> Iterator[dict]:
    """One record per image and condition: what every defence answered.

    The attack on a batch is seeded by (attack seed, batch).
    """
    defender = answers.defender
    for number, start in enumerate(range(0, len(images), batch_size)):
        pixels, truth = images[start : start + batch_size], labels[start : start + batch_size]
        for condition in conditions:
            seen = pixels
            if condition.attack is not None:
                attack = replace(condition.attack, seed=condition.attack.seed * 1_000_003 + number)
                classifier = defender.classifier(condition.threat)
                seen = attack_images(classifier, pixels, truth, attack)
            told = answers(seen, start)
            largest = linf_255(seen, pixels)
            for i in range(len(pixels)):
                yield {
                    "image": start + i,
                    "condition": condition.name,
                    "label": int(truth[i]),
                    "linf_255": int(largest[i]),
                    "answers": {name: int(values[i]) for name, values in told.items()},
                }


def rows(
    records: Sequence[dict], conditions: Sequence[Condition], answers: Answers, peak_mb: float
) -> list[dict]:
    """The table: one row per defence and attack condition."""

    def right(condition: Condition, defense: str) -> tuple[int, int]:
        mine = [r for r in records if r["condition"] == condition.name]
        return sum(r["answers"][defense] == r["label"] for r in mine), len(mine)

    table = []
    for condition in conditions:
        if condition.attack is None:
            continue
        for defense in answers.defenses:
            clean, n = right(conditions[0], defense)
            hits, _ = right(condition, defense)
            table.append(
                {
                    "defense": defense,
                    "threat": condition.threat,
                    "attack": condition.attack.name,
                    "epsilon_255": condition.attack.epsilon_255,
                    "steps": condition.attack.steps,
                    "n": n,
                    "clean_accuracy": clean / max(1, n),
                    "clean_ci95": list(wilson(clean, n)),
                    "accuracy": hits / max(1, n),
                    "ci95": list(wilson(hits, n)),
                    "budget": f"{condition.attack.steps} steps",
                    "seconds_per_image": answers.seconds[defense] / max(1, answers.images),
                    "peak_memory_mb": peak_mb,
                }
            )
    return table


def table(result_rows: Sequence[dict]) -> str:
    """The rows for people; one line per defence, threat and epsilon."""
    header = (
        f"{'defence':<13} {'attacked model':<15} {'attack':<12} {'eps':>6}  {'n':>5}  "
        f"{'clean %':>7} {'95 % interval':>14}  {'attacked %':>10} {'95 % interval':>14}  "
        f"{'s/image':>8}"
    )
    lines = [header]
    for row in result_rows:
        clean, attacked = (
            f"{100 * row[key][0]:.1f}-{100 * row[key][1]:.1f}" for key in ("clean_ci95", "ci95")
        )
        lines.append(
            f"{row['defense']:<13} {row['threat']:<15} "
            f"{row['attack'] + '-' + str(row['steps']):<12} {row['epsilon_255']:>2}/255  "
            f"{row['n']:>5}  {100 * row['clean_accuracy']:>7.1f} {clean:>14}  "
            f"{100 * row['accuracy']:>10.1f} {attacked:>14}  {row['seconds_per_image']:>8.4f}"
        )
    return "\n".join(lines)


def default_batch_size(backbone: Backbone, config: TuneConfig) -> int:
    """Images per pass: about 8,000 tokens with gradients."""
    kept = kept_views_count(config.views, config.keep)
    return max(1, 8192 // (kept * backbone.image_tokens))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far: the GPU's where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    factor = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor / 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder or zip of class folders")
    add_model_options(parser)
    parser.add_argument("--defenses", type=names, default=list(DEFENSES), help="by commas")
    parser.add_argument("--threats", type=names, default=list(THREATS), help="by commas")
    parser.add_argument("--attack", default="pgd", choices=tuple(ATTACKS))
    parser.add_argument("--epsilon", type=fractions, default=[1 / 255], help="1/255,2/255")
    parser.add_argument("--steps", type=int, default=100, help="attack steps")
    parser.add_argument("--limit", type=int, help="a class-balanced subset of this many images")
    parser.add_argument("--batch-size", type=int, help="images per pass; default by memory")
    parser.add_argument("--seed", type=int, default=0)
    add_tuning_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--record", action="store_true", help="also write the table into the pack and its card"
    )


def _checked(args: argparse.Namespace) -> None:
    if args.record and not args.pack:
        raise InputError("--record needs --pack: the pack that the table belongs to.")
    for option, allowed in (("defenses", ALL_DEFENSES), ("threats", THREATS)):
        given = getattr(args, option)
        for name in given:
            if name not in allowed:
                raise InputError(
                    f"--{option}: {name!r} is unknown; choose from {', '.join(allowed)}."
                )
        if not given:
            raise InputError(f"--{option} is empty; choose from {', '.join(allowed)}.")
    for option in ("limit", "batch_size"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            name = option.replace("_", "-")
            raise InputError(f"--{name} must be at least 1, got {getattr(args, option)}.")


def run(args: argparse.Namespace) -> int:
    _checked(args)
    conditions = [Condition(None, None)] + [
        Condition(threat, AttackConfig(args.attack, epsilon, args.steps, seed=args.seed))
        for threat in args.threats
        for epsilon in args.epsilon
    ]
    data = load_data(args.data)
    if args.limit is not None:
        data = data.balanced(args.limit, args.seed)
    backbone, pack = model_of(args)
    if args.record and pack.origin:
        raise InputError("--record writes into the pack: give --pack its folder, not a Hub id.")
    config = tuning_config(args, pack.test_time)
    defender = make_defender(backbone, pack, data.classes)
    answers = Answers(defender, args.defenses, config, args.seed)
    batch_size = args.batch_size or default_batch_size(backbone, config)
    images, labels = in_memory(data, backbone.preprocess), torch.tensor(data.labels)
    args.out.mkdir(parents=True, exist_ok=True)
    records = []
    with (
        open(args.out / "outcomes.jsonl", "w", encoding="utf-8") as outcomes,
        tqdm(total=len(images) * len(conditions), unit="image", dynamic_ncols=True) as bar,
    ):
        for record in evaluation_batches(answers, images, labels, conditions, batch_size):
            outcomes.write(json.dumps(record) + "\n")
            records.append(record)
            bar.update()
    result_rows = rows(records, conditions, answers, peak_memory_mb(backbone.device))
    summary = {"settings": _settings(args, defender.pack, config), "rows": result_rows}
    write_file(args.out / "results.json", (json.dumps(summary, indent=2) + "\n").encode())
    if args.record:
        _record(pack, result_rows, Path(args.data).stem)
    print(table(result_rows))
    return 0


def _record(pack: Pack, result_rows: list[dict], dataset: str) -> None:
    """Puts rows into the pack's own table; rows of the same defence and attack are replaced."""
    keys = ("dataset", "defense", "threat", "attack", "epsilon_255", "steps")
    evaluation = {tuple(row[k] for k in keys): row for row in pack.evaluation}
    for row in result_rows:
        row = {"dataset": dataset, **row}
        evaluation[tuple(row[k] for k in keys)] = row
    save_pack(replace(pack, evaluation=list(evaluation.values())), pack_folder(pack.name))


def _settings(args: argparse.Namespace, pack: Pack, config: TuneConfig) -> dict:
    packages = ("torch", "open_clip_torch", "torchattacks")
    return {
        "data": Path(args.data).name,
        "backbone": args.backbone or pack.base_model["source"],
        "base_model": pack.base_model,
        "pack": pack.name,
        "trained": pack.trained,
        "test_time": config.to_dict(),
        "limit": args.limit,
        "seed": args.seed,
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
