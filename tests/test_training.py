"""Training of prompts and token statistics, on the toy CLIP."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TWO_PROCESSES, counted, python, write_noise
from PIL import Image
from safetensors.torch import load_file

from tapt.core.backbone import Backbone
from tapt.core.errors import InputError, PackError
from tapt.core.images import to_float
from tapt.core.prompts import PromptConfig, init_prompts
from tapt.core.towers import encode_image
from tapt.core.views import random_view
from tapt.data import LabelledImages, Pixels, load_data
from tapt.packs.format import Pack, load_pack
from tapt.training import checkpoints
from tapt.training.batches import MAX_HELD_OUT, TrainConfig, draw_batch, split_data
from tapt.training.checkpoints import Checkpoint
from tapt.training.prompts import CHECKPOINT, LOG, Trainer, _trim_log, train
from tapt.training.statistics import merged, statistics, token_moments

CLASSES = ["bird", "cat", "frog"]
PROMPTS = PromptConfig(design="VLI", tokens=2, visual_depth=2)
CONFIG = TrainConfig(
    epsilon=4 / 255,
    shots=None,
    epochs=2,
    batch_size=6,
    lr=0.01,
    optimizer="adamw",
    validation=0.2,
)
FILES = "prompts.safetensors", "statistics.safetensors"


def noise(count: int, seed: int = 0) -> LabelledImages:
    """Images of one class each; image i is known by its top left pixel."""
    random = np.random.RandomState(seed)
    pixels = random.randint(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count) % 256
    return LabelledImages(
        tuple(CLASSES),
        tuple(i % 3 for i in range(count)),
        lambda i: Image.fromarray(pixels[i]),
        lambda i: pixels[i].tobytes(),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("data"), classes=CLASSES, count=8)


@pytest.fixture(scope="module")
def trained(toy: Backbone, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `adversarial` and `clean` with trained prompts."""
    out = tmp_path_factory.mktemp("trained")
    train(toy, load_data(data), PROMPTS, CONFIG, out / "adversarial")
    train(toy, load_data(data), PROMPTS, CONFIG.updated(clean_share=1.0), out / "clean")
    return out


@pytest.fixture(scope="module")
def parts(toy: Backbone, trained: Path) -> list[Pack]:
    return [load_pack(trained / n, toy, statistics=False) for n in ("adversarial", "clean")]


def test_train_writes_prompts_and_a_log(trained: Path, parts: list[Pack]):
    rows = [json.loads(line) for line in (trained / "adversarial" / LOG).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all({"loss", "clean_accuracy", "robust_accuracy"} <= set(row) for row in rows)
    adversarial, clean = parts
    assert adversarial.training["epsilon"] == pytest.approx(4 / 255)
    assert adversarial.training["shots"] is None
    assert (adversarial.training["clean_share"], clean.training["clean_share"]) == (0.5, 1.0)
    assert not torch.equal(adversarial.prompts.visual(), clean.prompts.visual())


def same_files(one: Path, other: Path, names: Sequence[str] = FILES[:1]) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("minutes", [0.0, 3.0], ids=["every-step", "every-epoch"])
def test_resume_goes_on_to_the_same_result(toy, data, trained, tmp_path, monkeypatch, minutes):
    """Stopped in the middle of the second epoch."""
    original = Trainer.train_step

    def stop_late(self: Trainer) -> float:
        if self.step == self.steps_per_epoch + 1:
            raise KeyboardInterrupt
        return original(self)

    arguments = toy, load_data(data), PROMPTS, CONFIG, tmp_path
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_late)
        patch.setattr(checkpoints, "MINUTES", minutes)
        with pytest.raises(KeyboardInterrupt):
            train(*arguments)
    assert not (tmp_path / "prompts.safetensors").exists()
    rows: list[dict] = []
    train(*arguments, resume=True, on_epoch=rows.append)
    assert [row["epoch"] for row in rows] == [2]
    assert same_files(tmp_path, trained / "adversarial")


@pytest.mark.parametrize(
    ("prompts", "config", "words"),
    [
        (PROMPTS, CONFIG.updated(seed=5), "other settings"),
        (PROMPTS.updated(tokens=1), CONFIG, "other settings"),
        (PROMPTS, CONFIG, "not a whole checkpoint"),
    ],
)
def test_resume_refuses_what_does_not_belong(prompts, config, words, toy, data, trained, tmp_path):
    whole = (trained / "adversarial" / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[:1000] if "whole" in words else whole)
    with pytest.raises(InputError, match=words):
        train(toy, load_data(data), prompts, config, tmp_path, resume=True)


def test_a_log_line_that_was_cut_short_is_dropped(tmp_path: Path):
    rows = [json.dumps({"epoch": i, "step": 3 * i}) for i in (1, 2, 3)]
    (tmp_path / LOG).write_text("\n".join([*rows, "{}", "{]}", rows[0][:9]]))
    _trim_log(tmp_path / LOG, 6)
    assert (tmp_path / LOG).read_text().splitlines() == rows[:2]


def test_no_shots_are_all():
    assert TrainConfig(shots=0) == TrainConfig(shots=None)


def test_outputs_and_depths_are_checked_first(toy: Backbone, tmp_path: Path):
    images, opened = counted(noise(6))
    (tmp_path / "file").touch()
    pack = Pack(init_prompts(toy, PROMPTS), None, {}, "p", {})
    for call in (
        lambda: train(toy, images, PROMPTS, CONFIG, tmp_path / "file"),
        lambda: train(toy, images, PROMPTS.updated(visual_depth=9), CONFIG, tmp_path / "out"),
        lambda: statistics(toy, images, pack, pack, tmp_path / "file" / "out"),
        lambda: statistics(toy, images, pack, pack, tmp_path / "out", limit=1),
    ):
        with pytest.raises(InputError, match=r"cannot be written|at most 3|at least 2, got 1"):
            call()
    other = Pack(init_prompts(toy, PROMPTS.updated(tokens=1)), None, {}, "p", {})
    with pytest.raises(PackError, match="different designs or shapes"):
        statistics(toy, images, pack, other, tmp_path / "out")
    assert not opened
    assert not (tmp_path / "out").exists()


def test_few_shots_hold_few_images_for_validation(toy: Backbone):
    """Nothing is both trained on and held out; ImageNet's tenth would take hours."""
    labels = tuple(i % 30 for i in range(3000))
    names = tuple(map(str, range(30)))
    whole = LabelledImages(
        names, labels, lambda i: Image.new("RGB", (32, 32)), lambda i: str(i).encode()
    )
    few = split_data(whole, toy, TrainConfig(shots=10, validation=0.5))
    assert (len(few.images), len(few.held_out)) == (300, MAX_HELD_OUT)
    assert torch.bincount(few.labels).tolist() == [10] * 30
    sets = [{p.data.content(i) for i in range(len(p))} for p in (few.images, few.held_out)]
    assert not sets[0] & sets[1]


def test_processes_share_the_batch_that_one_would_draw(toy: Backbone):
    data, config = noise(20), CONFIG.updated(batch_size=7, validation=0.0)
    whole = draw_batch(split_data(data, toy, config), config, 32, 1, 0, 1)
    for process in range(3):
        own, opened = counted(data)
        part = draw_batch(split_data(own, toy, config), config, 32, 1, process, 3)
        for name in ("images", "labels", "attacked", "start"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[process::3])
        assert part.joint == 7
        assert len(opened) == len(part.images)


def test_results_do_not_depend_on_what_is_held(toy, data, trained, parts, tmp_path, monkeypatch):
    statistics(toy, load_data(data), *parts, tmp_path / "held")
    monkeypatch.setattr("tapt.data.images.MAX_HELD_BYTES", 5 * 3 * 32 * 32)
    train(toy, load_data(data), PROMPTS, CONFIG, tmp_path / "streamed")
    assert same_files(tmp_path / "streamed", trained / "adversarial")
    images, opened = counted(load_data(data))
    statistics(toy, images, *parts, tmp_path / "streamed")
    assert same_files(tmp_path / "streamed", tmp_path / "held", FILES)
    assert len(opened) == 24 + 24 - 5


def test_statistics_make_a_whole_pack(toy: Backbone, data: Path, parts: list[Pack], tmp_path: Path):
    settings = {"tapt": {"views": 8, "lr": 0.001}}
    statistics(toy, load_data(data), *parts, tmp_path, limit=20, test_time=settings)
    loaded = load_pack(tmp_path, toy)
    assert loaded.test_time == settings
    assert loaded.training["statistics"]["images"] == 20
    assert loaded.training["clean"]["clean_share"] == 1.0
    assert loaded.statistics is not None
    assert not torch.equal(loaded.statistics.adversarial.mean, loaded.statistics.clean.mean)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: tapt" in card
    assert "has not been evaluated" in card
    assert not list(tmp_path.glob("*.ckpt"))


def test_statistics_refuse_a_checkpoint_of_other_images(toy: Backbone, tmp_path: Path):
    prompts = init_prompts(toy, PROMPTS)
    checkpoint = Checkpoint(tmp_path / "part.ckpt", resume=True)
    token_moments(toy, prompts, Pixels(noise(4), toy.preprocess), range(4), checkpoint)
    others = Pixels(noise(4, seed=1), toy.preprocess)
    with pytest.raises(InputError, match="other prompts, other images"):
        token_moments(toy, prompts, others, range(4), checkpoint)
    checkpoint.path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a whole checkpoint"):
        token_moments(toy, prompts, others, range(4), checkpoint)


def test_parts_of_statistics_merge_in_any_order(toy: Backbone, tmp_path: Path):
    """As the processes of `accelerate launch` cut the images."""
    given = toy, init_prompts(toy, PROMPTS), Pixels(noise(7), toy.preprocess)
    checkpoint = Checkpoint(tmp_path / "part.ckpt")
    whole = token_moments(*given, range(7), checkpoint)
    parts = [token_moments(*given, range(i, 7, 3), checkpoint) for i in range(3)]
    for order in itertools.permutations(parts):
        moments = merged(order)
        assert moments.count == whole.count
        for name in ("mean", "var"):
            torch.testing.assert_close(
                getattr(moments.statistics(), name),
                getattr(whole.statistics(), name),
                rtol=1e-6,
                atol=1e-6,
            )


def test_statistics_are_mean_and_variance_of_hidden_states(toy: Backbone, tmp_path: Path):
    prompts, images = init_prompts(toy, PROMPTS), Pixels(noise(7), toy.preprocess)
    checkpoint = Checkpoint(tmp_path / "part.ckpt")
    moments = token_moments(toy, prompts, images, range(7), checkpoint, batch_size=3)
    result = moments.statistics()
    views = torch.stack(
        [random_view(to_float(images[i]), torch.Generator().manual_seed(i)) for i in range(7)]
    )
    blocks = range(toy.visual_blocks)
    with torch.no_grad():
        _, hidden = encode_image(toy, views, prompts.visual(), hidden=blocks)
    stacked = torch.stack(hidden).double()
    torch.testing.assert_close(result.mean.double(), stacked.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.var.double(), stacked.var(1), rtol=1e-4, atol=1e-5)


def test_statistics_stopped_and_resumed(
    toy: Backbone, parts: list[Pack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped in the third batch, after the checkpoint of the second."""
    data = noise(600)
    whole = statistics(toy, data, *parts, tmp_path / "whole").statistics
    images, opened = counted(data)
    original = images.read

    def stop_late(i: int) -> Image.Image:
        if len(opened) == 300:
            raise KeyboardInterrupt
        return original(i)

    stopped = LabelledImages(images.classes, images.labels, stop_late, images.content)
    out = tmp_path / "stopped"
    monkeypatch.setattr(checkpoints, "MINUTES", 0.0)
    with pytest.raises(KeyboardInterrupt):
        statistics(toy, stopped, *parts, out)
    assert not (out / "config.json").exists()
    opened.clear()
    resumed = statistics(toy, images, *parts, out, resume=True).statistics
    assert opened[0] == 256
    assert whole is not None
    assert resumed is not None
    assert same_files(out, tmp_path / "whole", FILES)
    assert not list(out.glob("*.ckpt"))


SCRIPT = """
import sys
from pathlib import Path
from conftest import local_backbone
from test_training import CONFIG, PROMPTS
from tapt.data import load_data
from tapt.packs.format import load_pack
from tapt.processes import start_processes
from tapt.training import checkpoints
from tapt.training.prompts import train
from tapt.training.statistics import statistics

if __name__ == "__main__":
    toy, data, prompts, out = map(Path, sys.argv[1:])
    start_processes("cpu")
    backbone, data = local_backbone(toy), load_data(data)
    checkpoints.MINUTES = 0.0
    train(backbone, data, PROMPTS, CONFIG, out / "prompts")
    pack = load_pack(prompts, backbone, statistics=False)
    statistics(backbone, data, pack, pack, out / "pack")
"""


def test_two_processes_equal_one(toy, toy_folder, data, trained, parts, tmp_path: Path):
    """Training steps to float tolerance, statistics to 1e-6."""
    (tmp_path / "work.py").write_text(SCRIPT)
    given = map(str, (tmp_path / "work.py", toy_folder, data, trained / "adversarial", tmp_path))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    python(*TWO_PROCESSES.split(), *given, PYTHONPATH=paths)
    statistics(toy, load_data(data), parts[0], parts[0], tmp_path / "one")
    for file, alone, tolerance in (
        (f"prompts/{FILES[0]}", trained / "adversarial" / FILES[0], 1e-5),
        (f"pack/{FILES[1]}", tmp_path / "one" / FILES[1], 1e-6),
    ):
        expected, found = load_file(alone), load_file(tmp_path / file)
        assert expected.keys() == found.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=tolerance, atol=tolerance)
