"""Files that a kill leaves whole, and the log."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch


def save_aside(value: object, path: Path) -> None:
    """torch.save to another name, then renamed."""
    torch.save(value, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def log(**row: object) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps(rounded), flush=True)
