"""Chooses the test-time settings of every defence on images held out of the training data.

Each defence's default and all combinations of the values that it lists in `search` answer the same
images: as they are, and attacked on vanilla CLIP and on the static prompts. The best mean of the
three accuracies wins, among equals the default.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tapt.core.attacks import Attack, attack_images
from tapt.core.clip import PromptedClip
from tapt.core.errors import InputError
from tapt.core.views import image_seeds
from tapt.data import LabelledImages
from tapt.defenses import (
    Defense,
    ImageBatch,
    PreparedDefense,
    find_defense,
    find_defenses,
    list_defenses,
)
from tapt.defenses.base import images_per_pass
from tapt.files import check_output, json_lines
from tapt.model import Model
from tapt.packs.format import Pack
from tapt.processes import start_processes
from tapt.progress import Progress, quiet
from tapt.training.batches import TrainConfig, TrainingData, split_data
from tapt.training.statistics import fingerprint

SEARCH = "search.jsonl"
VIEWS = 12  # per image with gradients: what fits in a pass
Candidate = tuple[Defense, dict[str, Any]]


def choose_settings(
    model: Model,
    data: LabelledImages,
    out: Path,
    *,
    defenses: Sequence[str] | None = None,
    images: int = 160,
    steps: int = 10,
    on_progress: Progress = quiet,
) -> Pack:
    """The model's pack with chosen settings, and in `training` how they were chosen.

    data: that the prompts were trained on; the images are those that they were not shown.
    out: folder for the counts of every batch; the same call goes on from there. With several
        processes, all of them see it.
    defenses: default all of them; the others' settings stay as they are.
    images: at most so many. steps: of PGD at the epsilon of the training.

    Raises `InputError` where no image was held out or the folder cannot be written, `DataError`
    for an image that cannot be read.
    """
    path = check_output(out, folder=True) / SEARCH
    made = model.pack.training["adversarial"]
    config = TrainConfig(**{name: made[name] for name in TrainConfig.model_fields})
    held_out = split_data(data, model.backbone, config)
    count = min(images, len(held_out.held_out))
    if not count:
        raise InputError("Settings are chosen on held-out images: validation must be above 0.")
    state = start_processes(model.backbone.device)
    clip = model.prepare(data.classes, template=data.template, as_listed=True)
    every, prepared = candidates(clip, list_defenses() if defenses is None else defenses)
    attack = Attack("pgd", epsilon=config.epsilon, steps=steps)
    key = _key(model, held_out, every, attack)
    size = images_per_pass(model.backbone, VIEWS, clip.texts)
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]

    out.mkdir(parents=True, exist_ok=True)
    known = _read(path, key)
    for batch in batches[state.process_index :: state.num_processes]:
        if str(batch) not in known:
            right = _right(model, clip, prepared, held_out, batch, attack)
            line = json.dumps({"key": key, "images": str(batch), "right": right.tolist()}) + "\n"
            with open(path, "ab", buffering=0) as file:  # one write: lines never mix
                file.write(line.encode())
        on_progress(batch.stop, count)
    state.wait_for_everyone()
    known = _read(path, key)
    total = torch.tensor([known[str(batch)] for batch in batches]).sum(0)
    return _chosen(model, every, total.tolist(), count, attack)


def candidates(
    clip: PromptedClip, defenses: Sequence[str]
) -> tuple[list[Candidate], list[PreparedDefense]]:
    """Every defence with its default and then with each other combination of what it lists in
    `search`; and all of them ready for a class list."""
    every: list[Candidate] = []
    for row in find_defenses(defenses):
        default = {name: getattr(row.settings(), name) for name in row.search}
        choices = [dict(zip(row.search, c, strict=True)) for c in product(*row.search.values())]
        every += [(row, default), *((row, choice) for choice in choices if choice != default)]
    return every, [row.prepare(clip, row.settings(**choice)) for row, choice in every]


def _key(model: Model, data: TrainingData, every: Sequence[Candidate], attack: Attack) -> str:
    """What the counts of one search share."""
    pack, images = model.pack, data.held_out
    tensors = [*pack.prompts.tensors.values(), *pack.statistics_tensors().values()]
    inputs = fingerprint(model.backbone, tensors, images, range(len(images)), attack.seed)
    parts = [inputs, [(row.name, choice) for row, choice in every], attack.to_dict()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(path: Path, key: str) -> dict[str, list[list[int]]]:
    """Counts of the batches that are there; lines of another search are passed over."""
    return {row["images"]: row["right"] for row in json_lines(path) if row.get("key") == key}


def _right(
    model: Model,
    clip: PromptedClip,
    prepared: Sequence[PreparedDefense],
    data: TrainingData,
    images: range,
    attack: Attack,
) -> Tensor:
    """How many images each candidate answers rightly, (candidates, 3): clean, attacked on vanilla
    CLIP, attacked on the static prompts."""
    pixels, labels = data.held_out.batch(images), data.held_out_labels[list(images)]
    columns = []
    for attacked in (None, clip.vanilla, clip.static):
        shown = pixels
        if attacked is not None:
            shown = attack_images(attacked, pixels, labels, attack, images=images)
        batch = ImageBatch(model.floats(shown), image_seeds(attack.seed, images))
        answers = [each.predict(batch).probabilities.argmax(-1) for each in prepared]
        columns.append(torch.stack([(answer == labels).sum() for answer in answers]))
    return torch.stack(columns, 1)


def _chosen(
    model: Model, every: Sequence[Candidate], right: list[list[int]], count: int, attack: Attack
) -> Pack:
    """The pack with the best candidates, and with all of them in `training`."""
    pack, best = model.pack, dict[str, int]()
    tables, test_time = dict[str, dict[str, str]](), {**pack.test_time}
    for (row, choice), counts in zip(every, right, strict=True):
        words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in choice.items()]
        *cells, mean = (f"{100 * n / count:.1f}" for n in (*counts, sum(counts) / 3))
        table = tables.setdefault(row.name, {})
        table[", ".join(words)] = f"{' / '.join(cells)}, mean {mean}"
        if sum(counts) > best.get(row.name, -1):
            best[row.name], test_time[row.name] = sum(counts), choice
    search = {
        "images": count,
        "attack": f"{attack.name}-{attack.budget_steps}",
        "epsilon": attack.epsilon,
        "cells": "accuracy in %: clean / attacked on vanilla CLIP / on the static prompts, mean",
        "candidates": tables,
    }
    return replace(
        pack,
        test_time={name: choice for name, choice in test_time.items() if choice},
        training={**pack.training, "test_time_search": search},
        evaluation=[_marked(row, model, test_time) for row in pack.evaluation],
    )


def _marked(
    row: dict[str, Any], model: Model, test_time: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """A row of the pack's table, with the settings by which it differs from the new ones."""
    if row["defense"] not in test_time:
        return row
    defense = find_defense(row["defense"])
    old = model.settings(defense, row.get("settings")).model_dump(mode="json")
    new = defense.settings(**test_time[row["defense"]]).model_dump(mode="json")
    changed = {name: value for name, value in old.items() if new[name] != value}
    return {**row, "settings": changed}
