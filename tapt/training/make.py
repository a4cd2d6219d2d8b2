"""From nothing to a pack: adversarial and clean prompts, their statistics, test-time settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tapt.core.backbone import Backbone
from tapt.core.clip import PromptedClip
from tapt.core.errors import InputError, PackError
from tapt.core.images import to_float
from tapt.core.prompts import PromptConfig
from tapt.data import LabelledImages
from tapt.defenses import ImageBatch, find_defenses, list_defenses
from tapt.model import Model
from tapt.packs.card import write_pack
from tapt.packs.format import CONFIG, Pack, open_pack
from tapt.processes import start_processes
from tapt.training.batches import TrainConfig, split_data
from tapt.training.checkpoints import read_checkpoint
from tapt.training.choose import candidates, choose_settings
from tapt.training.prompts import Trainer, train
from tapt.training.statistics import statistics

PRESETS = {  # images of the statistics, of the search and of the table, and steps of its PGD
    "paper": (16_000, 200, 500, 100),
    "quick": (2000, 40, 50, 20),
    "embedded": (20_000, 160, 0, 0),
}
SEEN = 8000  # images that the quick preset trains on


@dataclass(frozen=True)
class Recipe:
    """How a pack is made.

    prompts: their layout. training: of the adversarial ones.
    defenses: those whose settings are chosen, and that the table has.
    statistics: images that they are taken of, at most.
    search: held-out images that settings are chosen on, at most.
    table, steps: held-out images of a first table, and steps of its PGD.
    """

    prompts: PromptConfig
    training: TrainConfig
    defenses: list[str]
    statistics: int
    search: int
    table: int
    steps: int

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """Of both kinds of prompts."""
        return {"adversarial": self.training, "clean": self.training.updated(clean_share=1.0)}


def make_recipe(
    preset: str,
    backbone: Backbone,
    data: LabelledImages,
    prompts: dict[str, Any],
    training: dict[str, Any],
) -> Recipe:
    """A preset for a backbone and data set: `paper`, the published settings; `quick`, an hour of
    eight cores with ViT-B/32; `embedded`, what the packs that come along were made with.

    prompts, training: what is to differ from it; `InputError` for prompts that do not fit the
        backbone, and for values out of range.
    """
    layout: dict[str, Any] = {
        "visual_depth": min(9, backbone.visual_blocks),
        "text_depth": min(9, backbone.text_blocks),
    }
    config: dict[str, Any] = {}
    if preset != "paper":
        config = {"optimizer": "adamw", "lr": 0.01, "min_crop": 0.3, "epochs": 1}
    if preset == "quick":
        shots = max(1, SEEN // len(data.classes))
        seen = min(len(data), shots * len(data.classes))
        config |= {"shots": shots, "epochs": max(1, SEEN // seen)}
    if preset == "embedded":
        layout["tokens"] = 4
        config |= {"shots": None, "batch_size": 128, "precision": "bfloat16", "validation": 0.02}
        config |= {"epsilon": 2 / 255, "clean_share": 0.25}
    chosen, trained = PromptConfig(**{**layout, **prompts}), TrainConfig(**{**config, **training})
    chosen.shapes(backbone.architecture)
    if not round(len(data) * trained.validation):
        raise InputError("No image is held out to choose settings on: raise validation.")
    quick = [row.name for row in find_defenses()]
    defenses = quick if preset == "quick" else list_defenses()
    return Recipe(chosen, trained, defenses, *PRESETS[preset])


def make_pack(
    backbone: Backbone,
    data: LabelledImages,
    recipe: Recipe,
    out: Path,
    work: Path,
    *,
    report: Callable[[str], None] = lambda stage: None,
) -> Pack:
    """Runs the stages that are not done yet, and goes on with one that was interrupted.

    data: the training part. out: the pack's folder. work: for prompts, checkpoints and counts.
    report: called with what begins.

    Raises `InputError` where a folder holds what was made otherwise, `DataError` for an image
    that cannot be read.
    """
    pack = made(out, backbone, recipe.prompts, recipe.training)
    if pack is None:
        parts, resume = [], True
        for name, config in recipe.trainings.items():
            part = made(work / name, backbone, recipe.prompts, config, statistics=False)
            if part is None:
                report(f"{name} prompts")
                _drop_damaged(work / name)
                part = train(backbone, data, recipe.prompts, config, work / name, resume=True)
                resume = False  # sums under other prompts are of no use
            parts.append(part)
        report("statistics")
        _drop_damaged(out)
        adversarial, clean = parts
        limit = min(len(data), recipe.statistics)
        pack = statistics(backbone, data, adversarial, clean, out, limit=limit, resume=resume)
    report("test-time settings")
    pack = choose_settings(
        Model(backbone, pack),
        data,
        work,
        defenses=recipe.defenses,
        images=recipe.search,
        on_progress=lambda done, total: report(f"{done} of {total} images"),
    )
    if start_processes().is_main_process:
        write_pack(pack, out)
    start_processes().wait_for_everyone()
    return pack


def made(
    folder: Path,
    backbone: Backbone,
    prompts: PromptConfig,
    config: TrainConfig,
    *,
    statistics: bool = True,
) -> Pack | None:
    """What a stage has left in a folder; None where there is nothing, or nothing whole, and
    `InputError` where it was made otherwise."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        files = open_pack(folder.absolute(), statistics=statistics)
        found: Any = files.config.training.get("adversarial", files.config.training)
        wanted = config.model_dump()
        same = {name: found.get(name) for name in wanted} == wanted
        same &= files.config.base_model.sha256 == backbone.sha256
        if same and files.config.prompts == prompts:
            return files.read(backbone, statistics=statistics)
    except (PackError, AttributeError):
        return None
    raise InputError(f"{folder.name!r} holds a pack of other settings: use another folder.")


def _drop_damaged(folder: Path) -> None:
    """Removes checkpoints that cannot be read, so that their stage begins anew."""
    for path in folder.glob("*.ckpt") if start_processes().is_main_process else ():
        try:
            read_checkpoint(path)
        except InputError:
            path.unlink()
    start_processes().wait_for_everyone()


def estimate(backbone: Backbone, data: LabelledImages, recipe: Recipe) -> dict[str, float]:
    """About how many seconds each stage takes in one process: from one training step of each kind,
    and from one image that all candidates of the search answer."""
    split, seconds = split_data(data, backbone, recipe.training), 0.0
    for config in recipe.trainings.values():
        trainer = Trainer(backbone, recipe.prompts, split, config)
        trainer.train_step()  # the first one is slower
        step = _seconds(trainer.train_step)
        seconds += step * trainer.total
    image, held = step / config.batch_size, len(split.held_out)  # there and back
    clip = PromptedClip(backbone, trainer.prompts.map(Tensor.detach), None, data.classes)
    every, prepared = candidates(clip, recipe.defenses)
    pixels = to_float(split.images.batch([0]).to(backbone.device), backbone.dtype)
    batch = ImageBatch(pixels, [0])
    answers = _seconds(lambda: [each.predict(batch) for each in prepared])
    once = answers * len(recipe.defenses) / len(every)
    return {
        "prompts": seconds,
        "statistics": min(len(data), recipe.statistics) * image,
        "settings": min(held, recipe.search) * (3 * answers + 2 * 10 * image),
        "table": min(held, recipe.table) * (3 * once + 2 * recipe.steps * image),
    }


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()  # its results are read on the CPU: a GPU has ended, too
    return time.perf_counter() - began
