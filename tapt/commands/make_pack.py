"""`tapt make-pack`: one command from a backbone and a data set to a pack."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tapt.commands.options import (
    DATA_HELP,
    add_backbone_options,
    add_prompt_options,
    filled,
    given,
    positive,
    training_inputs,
)
from tapt.core.attacks import Attack
from tapt.core.errors import InputError
from tapt.core.prompts import PromptConfig
from tapt.data import LabelledImages
from tapt.evaluation import evaluate, record
from tapt.files import check_output
from tapt.model import Model
from tapt.packs.backbones import is_public
from tapt.packs.card import read_notes
from tapt.packs.publish import check_target, publish
from tapt.training.batches import TrainConfig, split_data
from tapt.training.make import PRESETS, Recipe, estimate, made, make_pack, make_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains adversarial and clean-tuned prompts, takes their statistics, chooses the test-time "
        "settings and measures a first table on held-out images, and writes the pack with its "
        "card. Killed and called again, it goes on; also under `accelerate launch`."
    )
    add_backbone_options(parser, default="small")
    parser.add_argument("--data", required=True, type=filled, help=DATA_HELP)
    parser.add_argument("--out", required=True, type=filled, help="folder for the pack")
    parser.add_argument("--work", type=filled, help="for what is unfinished; default OUT-work")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="quick: ViT-B/32 in a quarter of an hour of a GPU, or an hour of eight cores; paper: "
        "published settings; embedded: those of the packs that come along (default quick)",
    )
    parser.add_argument("--push", type=filled, metavar="owner/repo", help="publish it on the Hub")
    parser.add_argument(
        "--search", type=positive, metavar="N", help="held-out images that settings are chosen on"
    )
    add_prompt_options(parser)


def run(args: argparse.Namespace) -> int:
    """Says what begins, how long it takes, and where the pack is."""
    own = given(args, PromptConfig), given(args, TrainConfig)
    out = check_output(args.out, folder=True)
    work = check_output(args.work or f"{out}-work", folder=True)
    read_notes(out)
    if args.push is not None:
        check_target(args.push)
        if not is_public(args.backbone):
            raise InputError(
                f"Others cannot load {args.backbone!r}: publish it, use hf-hub:owner/repo."
            )
    state, backbone, data = training_inputs(args)
    recipe = make_recipe(args.preset, backbone, data, *own)
    recipe = replace(recipe, search=args.search or recipe.search)

    def say(text: str) -> None:
        if state.is_main_process:
            print(text, file=sys.stderr, flush=True)

    if made(out, backbone, recipe.prompts, recipe.training) is None:
        minutes = {k: seconds / 60 for k, seconds in estimate(backbone, data, recipe).items()}
        parts = ", ".join(f"{name} {spent:.1f}" for name, spent in minutes.items())
        say(f"About {sum(minutes.values()):.0f} minutes on {backbone.device.type}: {parts}.")
    pack = make_pack(backbone, data, recipe, out, work, report=say)
    if recipe.table:
        say("table")
        model = Model(backbone, replace(pack, name=str(out.absolute())))
        rows = _measure(model, data, recipe, work / "table")
        if state.is_main_process:
            record(model.pack, rows)
    if state.is_main_process:
        print(f"Pack written to {out}.")
        if args.push:
            print(f"Published: {publish(out, args.push).url}")
    return 0


def _measure(model: Model, data: LabelledImages, recipe: Recipe, folder: Path) -> list[dict]:
    """Rows of held-out images, those of the search left out where there are others."""
    held = split_data(data, model.backbone, recipe.training).held_out.data
    others = range(recipe.search, len(held)) or range(len(held))
    shown = replace(held.subset(others), name=f"{data.name}-held-out")
    attack = Attack("pgd", epsilon=recipe.training.epsilon, steps=recipe.steps)
    options: dict[str, Any] = {"defenses": recipe.defenses, "limit": recipe.table, "out": folder}
    measure = partial(evaluate, model, shown, attacks=attack, **options)
    try:
        return measure().rows
    except InputError:  # damaged, or of another choice of settings
        shutil.rmtree(folder, ignore_errors=True)
        return measure().rows
