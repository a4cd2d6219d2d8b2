"""Several processes or GPUs under `accelerate launch`."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


def start_processes(device: str | torch.device | None = None) -> PartialState:
    """Joins the processes of `accelerate launch`; one process alone is the usual case.

    device: `cpu` where no GPU is wanted; of the first call, later ones change nothing.
    """
    from accelerate import PartialState

    if device is None:  # without a GPU each process would take itself for the only one
        cpu = "WORLD_SIZE" in os.environ and not torch.cuda.is_available()
    else:
        cpu = torch.device(device).type == "cpu"
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
