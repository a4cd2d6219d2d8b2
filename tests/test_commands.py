"""`python -m tapt`: predict, train, statistics and evaluate, on the toy CLIP."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from tapt.__main__ import main
from tapt.backbone import Backbone
from tapt.data import LabelledImages
from tapt.errors import InputError
from tapt.pack import load_pack
from tapt.statistics import Checkpoint, empty_moments, token_moments
from tapt.towers import encode_image
from tapt.train import (
    CHECKPOINT,
    LOG,
    MOST_HELD,
    TrainConfig,
    _trim_log,
    load_training_data,
)

CLASSES = ["bird", "cat", "frog"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for i in range(8):
            pixels = random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def picture(data: Path) -> str:
    return str(data / "cat" / "0.png")


@pytest.fixture(scope="module")
def train_arguments(toy_folder: Path, data: Path) -> list[str]:
    return (
        f"train --backbone local-dir:{toy_folder} --device cpu --data {data} --design VLI "
        "--tokens 2 --depth 2 --epsilon 4/255 --shots 0 --epochs 2 --batch-size 6 --lr 0.01 "
        "--optimizer adamw --validation 0.2"
    ).split()


@pytest.fixture(scope="module")
def trained(train_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `adversarial` and `clean` with trained prompts."""
    out = tmp_path_factory.mktemp("trained")
    assert main([*train_arguments, "--out", str(out / "adversarial")]) == 0
    clean = ["--clean-share", "1.0", "--out", str(out / "clean")]
    assert main([*train_arguments, *clean]) == 0
    return out


@pytest.fixture(scope="module")
def pack(trained: Path, toy_folder: Path, data: Path) -> Path:
    out = trained / "pack"
    arguments = (
        f"statistics --backbone local-dir:{toy_folder} --device cpu --data {data} "
        f"--adversarial {trained / 'adversarial'} --clean {trained / 'clean'} --out {out} "
        "--views 8 --lr 0.001"
    )
    assert main(arguments.split()) == 0
    return out


def test_train_writes_prompts_and_a_log(trained: Path, toy: Backbone):
    rows = [json.loads(line) for line in (trained / "adversarial" / LOG).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all({"loss", "clean_accuracy", "robust_accuracy"} <= set(row) for row in rows)
    pack = load_pack(trained / "adversarial", toy, statistics=False)
    assert pack.training["epsilon"] == pytest.approx(4 / 255)
    assert pack.training["clean_share"] == 0.5


def test_clean_share_changes_the_result(trained: Path):
    adversarial, clean = (
        load_file(trained / name / "prompts.safetensors") for name in ("adversarial", "clean")
    )
    assert any(not torch.equal(adversarial[key], clean[key]) for key in clean)


def test_resume_goes_on_to_the_same_result(
    train_arguments: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped in the middle of the second epoch, after the checkpoint of the first."""
    from tapt.train import Trainer

    original = Trainer.train_step

    def stop_late(self: Trainer) -> float:
        if self.step == self.steps_per_epoch + 1:
            raise KeyboardInterrupt
        return original(self)

    out = ["--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_late)
        assert main([*train_arguments, *out]) == 130
    assert not (tmp_path / "run" / "prompts.safetensors").exists()
    assert main([*train_arguments, *out, "--resume"]) == 0
    resumed = load_file(tmp_path / "run" / "prompts.safetensors")
    whole = load_file(trained / "adversarial" / "prompts.safetensors")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize("other", ["--seed 5", "--tokens 1"])
def test_resume_refuses_other_settings(
    other: str, train_arguments: list[str], trained: Path, capsys
):
    out = ["--out", str(trained / "adversarial"), "--resume", *other.split()]
    assert main([*train_arguments, *out]) == 2
    assert "other settings" in capsys.readouterr().err


def kill_after(arguments: list[str], checkpoint: Path) -> None:
    """Starts a command, and kills it as soon as it has written its first checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tapt", *arguments, "--checkpoint-minutes", "0"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def test_a_log_line_that_was_cut_short_is_dropped(tmp_path: Path):
    rows = [json.dumps({"epoch": i, "step": 3 * i}) for i in (1, 2, 3)]
    (tmp_path / LOG).write_text("\n".join([*rows, rows[0][:9]]))
    _trim_log(tmp_path / LOG, 6)
    assert (tmp_path / LOG).read_text().splitlines() == rows[:2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--epsilon 0", "epsilon must be from 1/255 to 1"),
        ("--shots -1", "shots must be >= 1"),
        ("--clean-share 2", "clean_share must be from"),
        ("--depth 9", "visual_depth must be at most 3"),
    ],
)
def test_train_says_what_is_wrong(options, sentence, train_arguments, tmp_path, capsys):
    assert main([*train_arguments, *options.split(), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_few_shots_hold_few_images_for_validation(toy: Backbone):
    """Nothing is both trained on and held out; ImageNet's tenth would fill the memory."""
    seen = []

    def read(i: int) -> Image.Image:
        seen.append(i)
        return Image.new("RGB", (32, 32))

    labels = tuple(i % 30 for i in range(3000))
    whole = LabelledImages(tuple(map(str, range(30))), labels, read)
    few = load_training_data(whole, toy, TrainConfig(shots=10, validation=0.5))
    assert (len(few.images), len(few.held_images)) == (300, MOST_HELD)
    assert torch.bincount(few.labels).tolist() == [10] * 30
    assert len(set(seen)) == 300 + MOST_HELD


def test_train_killed_and_resumed(train_arguments: list[str], tmp_path: Path):
    long = [*train_arguments, "--epochs", "30"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_after([*long, "--out", str(killed)], killed / CHECKPOINT)
    assert not (killed / "config.json").exists()
    assert main([*long, "--out", str(killed), "--resume"]) == 0
    assert main([*long, "--out", str(whole)]) == 0
    resumed, uninterrupted = (load_file(p / "prompts.safetensors") for p in (killed, whole))
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)
    rows = [json.loads(line) for line in (killed / LOG).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 31))


def test_statistics_killed_and_resumed(pack: Path, trained: Path, toy_folder: Path, tmp_path: Path):
    random = np.random.RandomState(1)
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(500):  # several batches
            pixels = random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.ppm")
    arguments = (
        f"statistics --backbone local-dir:{toy_folder} --device cpu --data {tmp_path / 'data'} "
        f"--adversarial {trained / 'adversarial'} --clean {trained / 'clean'}"
    ).split()
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_after([*arguments, "--out", str(killed)], killed / "adversarial-0.ckpt")
    assert not (killed / "config.json").exists()
    assert main([*arguments, "--out", str(killed), "--resume"]) == 0
    assert main([*arguments, "--out", str(whole)]) == 0
    for name in ("statistics.safetensors", "prompts.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not list(killed.glob("*.ckpt"))


def test_statistics_refuse_a_checkpoint_of_other_images(toy: Backbone, pack: Path, tmp_path: Path):
    prompts = load_pack(pack, toy).prompts
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    checkpoint = Checkpoint(tmp_path / "part.ckpt", resume=True)
    token_moments(toy, prompts, images, checkpoint=checkpoint)
    with pytest.raises(InputError, match="other prompts, other images"):
        token_moments(toy, prompts, images + 1, checkpoint=checkpoint)


def test_parts_of_statistics_merge_in_any_order(toy: Backbone, pack: Path):
    """As the processes of `accelerate launch` cut the images."""
    prompts = load_pack(pack, toy).prompts
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    whole = token_moments(toy, prompts, images)
    parts = [token_moments(toy, prompts, images, indices=range(i, 7, 3)) for i in range(3)]
    for a, b, c in itertools.permutations(parts):
        merged = a.merge(b).merge(c)
        assert merged.count == whole.count
        for name in ("mean", "var"):
            torch.testing.assert_close(
                getattr(merged.statistics(), name),
                getattr(whole.statistics(), name),
                rtol=1e-6,
                atol=1e-6,
            )


def test_statistics_need_two_images(pack: Path, toy_folder: Path, data: Path, capsys):
    command = (
        f"statistics --backbone local-dir:{toy_folder} --data {data} --limit 1 "
        f"--adversarial {pack} --clean {pack} --out {pack}"
    )
    assert main(command.split()) == 2
    assert "--limit must be at least 2, got 1" in capsys.readouterr().err


def test_statistics_in_two_parts_equal_two_passes(toy: Backbone, pack: Path):
    prompts = load_pack(pack, toy).prompts
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 32, 32), generator=random, dtype=torch.uint8)
    whole = token_moments(toy, prompts, images, batch_size=3)
    merged = empty_moments(toy, prompts)
    for size in (5, 2):
        merged = token_moments(toy, prompts, images, batch_size=size).merge(merged)
    assert merged.count == 2 * whole.count
    torch.testing.assert_close(merged.total, 2 * whole.total, rtol=1e-6, atol=1e-6)

    from tapt.images import to_float
    from tapt.views import random_view

    views = torch.stack(
        [random_view(to_float(x), torch.Generator().manual_seed(i)) for i, x in enumerate(images)]
    )
    _, taps = encode_image(toy, views, prompts.visual(), tap=range(toy.visual_blocks))
    stacked = torch.stack(taps).double()
    statistics = whole.statistics()
    torch.testing.assert_close(statistics.mean.double(), stacked.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.var.double(), stacked.var(1), rtol=1e-4, atol=1e-5)


def test_statistics_make_a_whole_pack(pack: Path, toy: Backbone):
    loaded = load_pack(pack, toy)
    assert loaded.test_time.views == 8
    assert loaded.test_time.lr == pytest.approx(0.001)
    assert loaded.training["statistics"]["images"] == 24
    assert not torch.equal(loaded.statistics.adversarial.mean, loaded.statistics.clean.mean)
    card = (pack / "README.md").read_text()
    assert "library_name: tapt" in card
    assert "has not been evaluated" in card


def predict(picture: str, *options: str, toy_folder: Path) -> int:
    backbone = ["--backbone", f"local-dir:{toy_folder}", "--device", "cpu"]
    return main(["predict", picture, "--classes", "cat,dog,frog", *backbone, *options])


def test_predict_json(picture: str, pack: Path, toy_folder: Path, capsys):
    options = f"--pack {pack} --attack pgd --epsilon 4/255 --steps 3 --threat static --json"
    assert predict(picture, *options.split(), toy_folder=toy_folder) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["classes"] == ["cat", "dog", "frog"]
    assert set(result["results"]) == {"clip", "static", "ensemble", "tapt"}
    for answers in result["results"].values():
        for probabilities in answers.values():
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert 0 < result["linf_255"] <= 4
    assert result["settings"]["threat"] == "static"
    assert len(result["trace"]["attacked"]["entropies"]) == 8


def test_predict_without_attack_and_pack(picture: str, toy_folder: Path, capsys):
    assert predict(picture, "--json", "--views", "4", toy_folder=toy_folder) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["linf_255"] is None
    assert result["trace"]["attacked"] is None
    assert all(answers["attacked"] is None for answers in result["results"].values())
    assert result["settings"]["trained"] is False


def test_predict_table_labels_untrained_prompts(picture: str, toy_folder: Path, capsys):
    options = ["--attack", "pgd", "--steps", "2", "--views", "4"]
    assert predict(picture, *options, toy_folder=toy_folder) == 0
    out = capsys.readouterr().out
    assert "untrained prompts, entropy only" in out
    assert "measured L-inf" in out


def test_predict_with_an_attack_without_epsilon(picture: str, toy_folder: Path, capsys):
    options = ["--attack", "cw", "--steps", "5", "--views", "4"]
    assert predict(picture, *options, toy_folder=toy_folder) == 0
    assert "CW-5 on vanilla CLIP, no epsilon, measured L-inf" in capsys.readouterr().out
    assert predict(picture, *options, "--json", toy_folder=toy_folder) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["epsilon_255"] is None
    assert result["l2"] >= 0


def test_saved_attack_keeps_its_effect(picture: str, toy_folder: Path, tmp_path: Path, capsys):
    saved = tmp_path / "attacked.png"
    options = ["--attack", "pgd", "--steps", "3", "--views", "4", "--json"]
    assert predict(picture, *options, "--save", str(saved), toy_folder=toy_folder) == 0
    attacked = json.loads(capsys.readouterr().out)["results"]["clip"]["attacked"]
    assert predict(str(saved), "--views", "4", "--json", toy_folder=toy_folder) == 0
    again = json.loads(capsys.readouterr().out)["results"]["clip"]["clean"]
    assert again == attacked


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--attack", "pgd", "--epsilon", "0"], "epsilon must be a number from 1/255 to 1"),
        (["--attack", "pgd", "--steps", "0"], "steps must be a number from 1"),
        (["--views", "0"], "views must be a whole number from 1"),
        (["--label", "bus"], "'bus' is not one of the class names"),
        (["--pack", "nowhere"], "There is no pack 'nowhere'"),
        (["--classes", "cat"], "at least two class names"),
        (["--save", "x.png"], "choose an --attack"),
    ],
)
def test_predict_says_what_is_wrong(options, sentence, picture, toy_folder, capsys):
    assert predict(picture, *options, toy_folder=toy_folder) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
