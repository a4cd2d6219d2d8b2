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

import tapt.core.clip
import tapt.core.tuning
import tapt.model
from tapt.comparison import Answer, Answers, Comparison, attacked_title
from tapt.core.attacks import Attack, attack_images
from tapt.core.backbone import Backbone
from tapt.core.errors import BackboneError, InputError, PackError
from tapt.core.images import to_float, to_uint8
from tapt.core.tuning import TuneConfig, tune
from tapt.core.views import generators, image_seeds, make_views
from tapt.data.names import names_text, parse_classes
from tapt.defenses import find_defenses
from tapt.model import Model, attack_batch, load
from tapt.packs.format import save_pack

ATTACK = Attack(epsilon=8 / 255, steps=3)


@pytest.fixture(scope="module")
def model(toy: Backbone) -> Model:
    return toy_model(toy)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    values = np.random.RandomState(0).randint(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def finished(model: Model, image: Image.Image) -> Comparison:
    return model.compare(image, TOY_CLASSES, attack=ATTACK)


def workers() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t is not threading.main_thread() and t.daemon}


def test_results_come_in_order_and_the_last_pair_is_complete(model, image):
    answered, phases = [], []
    for progress, result in model.compare_steps(image, TOY_CLASSES, attack=ATTACK):
        here = [
            (name, kind)
            for name, answers in result.answers.items()
            for kind in ("clean", "attacked")
            if getattr(answers, kind) is not None
        ]
        answered += [answer for answer in here if answer not in answered]
        phases += [] if progress.phase in phases else [progress.phase]
        assert 0 <= progress.done <= progress.total
    assert answered[:2] == [("clip", "clean"), ("clip", "attacked")]
    assert set(answered) == {
        (n, k) for n in [row.name for row in find_defenses()] for k in ("clean", "attacked")
    }
    titles = [row.title for row in find_defenses()]
    assert phases == [titles[0], "attack", *titles[1:], "finished"]
    assert result.finished
    assert result.seconds.keys() == {"attack", "total"}


def test_every_probability_is_the_defences_own(model, image, finished):
    backbone, pack = model.backbone, model.pack
    clip, settings = model.prepare(TOY_CLASSES), TuneConfig(**pack.test_time["tapt"])
    pixels = backbone.preprocess(image)
    assert torch.equal(finished.clean, pixels)
    labels = torch.tensor([finished.label])
    attacked = attack_images(clip.vanilla, pixels[None], labels, ATTACK)[0]
    assert torch.equal(finished.attacked, attacked)
    for kind, shown in (("clean", pixels), ("attacked", attacked)):
        (generator,) = generators(image_seeds(0, [0]))
        views = make_views(to_float(shown), settings.views, generator=generator)[None]
        tuned = tune(
            backbone, pack.prompts, views, clip.texts, statistics=pack.statistics, config=settings
        )
        expected = {
            "clip": clip.vanilla(to_float(shown[None])).softmax(-1)[0],
            "static": tuned.view_logits[0, 0].softmax(-1),
            "ensemble": tuned.view_logits[0][tuned.kept[0]].softmax(-1).mean(0),
            "tapt": tuned.logits[0].softmax(-1),
        }
        for name, probabilities in expected.items():
            actual = getattr(finished[name], kind).probabilities
            torch.testing.assert_close(actual, probabilities, atol=1e-5, rtol=0)


def test_without_an_attack_there_is_only_the_clean_picture(model, image):
    result = model.predict(image, TOY_CLASSES, defenses=["clip", "static"])
    assert result.attacked is result.linf_255 is result.l2 is None
    assert all(answers.attacked is None for answers in result.answers.values())
    assert all(answers.clean is not None for answers in result.answers.values())
    assert result.settings["attack"] is result.settings["attacked_model"] is None
    assert result.to_dict()["trace"]["static"]["attacked"] is None
    assert "attacked" not in str(result)


def test_an_attack_can_aim_at_a_class(model, image, finished):
    other = next(name for name in TOY_CLASSES if name != finished.classes[finished.label])
    few = {"attack": ATTACK, "defenses": ["clip"]}
    result = model.compare(image, TOY_CLASSES, target=other, **few)
    index = TOY_CLASSES.index(other)
    towards, away = (r["clip"].attacked.probabilities[index] for r in (result, finished))
    assert towards > result["clip"].clean.probabilities[index]
    assert towards >= away
    assert result.settings["target"] == other
    with pytest.raises(InputError, match="The target 'horse' is not one of the class names"):
        model.compare(image, TOY_CLASSES, target="horse", **few)
    with pytest.raises(InputError, match=f"The target {other!r} is the true class already"):
        model.compare(image, TOY_CLASSES, label=other, target=other, **few)
    with pytest.raises(InputError, match="is the true class already"):
        model.compare(image, TOY_CLASSES, target=finished.classes[finished.label], **few)


def test_the_json_object_has_exactly_these_keys(finished: Comparison):
    data = json.loads(json.dumps(finished.to_dict(), allow_nan=False))
    assert set(data) == {
        "settings",
        "classes",
        "label",
        "label_given",
        "results",
        "states",
        "linf_255",
        "l2",
        "trace",
        "seconds",
        "versions",
    }
    assert list(data["results"]) == [row.name for row in find_defenses()]
    for images in data["results"].values():
        assert list(images) == ["clean", "attacked"]
        for values in images.values():
            assert len(values) == len(TOY_CLASSES)
            assert math.isclose(sum(values), 1, abs_tol=1e-5)
    assert data["classes"] == TOY_CLASSES
    assert data["label"] in TOY_CLASSES
    assert data["label_given"] is False
    assert data["linf_255"] == 8
    trace = data["trace"]["tapt"]["attacked"]
    assert len(trace["kept"]) == 2
    assert len(trace["entropies"]) == 6
    assert len(trace["before"]["per_block_clean"]) == 2
    assert trace["after"]["total"] < trace["before"]["total"]
    settings = data["settings"]
    assert settings["attack"]["epsilon"] == ATTACK.epsilon
    assert settings["epsilon_255"] == 8
    assert (settings["pack"], settings["trained"]) == ("toy", True)
    assert settings["attacked_model"] == "clip"
    assert settings["test_time"]["tapt"]["lr"] == 0.02


def test_results_so_far_are_an_object_too(model, image):
    steps = model.compare_steps(image, TOY_CLASSES, attack=ATTACK)
    _, result = next(steps)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["results"]["tapt"] == {"clean": None, "attacked": None}
    assert not result.finished
    assert str(result)
    steps.close()


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
    with pytest.raises(InputError, match="views must be a whole number from 1 to 1024, got 0"):
        model.prepare_defenses(clip, None, {"views": 0})


def test_a_given_label_is_the_attacks_label(model, image, finished):
    other = next(c for i, c in enumerate(TOY_CLASSES) if i != finished.label)
    few = {"attack": ATTACK, "defenses": ["clip"]}
    result = model.compare(image, TOY_CLASSES, label=other, **few)
    assert result.label_given
    clip, index = result["clip"], result.label
    assert result.classes[index] == other
    assert clip.attacked.probabilities[index] < clip.clean.probabilities[index]
    assert not torch.equal(result.attacked, finished.attacked)
    picture = model.attack(image, TOY_CLASSES, ATTACK, label=other)
    assert torch.equal(to_uint8(picture), result.attacked)


def test_the_static_prompts_and_a_deployed_defence_can_be_attacked(model, image, finished):
    few = {"attack": ATTACK, "defenses": ["static"], "draws": 1}
    static = model.compare(image, TOY_CLASSES, attacked="static", **few)
    assert static.settings["attacked_model"] == "static"
    label = static.label
    one, other = (r["static"].attacked.probabilities[label] for r in (static, finished))
    assert one < other
    through = model.compare(image, TOY_CLASSES, attacked="deployed:static", **few)
    assert torch.equal(through.attacked, static.attacked)
    assert through.settings["attacked_model"] == "deployed:static"
    default = model.compare(image, TOY_CLASSES, attacked="deployed", **few)
    assert default.settings["attacked_model"] == "deployed:tapt"
    assert "on TAPT as deployed" in str(default)
    assert attacked_title("clip") == "Vanilla CLIP"


def test_a_query_of_a_deployed_defence_is_one_answer(model, image, monkeypatch):
    draws = []
    monkeypatch.setattr(
        tapt.model, "attack_deployed", lambda *_, **options: draws.append(options["draws"])
    )
    clip = model.prepare(TOY_CLASSES)
    (prepared,) = model.prepare_defenses(clip, ["tapt"]).values()
    for name in ("pgd", "square"):
        parts = clip, "deployed", torch.zeros(1), torch.zeros(1), Attack(name)
        attack_batch(*parts, prepared=prepared, draws=3)
    assert draws == [3, 1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label": "horse"}, "The true class 'horse' is not one of the class names"),
        ({"attacked": "tapt"}, "The attacked model must be clip, static, deployed or"),
        ({"attacked": "clip:tapt"}, "The attacked model must be clip, static, deployed or"),
        ({"attacked": "deployed:magic"}, "'magic' is unknown"),
        ({"defenses": []}, "at least one defence"),
        ({"draws": 0}, "draws must be"),
    ],
)
def test_wrong_arguments_are_refused(model, image, options, sentence):
    with pytest.raises(InputError, match=sentence):
        model.compare(image, TOY_CLASSES, attack=ATTACK, **options)


@pytest.mark.parametrize("phase", ["attack", "TAPT"])
def test_closing_the_generator_stops_the_computation(
    model, image, phase: str, monkeypatch: pytest.MonkeyPatch
):
    """The thread ends at its next report, long before its work would."""
    passes = []
    for module, name in ((tapt.core.clip, "logits"), (tapt.core.tuning, "encode_image")):
        original = getattr(module, name)

        def spy(*args, original=original, **options):
            passes.append(1)
            return original(*args, **options)

        monkeypatch.setattr(module, name, spy)
    before = workers()
    attack = ATTACK.updated(steps=10_000 if phase == "attack" else 1)
    settings = {"steps": 1 if phase == "attack" else 100}
    running = model.compare_steps(image, TOY_CLASSES, attack=attack, settings=settings)
    for progress, _ in running:
        if progress.phase == phase and progress.done:
            break
    assert workers() - before
    running.close()
    assert not workers() - before
    assert len(passes) < (10_000 if phase == "attack" else 100)
    assert model.compare(image, TOY_CLASSES, defenses=["clip"]).finished


def test_an_error_in_the_thread_reaches_the_caller(model, image, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise InputError("No attack today.")

    monkeypatch.setattr(tapt.model, "attack_images", fail)
    with pytest.raises(InputError, match=r"No attack today\."):
        model.compare(image, TOY_CLASSES, attack=ATTACK)


def test_a_class_name_that_does_not_fit_is_refused(model):
    with pytest.raises(InputError, match="at most 22 per sentence"):
        model.prepare(["cat", "very " * 30 + "long dog"])


@pytest.mark.parametrize("name", ["visual", "text"])
def test_prompts_without_finite_answers_are_refused(toy, image, name):
    pack = toy_model(toy).pack
    tensors = {**pack.prompts.tensors, name: pack.prompts.tensors[name] * 1e38}
    prompts = replace(pack.prompts, tensors=tensors)
    with pytest.raises(PackError, match="The prompts of pack 'toy' give no finite answers"):
        Model(toy, replace(pack, prompts=prompts)).compare(image, TOY_CLASSES)


def test_a_defence_of_somebody_else_is_compared(model, image, flips):
    result = model.compare(image, TOY_CLASSES, attack=ATTACK)
    assert result["flips"].attacked is not None
    assert flips.title in str(result)


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
        (
            ("cat", "dog"),
            ("cat", "cat"),
            "cat",
            True,
            "Vanilla CLIP, attacked directly: fooled (cat, then dog). "
            "In all 1 fooled (Vanilla CLIP), 1 held (TAPT). The true class is cat.",
        ),
        (
            ("cat", "dog"),
            ("cat", "cat"),
            None,
            True,
            "Vanilla CLIP, attacked directly: changed (cat, then dog). "
            "In all 1 changed (Vanilla CLIP), 1 kept (TAPT).",
        ),
        (("cat", None), (None, None), "cat", True, ""),
        (("cat", None), ("cat", None), None, False, "In all 2 cat (Vanilla CLIP, TAPT)."),
        (
            ("cat", None),
            ("dog", None),
            "dog",
            False,
            "In all 1 wrong (Vanilla CLIP), 1 right (TAPT). The true class is dog.",
        ),
    ],
)
def test_the_verdict(clip, own, true, attack, sentence):
    assert comparison({"clip": clip, "tapt": own}, true, attack).verdict() == sentence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat, dog", ["cat", "dog"]),
        ("cat\ndog\r\nsports car\n", ["cat", "dog", "sports car"]),
        ("  cat ,, dog,\n\n , horse ", ["cat", "dog", "horse"]),
        ("cat, dog, cat\ndog", ["cat", "dog"]),
        ("sports   car,\tdog", ["sports car", "dog"]),
        ("Cat, dog, cat, d og", ["Cat", "dog"]),
        (
            'cat; "dog, the hot one"; a "big" car, "',
            ["cat", "dog, the hot one", 'a "big" car', '"'],
        ),
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
    for options in (
        {"name": str(tmp_path / "pack")},
        {"pack": tmp_path / "pack", "backbone": f"local-dir:{toy_folder}"},
    ):
        model = load(**options, device="cpu")
        assert model.backbone.sha256 == toy.sha256
        assert model.pack.trained
        assert model.origins == (None, None)
        assert model.settings(find_defenses(["tapt"])[0]).views == 6
    alone = load(f"local-dir:{toy_folder}", device="cpu")
    assert not alone.pack.trained
    with pytest.raises(InputError, match="not both"):
        load("tiny/vli", backbone="tiny")
    with pytest.raises(PackError, match="no pack 'tiny/nothing'"):
        load("tiny/nothing")
    with pytest.raises(BackboneError, match="unknown"):
        load("nothing:x")
    with pytest.raises(BackboneError, match="has no revision 'main'"):
        load(f"local-dir:{toy_folder}", revision="main")
    with pytest.raises(PackError, match="made for backbone"):
        load(backbone="tiny", pack=tmp_path / "pack", device="cpu")


def test_settings_that_no_defence_takes_are_told_when_a_pack_is_loaded(toy, tmp_path):
    pack = toy_model(toy, test_time={}).pack
    for settings in ({"views": 0}, {"magic": 1}):
        with pytest.raises(PackError, match=r"Pack 'toy', test_time of tapt: (views|magic)"):
            Model(toy, replace(pack, test_time={"tapt": settings}))
