"""Several processes or GPUs under `accelerate launch`, and checkpoints of long commands."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState


def start_processes(device: str | None) -> PartialState:
    """Joins the processes of `accelerate launch`; one process alone is the usual case."""
    # the shares of an evaluation end hours apart
    return PartialState(cpu=device == "cpu", timeout=timedelta(days=30))


def save_checkpoint(state: dict, path: Path) -> None:
    """Writes tensors and plain values aside, then renames: a kill leaves the old file whole."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
