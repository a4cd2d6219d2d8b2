"""The page's endpoints over HTTP, with every kind of bad input, and its parts on their own."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from gradio_client import Client, handle_file
from huggingface_hub import SpaceCardData
from PIL import Image

import tapt.core.clip
import tapt.ui
from tapt.core.attacks import METHODS
from tapt.core.errors import InputError, PackError
from tapt.data.names import class_names
from tapt.defenses import Defense, list_defenses
from tapt.evaluation.sweep import Sweep
from tapt.ui import background, chart, inputs, known, links, render, serve
from tapt.ui.handlers import Handlers
from tapt.ui.page import build_page, launch_options
from tapt.ui.service import load_service

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "tapt" / "examples" / "cat.png"
FAST = {"views": 4, "steps": 2}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def inline(data: bytes) -> dict:
    return {"url": "data:image/png;base64," + base64.b64encode(data).decode()}


RED = inline(encoded(Image.new("RGB", (60, 40), "red")))


@pytest.fixture(scope="module")
def client(server: str) -> Client:
    return Client(server, verbose=False)


def post(server: str, endpoint: str, **values: object) -> tuple[str, object]:
    """The last event of a raw call and its data, as any HTTP client could get them."""
    given = {"image": RED, "class_names": "cat, dog", **FAST, **values}
    fields = inputs.SWEEP_FIELDS if endpoint == "sweep" else inputs.FIELDS
    return call(server, endpoint, [given.get(name) for name in fields])


def call(server: str, endpoint: str, data: list) -> tuple[str, object]:
    address = f"{server}/gradio_api/call/{endpoint}"
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/{event}", timeout=120) as answer:
        *_, kind, data = answer.read().decode().strip().splitlines()
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def refused(server: str, **values: object) -> str:
    kind, data = post(server, "analyze", **values)
    assert kind == "error", data
    assert str(ROOT) not in data["error"]
    return data["error"]


def analyzed(server: str, **values: object) -> dict:
    kind, data = post(server, "analyze", **values)
    assert kind == "complete", data
    return data[0]


def test_compare_returns_every_value(client: Client):
    options = {"class_names": "cat, dog, ship", "attack": "pgd", "epsilon": 2, **FAST}
    options["attacked_model"] = "static"
    status, verdict, answers, slider, perturbation, did, downloads, result = client.predict(
        handle_file(PICTURE), **options, true_class="Dog", api_name="/compare"
    )
    assert "Finished" in status
    assert "t-sentence" in verdict
    assert "</table>" in answers
    assert "data:image/png" in perturbation
    assert "t-views" in did
    assert "tapt.json" in downloads
    clean, attacked = (Image.open(path) for path in slider)
    assert clean.size == attacked.size == (32, 32)
    assert result["finished"] is True
    assert (result["label"], result["label_given"]) == ("dog", True)
    assert result["settings"]["attacked_model"] == "static"
    assert result["settings"]["test_time"]["tapt"]["views"] == 4
    assert 1 <= result["linf_255"] <= result["settings"]["epsilon_255"] == 2
    measured = np.abs(np.asarray(clean, int) - np.asarray(attacked, int)).max()
    assert measured == result["linf_255"]
    assert list(result["results"]) == ["clip", "static", "ensemble", "tapt"]
    for kinds in result["results"].values():
        for probabilities in kinds.values():
            assert sum(probabilities) == pytest.approx(1, abs=1e-4)

    same = client.predict(handle_file(PICTURE), **options, true_class="dog", api_name="/analyze")
    assert same["results"] == result["results"]
    assert set(same) == set(result) - {"verdict", "finished", "unknown_classes"}

    # the PNG keeps the attack
    again = client.predict(
        handle_file(slider[1]),
        class_names="cat, dog, ship",
        attack="none",
        views=4,
        api_name="/analyze",
    )
    for name, kinds in result["results"].items():
        assert again["results"][name]["clean"] == kinds["attacked"]


def test_analyze_returns_what_the_command_prints(server: str, client: Client):
    names = list_defenses()
    assert len(names) == 10
    command = [sys.executable, "-m", "tapt", "predict", str(PICTURE), "--classes", "cat,dog,ship"]
    command += ["--attack", "apgd", "--epsilon", "3/255", "--steps", "2", "--seed", "5"]
    command += ["--views", "4", "--device", "cpu", "--json", "--defenses", ",".join(names)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    expected = json.loads(printed.stdout)
    options = {"attack": "apgd", "epsilon": 3, "seed": 5, "defenses": names, **FAST}
    result = client.predict(
        handle_file(PICTURE), class_names="cat\ndog\nship", **options, api_name="/analyze"
    )
    assert result["settings"] == expected["settings"]
    assert set(result) == set(expected)
    assert list(result["results"]) == names
    for name, kinds in expected["results"].items():
        for kind, probabilities in kinds.items():
            assert result["results"][name][kind] == pytest.approx(probabilities, abs=1e-5)


def test_endpoints_and_their_parameters_are_documented(server: str):
    with urllib.request.urlopen(f"{server}/gradio_api/info") as answer:
        info = json.load(answer)
    assert info["unnamed_endpoints"] == {}
    assert set(info["named_endpoints"]) == {"/compare", "/analyze", "/sweep"}
    for entry in info["named_endpoints"].values():
        names = [parameter["parameter_name"] for parameter in entry["parameters"]]
        assert set(names) >= set(inputs.FIELDS) - {"epsilon"}
        assert all(re.search(rf"\b{name}\b", entry["description"]) for name in names)
        required = [
            p["parameter_name"] for p in entry["parameters"] if not p["parameter_has_default"]
        ]
        assert required == ["image"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attack": "none"}, "Choose an attack first"),
        ({"attack": "cw"}, "CW has none"),
        ({"attack": "pgd", "max_epsilon": 0}, "max_epsilon must be"),
        ({"attack": "pgd", "epsilon_step": float("nan")}, "epsilon_step must be"),
        ({"attack": "pgd", "true_class": "cat", "target": "cat"}, "is the true class already"),
    ],
)
def test_sweep_refuses_in_words(server: str, values: dict, message: str):
    kind, data = post(server, "sweep", **values)
    assert kind == "error"
    assert message in data["error"]


ROW = {
    "dataset": "dev",
    "attack": "pgd",
    "attacked_model": "clip",
    "defense": "tapt",
    "steps": 20,
    "epsilon_255": 2,
    "n": 100,
    "clean_accuracy": 0.9,
    "accuracy": 0.5,
    "ci95": [0.25, 0.75],
}


def published(*changes: dict) -> str:
    return render.published(SimpleNamespace(evaluation=[{**ROW, **change} for change in changes]))


def test_published_accuracy_is_drawn_per_attack():
    random = {"settings": {"random_start": True}}
    shown = published(
        *(
            {**defense, "attacked_model": attacked, "epsilon_255": e, "accuracy": 0.9 - e / 10}
            for defense in ({"defense": "clip"}, {}, random)
            for attacked in ("clip", "deployed")
            for e in (4, 1)
        ),
        {"attack": "cw", "epsilon_255": None},
    )
    assert shown.count("<figure") == 2
    assert "<figcaption>PGD-20 on each defence as deployed (dev, n = 100)<" in shown
    assert shown.count("TAPT, 4: 50.0 %") == 2
    assert shown.count("<td>25.0 % to 75.0 %</td>") == 12
    assert "TAPT (random start), 4: 50.0 %" in shown
    shown = published({"attacked_model": "all", "attack": "worst", "steps": None})
    assert "The worst, for each picture, of the attacks run on it (dev, n = 100)<" in shown
    assert "<figcaption>&lt;i&gt;-20 on Vanilla CLIP (&lt;b&gt;, n = 100)<" in published(
        {"attack": "<i>", "dataset": "<b>", "defense": "<u>"}
    )
    assert "None yet." in published()


def test_of_many_published_charts_one_for_each_attacked_model_is_open():
    conditions = [(attacked, n) for attacked in ("clip", "deployed") for n in (100, 300, 200)]
    shown = published(*({"attacked_model": a, "n": n, "steps": n // 10} for a, n in conditions))
    opened, rest = shown.split("More attacks and epsilons")
    folded, table = rest.split("All of them")
    assert opened.count("<figcaption>") == 2 == opened.count("<figcaption>PGD-30 ")
    assert (folded.count("<figcaption>"), table.count("<tr>")) == (4, 7)


@pytest.mark.parametrize(
    ("answers", "given", "words"),
    [
        ("cccc", True, "right everywhere"),
        ("ccdd", True, "wrong from 4/255 on"),
        ("dddd", True, "wrong from 0/255 on"),
        ("cdcd", True, "wrong at 2/255, 6/255"),
        ("cd", True, "wrong at 2/255"),
        ("dddd", False, "kept everywhere"),
        ("ddcc", False, "changed from 4/255 on"),
    ],
)
def test_a_sweep_says_in_words_where_each_defence_falls(answers: str, given: bool, words: str):
    settings = {"attack": {"name": "pgd"}, "attacked_model": "deployed:tapt"}
    values = {"tapt": [0.5] * len(answers)}
    shown = render.sweep(Sweep("c", given, (0, 2, 4, 6), settings, values, {"tapt": [*answers]}))
    assert f"<li>TAPT: {words}</li>" in shown
    assert "The attack sees TAPT as deployed." in shown
    assert ("true class" in shown) == given


@pytest.mark.parametrize(
    ("value", "end"),
    [(0, 1), (0.488, 0.6), (0.07, 0.08), (1, 1), (33, 40), (0.3, 0.4), (95, 100)],
)
def test_a_charts_axis_ends_at_a_round_number(value: float, end: float):
    shown = chart.line_chart(
        {"a": [(0, value)]}, title="t", x_label="x", x_range=(0, 1), y_max=value, x_ticks=[0]
    )
    assert f'text-anchor="end">{end:g}</text>' in shown


@pytest.mark.parametrize("name", METHODS)
def test_every_attack_and_attacked_model_is_explained(name: str):
    for attacked in ("clip", "static", "deployed"):
        note = render.attack_note(METHODS[name], attacked)
        assert f"<strong>{METHODS[name].title}:</strong>" in note
        words = [word for word in ("white-box", "adaptive", "black-box") if f", {word}" in note]
        gradients = "adaptive" if attacked == "deployed" else "white-box"
        assert words == ["black-box" if name == "square" else gradients]
    assert ("L2" in note) == (name == "cw")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"path": "/etc/hostname"}}, "not an uploaded file"),
        ({"image": {"path": str(PICTURE)}}, "not an uploaded file"),
        ({"image": {"path": "/etc/hostname", "url": "http://127.0.0.1/a.png"}}, "not an uploaded"),
        ({"image": None}, "Choose a picture first"),
        ({"image": inline(encoded(Image.new("L", (13000, 13000))))}, "too large"),
        ({"class_names": "cat, \ud800"}, "must be valid Unicode"),
        ({"class_names": "cat"}, "at least two class names"),
        ({"class_names": ",".join(str(i) for i in range(100_000))}, "at most 100,000 characters"),
        ({"class_names": "cat, " + "very " * 40 + "long cat"}, "very very"),
        ({"attack": True}, "attack must be one of none, pgd"),
        ({"epsilon": float("nan")}, "epsilon must be a whole number from 0 to 16, got nan"),
        ({"epsilon": True}, "epsilon must be a whole number"),
        ({"epsilon": 99}, "epsilon must be a whole number from 0 to 16, got 99"),
        ({"step_size": float("nan")}, "step_size must be"),
        ({"seed": 10**30}, "seed must be a whole number"),
        ({"views": 0}, "views must be"),
        ({"alpha": 2}, "alpha must be a number from 0 to 1"),
        ({"attacked_model": "everything"}, "must be one of clip, static"),
        ({"defenses": ["nope"]}, "Defence 'nope' is unknown; choose from clip, static"),
        ({"defenses": "tapt"}, "defenses must be a list of names"),
        ({"true_class": "<i>bird</i>"}, "&lt;i&gt;bird&lt;/i&gt;' is not one of the class names"),
        ({"attack": "pgd", "target": "bird"}, "The target 'bird' is not one of the class names"),
        ({"attack": "pgd", "true_class": "cat", "target": "cat"}, "is the true class already"),
        ({"attack": "apgd", "target": "dog", "true_class": "cat"}, "cannot aim at a class"),
        ({"backbone": "local-dir:/etc"}, "This page offers the backbones tiny"),
        ({"pack": "/etc"}, "This page offers the packs"),
        ({"pack": "../prompts/tiny/vli"}, "This page offers the packs"),
        ({"pack": 3}, "pack must be text"),
        ({"pack": "x" * 1000}, "at most 200 characters"),
        ({"backbone": "a\0b"}, "This page offers the backbones tiny"),
        ({"pack": "a\0b/c"}, "This page offers the packs"),
    ],
)
def test_bad_values_are_refused_in_words(server: str, changes: dict, message: str):
    assert message in refused(server, **{"attack": "none", **changes})


def gradient() -> Image.Image:
    values = np.add.outer(np.arange(40), np.arange(60))
    return Image.fromarray((values * 2).astype(np.uint8))


def test_names_in_any_script(server: str):
    names = ["قطة", "כלב", "🐸", "猫", "a\u0301ne", "&lt;b&gt;", "' OR 1=1 --"]
    assert analyzed(server, class_names="\n".join(names), attack="none")["classes"] == names


def test_twenty_people_at_once_get_their_own_results(server: str):
    def one(index: int) -> tuple[list, dict]:
        names = ["cat", "dog", *(f"thing {index} {n}" for n in range(index % 5))]
        image = inline(encoded(Image.new("RGB", (40, 40), (12 * index, 255 - 12 * index, 99))))
        options = {"image": image, "class_names": ",".join(names), "seed": index}
        return names, analyzed(server, **options, attack="pgd", epsilon=1 + index % 4)

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        together = list(pool.map(one, range(20)))
    for index, (names, result) in enumerate(together):
        assert result["classes"] == names
        assert result["settings"]["seed"] == index
        assert result["settings"]["epsilon_255"] == 1 + index % 4
    for index in (0, 7, 19):
        assert one(index)[1]["results"] == together[index][1]["results"]


@pytest.mark.parametrize(("attack", "draws"), [("pgd", 4), ("square", 1)])
def test_the_deployed_defence_may_be_attacked(server: str, attack: str, draws: int):
    result = analyzed(server, attack=attack, attacked_model="deployed", epsilon=3)
    settings = result["settings"]
    assert (settings["attacked_model"], settings["draws"]) == ("deployed:tapt", draws)
    assert 1 <= result["linf_255"] <= 3


@pytest.mark.filterwarnings("ignore")  # gradio's own, about pandas
def test_results_of_finished_calls_are_not_kept_for_ever(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("tapt.ui.page.MAX_SESSIONS", 3)
    served = build_page(load_service(f"local-dir:{toy_folder}", device="cpu"))
    serve.reach_oneself()
    options = launch_options()
    _, url, _ = served.launch(prevent_thread_lock=True, server_name="127.0.0.1", **options)
    try:
        for seed in range(6):
            assert analyzed(url.rstrip("/"), attack="none", seed=seed)["settings"]["seed"] == seed
            assert len(served.state_holder.session_data) <= 3
    finally:
        served.close()


def test_full_queue_says_so(server: str):
    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda _: _try(server), range(60)))
    full = [text for text in answers if text != "complete"]
    assert full
    assert all("queue is full" in text.lower() for text in full)
    assert _try(server) == "complete"


def _try(server: str) -> str:
    try:
        kind, data = post(server, "analyze", attack="none")
    except urllib.error.HTTPError as error:
        return error.read().decode()
    return kind if kind == "complete" else data["error"]


def test_link_round_trip_and_bounds():
    picture = gradient().convert("RGB")
    values = {"class_names": "a, b", "epsilon": 3}
    restored = links.from_link(links.to_link(values, picture))
    again = inputs.read_request(restored, "/nowhere")
    assert (again.classes, again.picture.tobytes()) == (("a", "b"), picture.tobytes())
    bomb = links.to_link({"class_names": "a" * 5_000_000}, picture)
    for bad in ("x", bomb, links.to_link(values, picture)[:-40], "é", "a" * 3_000_000, None):
        with pytest.raises(InputError, match="damaged or cut off"):
            links.from_link(bad)


def test_public_space_loads_only_its_backbones(toy_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPACE_ID", "someone/tapt")
    service = load_service(f"local-dir:{toy_folder}", device="cpu")
    assert list(service.backbones) == [f"local-dir:{toy_folder.name}"]
    for name in ("tiny", "ViT-B-16", "hf-hub:someone/clip"):
        with pytest.raises(InputError, match="offers the backbones local-dir:"):
            service.model(name)
    monkeypatch.delenv("SPACE_ID")
    elsewhere = load_service(f"local-dir:{toy_folder}", device="cpu")
    assert elsewhere.model("tiny").pack.name == "tiny/vli"


def test_class_names_too_long_for_the_embedded_model_are_told_before_the_run():
    service = load_service("tiny", device="cpu")
    handlers = Handlers(service, "/nowhere")
    for name, text in known.presets().items():
        every, filled = class_names(text), class_names(handlers.preset(name, "tiny"))
        assert [each for each in every if each not in filled] == service.too_long(every)
        assert service.model("tiny").prepare(filled)
    long = "<b>" + "very " * 12 + "dog"
    note = handlers.classes(f"cat, {long}", "", "", "tiny")[0]
    assert "Too long for this model:</strong> &lt;b&gt;very very" in note
    assert "Too long" not in handlers.classes(f"cat, {long}", "", "", "ViT-B-16")[0]
    with pytest.raises(InputError, match=r"very very.*this model reads at most"):
        service.model("tiny").prepare(("cat", long))


def test_closing_a_run_ends_its_computation(toy_folder: Path, monkeypatch: pytest.MonkeyPatch):
    passes = []
    original = tapt.core.clip.logits

    def counted(*values: object, **options: object):
        passes.append(1)
        return original(*values, **options)

    monkeypatch.setattr("tapt.core.clip.logits", counted)
    handlers = Handlers(load_service(f"local-dir:{toy_folder}", device="cpu"), "/nowhere")
    values = {"image": RED, "class_names": "cat, dog", "attack": "pgd", "steps": 5000, "views": 4}
    before = set(threading.enumerate())
    running = handlers.compare(*(values.get(name) for name in inputs.FIELDS))
    for status, *_ in running:
        if isinstance(status, str) and "Attacking the picture" in status:
            break
    workers = set(threading.enumerate()) - before
    assert workers
    running.close()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert 0 < len(passes) < 5000


def test_a_slow_step_gives_way_to_the_page():
    closed, go = threading.Event(), threading.Event()

    def steps() -> Iterator[int]:
        try:
            go.wait(60)
            yield 1
            yield 2
        finally:
            closed.set()

    items = background.with_heartbeat(steps(), beat=0.01)
    assert next(items) is None
    go.set()
    assert [item for item in items if item is not None] == [1, 2]
    assert closed.wait(60)

    def broken() -> Iterator[int]:
        yield 1
        raise InputError("No more.")

    with pytest.raises(InputError, match="No more"):
        list(background.with_heartbeat(broken()))


def test_no_folder_is_taken_for_a_pack(toy_folder: Path, monkeypatch: pytest.MonkeyPatch):
    service = load_service(f"local-dir:{toy_folder}", device="cpu")
    monkeypatch.chdir(ROOT)
    for name in ("tapt/ui", "tapt/ui/", "./tapt/ui", str(ROOT / "tapt")):
        with pytest.raises(InputError, match="offers the packs untrained prompts"):
            service.model("", name)
    with pytest.raises(PackError, match="was made for backbone 'tiny'") as refused:
        service.model("", "tiny/vli")
    assert str(toy_folder.parent) not in str(refused.value)


def test_gpu_function_takes_and_gives_what_can_be_pickled(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    class FakeSpaces:
        """ZeroGPU's decorator, as far as pickling goes."""

        calls = 0

        @classmethod
        def GPU(cls, function: Callable) -> Callable:
            def forked(*values: object):
                cls.calls += 1
                for item in function(*pickle.loads(pickle.dumps(values))):
                    yield pickle.loads(pickle.dumps(item))

            return forked

    monkeypatch.setattr(tapt.ui, "spaces", FakeSpaces)
    handlers = Handlers(load_service(f"local-dir:{toy_folder}", device="cpu"), "/nowhere")
    values = {"image": RED, "class_names": "cat, dog", "attack": "pgd", **FAST}
    *_, last = handlers.compare(*(values.get(name) for name in inputs.FIELDS))
    assert last[-1]["finished"] is True
    assert FakeSpaces.calls == 1


def test_a_space_is_set_by_its_variables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TAPT_BACKBONE", "ViT-B-16,tiny")
    monkeypatch.setenv("TAPT_PACK", "owner/repo@v1")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7861")
    args = serve.parse_args([])
    assert (args.backbone, args.pack) == ("ViT-B-16,tiny", "owner/repo@v1")
    assert (args.host, args.port) == ("0.0.0.0", 7861)
    assert serve.parse_args(["--backbone", "tiny"]).backbone == "tiny"


def test_the_front_matter_is_a_spaces():
    front = (ROOT / "README.md").read_text(encoding="utf-8").split("---")[1]
    card = SpaceCardData(**yaml.safe_load(front))
    assert (card.sdk, card.license, card.python_version) == ("gradio", "mit", "3.12")
    assert (ROOT / card.app_file).is_file()
    assert len(card.short_description) <= 60  # the Hub takes no more
    names = "title emoji tags colorFrom colorTo suggested_hardware startup_duration_timeout"
    assert all(card.get(name) for name in names.split())


@pytest.mark.parametrize(
    "data",
    [
        [],
        [None],
        [{"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}, *[None] * 20],
        [{"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}, *[None] * 20],
    ],
)
def test_requests_that_gradio_cannot_read_are_refused_in_words(server: str, data: list):
    for endpoint in ("analyze", "compare", "sweep"):
        kind, answer = call(server, endpoint, data)
        assert kind == "error"
        assert "This request does not fit" in answer["error"]


def test_another_defence_is_on_the_page_once_it_is_registered(toy_folder: Path, flips: Defense):
    handlers = Handlers(load_service(f"local-dir:{toy_folder}", device="cpu"), "/nowhere")
    values = {"image": RED, "class_names": "cat, dog", "attack": "pgd", **FAST}
    request = [values.get(name) for name in inputs.FIELDS]
    *_, result = handlers.analyze(*request)
    assert sum(result["results"]["flips"]["attacked"]) == pytest.approx(1, abs=1e-4)
    assert result["settings"]["test_time"]["flips"] == {"flips": 5}
    *_, last = handlers.compare(*request)
    assert "Median over flips" in last[1]
    assert last[2].count("t-first") == 10
    values |= {"max_epsilon": 1}
    *_, last = handlers.sweep(*(values.get(name) for name in inputs.SWEEP_FIELDS))
    assert "<li>Median over flips: " in last[1]


def test_importing_the_app_makes_the_page(tmp_path: Path):
    code = "import app, os; print(len(app.demo.fns), os.environ['OMP_WAIT_POLICY'])"
    own = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    options = {"cwd": tmp_path, "env": {**own, "PYTHONPATH": str(ROOT)}, "text": True}
    count, policy = subprocess.check_output([sys.executable, "-c", code], **options).split()
    assert (int(count) > 5, policy) == (True, "passive")


def test_amplified_difference_reaches_full_range_around_grey():
    clean = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    attacked = clean.clone()
    attacked[0, 0, 0], attacked[1, 1, 1] = 104, 96
    picture, scale = render.amplified_difference(attacked, clean)
    assert scale == 31
    assert picture.getpixel((0, 0)) == (128 + 4 * 31, 128, 128)
    assert picture.getpixel((1, 1)) == (128, 128 - 4 * 31, 128)
    assert picture.getpixel((1, 0)) == (128, 128, 128)
    same, _ = render.amplified_difference(clean, clean)
    assert same.getextrema() == ((128, 128),) * 3
