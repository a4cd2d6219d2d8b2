"""`tapt train`: adversarial prompt tuning."""

from __future__ import annotations

import argparse
import json

from tqdm import tqdm

from tapt.commands.options import (
    add_prompt_options,
    add_training_options,
    given,
    training_inputs,
)
from tapt.core.prompts import PromptConfig
from tapt.files import check_output
from tapt.training.batches import TrainConfig
from tapt.training.prompts import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Adversarial prompt tuning on a frozen backbone: makes the prompts that every image starts "
        "from, one process or several under `accelerate launch`."
    )
    add_training_options(parser, "folder for prompts and log")
    add_prompt_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a line per epoch."""
    prompts = PromptConfig(**given(args, PromptConfig))
    config = TrainConfig(**given(args, TrainConfig))
    out = check_output(args.out, folder=True)
    state, backbone, data = training_inputs(args)
    train(
        backbone,
        data,
        prompts,
        config,
        out,
        resume=args.resume,
        on_epoch=lambda row: tqdm.write(json.dumps(row)),
    )
    if state.is_main_process:
        print(f"Prompts written to {out}.")
    return 0
