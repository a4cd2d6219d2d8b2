"""An evaluation under `accelerate launch`: killed, continued, and shared by two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_processes {n} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0 -m tapt"
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(1)
    for name in ("bird", "cat", "frog"):
        (folder / name).mkdir()
        for i in range(2):
            pixels = random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def command(processes: int, arguments: str) -> list[str]:
    launch = LAUNCH.format(n=processes) if processes > 1 else "-m tapt"
    return [sys.executable, *launch.split(), *arguments.split()]


def run(processes: int, arguments: str) -> None:
    done = subprocess.run(
        command(processes, arguments),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def kill_after_the_first_batch(arguments: str, outcomes: Path) -> None:
    """SIGKILL to every process of the command, as soon as there is an outcome."""
    running = subprocess.Popen(
        command(1, arguments),
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not (outcomes.exists() and outcomes.stat().st_size):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait(timeout=60)


def table(out: Path) -> list[dict]:
    """The rows without what was measured on the clock."""
    measured = {"seconds_per_image", "attack_seconds_per_image"}
    rows = json.loads((out / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


def test_evaluation_survives_kill_and_other_numbers_of_processes(
    data: Path, toy_folder: Path, tmp_path: Path
):
    """One process to the end, and one killed and continued by two in other batches."""
    common = (
        f"evaluate --backbone local-dir:{toy_folder} --device cpu --data {data} --views 6 "
        "--attacked static,deployed --defenses static,tapt --epsilon 4/255 --steps 1 --judging 1 "
        "--rescore 2"
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(1, f"{common} --batch-size 3 --out {whole}")
    outcomes = broken / "outcomes.jsonl"
    kill_after_the_first_batch(f"{common} --batch-size 1 --out {broken}", outcomes)
    first = outcomes.read_bytes()
    assert 0 < len(first) < (whole / "outcomes.jsonl").stat().st_size
    with open(outcomes, "ab") as file:  # as if it had died within a write
        file.write(first.splitlines()[0][:50])
    run(2, f"{common} --batch-size 2 --out {broken}")
    assert table(broken) == table(whole)
    assert len(table(whole)) == 2 * (2 + 1)
    assert outcomes.read_bytes().startswith(first)
