"""Curves of one picture against epsilon, as the page and the command use them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TOY_CLASSES
from PIL import Image
from torch import Tensor

from tapt.__main__ import main
from tapt.attacks import AttackConfig
from tapt.backbone import Backbone
from tapt.compare import compare
from tapt.defense import DEFENSES, Defender, make_defender
from tapt.errors import InputError
from tapt.images import to_picture
from tapt.pack import Pack, base_model
from tapt.prompts import PromptConfig, init_prompts
from tapt.sweep import Sweep, curve_png, sweep_steps
from tapt.tuning import TuneConfig


@pytest.fixture(scope="module")
def defender(toy: Backbone) -> Defender:
    prompts = init_prompts(toy, PromptConfig("VLI", 2, 3), seed=1)
    config = TuneConfig(views=6, keep=0.5, lr=0.02)
    return make_defender(toy, Pack(prompts, None, config, "toy", base_model(toy)), TOY_CLASSES)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    pixels: Tensor = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)
    return to_picture(pixels)


def test_the_curves_are_those_of_compare(defender, image):
    attack = AttackConfig("pgd", steps=3)
    *_, (progress, result) = sweep_steps(
        defender, image, attack=attack, threat="static", epsilons=(0, 2, 8)
    )
    assert (progress.done, progress.total) == (3, 3)
    assert not result.label_given
    for place, epsilon in enumerate((0, 2, 8)):
        config = AttackConfig("pgd", epsilon / 255, 3) if epsilon else None
        single = compare(defender, image, attack=config, threat="static", label=result.label)
        for name in DEFENSES:
            told = single.results[name]["attacked" if epsilon else "clean"]
            expected = float(told[TOY_CLASSES.index(result.label)])
            assert result.probabilities[name][place] == pytest.approx(expected, abs=1e-5)
            assert result.answers[name][place] == TOY_CLASSES[int(told.argmax())]
    assert result.probabilities["static"][2] < result.probabilities["static"][0]


def test_it_fills_in_and_stops(defender, image):
    steps = sweep_steps(defender, image, attack=AttackConfig(steps=2), epsilons=(0, 1, 2))
    lengths = []
    for progress, result in steps:
        lengths.append(len(result.probabilities["tapt"]))
        if progress.phase == "epsilon 2/255, attack":
            steps.close()
            break
    assert lengths[0] == 0
    assert lengths[-1] == 2
    assert next(steps, None) is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attack": AttackConfig("cw")}, "needs an attack with an epsilon; CW has none"),
        ({"threat": "rumour"}, "threat must be one of"),
        ({"threat": "square"}, "needs the attack square"),
        ({"label": "bus"}, "'bus' is not one of the class names"),
    ],
)
def test_wrong_arguments_are_refused(defender, image, options, sentence):
    with pytest.raises(InputError, match=sentence):
        next(sweep_steps(defender, image, **options))


def test_the_deployed_defence_can_be_the_attacked_model(defender, image):
    *_, (_, result) = sweep_steps(
        defender,
        image,
        attack=AttackConfig(steps=1),
        threat="adaptive",
        epsilons=(0, 8),
        draws=1,
    )
    assert all(len(values) == 2 for values in result.probabilities.values())


def test_the_command_writes_a_plot(image, toy_folder, tmp_path: Path, capsys):
    image.save(tmp_path / "noise.png")
    command = (
        f"sweep {tmp_path / 'noise.png'} --classes cat,dog --backbone local-dir:{toy_folder} "
        f"--device cpu --steps 2 --views 4 --max-epsilon 2 --out {tmp_path / 'plots' / 'curve.png'}"
    )
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == ["epsilon", *DEFENSES]
    assert out.splitlines()[-1].startswith("2/255")
    with Image.open(tmp_path / "plots" / "curve.png") as plot:
        assert plot.format == "PNG"
        assert len(plot.convert("RGB").getcolors(1 << 20)) > 50
    assert main([*command.split(), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["epsilons"] == [0, 1, 2]
    assert all(len(v) == 3 for v in told["probabilities"].values())
    assert told["settings"]["trained"] is False
    assert main([*command.split(), "--max-epsilon", "0"]) == 2
    assert main([*command.split(), "--attack", "cw"]) == 2


def test_unfinished_curves_can_be_drawn():
    settings = {"attack": {"name": "pgd", "steps": 3}, "threat": "clip", "trained": True}
    half = Sweep("cat", True, (0, 1, 2), settings)
    for values in half.probabilities.values():
        values.append(0.5)
    assert curve_png(half).startswith(b"\x89PNG")
