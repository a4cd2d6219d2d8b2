"""A model behind one call: order of results, the JSON object, stopping, the verdict, loading."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TOY_CLASSES, toy_model
from PIL import Image

import tapt.model
from tapt.comparison import Answer, Answers, Comparison, attacked_title
from tapt.core.attacks import Attack, attack_images
from tapt.core.errors import BackboneError, InputError, PackError
from tapt.core.images import to_float, to_uint8
from tapt.core.views import image_seeds
from tapt.data.names import names_text, parse_classes
from tapt.defenses import ImageBatch, find_defense, find_defenses
from tapt.model import QUICK, Model, load
from tapt.packs.format import save_pack

ATTACK = Attack(epsilon=8 / 255, steps=3)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    values = np.random.RandomState(0).randint(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def finished(model: Model, image: Image.Image) -> Comparison:
    return model.compare(image, TOY_CLASSES, attack=ATTACK)


def test_results_come_in_order_and_the_last_pair_is_complete(model, image):
    answered, phases = [], []
    for progress, result in model.compare_steps(image, TOY_CLASSES, attack=ATTACK):
        data = json.loads(json.dumps(result.to_dict()))["results"]  # results so far are an object
        here = [(n, k) for n, answers in data.items() for k, v in answers.items() if v is not None]
        answered += [answer for answer in here if answer not in answered]
        phases += [] if progress.name in phases else [progress.name]
        assert 0 <= progress.done <= progress.total
        assert str(result)
        assert result.finished is (progress.name == "finished")
    names, titles = zip(*((row.name, row.title) for row in find_defenses()), strict=True)
    assert answered[:2] == [("clip", "clean"), ("clip", "attacked")]
    assert set(answered) == {(n, k) for n in names for k in ("clean", "attacked")}
    assert phases == [titles[0], "attack", *titles[1:], "finished"]
    assert result.seconds.keys() == {"attack", "total"}


def test_every_probability_is_the_defences_own(model, image, finished):
    clip, pixels = model.prepare(TOY_CLASSES), model.backbone.preprocess(image)
    assert torch.equal(finished.clean, pixels)
    labels = torch.tensor([finished.label])
    attacked = attack_images(clip.vanilla, pixels[None], labels, ATTACK)[0]
    assert torch.equal(finished.attacked, attacked)
    for kind, shown in (("clean", pixels), ("attacked", attacked)):
        for name, defense in model.prepare_defenses(clip).items():
            alone = defense.predict(ImageBatch(to_float(shown[None]), image_seeds(0, [0])))
            actual = getattr(finished[name], kind).probabilities
            torch.testing.assert_close(actual, alone.probabilities[0], atol=1e-5, rtol=0)


def test_without_an_attack_there_is_only_the_clean_picture(model, image):
    result = model.predict(image, TOY_CLASSES, defenses=["clip", "static"])
    assert result.attacked is result.linf_255 is result.l2 is None
    for answers in result.answers.values():
        assert (answers.clean is None, answers.attacked is None) == (False, True)
    assert result.settings["attack"] is result.settings["attacked_model"] is None
    assert "attacked" not in str(result)


def test_an_attack_can_aim_at_a_class(model, image, finished):
    true = finished.classes[finished.label]
    other = next(name for name in TOY_CLASSES if name != true)
    few = {"attack": ATTACK, "defenses": ["clip"]}
    result, index = model.compare(image, TOY_CLASSES, target=other, **few), TOY_CLASSES.index(other)
    towards, away = (r["clip"].attacked.probabilities[index] for r in (result, finished))
    assert towards > result["clip"].clean.probabilities[index]
    assert towards >= away
    assert result.settings["target"] == other
    with pytest.raises(InputError, match="The target 'horse' is not one of the class names"):
        model.compare(image, TOY_CLASSES, target="horse", **few)
    for label in (None, other):  # vanilla CLIP's answer, and a given one
        with pytest.raises(InputError, match="is the true class already"):
            model.compare(image, TOY_CLASSES, label=label, target=label or true, **few)


def test_the_json_object(finished: Comparison):
    data = json.loads(json.dumps(finished.to_dict(), allow_nan=False))
    assert {"states", "l2", "seconds", "versions"} <= set(data)
    assert list(data["results"]) == [row.name for row in find_defenses()]
    for images in data["results"].values():
        assert list(images) == ["clean", "attacked"]
        assert [math.isclose(sum(v), 1, abs_tol=1e-5) for v in images.values()] == [True, True]
    assert (data["classes"], data["label_given"], data["linf_255"]) == (TOY_CLASSES, False, 8)
    assert data["label"] in TOY_CLASSES
    trace = data["trace"]["tapt"]["attacked"]
    assert (len(trace["kept"]), len(trace["entropies"])) == (2, 6)
    assert len(trace["before"]["per_block_clean"]) == 2
    assert trace["after"]["total"] < trace["before"]["total"]
    settings = data["settings"]
    assert (settings["attack"]["epsilon"], settings["epsilon_255"]) == (ATTACK.epsilon, 8)
    wanted = {"pack": "toy", "trained": True, "attacked_model": "clip"}
    assert wanted.items() <= settings.items()
    assert settings["test_time"]["tapt"]["lr"] == 0.02


def test_the_same_settings_give_the_same_object(model, image, finished):
    again, other = (model.compare(image, TOY_CLASSES, attack=ATTACK, seed=s) for s in (0, 1))
    results = finished.to_dict()["results"]
    assert again.to_dict()["results"] == results
    assert other.to_dict()["results"]["tapt"] != results["tapt"]
    assert other.to_dict()["results"]["static"] == results["static"]
    assert other.settings["seed"] == 1


def test_settings_are_the_packs_until_somebody_changes_them(model):
    clip = model.prepare(TOY_CLASSES)
    changes = {"views": 4, "tapt.keep": 0.5, "lr": None}
    prepared = model.prepare_defenses(clip, ["ensemble", "tapt"], changes)
    ensemble, own = prepared["ensemble"].settings, prepared["tapt"].settings
    assert (ensemble.views, ensemble.keep) == (4, 0.34)
    assert (own.views, own.keep, own.lr) == (4, 0.5, 0.02)
    with pytest.raises(InputError, match="'magic' is a setting of no defence"):
        model.prepare_defenses(clip, None, {"magic": 1})


def test_a_given_label_is_the_attacks_label(model, image, finished):
    other = next(c for i, c in enumerate(TOY_CLASSES) if i != finished.label)
    few = {"attack": ATTACK, "defenses": ["clip"]}
    result = model.compare(image, TOY_CLASSES, label=other, **few)
    clip, index = result["clip"], result.label
    assert (result.label_given, result.classes[index]) == (True, other)
    assert clip.attacked.probabilities[index] < clip.clean.probabilities[index]
    assert not torch.equal(result.attacked, finished.attacked)
    picture = model.attack(image, TOY_CLASSES, ATTACK, label=other)
    assert torch.equal(to_uint8(picture), result.attacked)


def test_the_static_prompts_and_a_deployed_defence_can_be_attacked(model, image, finished):
    few = {"attack": ATTACK, "defenses": ["static"]}
    static, through, default = (
        model.compare(image, TOY_CLASSES, attacked=attacked, **few)
        for attacked in ("static", "deployed:static", "deployed")
    )
    label = static.label
    one, other = (r["static"].attacked.probabilities[label] for r in (static, finished))
    assert one < other
    assert through["static"].attacked.probabilities[label] <= other
    models = [r.settings["attacked_model"] for r in (static, through, default)]
    assert models == ["static", "deployed:static", "deployed:tapt"]
    assert through.settings["adaptive"]["pool"] == QUICK.pool
    assert "on TAPT as deployed" in str(default)
    assert attacked_title("clip") == "Vanilla CLIP"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label": "horse"}, "The true class 'horse' is not one of the class names"),
        ({"attacked": "tapt"}, "The attacked model must be clip, static, deployed or"),
        ({"attacked": "clip:tapt"}, "The attacked model must be clip, static, deployed or"),
        ({"attacked": "deployed:magic"}, "'magic' is unknown"),
        ({"defenses": []}, "at least one defence"),
    ],
)
def test_wrong_arguments_are_refused(model, image, options, sentence):
    with pytest.raises(InputError, match=sentence):
        model.compare(image, TOY_CLASSES, attack=ATTACK, **options)


@pytest.mark.parametrize(
    ("phase", "attack", "settings"),
    [("attack", ATTACK.updated(steps=10_000), {}), ("TAPT", ATTACK, {"steps": 100})],
)
def test_closing_the_generator_stops_the_computation(model, image, phase, attack, settings):
    """The thread ends at its next report, long before its work would."""
    running = model.compare_steps(image, TOY_CLASSES, attack=attack, settings=settings)
    before = set(threading.enumerate())
    for progress, _ in running:
        if progress.name == phase and progress.done:
            break
    (worker,) = set(threading.enumerate()) - before
    running.close()
    assert not worker.is_alive()
    assert progress.done < progress.total
    assert model.compare(image, TOY_CLASSES, defenses=["clip"]).finished


def test_an_error_in_the_thread_reaches_the_caller(model, image, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise InputError("No attack today.")

    monkeypatch.setattr(tapt.model, "attack_batch", fail)
    with pytest.raises(InputError, match=r"No attack today\."):
        model.compare(image, TOY_CLASSES, attack=ATTACK)


@pytest.mark.parametrize("name", ["visual", "text"])
def test_prompts_without_finite_answers_are_refused(toy, image, name):
    pack = toy_model(toy).pack
    tensors = {**pack.prompts.tensors, name: pack.prompts.tensors[name] * 1e38}
    prompts = replace(pack.prompts, tensors=tensors)
    with pytest.raises(PackError, match="The prompts of pack 'toy' give no finite answers"):
        Model(toy, replace(pack, prompts=prompts)).compare(image, TOY_CLASSES)


NAMES, SEEN = ("cat", "dog", "car"), ("attack", "attacked_model")


def comparison(
    answers: dict[str, tuple[str | None, str | None]], true: str | None, attack: bool = True
) -> Comparison:
    def answer(name: str | None) -> Answer | None:
        values = torch.tensor([0.8 if n == name else 0.1 for n in NAMES])
        return name and Answer(NAMES, values, {}, 0.0)

    seen = {"attack": {}, "attacked_model": "clip"} if attack else dict.fromkeys(SEEN)
    settings = {"trained": True, **seen}
    rows = {name: Answers(*map(answer, pair)) for name, pair in answers.items()}
    clean = rows["clip"].clean
    label = true or (clean and clean.top[0])
    pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    index = None if label is None else NAMES.index(label)
    given = true is not None
    return Comparison(NAMES, settings, pixels, rows, label=index, label_given=given)


@pytest.mark.parametrize(
    ("clean", "attacked", "true", "state"),
    [
        ("cat", "cat", "cat", "held"),
        ("cat", "dog", "cat", "fooled"),
        ("dog", "car", "cat", "wrong before"),
        ("dog", "cat", "cat", "recovered"),
        ("cat", "cat", None, "kept"),
        ("cat", "dog", None, "changed"),
        ("cat", None, "cat", None),
    ],
)
def test_what_the_attack_did_to_a_defence(clean, attacked, true, state):
    result = comparison({"clip": (clean, attacked)}, true)
    assert result.state("clip") == state
    assert result["clip"].clean.top == (clean, pytest.approx(0.8))


@pytest.mark.parametrize(
    ("clip", "own", "true", "attack", "sentence"),
    [
        (("cat", "dog"), ("cat", "cat"), "cat", True, "fooled (Vanilla CLIP), 1 held (TAPT). The"),
        (("cat", "dog"), ("cat", "cat"), None, True, "1 changed (Vanilla CLIP), 1 kept (TAPT)."),
        (("cat", None), ("cat", None), None, False, "In all 2 cat (Vanilla CLIP, TAPT)."),
        (("cat", None), ("dog", None), "dog", False, "1 wrong (Vanilla CLIP), 1 right (TAPT). The"),
    ],
)
def test_the_verdict(clip, own, true, attack, sentence):
    verdict = comparison({"clip": clip, "tapt": own}, true, attack).verdict()
    assert sentence in verdict
    assert ("attacked directly" in verdict, "The true class is" in verdict) == (attack, bool(true))


def test_there_is_no_verdict_before_the_last_answer():
    assert comparison({"clip": ("cat", None), "tapt": (None, None)}, "cat").verdict() == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat, dog", ["cat", "dog"]),
        ("cat\ndog\r\nsports car\n", ["cat", "dog", "sports car"]),
        ("  cat ,, dog,\n\n , horse ", ["cat", "dog", "horse"]),
        ("cat, dog, cat\ndog", ["cat", "dog"]),
        ("sports   car,\tdog", ["sports car", "dog"]),
        ("Cat, dog, cat, d og", ["Cat", "dog"]),
        ('cat; "dog, hot"; a "big" car, "', ["cat", "dog, hot", 'a "big" car', '"']),
        ("猫, chien à poil", ["猫", "chien à poil"]),
        (["cat", "dog, horse"], ["cat", "dog, horse"]),
    ],
)
def test_class_names_are_read_from_text(text: str | list[str], expected: list[str]):
    assert parse_classes(text) == parse_classes(names_text(expected)) == expected


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), (" ,\n, ", 0), ("cat", 1), ("cat, Cat", 1), ([], 0)]
)
def test_fewer_than_two_classes_are_refused(text: str | list[str], count: int):
    with pytest.raises(InputError, match=f"at least two class names.*; got {count}"):
        parse_classes(text)


def test_a_thousand_classes_are_the_most():
    names = [f"class {i}" for i in range(1001)]
    assert parse_classes("\n".join(names[:1000])) == names[:1000]
    with pytest.raises(InputError, match=r"at most 1,000 class names; got 1,001"):
        parse_classes(names)


def test_a_pack_brings_its_backbone_along(toy, toy_folder, tmp_path):
    save_pack(toy_model(toy).pack, tmp_path / "pack")
    own = f"local-dir:{toy_folder}"
    for options in ({"name": str(tmp_path / "pack")}, {"pack": tmp_path / "pack", "backbone": own}):
        model = load(**options, device="cpu")
        assert model.backbone.sha256 == toy.sha256
        assert model.pack.trained
        assert model.origins == (None, None)
        assert model.settings(find_defense("tapt")).views == 6
    assert not load(own, device="cpu").pack.trained
    for options, error, sentence in (
        ({"name": "tiny/vli", "backbone": "tiny"}, InputError, "not both"),
        ({"name": "tiny/nothing"}, PackError, "no pack 'tiny/nothing'"),
        ({"name": "nothing:x"}, BackboneError, "unknown"),
        ({"name": own, "revision": "main"}, BackboneError, "has no revision 'main'"),
        ({"backbone": "tiny", "pack": tmp_path / "pack"}, PackError, "made for backbone"),
    ):
        with pytest.raises(error, match=sentence):
            load(**options, device="cpu")


def test_settings_that_no_defence_takes_are_told_when_a_pack_is_loaded(toy, tmp_path):
    pack = toy_model(toy, test_time={}).pack
    for settings in ({"views": 0}, {"magic": 1}):
        with pytest.raises(PackError, match=r"Pack 'toy', test_time of tapt: (views|magic)"):
            Model(toy, replace(pack, test_time={"tapt": settings}))
