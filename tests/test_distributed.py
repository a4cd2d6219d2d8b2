"""An evaluation under `accelerate launch`: killed, continued, and shared by two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, TWO_PROCESSES, python, write_noise


def kill_after_the_first_batch(arguments: str, outcomes: Path) -> None:
    """SIGKILL to every process of the command, as soon as there is an outcome."""
    running = subprocess.Popen(
        [sys.executable, "-m", "tapt", *arguments.split()],
        cwd=ROOT,
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


def test_evaluation_survives_kill_and_other_numbers_of_processes(toy_folder: Path, tmp_path: Path):
    """One process to the end, and one killed and continued by two in other batches."""
    data = write_noise(tmp_path / "data", 1)
    common = (
        f"evaluate --backbone local-dir:{toy_folder} --data {data} --views 6 "
        "--attacked static,deployed --defenses static,tapt --epsilon 4/255 --steps 1 --judging 1 "
        "--rescore 2"
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    python(*f"-m tapt {common} --batch-size 3 --out {whole}".split())
    outcomes = broken / "outcomes.jsonl"
    kill_after_the_first_batch(f"{common} --batch-size 1 --out {broken}", outcomes)
    first = outcomes.read_bytes()
    assert 0 < len(first) < (whole / "outcomes.jsonl").stat().st_size
    with open(outcomes, "ab") as file:  # as if it had died within a write
        file.write(first.splitlines()[0][:50])
    python(*f"{TWO_PROCESSES} -m tapt {common} --batch-size 2 --out {broken}".split())
    assert table(broken) == table(whole)
    assert len(table(whole)) == 2 * (2 + 1)
    assert outcomes.read_bytes().startswith(first)
    once = (whole / "outcomes.jsonl").read_bytes().splitlines()
    assert len(outcomes.read_bytes().splitlines()) == len(once)  # no process did another's work
