"""Curves of one picture against epsilon, as the page and the command use them."""

from __future__ import annotations

import json

import pytest
from conftest import TOY_CLASSES, random_pixels
from PIL import Image

from tapt.core.attacks import Attack
from tapt.core.errors import InputError
from tapt.core.images import to_picture
from tapt.defenses import find_defenses
from tapt.evaluation.sweep import curve_png, sweep_steps


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return to_picture(random_pixels(1)[0])


def test_the_curves_are_those_of_compare(model, image):
    options = {"attacked": "static", "defenses": ["static", "tapt"]}
    *_, (progress, result) = sweep_steps(
        model, image, TOY_CLASSES, attack=Attack("pgd", steps=3), epsilons=(0, 2, 8), **options
    )
    assert (progress.done, progress.total) == (3, 3)
    assert not result.label_given
    for place, epsilon in enumerate((0, 2, 8)):
        attack = Attack("pgd", epsilon / 255, 3) if epsilon else None
        single = model.compare(image, TOY_CLASSES, attack=attack, label=result.label, **options)
        for name in options["defenses"]:
            answer = single[name].attacked if epsilon else single[name].clean
            expected = float(answer.probabilities[TOY_CLASSES.index(result.label)])
            assert result.probabilities[name][place] == pytest.approx(expected, abs=1e-5)
            assert result.answers[name][place] == answer.top[0]
    assert result.probabilities["static"][2] < result.probabilities["static"][0]
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert told["settings"]["attacked_model"] == "static"
    assert not {"epsilon", "step_size"} & set(told["settings"]["attack"])
    lines = str(result).splitlines()
    assert lines[1].split() == ["epsilon", "static", "tapt"]
    assert lines[-1].startswith("8/255")


def test_it_fills_in_and_stops(model, image, flips):
    steps = sweep_steps(model, image, TOY_CLASSES, attack=Attack(steps=2), epsilons=(0, 1, 2))
    lengths = []
    for progress, result in steps:
        lengths.append(len(result.probabilities["flips"]))
        if progress.name == "epsilon 2/255, attack":
            steps.close()
            break
    assert list(result.answers) == [row.name for row in find_defenses()]
    assert lengths[0] == 0
    assert lengths[-1] == 2
    assert next(steps, None) is None
    assert len(str(result).splitlines()) == 2 + 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attack": Attack("cw")}, "needs an attack with an epsilon; CW has none"),
        ({"attacked": "rumour"}, "attacked model must be"),
        ({"label": "bus"}, "'bus' is not one of the class names"),
        ({"epsilons": (0, 256)}, "from 0 to 255"),
        ({"defenses": ["magic"]}, "'magic' is unknown"),
    ],
)
def test_wrong_arguments_are_refused(model, image, options, sentence):
    with pytest.raises(InputError, match=sentence):
        next(sweep_steps(model, image, TOY_CLASSES, **options))


def test_the_deployed_defence_can_be_the_attacked_model(model, image):
    options = {"attacked": "deployed:ensemble", "defenses": ["clip", "ensemble"]}
    steps = sweep_steps(
        model, image, TOY_CLASSES, attack=Attack("square", steps=1), epsilons=(0, 8), **options
    )
    for _, result in steps:  # curves can be drawn before there is anything to draw
        assert curve_png(result).startswith(b"\x89PNG")
    assert all(len(values) == 2 for values in result.probabilities.values())
