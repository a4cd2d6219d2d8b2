"""`tapt.evaluate` on the toy CLIP: conditions, rows, interruption, what is refused."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import toy_model, write_noise
from PIL import Image

from tapt.core.attacks import Attack
from tapt.core.errors import InputError, PackError
from tapt.core.views import generators
from tapt.data import LabelledImages, load_data
from tapt.defenses import adaptive, deployed
from tapt.defenses.adaptive import Adaptive
from tapt.evaluation import Results, check_record, evaluate, record, store
from tapt.evaluation.evaluator import Evaluator, make_conditions
from tapt.evaluation.outcomes import CONDITION, read_outcomes
from tapt.evaluation.store import OUTCOMES, RESULTS, SETTINGS
from tapt.model import Model
from tapt.packs.card import write_pack
from tapt.packs.format import load_pack

TIMES = ("seconds_per_image", "attack_seconds_per_image")
ATTACKS = [Attack("pgd", 2 / 255, 3), Attack("pgd", 200 / 255, 3), Attack("square", 2 / 255, 5)]
EVERYTHING = {
    "attacks": ATTACKS,
    "attacked": ("clip", "static", "deployed"),
    "adaptive": Adaptive(pool=2, judging=1, draws=2),
    "score_draws": 4,
}
PGD = Attack("pgd", 2 / 255, 3)
PURPOSES = ("deployed", "judging", "score")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("evaluated") / "noise", count=1)


def untimed(results: Results) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in results.rows]


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory) -> tuple[Results, Path]:
    """Every attacked model and defence, two epsilons, in batches of two."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return evaluate(model, data, out=out, batch_size=2, **EVERYTHING), out


def test_one_row_per_defence_attacked_model_and_attack(whole):
    results, out = whole
    assert len(results.rows) == 4 * (3 * 3 + 2)  # and the worst at two epsilons
    names = ("defense", "attacked_model", "attack", "epsilon_255")
    assert len({tuple(row[name] for name in names) for row in results.rows}) == len(results.rows)
    for row in results.rows:
        assert (row["dataset"], row["n"]) == ("noise", 3)
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
        assert row["seconds_per_image"] > 0
        assert row["attack"] != "square" or "5 queries" in row["budget"]  # whatever is attacked
        assert "settings" not in row  # they are the pack's own
    assert results.settings["test_time"]["tapt"]["views"] == 6
    assert results.to_dict() == json.loads((out / RESULTS).read_text())
    assert str(results).splitlines()[0].split()[:2] == ["data", "defence"]
    pairs = [p for p in results.paired if p["attacked_model"] == "static"]
    assert len(pairs) == 3 * 6  # three attacks, pairs of four defences


def test_a_large_epsilon_leaves_nothing(whole):
    for row in whole[0].rows:
        own = row["attacked_model"] in (row["defense"], "deployed")
        assert row["epsilon_255"] != 200 or not own or row["accuracy"] <= 0.2


def test_rows_can_be_counted_again_from_the_outcomes(whole):
    results, out = whole
    outcomes = [o for o in read_outcomes(out / OUTCOMES) if o.epsilon_255 == 2]
    own = [o for o in outcomes if "tapt" in o.right]
    right = [o.right["tapt"] for o in own if (o.attacked_model, o.attack) == ("deployed", "pgd")]
    assert len(right) == 3
    assert set(right) <= {0, 0.25, 0.5, 0.75, 1}
    wanted = ["tapt", "deployed", "pgd", 2, 3]
    (row,) = [r for r in results.rows if [r[k] for k in ("defense", *CONDITION[1:])] == wanted]
    assert row["accuracy"] == pytest.approx(sum(right) / 3)
    best = "best of replays, crops, smooth step, BPDA by 1 draws, scored on 4 fresh draws"
    assert row["budget"] == f"3 steps, pool of 2, one new every 4 steps, {best}"
    assert max(o.linf_255 for o in outcomes) == 2
    one_draw = [o.right for o in outcomes if o.attacked_model == "static"]
    assert all(share in (0, 1) for r in one_draw for share in r.values())
    for name, together in (("clip", 4), ("static", 4), ("deployed", 1)):
        assert {len(o.right) for o in outcomes if o.attacked_model == name} == {together}


def test_the_report_and_its_plots(whole):
    _, out = whole
    report = (out / "report.md").read_text()
    assert "each row's own defence as it is deployed" in report
    for name in ("accuracy-noise.png", "epsilon-noise.png"):
        assert f"({name})" in report
        with Image.open(out / name) as plot:
            assert plot.size[0] > 500
            assert len(plot.convert("RGB").getcolors(1 << 20)) > 20


def test_an_interruption_and_another_batch_size_end_in_the_same_table(whole, model, data, tmp_path):
    """Some batches are there, one in parts, the last line is cut short."""
    results, done = whole
    out = tmp_path / "out"
    out.mkdir()
    (out / SETTINGS).write_bytes((done / SETTINGS).read_bytes())
    lines = (done / OUTCOMES).read_bytes().splitlines(keepends=True)
    (out / OUTCOMES).write_bytes(b"".join(lines[:20]) + lines[20][:40])
    steps = []
    options = {"batch_size": 7, "progress": lambda *step: steps.append(step), **EVERYTHING}
    again = evaluate(model, data, out=out, **options)
    assert untimed(again) == untimed(results)
    assert steps[0] == (0, len(lines) - 20)
    assert steps[-1] == (len(lines) - 20,) * 2


def test_a_finished_folder_is_not_computed_again(whole, model, data, monkeypatch):
    results, out = whole
    monkeypatch.setattr(Evaluator, "outcomes", lambda *_: pytest.fail("computed again"))
    assert untimed(evaluate(model, data, out=out, **EVERYTHING)) == untimed(results)


def test_a_folder_collects_attacks_and_refuses_other_settings_and_data(model, data, tmp_path):
    out = tmp_path / "out"
    few = {"defenses": ["static"], "attacked": "static", "out": out}
    evaluate(model, data, attacks=PGD, **few)
    attacks = [Attack("apgd", 2 / 255, 3), Attack("cw", steps=3), Attack("cw", 3 / 255, 3)]
    results = evaluate(model, data, attacks=attacks, **few)
    rows = {row["attack"]: row for row in results.rows}
    assert set(rows) == {"pgd", "apgd", "cw", "worst"}
    assert rows["cw"]["epsilon_255"] is None
    assert "cw" not in rows["worst"]["budget"]
    without = Model(model.backbone, replace(model.pack, statistics=None))
    same_name = write_noise(tmp_path / "noise", 1, count=1)
    for own, source, changes, name in (
        (model, data, {"seed": 1}, "seed"),
        (model, data, {"settings": {"tapt.views": 5}}, "test_time"),
        (model, same_name, {}, "data_sha256"),
        (without, data, {}, "pack_sha256"),
    ):
        with pytest.raises(InputError, match=rf"out was started with other settings \({name}\)"):
            evaluate(own, source, attacks=PGD, **few, **changes)


def test_answers_do_not_depend_on_other_defences(model, data, tmp_path):
    answers = []
    for defenses in (["tapt"], ["clip", "tapt"]):
        out = tmp_path / str(len(defenses))
        evaluate(model, data, attacks=PGD, attacked="static", defenses=defenses, out=out)
        answers.append([o.answers["tapt"] for o in read_outcomes(out / OUTCOMES)])
    assert answers[0] == answers[1]


def test_several_sets_with_their_own_templates(toy, tmp_path, monkeypatch):
    sources = []
    for name, classes in (("DTD", ["banded", "woven"]), ("EuroSAT", ["River", "Forest"])):
        sources.append(f"{name}:{write_noise(tmp_path / name, classes=classes, count=1)}")
    clips = []
    prepare = Model.prepare

    def spy(*args: object, **options: object) -> object:
        clips.append(prepare(*args, **options))
        return clips[-1]

    monkeypatch.setattr(Model, "prepare", spy)
    few = {"attacks": PGD, "attacked": "clip", "defenses": ["clip", "static"]}
    results = evaluate(toy_model(toy, "V"), sources, out=tmp_path / "out", **few)
    assert [row["dataset"] for row in results.rows] == ["DTD", "DTD", "EuroSAT", "EuroSAT"]
    assert "mean of 2" in (tmp_path / "out" / "report.md").read_text()
    river = load_data(sources[1])
    expected = toy.tokenize([f"a centered satellite photo of {c}." for c in river.classes])
    assert torch.equal(clips[1].vanilla_texts.tokens, expected)
    assert clips[1].texts is clips[1].vanilla_texts  # V speaks the template, too
    with pytest.raises(InputError, match="Two data sets have the same name"):
        evaluate(toy_model(toy), [sources[0], sources[0]], **few)


def test_class_names_that_are_there_twice_stay_two_classes(model):
    image = Image.new("RGB", (32, 32), "red")
    names = ("crane", "Crane", "crane", "dog")  # as in ImageNet
    data = LabelledImages(names, (0, 3), lambda i: image, lambda i: b"%d" % i, "twice")
    few = {"attacks": PGD, "attacked": "clip", "defenses": ["clip"]}
    assert evaluate(model, data, **few).settings["classes"] == [4]


def test_rows_go_into_the_pack_and_its_card(toy, data, tmp_path):
    folder = tmp_path / "pack"
    write_pack(toy_model(toy).pack, folder)
    pack = load_pack(folder, toy)
    attacks = [PGD, Attack("cw", steps=3)]
    model = Model(toy, pack)
    few = {"attacks": attacks, "defenses": ["static", "tapt"], "attacked": "static"}
    own = evaluate(model, data, **few)
    record(pack, own.rows)
    assert load_pack(folder, toy).evaluation == own.rows
    card = (folder / "README.md").read_text()
    assert all(words in card for words in ("pgd-3", "cw-3", "| 2/255 |", "L2"))
    other = evaluate(model, data, **few, settings={"views": 3, "lr": None})
    assert [row.get("settings") for row in other.rows[:2]] == [None, {"views": 3}]
    record(load_pack(folder, toy), other.rows)
    rows = load_pack(folder, toy).evaluation  # static's are the same rows, TAPT's are others
    assert len(rows) == len(own.rows) + len(own.rows) // 2
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(PackError, match="not a UTF-8 text"):
        check_record(pack)
    with pytest.raises(InputError, match="give one as the pack"):
        check_record(toy_model(toy).pack)


def test_bfloat16_selects_and_says_how_far_it_agrees(model, data, tmp_path):
    few = {"attacks": PGD, "attacked": "static", "defenses": ["static", "tapt"]}
    results = evaluate(model, data, selection="bfloat16", out=tmp_path, **few)
    (entry,) = results.agreement
    assert (entry["defense"], entry["n"]) == ("tapt", 3)
    assert 0 <= entry["top1_agreement"] <= 1
    assert 0 <= entry["largest_probability_difference"] < 0.2
    assert set(entry["seconds_per_image"]) == {"bfloat16", "float32"}
    settings = {row["defense"]: row.get("settings") for row in results.rows}
    assert settings == {"static": None, "tapt": {"selection": "bfloat16"}}
    assert "an image takes" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"defenses": ["clip", "magic"]}, "'magic' is unknown"),
        ({"attacked": "rumour"}, "'rumour' is unknown"),
        ({"attacks": []}, "at least one attack"),
        ({"attacks": Attack("pgd", step_size=0.1)}, "their own step size"),
        ({"score_draws": 0}, "score_draws must be at least 1, got 0"),
        ({"settings": {"views": 0}}, "views must be"),
    ],
)
def test_wrong_arguments_are_refused(options, sentence, model, data, tmp_path):
    with pytest.raises(InputError, match=sentence):
        evaluate(model, data, **{"attacks": PGD, "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda out: (out / SETTINGS).write_bytes(b"{"), "settings.json in out is damaged"),
        (lambda out: (out / SETTINGS).write_bytes(b"\xff"), "settings.json in out is damaged"),
        (lambda out: (out / OUTCOMES).write_text('{"image": 0}\n'), "damaged in line 1: dataset"),
        (lambda out: [(out / OUTCOMES).unlink(), (out / OUTCOMES).mkdir()], "cannot be read"),
    ],
)
def test_damaged_results_are_a_sentence(damage, sentence, whole, model, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (SETTINGS, OUTCOMES):
        (out / name).write_bytes((whole[1] / name).read_bytes())
    damage(out)
    with pytest.raises(InputError, match=sentence):
        evaluate(model, data, out=out, **EVERYTHING)


def test_a_full_disk_is_a_sentence(model, data, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "open", full, raising=False)
    with pytest.raises(InputError, match="out cannot be written: there is no room on the disk"):
        evaluate(model, data, attacks=PGD, attacked="clip", defenses=["clip"], out=tmp_path / "out")


def test_a_defence_of_somebody_else_is_evaluated(model, data, flips):
    few = {"attacks": Attack("square", steps=3), "attacked": "deployed", "score_draws": 2}
    (row,) = evaluate(model, data, defenses=["flips"], **few).rows
    assert (row["defense"], row["n"]) == ("flips", 3)
    assert row["budget"] == "3 queries, EOT 4, scored on 2 fresh draws"
    assert "flips" in {r["defense"] for r in evaluate(model, data, attacks=PGD, limit=1).rows}


@pytest.mark.parametrize("name", ["pgd", "square"])
def test_the_draws_that_score_are_not_the_attacks_nor_its_judges(model, data, name, monkeypatch):
    drawn: list[int] = []

    def noted(seeds: list[int], purpose: str = "") -> list[torch.Generator]:
        made = generators(seeds, purpose)
        drawn.extend(g.initial_seed() for g in made if purpose in PURPOSES)
        return made

    for module in (deployed, adaptive):
        monkeypatch.setattr(module, "generators", noted)
    labelled = load_data(data)
    clip = model.prepare(labelled.classes)
    few = Adaptive(pool=1, judging=2, draws=1, starts=False)
    evaluator = Evaluator(model, clip, model.prepare_defenses(clip), labelled, 3, few, 5)
    _, condition = make_conditions([Attack(name, 8 / 255, 1)], ["deployed"], ["tapt"])
    scores = set()
    for image in (0, 1):
        drawn.clear()
        (outcome,) = evaluator.outcomes(condition, [image])
        assert 5 * outcome.right["tapt"] == pytest.approx(round(5 * outcome.right["tapt"]))
        assert len(set(drawn)) == (3 if name == "pgd" else 2)  # attack, judging, score
        scores.add(drawn[-1])
    assert len(scores) == 2
