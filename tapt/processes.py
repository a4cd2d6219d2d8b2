"""Several processes or GPUs under `accelerate launch`, and checkpoints of long commands."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tapt.core.errors import InputError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


def start_processes(device: str | torch.device | None = None) -> PartialState:
    """Joins the processes of `accelerate launch`; one process alone is the usual case.

    device: `cpu` where no GPU is wanted; of the first call, later ones change nothing.
    """
    from accelerate import PartialState

    cpu = device is not None and torch.device(device).type == "cpu"
    # the shares of an evaluation end hours apart
    return PartialState(cpu=cpu, timeout=timedelta(days=30))


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    from accelerate.utils import reduce

    summed: Tensor = reduce(tensor, "sum")
    return summed


def gather(value: T) -> list[T]:
    """A value of every process, in their order."""
    from accelerate.utils import gather_object

    values: list[T] = gather_object([value])
    return values


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Writes tensors and plain values aside, then renames: a kill leaves the old file whole."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote.

    Raises:
        InputError: the file is damaged or something else.
    """
    try:
        state = torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # damaged files raise whatever the unpickler stumbles over
        raise InputError(f"{path.name} is not a whole checkpoint; start anew.") from error
    if not isinstance(state, dict):
        raise InputError(f"{path.name} is not a checkpoint; start anew.")
    return state
