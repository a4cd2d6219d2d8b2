"""The measuring command on the toy: what it reports, never how long it took."""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

import tapt.bench
from tapt.backbone import Backbone, load_backbone
from tapt.bench import PHASES, Job, add_arguments, matrix_speed, measure, method_flop, run
from tapt.errors import InputError, TaptError
from tapt.prompts import PromptConfig, class_texts, init_prompts
from tapt.tuning import TuneConfig, tune


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures here instead of in a process of its own, and the machine's speed only briefly."""
    monkeypatch.setattr(tapt.bench, "_in_process", measure)
    monkeypatch.setattr(tapt.bench, "SPEED_SECONDS", 0.001)
    monkeypatch.setattr(tapt.bench, "FAST_ALONE", 9)


def arguments(folder: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = ["--backbone", f"local-dir:{folder}", "--device", "cpu", "--views", "10"]
    return parser.parse_args([*options, *more])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("design", ["V", "VLI", "VLJ"])
def test_both_paths_give_equal_results(toy_folder: Path, design: str):
    fast, slow = (
        measure(Job(f"local-dir:{toy_folder}", design, 7, 20, fast, device="cpu"))
        for fast in (True, False)
    )
    assert len(fast["logits"]) == 7
    assert fast["logits"] == pytest.approx(slow["logits"], abs=2e-2)
    assert fast["logits"] == pytest.approx(slow["logits"], abs=1e-4)
    for result in (fast, slow):
        assert set(result["seconds"]) == set(PHASES)
        assert sum(result["seconds"].values()) <= result["total"]
        assert result["peak"] >= result["above_model"] >= 0
        assert result["device"] == "cpu"
        assert result["depth"] == 3
    assert fast["flop"] > 0
    assert slow["flop"] is None


@pytest.mark.usefixtures("quick")
def test_the_json_object(toy_folder: Path, capsys: pytest.CaptureFixture[str]):
    options = ("--classes", "3,9", "--designs", "VLI", "--repeats", "2", "--json")
    assert run(arguments(toy_folder, *options)) == 0
    few, many = json.loads(capsys.readouterr().out)["rows"]
    assert (few["design"], few["classes"], few["views"], few["repeats"]) == ("VLI", 3, 10, 2)
    assert set(few["fast"]) == set(few["straightforward"])
    assert set(few["fast"]["seconds"]) == set(PHASES)
    assert few["ratios"]["largest_difference"] < 1e-4
    assert few["ratios"]["memory"] == pytest.approx(1, abs=0.5)  # one process: the same peak
    assert few["ratios"]["time"] > 0
    assert few["times_floor"] > 0
    assert many["classes"] == 9
    assert many["straightforward"] is many["ratios"] is None
    assert many["flop"] > few["flop"]


@pytest.mark.usefixtures("quick")
def test_the_table(toy_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(arguments(toy_folder, "--classes", "3,9", "--designs", "V")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "10 views, n = 2, depth 3" in lines[0]
    assert "peak, and above the loaded model" in lines[1]
    titles = lines[3].split()
    assert titles == ["design", "classes", "path", *PHASES, "total", "peak", "above"]
    rows = [line.split() for line in lines if line.startswith("V ")]
    assert [row[:3] for row in rows] == [
        ["V", "3", "fast"],
        ["V", "3", "straightforward"],
        ["V", "9", "fast"],
    ]
    assert all(len(row) == len(titles) for row in rows)
    assert any("straightforward / fast: time" in line for line in lines)
    assert any("left out from 9 classes" in line for line in lines)


@pytest.mark.usefixtures("quick")
def test_different_results_are_an_error(toy_folder: Path, capsys, monkeypatch):
    def off(job: Job) -> dict:
        result = measure(job)
        return {**result, "logits": [x + 0.1 * job.fast for x in result["logits"]]}

    monkeypatch.setattr(tapt.bench, "_in_process", off)
    assert run(arguments(toy_folder, "--classes", "3", "--designs", "V", "--json")) == 1
    assert "differ by 0.1, more than 0.02" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_the_selection_in_bfloat16(toy_folder: Path, capsys, monkeypatch):
    selected_with = []

    def spy(*args, coarse: Backbone | None = None, **options):
        selected_with.append(coarse and coarse.dtype)
        return tune(*args, coarse=coarse, **options)

    monkeypatch.setattr(tapt.bench, "tune", spy)
    options = ("--classes", "3", "--designs", "V", "--precision", "bfloat16")
    assert run(arguments(toy_folder, *options)) == 0
    assert "float32, views selected in bfloat16, 10 views" in capsys.readouterr().out
    # the fast path, its operations counted without values, the straightforward path
    assert selected_with == [torch.bfloat16, None, None]


def test_a_measurement_runs_in_a_process_of_its_own(toy_folder: Path, capsys):
    threads = torch.get_num_threads()
    options = ("--classes", "1000", "--designs", "V", "--threads", "1", "--json")
    assert run(arguments(toy_folder, *options)) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["threads"] == 1
    assert torch.get_num_threads() == threads
    assert 0 < row["fast"]["above_model"] < row["fast"]["peak"] < 4e9


def test_a_process_that_dies_is_explained(toy_folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Broken(tapt.bench.ProcessPoolExecutor):
        def submit(self, *_: object) -> None:
            raise BrokenProcessPool("killed")

    monkeypatch.setattr(tapt.bench, "ProcessPoolExecutor", Broken)
    with pytest.raises(TaptError, match=r"fast path of V with 3 classes .* not enough memory"):
        run(arguments(toy_folder, "--classes", "3", "--designs", "V"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--designs", "V,W"), "--designs must be of V, VLI, VLJ, got 'W'"),
        (("--designs", ","), "need at least one value"),
        (("--classes", "1"), "whole numbers from 2 to 1000, got '1'"),
        (("--classes", "10,1001"), "whole numbers from 2 to 1000, got '1001'"),
        (("--classes", "ten"), "whole numbers from 2 to 1000, got 'ten'"),
        (("--views", "0"), "views must be a whole number from 1 to 1024, got 0"),
        (("--repeats", "0"), "--repeats must be at least 1, got 0"),
        (("--threads", "-1"), "--threads must be at least 1, got -1"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(
    toy_folder: Path, options: tuple[str, str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tapt.bench, "_in_process", None)
    with pytest.raises(InputError) as error:
        run(arguments(toy_folder, *options))
    assert message in str(error.value)


def test_flop_are_those_of_the_written_formula(toy_folder: Path):
    """Blocks: 12 w^2 per token and the two products of attention; a backward pass to the
    activations repeats the first once and the second twice."""
    backbone = load_backbone(f"local-dir:{toy_folder}", device="cpu")
    prompts = init_prompts(backbone, PromptConfig("VLI", 2, 3))
    texts = class_texts(backbone, ["cat", "dog"], prompts.config)
    targets = tapt.bench._random_statistics(backbone, prompts)
    views = torch.rand(1, 20, 3, 32, 32)
    case = tapt.bench._Case(backbone, prompts, views, texts, targets, TuneConfig(views=20))

    def blocks(items: int, tokens: int, width: int, backward: int) -> int:
        linear, attention = 24 * tokens * width**2, 4 * tokens**2 * width
        return 3 * items * (linear * (1 + backward) + attention * (1 + 2 * backward))

    images = blocks(20, 19, 64, 0) + blocks(2, 19, 64, 1) + blocks(1, 19, 64, 0)
    length = texts.tokens.shape[1]
    text = blocks(2, length, 32, 1) + blocks(2, length, 32, 0)
    patches = 23 * 16 * 2 * (3 * 8 * 8) * 64
    assert method_flop(case) == pytest.approx(images + text + patches, rel=0.02)
    assert prompts.tensors["visual"].device.type == "cpu"


def test_the_matrix_speed_is_a_speed(toy: Backbone):
    assert 1e6 < matrix_speed(toy, 0.01) < 1e16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_counted_from_where_it_starts():
    memory = tapt.bench._Memory(torch.device("cpu"))
    block = torch.ones(50_000_000)
    del block
    assert 190e6 < memory.peak() - memory.start < 400e6
    later = tapt.bench._Memory(torch.device("cpu"))
    assert later.peak() - later.start < 100e6
