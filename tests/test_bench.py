"""The benchmark on the toy: what it reports, never how long it took."""

from __future__ import annotations

import json
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import local_backbone, toy_clip

from tapt.core.backbone import Backbone
from tapt.core.errors import InputError, TaptError
from tapt.core.tuning import TuneConfig
from tapt.defenses import ImageBatch, base
from tapt.evaluation import bench as module
from tapt.evaluation.bench import PHASES, Job, bench, measure, method_flop


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures here instead of in a process of its own, and the machine's speed only briefly."""
    monkeypatch.setattr(module, "_in_process", measure)
    monkeypatch.setattr(module, "SPEED_SECONDS", 0.001)
    monkeypatch.setattr(module, "FAST_ALONE", 9)


def rows_of(folder: Path, **options: object) -> list[dict]:
    options = {"device": "cpu", "views": 10, "designs": ["V"], "classes": [3], **options}
    return list(bench(backbone=f"local-dir:{folder}", **options))


@pytest.mark.usefixtures("quick")
def test_both_paths_and_their_table(toy_folder: Path):
    rows = rows_of(toy_folder, classes=(3, 9), designs=("VLI",))
    few, many = json.loads(json.dumps(rows))
    assert [few[k] for k in ("design", "classes", "repeats", "depth")] == ["VLI", 3, 1, 3]
    for numbers in few["measured"].values():
        assert list(numbers["seconds"]) == list(PHASES)
        assert numbers["total"] == pytest.approx(sum(numbers["seconds"].values()), rel=0.5)
        assert numbers["peak"] >= numbers["above"] >= 0
    assert few["ratios"][module.DIFFERENCE] < 1e-4
    # in one process the memory may not grow, and the logits may be the same to the last bit
    assert all(value >= 0 for value in few["ratios"].values())
    assert few["ratios"]["straightforward / fast, seconds"] > 0
    assert list(many["measured"]) == ["fast"]
    assert many["measured"]["fast"]["flop"] > few["measured"]["fast"]["flop"]
    assert module.mistakes(rows) == []
    about, titles, fast, slow, *ratios = module.table(few).splitlines()
    assert "classes 3, views 10" in about
    assert titles.split() == [*PHASES, "total", "GB", "above"]
    assert (fast.split()[0], slow.split()[0]) == ("fast", "straightforward")
    assert any("fast / the floor of its matrix products: " in line for line in ratios)
    assert "left out from 9 classes" in module.table(many)


@pytest.mark.usefixtures("quick")
def test_every_defence_beside_vanilla_clip(toy_folder: Path):
    names = ["static", "ensemble", "tapt", "tapt-ensemble", "tpt", "ttc"]
    (row,) = json.loads(json.dumps(rows_of(toy_folder, defenses=names)))
    assert set(row["measured"]) == {"clip", *names, module.PLAIN, module.ENCODING, module.TOGETHER}
    assert f"tpt / {module.PLAIN}" in row["ratios"]
    assert len(row["ratios"]) == 2
    lines = module.table(row).splitlines()
    assert lines[1].split() == ["total", "x", "clip", "GB", "above"]
    assert lines[2].split()[:1] + lines[2].split()[2:3] == ["clip", "1.00"]


@pytest.mark.usefixtures("quick")
def test_different_results_are_a_mistake(toy_folder: Path, monkeypatch):
    def off(job: Job) -> dict:
        run = measure(job)
        return {**run, "logits": [x + 0.1 * (job.what == "fast") for x in run["logits"]]}

    monkeypatch.setattr(module, "_in_process", off)
    (row,) = rows_of(toy_folder, repeats=2)
    (sentence,) = module.mistakes([row])
    assert "differ by 0.1, more than 0.02" in sentence


@pytest.mark.usefixtures("quick")
def test_the_selection_in_bfloat16(toy_folder: Path, monkeypatch):
    selected_with, encode_views = [], base.encode_views

    def spy(backbone: Backbone, *args: object, **options: object) -> torch.Tensor:
        selected_with.append(backbone.dtype)
        return encode_views(backbone, *args, **options)

    monkeypatch.setattr(base, "encode_views", spy)
    (row,) = rows_of(toy_folder, selection="bfloat16")
    assert "selection bfloat16" in module.table(row)
    assert selected_with == [torch.bfloat16, torch.float32]  # the last where FLOP are counted


def test_a_measurement_runs_in_a_process_of_its_own(toy_folder: Path):
    threads = torch.get_num_threads()
    (row,) = rows_of(toy_folder, defenses=["clip"], threads=1)
    assert row["threads"] == 1
    assert torch.get_num_threads() == threads
    assert 0 <= row["measured"]["clip"]["above"] < row["measured"]["clip"]["peak"] < 4e9


def test_a_process_that_dies_is_explained(toy_folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Broken(module.ProcessPoolExecutor):
        def submit(self, *_: object) -> None:
            raise BrokenProcessPool("killed")

    monkeypatch.setattr(module, "ProcessPoolExecutor", Broken)
    with pytest.raises(TaptError, match=r"fast \(V, 3 classes\) .* not enough memory"):
        rows_of(toy_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"designs": ["V", "W"]}, "design must be one of V, VLI, VLJ, got 'W'"),
        ({"designs": []}, "at least one design"),
        ({"classes": [10, 1001]}, "classes must be a whole number from 2 to 1000, got 1001"),
        ({"defenses": ["moat"]}, "'moat' is unknown"),
        ({"threads": -1}, "threads must be a whole number from 1 to 1024, got -1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(options: dict, message: str):
    with pytest.raises(InputError, match=message):
        bench(**options)


def test_flop_are_those_of_the_written_formula(toy_folder: Path):
    """Blocks: 12 w^2 per token and the two products of attention; a backward pass to the
    activations repeats the first once and the second twice."""
    clip = replace(toy_clip(local_backbone(toy_folder)), classes=("cat", "dog"))

    def blocks(items: int, tokens: int, width: int, backward: int) -> int:
        linear, attention = 24 * tokens * width**2, 4 * tokens**2 * width
        return 3 * items * (linear * (1 + backward) + attention * (1 + 2 * backward))

    images = blocks(20, 19, 64, 0) + blocks(2, 19, 64, 1) + blocks(1, 19, 64, 0)
    length = clip.texts.tokens.shape[1]
    # features before the step, a pass for their gradient, features after it
    text = blocks(2, length, 32, 0) + blocks(2, length, 32, 1) + blocks(2, length, 32, 0)
    patches = 23 * 16 * 2 * (3 * 8 * 8) * 64
    flop = method_flop(clip, ImageBatch(torch.rand(1, 3, 32, 32), [0]), TuneConfig(views=20))
    assert flop == pytest.approx(images + text + patches, rel=0.02)
    assert clip.prompts.tensors["visual"].device.type == "cpu"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_counted_from_where_it_starts():
    memory = module.Memory(torch.device("cpu"))
    block = torch.ones(50_000_000)
    del block
    assert 190e6 < memory.used()["above"] < 400e6
    assert module.Memory(torch.device("cpu")).used()["above"] < 100e6
