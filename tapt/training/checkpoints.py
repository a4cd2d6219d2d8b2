"""Checkpoints of long commands."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import torch

from tapt.core.errors import InputError
from tapt.files import write_file

MINUTES = 3.0  # between two states that are saved


class Checkpoint:
    """A file that interrupted work goes on from.

    resume: whether to go on from the file where it is there.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path, self.resume = path, resume
        self._saved = time.monotonic()

    def load(self, inputs: str, device: str | torch.device = "cpu") -> dict[str, Any] | None:
        """The state to go on from, None to begin; `InputError` where the file is damaged or of
        work with other inputs."""
        if not (self.resume and self.path.exists()):
            return None
        state = read_checkpoint(self.path, device)
        if state.pop("inputs", None) != inputs:
            raise InputError(
                f"{self.path.name} was written with other settings, other prompts, other images or "
                "another number of processes; use the same again, or start anew."
            )
        return state

    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._saved > 60 * MINUTES

    def save(self, inputs: str, state: dict[str, Any]) -> None:
        """Writes tensors and plain values."""
        buffer = io.BytesIO()
        torch.save({**state, "inputs": inputs}, buffer)
        write_file(self.path, buffer.getvalue())
        self._saved = time.monotonic()


def read_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """A checkpoint's content; `InputError` where it is damaged or something else."""
    try:
        state = torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # damaged files raise whatever the unpickler stumbles over
        raise InputError(f"{path.name} is not a whole checkpoint; start anew.") from error
    if not isinstance(state, dict):
        raise InputError(f"{path.name} is not a checkpoint; start anew.")
    return state
