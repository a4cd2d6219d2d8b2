"""The main job: order of results, the JSON object, stopping, and the verdict's sentences."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TOY_CLASSES
from PIL import Image

import tapt.attacks
import tapt.compare
import tapt.tuning
from tapt.attacks import AttackConfig, Classifier, attack_images
from tapt.backbone import Backbone
from tapt.compare import Comparison, compare, compare_steps
from tapt.defense import DEFENSES, Defender, make_defender, parse_classes
from tapt.errors import InputError
from tapt.images import to_float
from tapt.losses import Statistics, TokenStatistics
from tapt.pack import Pack, statistics_shapes, untrained_pack
from tapt.tuning import TuneConfig, tune
from tapt.views import make_views

ATTACK = AttackConfig(epsilon=8 / 255, steps=3)
CONFIG = TuneConfig(views=10, keep=0.3)


@pytest.fixture(scope="module")
def defender(toy: Backbone) -> Defender:
    pack = untrained_pack(toy)
    generator = torch.Generator().manual_seed(2)
    values = [
        torch.rand(shape, generator=generator)
        for shape in statistics_shapes(toy, pack.prompts.config).values()
    ]
    statistics = Statistics(TokenStatistics(*values[:2]), TokenStatistics(*values[2:]))
    trained = Pack(pack.prompts, statistics, CONFIG, "mine", pack.base_model)
    return make_defender(toy, trained, TOY_CLASSES)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    values = np.random.RandomState(0).randint(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def finished(defender: Defender, image: Image.Image) -> Comparison:
    return compare(defender, image, attack=ATTACK)


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t is not threading.main_thread() and t.daemon]


def test_results_come_in_order_and_the_last_pair_is_complete(defender, image):
    seen, phases = [], []
    for progress, result in compare_steps(defender, image, attack=ATTACK):
        answered = [
            (name, kind)
            for kind in ("clean", "attacked")
            for name in DEFENSES
            if result.answer(name, kind) is not None
        ]
        seen += [answer for answer in answered if answer not in seen]
        phases += [] if progress.phase in phases else [progress.phase]
        assert 0 <= progress.done <= progress.total
    assert seen[:2] == [("clip", "clean"), ("clip", "attacked")]
    assert set(seen[2:5]) == {(name, "clean") for name in DEFENSES[1:]}
    assert set(seen[5:]) == {(name, "attacked") for name in DEFENSES[1:]}
    assert phases == [
        "vanilla CLIP",
        "attack",
        "TAPT on the clean image",
        "TAPT on the attacked image",
        "finished",
    ]
    assert result.finished
    assert result.seconds.keys() == {"clip", "attack", "tapt_clean", "tapt_attacked", "total"}


def test_every_probability_is_the_defences_own(defender, image, finished):
    backbone, pack = defender.backbone, defender.pack
    pixels = backbone.preprocess(image)
    assert torch.equal(finished.clean, pixels)
    labels = torch.tensor([finished.label])
    attacked = attack_images(defender.classifier("clip"), pixels[None], labels, ATTACK)[0]
    assert torch.equal(finished.attacked, attacked)
    for kind, seen in (("clean", pixels), ("attacked", attacked)):
        generator = torch.Generator().manual_seed(0)
        views = make_views(to_float(seen), CONFIG.views, generator=generator)[None]
        tuned = tune(
            backbone,
            pack.prompts,
            views,
            defender.prompted,
            statistics=pack.statistics,
            config=CONFIG,
        )
        trace = tuned.trace
        plain = Classifier(backbone, defender.vanilla.fixed)(to_float(seen[None]))
        expected = {
            "clip": plain.softmax(-1)[0],
            "static": trace.logits[0, 0].softmax(-1),
            "ensemble": trace.logits[0][trace.kept[0]].softmax(-1).mean(0),
            "tapt": tuned.logits[0].softmax(-1),
        }
        for name in DEFENSES:
            actual = finished.results[name][kind]
            torch.testing.assert_close(actual, expected[name], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            defender.static(seen[None])[0], expected["static"], atol=1e-5, rtol=0
        )


def test_without_an_attack_there_is_only_the_clean_picture(defender, image):
    result = compare(defender, image)
    assert result.attacked is None
    assert result.linf_255 is None
    assert all(result.results[name]["attacked"] is None for name in DEFENSES)
    assert all(result.results[name]["clean"] is not None for name in DEFENSES)
    assert result.settings["attack"] is None
    assert result.settings["threat"] is None
    assert result.to_dict()["trace"]["attacked"] is None


def test_an_attack_can_aim_at_a_class(defender, image, finished):
    other = next(name for name in TOY_CLASSES if name != finished.classes[finished.label])
    result = compare(defender, image, attack=ATTACK, target=other)
    index = TOY_CLASSES.index(other)
    towards, away = (r.results["clip"]["attacked"][index] for r in (result, finished))
    assert towards > result.results["clip"]["clean"][index]
    assert towards >= away
    assert result.settings["target"] == other
    with pytest.raises(InputError, match="'horse' is not one of the class names"):
        compare(defender, image, attack=ATTACK, target="horse")
    with pytest.raises(InputError, match=f"The target {other!r} is the true class already"):
        compare(defender, image, attack=ATTACK, label=other, target=other)


def test_the_json_object_has_exactly_these_keys(finished: Comparison):
    data = json.loads(json.dumps(finished.to_dict(), allow_nan=False))
    assert set(data) == {
        "settings",
        "classes",
        "label",
        "label_given",
        "results",
        "linf_255",
        "l2",
        "trace",
        "seconds",
        "versions",
    }
    assert list(data["results"]) == ["clip", "static", "ensemble", "tapt"]
    for images in data["results"].values():
        assert list(images) == ["clean", "attacked"]
        for values in images.values():
            assert len(values) == len(TOY_CLASSES)
            assert math.isclose(sum(values), 1, abs_tol=1e-5)
    assert data["classes"] == TOY_CLASSES
    assert data["label"] in TOY_CLASSES
    assert data["label_given"] is False
    assert data["linf_255"] == 8
    assert set(data["trace"]) == {"clean", "attacked"}
    trace = data["trace"]["attacked"]
    assert len(trace["kept"]) == 3
    assert len(trace["entropies"]) == 10
    assert len(trace["before"]["per_block_clean"]) == 2
    assert trace["after"]["total"] < trace["before"]["total"]
    settings = data["settings"]
    assert settings["attack"]["epsilon"] == ATTACK.epsilon
    assert settings["epsilon_255"] == 8
    assert (settings["pack"], settings["trained"], settings["threat"]) == ("mine", True, "clip")
    assert settings["test_time"] == CONFIG.to_dict()


def test_results_so_far_are_an_object_too(defender, image):
    steps = compare_steps(defender, image, attack=ATTACK)
    _, result = next(steps)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["results"]["clip"]["attacked"] is None
    assert data["results"]["tapt"] == {"clean": None, "attacked": None}
    assert not result.finished
    steps.close()


def test_the_same_settings_give_the_same_object(defender, image, finished):
    again = compare(defender, image, attack=ATTACK)
    one, other = finished.to_dict(), again.to_dict()
    assert one["results"] == other["results"]
    reseeded = compare(defender, image, attack=ATTACK, seed=1)
    assert reseeded.to_dict()["results"]["tapt"] != one["results"]["tapt"]
    assert reseeded.settings["seed"] == 1


def test_a_given_label_is_the_attacks_label(defender, image, finished):
    other = next(c for i, c in enumerate(TOY_CLASSES) if i != finished.label)
    result = compare(defender, image, attack=ATTACK, label=other)
    assert result.label_given
    assert result.classes[result.label] == other
    index = result.label
    assert result.results["clip"]["attacked"][index] < result.results["clip"]["clean"][index]
    assert not torch.equal(result.attacked, finished.attacked)


def test_the_static_threat_attacks_the_static_prompts(defender, image, finished):
    result = compare(defender, image, attack=ATTACK, threat="static")
    assert result.settings["threat"] == "static"
    label = result.label
    static, other = (r.results["static"]["attacked"][label] for r in (result, finished))
    assert static < other


def test_unknown_label_and_threat_are_refused(defender, image):
    with pytest.raises(InputError, match="The true class 'horse' is not one of the class names"):
        compare(defender, image, label="horse")
    with pytest.raises(InputError, match="The threat square needs the attack square"):
        compare(defender, image, attack=ATTACK, threat="square")
    with pytest.raises(InputError, match="threat must be one of clip, static, got 'tapt'"):
        defender.classifier("tapt")


@pytest.mark.parametrize("phase", ["attack", "TAPT on the clean image"])
def test_closing_the_generator_stops_the_computation(
    defender, image, phase: str, monkeypatch: pytest.MonkeyPatch
):
    """The thread ends at its next report, long before its work would."""
    passes = []
    for module in (tapt.attacks, tapt.tuning):

        def spy(*args, original=module.encode_image, **options):
            passes.append(1)
            return original(*args, **options)

        monkeypatch.setattr(module, "encode_image", spy)
    before = set(workers())
    steps = 10_000 if phase == "attack" else 1
    config = replace(CONFIG, steps=1 if phase == "attack" else 100)
    running = compare_steps(defender, image, attack=replace(ATTACK, steps=steps), config=config)
    for progress, _ in running:
        if progress.phase == phase and progress.done:
            break
    assert set(workers()) - before
    running.close()
    assert not set(workers()) - before
    assert len(passes) < (10_000 if phase == "attack" else 100)
    assert compare(defender, image).finished  # the model is as it was


def test_an_error_in_the_thread_reaches_the_caller(defender, image, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise InputError("No attack today.")

    monkeypatch.setattr(tapt.compare, "attack_images", fail)
    with pytest.raises(InputError, match=r"No attack today\."):
        compare(defender, image, attack=ATTACK)


def test_a_batch_is_defended_image_by_image(defender: Defender, image: Image.Image):
    one = defender.backbone.preprocess(image)
    other = defender.backbone.preprocess(image.rotate(90))
    both = defender.defend(torch.stack([one, other]), seeds=[0, 5]).probabilities
    for index, (pixels, seed) in enumerate(((one, 0), (other, 5))):
        alone = defender.defend(pixels[None], seeds=[seed]).probabilities
        for name, values in alone.items():
            torch.testing.assert_close(both[name][index], values[0], atol=1e-3, rtol=0)


def test_a_class_name_that_does_not_fit_is_refused(toy: Backbone):
    with pytest.raises(InputError, match="at most 22 per sentence"):
        make_defender(toy, untrained_pack(toy), ["cat", "very " * 30 + "long dog"])


CASES = {
    # clip clean, clip attacked, tapt clean, tapt attacked, true class
    "clip-wrong-before": (
        ("dog", "car", "cat", "cat", "cat"),
        "CLIP was wrong before the attack: it answers dog where cat is true, and car after it. "
        "TAPT answers cat on the attacked image.",
    ),
    "clip-wrong-before-and-unchanged": (
        ("dog", "dog", "cat", "dog", "cat"),
        "CLIP was wrong before the attack: it answers dog where cat is true. "
        "TAPT answers dog on the attacked image.",
    ),
    "attack-failed": (
        ("cat", "cat", "cat", "cat", None),
        "The attack failed to change CLIP's answer, cat; TAPT answers cat too.",
    ),
    "attack-failed-and-tapt-differs": (
        ("cat", "cat", "cat", "dog", "cat"),
        "The attack failed to change CLIP's answer, cat; TAPT, however, answers dog.",
    ),
    "tapt-recovers": (
        ("cat", "dog", "cat", "cat", "cat"),
        "The attack turned CLIP's answer from cat to dog; TAPT answers cat.",
    ),
    "tapt-recovers-without-a-label": (
        ("cat", "dog", "cat", "cat", None),
        "The attack turned CLIP's answer from cat to dog; TAPT answers cat.",
    ),
    "tapt-falls-too": (
        ("cat", "dog", "cat", "car", "cat"),
        "The attack turned CLIP's answer from cat to dog; TAPT falls too and answers car.",
    ),
    "tapt-missed-it-before": (
        ("cat", "dog", "car", "car", "cat"),
        "The attack turned CLIP's answer from cat to dog; TAPT answers car, but it missed cat "
        "before the attack too.",
    ),
    "attack-running": (
        ("cat", None, None, None, None),
        "CLIP answers cat; the attack is running.",
    ),
    "tapt-running": (
        ("cat", "dog", "cat", None, None),
        "The attack turned CLIP's answer from cat to dog.",
    ),
    "attack-failed-and-tapt-running": (
        ("cat", "cat", None, None, None),
        "The attack failed to change CLIP's answer, cat.",
    ),
    "clip-wrong-and-tapt-running": (
        ("dog", "car", None, None, "cat"),
        "CLIP was wrong before the attack: it answers dog where cat is true, and car after it.",
    ),
}
WITHOUT = {
    "nothing-yet": ((None, None, None), ""),
    "clip-alone": (("cat", None, None), "CLIP answers cat."),
    "both-agree": (
        ("cat", "cat", None),
        "Without an attack, CLIP and TAPT both answer cat.",
    ),
    "both-right": (
        ("cat", "cat", "cat"),
        "Without an attack, CLIP and TAPT both answer cat.",
    ),
    "both-wrong": (
        ("cat", "cat", "dog"),
        "Without an attack, CLIP and TAPT both answer cat; the true class is dog.",
    ),
    "they-differ": (
        ("cat", "dog", None),
        "Without an attack, CLIP answers cat and TAPT answers dog.",
    ),
    "they-differ-with-a-label": (
        ("cat", "dog", "dog"),
        "Without an attack, CLIP answers cat and TAPT answers dog; the true class is dog.",
    ),
}
NAMES = ("cat", "dog", "car")


def comparison(answers: dict[tuple[str, str], str | None], truth: str | None) -> Comparison:
    result = Comparison(NAMES, {"threat": "clip"}, torch.zeros(3, 2, 2, dtype=torch.uint8))
    for (defense, kind), answer in answers.items():
        images = result.results.setdefault(defense, {"clean": None, "attacked": None})
        if answer is not None:
            images[kind] = torch.tensor([0.8 if n == answer else 0.1 for n in NAMES])
    clean = answers[("clip", "clean")]
    result.label_given = truth is not None
    if truth or clean:
        result.label = NAMES.index(truth or clean)
    return result


@pytest.mark.parametrize("case", CASES)
def test_verdict_with_an_attack(case: str):
    (clean, attacked, tapt_clean, tapt_attacked, truth), sentence = CASES[case]
    answers = {
        ("clip", "clean"): clean,
        ("clip", "attacked"): attacked,
        ("tapt", "clean"): tapt_clean,
        ("tapt", "attacked"): tapt_attacked,
    }
    result = comparison(answers, truth)
    result.attacked = result.clean.clone()
    assert result.verdict() == sentence
    result.settings["threat"] = "static"
    expected = sentence.replace("The attack ", "The attack on the static prompts ")
    assert result.verdict() == expected


@pytest.mark.parametrize("case", WITHOUT)
def test_verdict_without_an_attack(case: str):
    (clip, tapt_clean, truth), sentence = WITHOUT[case]
    answers = {("clip", "clean"): clip, ("tapt", "clean"): tapt_clean}
    assert comparison(answers, truth).verdict() == sentence


def test_an_answer_is_the_top_class_and_its_probability():
    result = comparison({("clip", "clean"): "dog"}, None)
    assert result.answer("clip", "clean") == ("dog", pytest.approx(0.8))
    assert result.answer("clip", "attacked") is None
    assert result.answer("tapt", "clean") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat, dog", ["cat", "dog"]),
        ("cat\ndog\r\nsports car\n", ["cat", "dog", "sports car"]),
        ("  cat ,, dog,\n\n , horse ", ["cat", "dog", "horse"]),
        ("cat, dog, cat\ndog", ["cat", "dog"]),
        ("sports   car,\tdog", ["sports car", "dog"]),
        ("Cat, cat", ["Cat", "cat"]),
        ("猫, chien à poil", ["猫", "chien à poil"]),
        (["cat", "dog, horse"], ["cat", "dog", "horse"]),
    ],
)
def test_class_names_are_read_from_text(text: str | list[str], expected: list[str]):
    assert parse_classes(text) == expected


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), (" ,\n, ", 0), ("cat", 1), ("cat, cat", 1), ([], 0)]
)
def test_fewer_than_two_classes_are_refused(text: str | list[str], count: int):
    with pytest.raises(InputError, match=f"at least two class names.*; got {count}"):
        parse_classes(text)


def test_a_thousand_classes_are_the_most():
    names = [f"class {i}" for i in range(1001)]
    assert parse_classes("\n".join(names[:1000])) == names[:1000]
    with pytest.raises(InputError, match=r"at most 1,000 class names; got 1,001"):
        parse_classes(names)
