"""`python -m tapt evaluate` on the toy CLIP: conditions, rows, interruption, report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOY_CLASSES
from PIL import Image

from tapt import adaptive, plots
from tapt import panel as module
from tapt.__main__ import main
from tapt.backbone import Backbone
from tapt.data import load_data
from tapt.defense import make_defender
from tapt.evaluate import OUTCOMES, RESULTS, SETTINGS, read_outcomes
from tapt.losses import Statistics, TokenStatistics
from tapt.pack import Pack, base_model, load_pack, save_pack, statistics_shapes
from tapt.panel import default_batch_size
from tapt.plots import write_plots
from tapt.prompts import PromptConfig, init_prompts
from tapt.report import Outcomes, averages, mcnemar, wilson
from tapt.tuning import TuneConfig

SIZES = ((1000, 2, 0.3), (200, 2, 0.25), (300, 1, 0.4))  # n, epsilon, accuracy
TIMES = ("seconds_per_image", "attack_seconds_per_image", "peak_memory_mb")


@pytest.fixture(autouse=True, scope="module")
def one_judging_draw():
    """The choice between two attacks is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "JUDGING_DRAWS", 1)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "noise"
    random = np.random.RandomState(0)
    for name in TOY_CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(2):
            pixels = random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def write_pack(toy: Backbone, folder: Path, design: str = "VLI") -> Path:
    prompts = init_prompts(toy, PromptConfig(design, 2, 3), seed=1)
    generator = torch.Generator().manual_seed(2)
    shapes = statistics_shapes(toy, prompts.config).values()
    values = [torch.rand(shape, generator=generator) for shape in shapes]
    targets = Statistics(TokenStatistics(*values[:2]), TokenStatistics(*values[2:]))
    config = TuneConfig(views=6, keep=0.34, lr=0.02)
    save_pack(Pack(prompts, targets, config, "toy", base_model(toy)), folder)
    return folder


@pytest.fixture(scope="session")
def pack(toy: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(toy, tmp_path_factory.mktemp("pack") / "toy")


def arguments(
    data: object, pack: Path, toy_folder: Path, out: Path, options: str = ""
) -> list[str]:
    words = (
        f"evaluate --data {data} --backbone local-dir:{toy_folder} --device cpu --pack {pack} "
        f"--steps 3 --batch-size 4 --out {out} {options}"
    )
    return words.split()


def results(out: Path) -> dict:
    return json.loads((out / RESULTS).read_text())


def untimed(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in results(out)["rows"]]


@pytest.fixture(scope="module")
def whole(data, pack, toy_folder, tmp_path_factory) -> Path:
    """Every threat and defence, two epsilons."""
    out = tmp_path_factory.mktemp("whole") / "out"
    options = (
        "--defenses clip,static,ensemble,tapt,random-start --threats clip,static,square,adaptive "
        "--epsilon 2/255,200/255 --queries 5 --eot 2 --rescore 4"
    )
    assert main(arguments(data, pack, toy_folder, out, options)) == 0
    return out


def test_one_row_per_defence_threat_and_epsilon(whole: Path):
    rows = results(whole)["rows"]
    keys = {(r["defense"], r["threat"], r["attack"], r["epsilon_255"]) for r in rows}
    assert len(rows) == len(keys) == 5 * 2 * (4 + 1)
    for row in rows:
        assert row["dataset"] == "noise"
        assert row["n"] == 6
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
        assert row["seconds_per_image"] > 0
        assert row["peak_memory_mb"] > 0
        assert row["budget"]
    settings = results(whole)["settings"]
    assert settings["seed"] == 0
    assert settings["test_time"]["views"] == 6
    assert set(settings["versions"]) == {"torch", "open_clip_torch", "torchattacks"}
    assert len(settings["prompts_sha256"]) == 64


def test_plots_take_rows_of_several_sizes(tmp_path: Path):
    row = {"dataset": "set", "threat": "clip", "attack": "pgd", "steps": 20, "defense": "clip"}
    row |= {"clean_accuracy": 0.8, "clean_ci95": [0.7, 0.9], "ci95": [0.1, 0.5]}
    rows = [{**row, "n": n, "epsilon_255": e, "accuracy": a} for n, e, a in SIZES]
    assert write_plots(rows, tmp_path) == ["accuracy-set.png", "epsilon-set.png"]
    (axes,) = plots._curves(rows).axes
    points = axes.lines[0].get_xydata().tolist()
    assert points == [[0, 80], [1, 40], [2, 30]]  # at 2/255 that of 1,000 images
    labels = [text.get_text() for text in plots._bars(rows).axes[0].get_xticklabels()]
    assert "clip\npgd-20 2/255, n = 1000" in labels
    assert "clip\npgd-20 2/255, n = 200" in labels


def row_of(out: Path, **wanted: object) -> dict:
    (row,) = [r for r in results(out)["rows"] if wanted.items() <= r.items()]
    return row


def test_a_large_epsilon_leaves_nothing(whole: Path):
    for name in ("clip", "static"):
        assert row_of(whole, defense=name, threat=name, epsilon_255=200)["accuracy"] <= 0.17
    for name in ("clip", "static", "ensemble", "tapt"):
        row = row_of(whole, defense=name, threat="adaptive", epsilon_255=200)
        assert row["accuracy"] < row["clean_accuracy"]


def test_rows_can_be_counted_again_from_the_outcomes(whole: Path):
    records = read_outcomes(whole / OUTCOMES)
    right = [
        record["right"]["tapt"]
        for record in records
        if record["threat"] == "adaptive"
        and record["epsilon_255"] == 2
        and "tapt" in record["right"]
    ]
    assert len(right) == 6
    assert set(right) <= {0, 0.25, 0.5, 0.75, 1}
    row = row_of(whole, defense="tapt", threat="adaptive", epsilon_255=2)
    assert row["accuracy"] == pytest.approx(sum(right) / 6)
    assert "EOT 2, stronger of BPDA and smooth surrogate, scored on 4 fresh draws" in row["budget"]
    assert "5 queries" in row_of(whole, defense="tapt", threat="square", epsilon_255=2)["budget"]
    assert max(r["linf_255"] for r in records if r["epsilon_255"] == 2) == 2
    one_draw = [r["right"] for r in records if r["threat"] == "static"]
    assert all(share in (0, 1) for r in one_draw for share in r.values())


def test_each_row_of_a_deployed_threat_has_an_attack_of_its_own(whole: Path):
    records = read_outcomes(whole / OUTCOMES)
    for threat, together in (("clip", 5), ("static", 5), ("square", 1), ("adaptive", 1)):
        assert {len(r["right"]) for r in records if r["threat"] == threat} == {together}


def test_the_worst_case_is_taken_per_image(whole: Path):
    records = [r for r in read_outcomes(whole / OUTCOMES) if r["epsilon_255"] == 2]
    worst = []
    for image in range(6):
        seen = [r["right"]["tapt"] for r in records if r["image"] == image and "tapt" in r["right"]]
        assert len(seen) == 4
        worst.append(min(seen))
    row = row_of(whole, defense="tapt", attack="worst", epsilon_255=2)
    assert row["accuracy"] == pytest.approx(sum(worst) / 6)
    for other in results(whole)["rows"]:
        if other["defense"] == "tapt" and other["epsilon_255"] == 2:
            assert row["accuracy"] <= other["accuracy"]


def test_the_report_and_its_plots(whole: Path):
    report = (whole / "report.md").read_text()
    assert "white-box on each row's own defence" in report
    assert "pgd-3" in report
    for name in ("accuracy-noise.png", "epsilon-noise.png"):
        assert f"({name})" in report
        with Image.open(whole / name) as plot:
            assert plot.size[0] > 500
            assert len(plot.convert("RGB").getcolors(1 << 20)) > 20
    pairs = [p for p in results(whole)["paired"] if p["threat"] == "static"]
    assert len(pairs) == 2 * 10  # two epsilons, pairs of five defences
    assert all(p["difference"] == pytest.approx((p["only_a"] - p["only_b"]) / 6) for p in pairs)


def test_an_interruption_goes_on_to_the_same_table(whole, data, pack, toy_folder, tmp_path):
    """Some batches are there, one in parts, the last line is cut short."""
    out = tmp_path / "out"
    out.mkdir()
    (out / SETTINGS).write_bytes((whole / SETTINGS).read_bytes())
    lines = (whole / OUTCOMES).read_bytes().splitlines(keepends=True)
    (out / OUTCOMES).write_bytes(b"".join(lines[:26]) + lines[26][:40])
    options = (
        "--defenses clip,static,ensemble,tapt,random-start --threats clip,static,square,adaptive "
        "--epsilon 2/255,200/255 --queries 5 --eot 2 --rescore 4"
    )
    assert main(arguments(data, pack, toy_folder, out, options)) == 0
    assert untimed(out) == untimed(whole)


def test_a_finished_folder_is_not_computed_again(data, pack, toy_folder, tmp_path, monkeypatch):
    common = arguments(data, pack, toy_folder, tmp_path / "out", "--threats static")
    assert main(common) == 0
    before = untimed(tmp_path / "out")
    monkeypatch.setattr(module.Panel, "records", lambda *_: pytest.fail("computed again"))
    assert main(common) == 0
    assert untimed(tmp_path / "out") == before


def test_a_folder_collects_attacks_and_refuses_other_settings(
    data, pack, toy_folder, tmp_path, capsys
):
    out = tmp_path / "out"
    options = "--defenses static --threats static --epsilon 2/255"
    assert main(arguments(data, pack, toy_folder, out, f"{options} --attack pgd")) == 0
    assert main(arguments(data, pack, toy_folder, out, f"{options} --attack apgd,cw")) == 0
    rows = {row["attack"]: row for row in results(out)["rows"]}
    assert set(rows) == {"pgd", "apgd", "cw", "worst"}
    assert rows["cw"]["epsilon_255"] is None
    assert rows["cw"]["l2_median"] is None or rows["cw"]["l2_median"] > 0
    assert "cw" not in rows["worst"]["budget"]
    capsys.readouterr()
    assert main(arguments(data, pack, toy_folder, out, f"{options} --seed 1")) == 2
    assert "other settings (seed)" in capsys.readouterr().err


def test_answers_do_not_depend_on_other_defences(data, pack, toy_folder, tmp_path):
    for name, defenses in (("a", "tapt"), ("b", "clip,tapt")):
        options = f"--defenses {defenses} --threats static"
        assert main(arguments(data, pack, toy_folder, tmp_path / name, options)) == 0
    one, other = (
        [r["answers"]["tapt"] for r in read_outcomes(tmp_path / name / OUTCOMES)] for name in "ab"
    )
    assert one == other


def test_the_seed_and_the_batch_decide(data, pack, toy_folder, tmp_path):
    sizes = {}
    for seed in (0, 1):
        out = tmp_path / str(seed)
        options = f"--defenses clip --threats clip --seed {seed} --epsilon 8/255"
        assert main(arguments(data, pack, toy_folder, out, options)) == 0
        sizes[seed] = [r["l2"] for r in read_outcomes(out / OUTCOMES)]
    assert sizes[0] != sizes[1]


def test_several_sets_with_their_own_templates(toy, toy_folder, tmp_path):
    folders = []
    for name, classes in (("DTD", ["banded", "woven"]), ("EuroSAT", ["River", "Forest"])):
        for label, own in enumerate(classes):
            path = tmp_path / name / own
            path.mkdir(parents=True)
            Image.new("RGB", (32, 32), (200 * label, 90, 20)).save(path / "0.png")
        folders.append(f"{name}:{tmp_path / name}")
    pack = write_pack(toy, tmp_path / "pack", "V")
    out = tmp_path / "out"
    options = "--defenses clip,static --threats clip"
    assert main(arguments(" ".join(folders), pack, toy_folder, out, options)) == 0
    rows = results(out)["rows"]
    assert [row["dataset"] for row in rows] == ["DTD", "DTD", "EuroSAT", "EuroSAT"]
    (mean, _) = averages(rows)
    assert mean["accuracy"] == pytest.approx((rows[0]["accuracy"] + rows[2]["accuracy"]) / 2)
    assert "mean of 2" in (out / "report.md").read_text()
    loaded = load_pack(pack, toy)
    river = load_data(folders[1])
    defender = make_defender(toy, loaded, river.classes, template=river.template)
    expected = toy.tokenize([f"a centered satellite photo of {c}." for c in river.classes])
    assert torch.equal(defender.vanilla.tokens, expected)
    assert defender.prompted is defender.vanilla  # V speaks the template, too
    assert main(arguments(f"{folders[0]} {folders[0]}", pack, toy_folder, tmp_path / "twice")) == 2


def test_recorded_in_the_pack_and_its_card(toy, data, toy_folder, tmp_path):
    pack = write_pack(toy, tmp_path / "pack")
    options = "--threats clip,static --attack pgd,cw --record"
    assert main(arguments(data, pack, toy_folder, tmp_path / "out", options)) == 0
    loaded = load_pack(pack, toy)
    assert loaded.evaluation == results(tmp_path / "out")["rows"]
    card = (pack / "README.md").read_text()
    assert "pgd-3, 1/255" in card
    assert "cw-3, L2" in card
    assert "worst, 1/255" in card


def test_bfloat16_selects_and_says_how_far_it_agrees(data, pack, toy_folder, tmp_path):
    options = "--defenses tapt,ensemble --threats static --precision bfloat16"
    assert main(arguments(data, pack, toy_folder, tmp_path / "out", options)) == 0
    told = results(tmp_path / "out")["bfloat16"]
    assert told["n"] == 6
    assert 0 <= told["top1_agreement"] <= 1
    assert 0 <= told["largest_probability_difference"] < 0.2
    assert set(told["seconds_per_image"]) == {"bfloat16", "float32"}


def test_the_coarse_copy_only_encodes_the_views(toy: Backbone):
    coarse = toy.in_bfloat16()
    assert coarse.dtype == torch.bfloat16
    assert toy.dtype == torch.float32
    defender = make_defender(toy, replace_views(toy), TOY_CLASSES)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    exact = defender.defend(pixels, seeds=[1, 2])
    rough = replace(defender, coarse=coarse).defend(pixels, seeds=[1, 2])
    difference = (exact.trace.entropies - rough.trace.entropies).abs().max()
    assert 0 < difference < 0.1
    same = (exact.trace.kept == rough.trace.kept).all(1)
    torch.testing.assert_close(
        exact.probabilities["tapt"][same], rough.probabilities["tapt"][same], atol=1e-5, rtol=1e-4
    )
    assert rough.probabilities["tapt"].dtype == torch.float32


def replace_views(toy: Backbone) -> Pack:
    prompts = init_prompts(toy, PromptConfig("VLI", 2, 3), seed=1)
    return Pack(prompts, None, TuneConfig(views=6, keep=0.5), "toy", base_model(toy))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--defenses clip,magic", "'magic' is unknown"),
        ("--threats rumour", "'rumour' is unknown"),
        ("--attack pgd,rumour", "'rumour' is unknown"),
        ("--eot 0", "--eot must be at least 1"),
        ("--rescore 0", "--rescore must be at least 1"),
        ("--limit 0", "--limit must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, sentence, data, pack, toy_folder, tmp_path, capsys):
    assert main(arguments(data, pack, toy_folder, tmp_path / "out", options)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_batch_size_follows_the_free_memory(toy: Backbone, monkeypatch):
    texts = make_defender(toy, replace_views(toy), TOY_CLASSES).prompted

    def size(free: int, processes: int = 1) -> int:
        memory = type("Memory", (), {"available": free})
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda: memory)
        return default_batch_size(toy, TuneConfig(), texts, processes)

    assert size(1) == 1
    assert size(10**7, 2) < size(10**7) < size(10**12)
    assert size(10**12) == size(10**15)  # more tokens per pass bring nothing


def record(image: int, tapt: float = 0.0, **changes: object) -> dict:
    return {
        "dataset": "d",
        "threat": "static",
        "attack": "pgd",
        "epsilon_255": 1,
        "steps": 5,
        "image": image,
        "right": {"tapt": tapt},
        "seconds": {"tapt": 1.0},
        "attack_seconds": 2.0,
        "budget": "5 steps",
        "l2": 0.5,
        "peak_memory_mb": 1.0,
        **changes,
    }


def test_the_later_of_two_outcomes_counts():
    (row,) = Outcomes([record(0, 0.0), record(1, 1.0), record(0, 1.0)]).rows()
    assert (row["n"], row["accuracy"]) == (2, 1.0)


def test_the_worst_case_covers_the_images_that_met_every_attack():
    records = [record(i, 1.0) for i in range(4)] + [
        record(i, float(i > 0), attack="apgd") for i in range(2)
    ]
    rows = {row["attack"]: row for row in Outcomes(records).rows()}
    assert rows["worst"]["n"] == 2
    assert rows["worst"]["accuracy"] == 0.5
    assert rows["worst"]["threat"] == "all"


def test_wilson_interval():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(50, 100)  # by hand from the formula
    assert low == pytest.approx(0.40383, abs=1e-5)
    assert high == pytest.approx(0.59617, abs=1e-5)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 4) == mcnemar(4, 1) == pytest.approx(2 * (1 + 5) / 32)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(400, 100) < 1e-30


def test_paired_differences_by_hand():
    both = {"tapt": 1.0, "clip": 0.0}
    records = [
        record(0, right=both, seconds=both),
        record(1, right={"tapt": 1.0, "clip": 1.0}, seconds=both),
        record(2, right={"tapt": 0.0, "clip": 1.0}, seconds=both),
        record(3, right=both, seconds=both),
    ]
    (pair,) = Outcomes(records).paired()
    assert (pair["a"], pair["b"], pair["only_a"], pair["only_b"]) == ("tapt", "clip", 2, 1)
    assert pair["difference"] == 0.25
    assert pair["p_value"] == 1.0
