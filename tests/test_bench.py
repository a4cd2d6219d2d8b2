"""The benchmark on the toy: what it reports, never how long it took."""

from __future__ import annotations

import json
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from conftest import local_backbone, some_statistics

from tapt.core.backbone import Backbone
from tapt.core.errors import InputError, TaptError
from tapt.core.prompts import PromptConfig, class_texts, init_prompts
from tapt.core.tuning import TuneConfig, encode_views, tune
from tapt.evaluation import bench as module
from tapt.evaluation.bench import PHASES, Case, Job, bench, matrix_speed, measure, method_flop
from tapt.evaluation.plain import plain_tune


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures here instead of in a process of its own, and the machine's speed only briefly."""
    monkeypatch.setattr(module, "_in_process", measure)
    monkeypatch.setattr(module, "SPEED_SECONDS", 0.001)
    monkeypatch.setattr(module, "FAST_ALONE", 9)


def rows_of(folder: Path, **options: object) -> list[dict]:
    return list(bench(f"local-dir:{folder}", **{"device": "cpu", "views": 10, **options}))


@pytest.mark.parametrize("design", ["V", "VLI", "VLJ"])
def test_a_second_implementation_gives_the_same_logits(toy: Backbone, design: str):
    """Several steps, so that AdamW's moments count; large ones, so that they show."""
    prompts = init_prompts(toy, PromptConfig(design, 2, 3), seed=1)
    config = TuneConfig(views=9, keep=0.4, steps=3, lr=1e-3, alpha=0.3, weight_decay=0.1)
    statistics = some_statistics(toy, prompts.config)
    views = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names = ("cat", "dog", "sports car")
    logits = [
        tune(toy, prompts, views, texts, statistics=statistics, config=c).logits[0]
        for c, texts in (
            (config, class_texts(toy, names, prompts.config)),
            (config.updated(steps=0), class_texts(toy, names, prompts.config)),
        )
    ]
    texts = class_texts(toy, names, prompts.config, cut=False)
    plain, seconds = plain_tune(toy, prompts, views[0], texts.tokens, statistics, config)
    torch.testing.assert_close(plain, logits[0], atol=2e-4, rtol=0)
    assert (logits[0] - logits[1]).abs().max() > 0.01
    assert set(seconds) == set(PHASES) - {"views"}


@pytest.mark.usefixtures("quick")
def test_the_rows_and_their_table(toy_folder: Path):
    rows = rows_of(toy_folder, classes=(3, 9), designs=("VLI", "V"), repeats=2)
    few, many = json.loads(json.dumps(rows))[:2]
    assert (few["design"], few["classes"], few["views"], few["repeats"]) == ("VLI", 3, 10, 2)
    assert (few["depth"], few["device"]) == (3, "cpu")
    assert set(few["fast"]) == set(few["straightforward"])
    for path in ("fast", "straightforward"):
        assert set(few[path]["seconds"]) == set(PHASES)
        assert few[path]["peak"] >= few[path]["above_model"] >= 0
    assert few["ratios"]["largest_difference"] < 1e-4
    assert few["ratios"]["memory"] == pytest.approx(1, abs=0.5)  # one process: the same peak
    assert few["ratios"]["time"] > 0
    assert few["times_floor"] > 0
    assert many["straightforward"] is many["ratios"] is None
    assert many["flop"] > few["flop"]
    assert module.mistakes(rows) == []
    lines = module.table(rows).splitlines()
    assert "10 views, n = 2, depth 3, medians of 2 runs" in lines[0]
    titles = lines[3].split()
    assert titles == ["design", "classes", "path", *PHASES, "total", "peak", "above"]
    starts = [line.split()[:3] for line in lines if line.startswith("V ")]
    assert starts == [["V", "3", "fast"], ["V", "3", "straightforward"], ["V", "9", "fast"]]
    assert any("straightforward / fast: time" in line for line in lines)
    assert any("left out from 9 classes" in line for line in lines)


@pytest.mark.usefixtures("quick")
def test_different_results_are_a_mistake(toy_folder: Path, monkeypatch):
    def off(job: Job) -> dict:
        result = measure(job)
        return {**result, "logits": [x + 0.1 * job.fast for x in result["logits"]]}

    monkeypatch.setattr(module, "_in_process", off)
    (sentence,) = module.mistakes(rows_of(toy_folder, classes=[3], designs=["V"]))
    assert "differ by 0.1, more than 0.02" in sentence


@pytest.mark.usefixtures("quick")
def test_the_selection_in_bfloat16(toy_folder: Path, monkeypatch):
    selected_with = []

    def spy(backbone: Backbone, *args: object) -> torch.Tensor:
        selected_with.append(backbone.dtype)
        return encode_views(backbone, *args)

    monkeypatch.setattr(module, "encode_views", spy)
    rows = rows_of(toy_folder, classes=[3], designs=["V"], selection="bfloat16")
    assert "float32, views selected in bfloat16, 10 views" in module.table(rows)
    assert selected_with == [torch.bfloat16]  # neither where operations are counted


def test_a_measurement_runs_in_a_process_of_its_own(toy_folder: Path):
    threads = torch.get_num_threads()
    (row,) = rows_of(toy_folder, classes=[1000], designs=["V"], threads=1)
    assert row["threads"] == 1
    assert torch.get_num_threads() == threads
    assert 0 < row["fast"]["above_model"] < row["fast"]["peak"] < 4e9


def test_a_process_that_dies_is_explained(toy_folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Broken(module.ProcessPoolExecutor):
        def submit(self, *_: object) -> None:
            raise BrokenProcessPool("killed")

    monkeypatch.setattr(module, "ProcessPoolExecutor", Broken)
    with pytest.raises(TaptError, match=r"fast path of V with 3 classes .* not enough memory"):
        rows_of(toy_folder, classes=[3], designs=["V"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"designs": ["V", "W"]}, "design must be one of V, VLI, VLJ, got 'W'"),
        ({"designs": []}, "at least one design"),
        ({"classes": [1]}, "whole numbers from 2 to 1000, got 1"),
        ({"classes": [10, 1001]}, "whole numbers from 2 to 1000, got 1001"),
        ({"views": 0}, "views must be a whole number from 1 to 1024, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"threads": -1}, "threads must be at least 1, got -1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(options: dict, message: str):
    with pytest.raises(InputError) as error:
        bench("random:ViT-B-16", **options)
    assert message in str(error.value)


def test_flop_are_those_of_the_written_formula(toy_folder: Path):
    """Blocks: 12 w^2 per token and the two products of attention; a backward pass to the
    activations repeats the first once and the second twice."""
    backbone = local_backbone(toy_folder)
    prompts = init_prompts(backbone, PromptConfig("VLI", 2, 3))
    texts = class_texts(backbone, ["cat", "dog"], prompts.config)
    statistics = module.random_statistics(backbone, prompts)
    views = torch.rand(1, 20, 3, 32, 32)
    case = Case(backbone, prompts, views, texts, statistics, TuneConfig(views=20))

    def blocks(items: int, tokens: int, width: int, backward: int) -> int:
        linear, attention = 24 * tokens * width**2, 4 * tokens**2 * width
        return 3 * items * (linear * (1 + backward) + attention * (1 + 2 * backward))

    images = blocks(20, 19, 64, 0) + blocks(2, 19, 64, 1) + blocks(1, 19, 64, 0)
    length = texts.tokens.shape[1]
    # features before the step, a pass for their gradient, features after it
    text = blocks(2, length, 32, 0) + blocks(2, length, 32, 1) + blocks(2, length, 32, 0)
    patches = 23 * 16 * 2 * (3 * 8 * 8) * 64
    assert method_flop(case) == pytest.approx(images + text + patches, rel=0.02)
    assert prompts.tensors["visual"].device.type == "cpu"


def test_the_matrix_speed_is_a_speed(toy: Backbone):
    assert 1e6 < matrix_speed(toy, 0.01) < 1e16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_counted_from_where_it_starts():
    memory = module.Memory(torch.device("cpu"))
    block = torch.ones(50_000_000)
    del block
    assert 190e6 < memory.peak() - memory.start < 400e6
    later = module.Memory(torch.device("cpu"))
    assert later.peak() - later.start < 100e6
