"""The command line on the toy CLIP: options, outputs, sentences."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_noise
from PIL import Image

from tapt.__main__ import COMMANDS, main
from tapt.defenses import Defense, find_defenses
from tapt.packs.publish import Published

Predict = Callable[..., int]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("data"), classes=["bird", "cat", "frog"], count=4)


@pytest.fixture(scope="module")
def toy_options(toy_folder: Path) -> list[str]:
    return ["--backbone", f"local-dir:{toy_folder}", "--device", "cpu"]


@pytest.fixture
def predict(data: Path, toy_options: list[str]) -> Predict:
    """`tapt predict` on a picture, with further options in one string."""
    command = ["predict", str(data / "cat" / "0.png"), "--classes", "cat,dog,frog", *toy_options]
    return lambda options="", *more: main([*command, "--views", "4", *options.split(), *more])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a command ended with."""
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    return error


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert f"tapt {name} [-h]" in capsys.readouterr().out


def test_every_test_time_setting_is_an_option(flips: Defense, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for row in find_defenses():
        for name in set(row.settings.model_fields) - {"steps"}:
            assert f"--{name.replace('_', '-')}" in out
    assert "--tune-steps N AdamW steps per image, a whole number from 0 to 100" in out
    assert "--flips N how often a coin is thrown, a whole number from 1 to 64" in out
    assert "--epsilon X L-inf radius; CW has none, a number from 1/255 to 1 (default 4/255)" in out


def test_predict_json(predict: Predict, capsys: pytest.CaptureFixture[str]):
    options = "--attack pgd --epsilon 3/255 --steps 3 --attacked static --seed 5 --json"
    assert predict(f"{options} --set ensemble.views=3 --random-start --betas 0.8,0.9") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["classes"] == ["cat", "dog", "frog"]
    assert 0 < result["linf_255"] <= 3
    settings = result["settings"]
    assert (settings["attacked_model"], settings["seed"]) == ("static", 5)
    assert settings["attack"]["seed"] == 5
    assert settings["test_time"]["ensemble"]["views"] == 3
    tapt = settings["test_time"]["tapt"]
    assert (tapt["views"], tapt["random_start"], tapt["betas"]) == (4, True, [0.8, 0.9])
    assert predict("--json --defenses clip,tapt") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["results"]) == ["clip", "tapt"]
    assert all(answers["attacked"] is None for answers in result["results"].values())
    assert result["settings"]["trained"] is False


def test_predict_table(predict: Predict, flips: Defense, capsys: pytest.CaptureFixture[str]):
    assert predict("--attack square --queries 2 --attacked deployed:flips --draws 1 --flips 3") == 0
    out = capsys.readouterr().out
    assert "untrained prompts" in out
    assert "Median over flips, untrained prompts  " in out
    assert "Square-2 on Median over flips as deployed, epsilon 4/255, measured L-inf" in out


def test_saved_attack_keeps_its_effect(predict: Predict, tmp_path: Path, toy_options, capsys):
    saved = tmp_path / "new" / "attacked.png"
    assert predict("--attack cw --steps 5 --json --save", str(saved)) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["settings"]["epsilon_255"] is None
    again = ["predict", str(saved), "--classes", "cat,dog,frog", "--json", "--views", "4"]
    assert main([*again, *toy_options]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["results"]["clip"]["clean"] == first["results"]["clip"]["attacked"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--epsilon 4/x", "epsilon must be a number from 1/255 to 1, got '4/x'"),
        ("--attack pgd --steps many", "steps must be a whole number from 1 to 10000, got 'many'"),
        ("--attack bite", "invalid choice: 'bite'"),
        (f"--seed {10**30}", "seed must be a whole number from 0 to 2147483647, got 1000"),
        ("--tune-steps 101", "steps must be a whole number from 0 to 100, got 101"),
        ("--set tapt.views=0", "views must be a whole number from 1 to 1024, got 0"),
        ("--set tapt.sights=3", "--set takes DEFENCE.NAME=VALUE of ensemble.views"),
        ("--classes cat", "at least two class names"),
        ("--device=", "--device: must not be empty"),
        ("--backbone tiny --revision v1", "has no revision 'v1'"),
        ("--frames 3", "unrecognized arguments: --frames"),
        ("--save x.png", "choose an --attack"),
    ],
)
def test_predict_says_what_is_wrong(options: str, sentence: str, predict: Predict, capsys):
    assert predict(options) == 2
    error = error_of(capsys)
    assert error.startswith("tapt predict: ")
    assert sentence in error


@pytest.mark.parametrize(
    ("name", "sentence"), [("x.jpg", "end its name in .png"), ("folder.png", "it is a folder")]
)
@pytest.mark.parametrize(("command", "option"), [("predict", "--save"), ("sweep", "--out")])
def test_picture_outputs_are_checked_before_the_work(
    command, option, name, sentence, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    picture = str(data / "cat" / "0.png")
    arguments = [command, picture, "--classes", "a,b", "--attack", "pgd", f"{option}={name}"]
    assert main([*arguments, "--pack", "not read"]) == 2
    assert sentence in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_full_disk_is_a_sentence(predict: Predict, tmp_path: Path, monkeypatch, capsys):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/private")

    monkeypatch.setattr("tapt.commands.predict.write_file", full)
    assert predict("--attack pgd --steps 1 --save", str(tmp_path / "x.png")) == 2
    assert error_of(capsys) == "tapt predict: No space left on device.\n"


def test_stopped_by_the_keyboard(predict: Predict, monkeypatch, capsys):
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tapt.commands.options.load", stop)
    assert predict() == 130
    assert error_of(capsys) == "Stopped.\n"


def test_sweep(data: Path, toy_options: list[str], tmp_path: Path, capsys):
    out = tmp_path / "new" / "curves.png"
    command = ["sweep", str(data / "cat" / "0.png"), "--classes", "a,b", *toy_options]
    command += ["--steps", "2", "--views", "4", "--max-epsilon", "2", "--defenses", "clip,tapt"]
    assert main([*command, "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["epsilons"] == [0, 1, 2]
    assert list(result["probabilities"]) == ["clip", "tapt"]
    assert result["settings"]["attack"]["steps"] == 2
    assert Image.open(out).format == "PNG"
    assert main([*command, "--out", str(out), "--max-epsilon", "256"]) == 2
    assert "--max-epsilon must be from 1 to 255" in error_of(capsys)


def evaluate(data: Path, out: Path, toy_options: list[str], options: str) -> int:
    common = ["evaluate", "--data", str(data), "--out", str(out), *toy_options]
    return main([*common, "--views", "4", *options.split()])


def test_evaluate(data: Path, toy_options: list[str], tmp_path: Path, capsys):
    """Square spends queries, the other attacks steps, whichever model is attacked."""
    options = "--attack pgd,square --epsilon 1/255,2/255 --steps 2 --queries 3 --limit 6"
    options += " --attacked clip,deployed --defenses clip,ensemble --judging 1 --rescore 2"
    assert evaluate(data, tmp_path / "out", toy_options, options) == 0
    assert "square-3" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    keys = ("attacked_model", "attack", "steps", "epsilon_255")
    found = {tuple(row[key] for key in keys) for row in rows if row["attack"] != "worst"}
    spent = ("pgd", 2), ("square", 3)
    assert found == {(m, *s, e) for m in ("clip", "deployed") for s in spent for e in (1, 2)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--attack bite", "attack must be one of pgd, "),
        ("--attack=", "--attack: must not be empty"),
        ("--rescore x", "--rescore: must be a whole number of at least 1"),
        ("--record", "--record needs --pack"),
        ("--out file", "file' cannot be written"),
    ],
)
def test_evaluate_says_what_is_wrong(options, sentence, data, toy_options, tmp_path, capsys):
    (tmp_path / "file").touch()
    options = options.replace("file", str(tmp_path / "file"))
    assert evaluate(data, tmp_path / "out", toy_options, options) == 2
    assert sentence in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_from_training_to_a_prediction(data, toy_options, tmp_path, predict: Predict, capsys):
    options = "--depth 2 --shots 0 --epochs 1 --batch-size 4 --epsilon 4/255"
    command = ["train", "--data", str(data), *toy_options, *options.split()]
    parts = {"adversarial": "0.5", "clean": "1.0"}
    for name, share in parts.items():
        assert main([*command, "--clean-share", share, "--out", str(tmp_path / name)]) == 0
    command = ["statistics", "--data", str(data), *toy_options, "--out", str(tmp_path / "pack")]
    for name in parts:
        command += [f"--{name}", str(tmp_path / name)]
    assert main([*command, "--views", "8", "--set", "tapt.lr=1/1000"]) == 0
    config = json.loads((tmp_path / "pack" / "config.json").read_text())
    assert config["training"]["adversarial"]["epsilon"] == pytest.approx(4 / 255)
    assert config["training"]["adversarial"]["shots"] is None
    assert config["test_time"]["tapt"] == {"views": 8, "lr": 0.001}
    assert config["test_time"]["ensemble"] == config["test_time"]["rtpt"] == {"views": 8}
    capsys.readouterr()
    assert predict("--json --pack", str(tmp_path / "pack")) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["trained"] is True
    assert settings["test_time"]["tapt"]["lr"] == 0.001
    assert main([*command, "--limit", "1"]) == 2
    assert "--limit must be at least 2, got 1" in error_of(capsys)


def test_push_says_where_the_pack_is(monkeypatch: pytest.MonkeyPatch, capsys):
    given: dict[str, object] = {}

    def publish(folder: str, repo: str, **options: object) -> Published:
        given.update(options, folder=folder, repo=repo)
        return Published("https://hub/commit", "abc", True, 2_000_000, ("a", "b"))

    monkeypatch.setattr("tapt.commands.push.publish", publish)
    assert main(["push", "my-pack", "owner/repo", "--tag", "v1"]) == 0
    assert given["folder"], given["repo"] == ("my-pack", "owner/repo")
    assert (given["tag"], given["public"], given["create_pr"]) == ("v1", False, False)
    assert capsys.readouterr().out.splitlines() == [
        "2.0 MB in 2 files: https://hub/commit",
        "The repo is private. Load it with",
        "  tapt demo --pack owner/repo@v1",
    ]


def test_convert_says_what_is_wrong(toy_folder: Path, tmp_path: Path, capsys):
    command = ["convert", "nothing.pth", "--design", "VLI", "--base-model"]
    command += [f"local-dir:{toy_folder}", "--statistics", *"abcd", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "'nothing.pth'" in error_of(capsys)
    assert not (tmp_path / "out").exists()
