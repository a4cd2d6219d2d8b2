"""`accelerate launch`: two CPU processes do what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_processes {n} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0 -m tapt"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(1)
    for name in ("bird", "cat", "frog"):
        (folder / name).mkdir()
        for i in range(7):
            pixels = random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def run(processes: int, arguments: str) -> None:
    launch = LAUNCH.format(n=processes) if processes > 1 else "-m tapt"
    done = subprocess.run(
        [sys.executable, *launch.split(), *arguments.split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_equal_one(data: Path, toy_folder: Path, tmp_path: Path):
    """Training steps to float tolerance, statistics to 1e-6."""
    common = f"--backbone local-dir:{toy_folder} --device cpu --data {data}"
    for processes in (1, 2):
        out = tmp_path / str(processes)
        run(
            processes,
            f"train {common} --tokens 2 --depth 2 --epsilon 4/255 --shots 0 --epochs 1 "
            f"--batch-size 5 --lr 0.01 --validation 0.2 --out {out / 'prompts'}",
        )
        both = f"--adversarial {tmp_path / '1/prompts'} --clean {tmp_path / '1/prompts'}"
        run(processes, f"statistics {common} {both} --out {out / 'pack'}")
    for file, tolerance in (
        ("prompts/prompts.safetensors", 1e-5),
        ("pack/statistics.safetensors", 1e-6),
    ):
        one, two = load_file(tmp_path / "1" / file), load_file(tmp_path / "2" / file)
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=tolerance, atol=tolerance)
