"""The page's endpoints over HTTP and MCP, with every kind of bad input, and what serves them."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import gc
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import yaml
from gradio_client import Client, handle_file
from huggingface_hub import SpaceCardData
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, Tool
from PIL import Image

import tapt.core.clip
import tapt.ui
from tapt.core.backbone import Backbone
from tapt.core.errors import InputError, PackError
from tapt.defenses import Defense, list_defenses
from tapt.model import QUICK
from tapt.ui import api, background, inputs, serve
from tapt.ui.background import Runs
from tapt.ui.page import build_page, launch_options
from tapt.ui.service import Service

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "tapt" / "examples" / "cat.png"
FAST = {"settings": {"views": 4}, "steps": 2}


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


@pytest.fixture
def service(toy_folder: Path) -> Service:
    return Service(f"local-dir:{toy_folder}", device="cpu")


def values_of(**values: object) -> dict:
    return {"image": RED, "class_names": "cat, dog", **FAST, **values}


def post(server: str, endpoint: str, **values: object) -> tuple[str, object]:
    """The last event of a raw call and its data, as any HTTP client could get them."""
    fields = inputs.SWEEP_FIELDS if endpoint == "sweep" else inputs.FIELDS
    return call(server, endpoint, [values_of(**values).get(name) for name in fields])


def call(server: str, endpoint: str, data: list) -> tuple[str, object]:
    address = f"{server}/gradio_api/call/{endpoint}"
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/{event}", timeout=120) as answer:
        *_, kind, data = answer.read().decode().strip().splitlines()
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def analyzed(server: str, **values: object) -> dict:
    kind, data = post(server, "analyze", **values)
    assert kind == "complete", data
    return data[0]


def agent(server: str, *calls: tuple[str, dict]) -> tuple[list[Tool], list[CallToolResult]]:
    """The tools, and the results of calling some, by the reference client."""

    async def run() -> tuple[list[Tool], list[CallToolResult]]:
        url = f"{server}/gradio_api/mcp/"
        async with (
            streamable_http_client(url) as (reader, writer, *_),
            ClientSession(reader, writer) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            return tools, [await session.call_tool(*each) for each in calls]

    with concurrent.futures.ThreadPoolExecutor(1) as aside:  # Playwright's loop runs in this thread
        return aside.submit(asyncio.run, run()).result()


def test_compare_and_analyze_return_every_value(client: Client):
    options = {"class_names": "cat, dog, ship", "attack": "pgd", "epsilon": 2, **FAST}
    options |= {"attacked_model": "static", "true_class": "Dog"}
    verdict, table, *pictures, result = client.predict(
        handle_file(PICTURE), **options, api_name="/compare"
    )
    assert "The true class is dog." in verdict
    assert "PGD-2 on Static prompts, epsilon 2/255" in table
    clean, attacked = (np.asarray(Image.open(path), int) for path in pictures)
    assert clean.shape == attacked.shape == (64, 64, 3)
    assert (result["label"], result["label_given"]) == ("dog", True)
    assert result["settings"]["test_time"]["tapt"]["views"] == 4
    assert 1 <= result["linf_255"] == np.abs(clean - attacked).max() <= 2
    same = client.predict(handle_file(PICTURE), **options, api_name="/analyze")
    assert (same["results"], set(same)) == (result["results"], set(result))
    # the PNG keeps the attack
    options |= {"attack": "none"}
    again = client.predict(handle_file(pictures[1]), **options, api_name="/analyze")
    for name, kinds in result["results"].items():
        assert again["results"][name]["clean"] == kinds["attacked"]


def test_analyze_returns_what_the_command_prints(server: str, client: Client):
    names = list_defenses()
    command = [sys.executable, "-m", "tapt", "predict", str(PICTURE), "--classes", "cat,dog,ship"]
    command += ["--attack", "apgd", "--epsilon", "3/255", "--steps", "2", "--seed", "5"]
    command += ["--views", "4", "--device", "cpu", "--json", "--defenses", ",".join(names)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    expected = json.loads(printed.stdout)
    options = {"attack": "apgd", "epsilon": 3, "seed": 5, "defenses": names, **FAST}
    result = client.predict(
        handle_file(PICTURE), class_names="cat\ndog\nship", **options, api_name="/analyze"
    )
    assert (set(result), result["settings"]) == (set(expected), expected["settings"])
    assert list(result["results"]) == names
    for name, kinds in expected["results"].items():
        for kind, probabilities in kinds.items():
            assert result["results"][name][kind] == pytest.approx(probabilities, abs=1e-5)


def test_settings_are_of_one_defence_or_of_all_that_have_them(server: str):
    changes = {"views": 4.0, "tapt.views": 5, "ensemble.keep": 0.5}
    used = analyzed(server, attack="none", settings=changes)["settings"]["test_time"]
    assert (used["tapt"]["views"], used["ensemble"]["views"]) == (5, 4)
    assert used["ensemble"]["keep"] == 0.5


def test_endpoints_and_their_parameters_are_documented(server: str):
    with urllib.request.urlopen(f"{server}/gradio_api/info") as answer:
        info = json.load(answer)
    short = {"/analyze_short", "/sweep_short"}
    assert info["unnamed_endpoints"] == {}
    assert set(info["named_endpoints"]) == {"/compare", "/analyze", "/sweep", *short}
    for path, entry in info["named_endpoints"].items():
        parameters = {p["parameter_name"]: p for p in entry["parameters"]}
        assert set(parameters) >= set(inputs.FIELDS) - {"epsilon"}
        for name, parameter in parameters.items():
            assert path in short or re.search(rf"\b{name}: \w", entry["description"])
            assert parameter["parameter_has_default"] == (name != "image")


def test_an_agent_has_two_tools_and_gets_short_json(server: str):
    picture = RED["url"]
    asked = {"image": picture, "class_names": "cup, teapot", "attack": "pgd", **FAST}
    tools, (analysis, sweep, refused, threat) = agent(
        server,
        ("analyze", {**asked, "true_class": "cup", "target": "teapot", "pack": ""}),
        ("sweep", {**asked, "attack": "square", "max_epsilon": 2}),
        ("analyze", {**asked, "true_class": "kettle"}),
        ("analyze", {**asked, "pack": "/etc"}),
    )
    assert [tool.name for tool in tools] == ["analyze", "sweep"]
    for tool in tools:
        assert tool.inputSchema["required"] == ["image"]
        for parameter in tool.inputSchema["properties"].values():
            assert len(parameter["description"]) > 10
            assert "enum" not in parameter
    text, image, *_ = analysis.content
    result = json.loads(text.text)
    assert result["true_class"] == "cup"
    assert set(result["defenses"]["clip"]) == {"state", "clean", "attacked"}
    assert result["defenses"]["clip"]["state"] in ("held", "fooled", "wrong before", "recovered")
    assert result["settings"]["target"] == "teapot"
    png = Image.open(io.BytesIO(base64.b64decode(image.data)))
    assert (image.mimeType, png.size) == ("image/png", (64, 64))
    result = json.loads(sweep.content[0].text)
    assert (result["epsilons"], len(result["probabilities"]["tapt"])) == ([0, 1, 2], 3)
    assert refused.isError
    assert "The true class 'kettle' is not one of the class names" in refused.content[0].text
    assert "This page offers the packs" in threat.content[0].text


def test_an_agents_text_is_short_whatever_the_names(service: Service):
    runs = Runs(service, "/nowhere")
    names = ",".join("abcdefgh")
    request = runs.request(values_of(class_names=names, true_class="h", attack="pgd"))
    *_, (_, result) = runs.compare(request)
    result.classes = tuple(f"{n} " + "猫" * 99 for n in result.classes)
    result.answers = {name: result.answers["tapt"] for name in list_defenses()}
    text = api.short_comparison(result)
    assert len(text.encode()) <= api.MAX_BYTES
    assert set(json.loads(text)["defenses"]) == set(list_defenses())


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"path": "/etc/hostname"}}, "not an uploaded file"),
        ({"image": {"path": str(PICTURE)}}, "not an uploaded file"),
        ({"image": {"path": "/etc/hostname", "url": "http://127.0.0.1/a.png"}}, "not an uploaded"),
        ({"image": None}, "Choose a picture first"),
        ({"image": "x"}, "Send the picture as an uploaded file"),
        ({"image": {"path": 3}}, "Send the picture as an uploaded file"),
        ({"image": inline(b"no picture")}, "not a readable picture"),
        ({"image": {"url": "data:image/png,x"}}, "not valid base64"),
        ({"image": inline(encoded(Image.new("L", (13000, 13000))))}, "too large"),
        ({"class_names": "cat, \ud800"}, "must be valid Unicode"),
        ({"class_names": "cat"}, "at least two class names"),
        ({"class_names": ",".join(str(i) for i in range(100_000))}, "at most 100,000 characters"),
        ({"class_names": "cat, " + "very " * 40 + "long cat"}, "very very"),
        ({"attack": True}, "attack must be one of none, pgd"),
        ({"attack": "nope"}, "attack must be one of none, pgd"),
        ({"epsilon": float("nan")}, "epsilon must be a whole number from 0 to 16, got nan"),
        ({"epsilon": True}, "epsilon must be a whole number"),
        ({"epsilon": 99}, "epsilon must be a whole number from 0 to 16, got 99"),
        ({"step_size": float("nan")}, "step_size must be"),
        ({"seed": 10**30}, "seed must be a whole number"),
        ({"settings": {"views": 0}}, "views must be a whole number from 1 to"),
        ({"settings": {"tapt.alpha": float("nan")}}, "alpha must be a number from 0 to 1, got nan"),
        ({"settings": {"clip.views": 3}}, "'clip.views' is a setting of no defence"),
        ({"settings": {"\ud800": 3}}, "is a setting of no defence"),
        ({"settings": ["views", 3]}, "settings must be an object of names and values"),
        ({"attacked_model": "everything"}, "must be one of clip, static"),
        ({"attacked_model": "deployed:nope"}, "Defence 'nope' is unknown"),
        ({"defenses": ["nope"]}, "Defence 'nope' is unknown; choose from clip, static"),
        ({"defenses": "tapt"}, "defenses must be a list of names"),
        ({"defenses": []}, "Choose at least one defence"),
        ({"true_class": "<i>bird</i>"}, "&lt;i&gt;bird&lt;/i&gt;' is not one of the class names"),
        ({"attack": "pgd", "target": "bird"}, "The target 'bird' is not one of the class names"),
        ({"attack": "apgd", "target": "dog", "true_class": "cat"}, "cannot aim at a class"),
        ({"backbone": "local-dir:/etc"}, "This page offers the backbones small, tiny"),
        ({"pack": "/etc"}, "This page offers the packs"),
        ({"pack": "../prompts/small/vli"}, "This page offers the packs"),
        ({"pack": 3}, "pack must be text"),
        ({"pack": "x" * 1000}, "at most 200 characters"),
        ({"backbone": "a\0b"}, "This page offers the backbones small, tiny"),
        ({"pack": "a\0b/c"}, "This page offers the packs"),
    ],
)
def test_bad_values_are_refused_in_words(server: str, changes: dict, message: str):
    kind, data = post(server, "analyze", **{"attack": "none", **changes})
    assert kind == "error", data
    assert message in data["error"]
    assert str(ROOT) not in data["error"]


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
    for endpoint in ("analyze", "compare", "sweep", "analyze_short"):
        kind, answer = call(server, endpoint, data)
        assert kind == "error"
        assert "This request does not fit" in answer["error"]


def test_gradio_itself_opens_no_picture(service: Service):
    """Its image input would open any file of the server that a request names."""
    events = [fn for fn in build_page(service).fns.values() if fn.fn and fn.preprocess]
    assert not [fn for fn in events for given in fn.inputs if isinstance(given, gr.Image)]


def test_names_in_any_script(server: str):
    names = ["قطة", "כלב", "🐸", "猫", "a\u0301ne", "<b>x</b>", "' OR 1=1 --"]
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
        assert (result["classes"], result["settings"]["seed"]) == (names, index)
        assert result["settings"]["epsilon_255"] == 1 + index % 4
    assert one(7)[1]["results"] == together[7][1]["results"]


@pytest.mark.parametrize("attack", ["pgd", "square"])
def test_a_deployed_defence_may_be_attacked(server: str, attack: str):
    settings = analyzed(server, attack=attack, attacked_model="deployed:ensemble")["settings"]
    assert settings["attacked_model"] == "deployed:ensemble"
    assert settings["adaptive"] == QUICK.model_dump()


def test_a_full_queue_says_so(server: str):
    def one(_: int) -> str:
        try:
            kind, data = post(server, "analyze", attack="none")
        except urllib.error.HTTPError as error:
            return error.read().decode()
        return kind if kind == "complete" else data["error"]

    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        full = [text for text in pool.map(one, range(60)) if text != "complete"]
    assert full
    assert all("queue is full" in text.lower() for text in full)
    assert one(0) == "complete"


@pytest.mark.filterwarnings("ignore")  # gradio's own, about pandas
def test_results_of_finished_calls_are_not_kept_for_ever(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("tapt.ui.page.MAX_SESSIONS", 3)
    served = build_page(service)
    serve.reach_oneself()
    options = launch_options()
    _, url, _ = served.launch(prevent_thread_lock=True, server_name="127.0.0.1", **options)
    try:
        for seed in range(6):
            assert analyzed(url.rstrip("/"), attack="none", seed=seed)["settings"]["seed"] == seed
            assert len(served.state_holder.session_data) <= 3
    finally:
        served.close()


class Loader:
    """Stands in for `load_backbone`: a copy of the toy for every name, each one only when it may.

    made: weak, to the models.
    """

    def __init__(self, toy: Backbone) -> None:
        self.toy, self.may, self.made = toy, threading.Event(), {}

    def __call__(self, name: str, **options: object) -> tuple[Backbone, None]:
        assert self.may.wait(60)
        backbone = replace(self.toy, name=name, model=deepcopy(self.toy.model))
        self.made[name] = weakref.ref(backbone.model)
        return backbone, None


@pytest.fixture
def loader(toy: Backbone, monkeypatch: pytest.MonkeyPatch) -> Loader:
    loader = Loader(toy)
    monkeypatch.setattr("tapt.ui.service.load_backbone", loader)
    return loader


def test_a_download_keeps_nobody_else_waiting(toy_folder: Path, loader: Loader):
    service = Service(f"local-dir:{toy_folder}", device="cpu", allow_backbones="one, two")
    runs = Runs(service, "/nowhere")
    waiting = [runs.compare(runs.request(values_of(backbone=name))) for name in ("one", "two")]
    assert [next(run) for run in waiting] == [(None, None)] * 2
    request = runs.request(values_of())
    *_, (_, result) = runs.compare(request)
    assert result.finished
    assert service.at_hand("one") is service.estimate(runs.request(values_of(backbone="one")))
    loader.may.set()
    for run in waiting:
        *_, (_, result) = run
        assert result.finished
    assert service.at_hand("one").backbone.name == "one"


def test_what_was_prepared_for_a_backbone_goes_with_it(toy_folder: Path, loader: Loader):
    service = Service(f"local-dir:{toy_folder}", device="cpu", allow_backbones="a,b,c,d")
    runs = Runs(service, "/nowhere")
    loader.may.set()
    for name in "abcd":
        for classes in ("cat, dog", "cup, teapot"):
            *_, last = runs.compare(runs.request(values_of(backbone=name, class_names=classes)))
    del last
    gc.collect()
    assert [name for name, model in loader.made.items() if model()] == ["c", "d"]


def test_a_run_is_told_as_long_as_the_last_one_was(service: Service):
    runs = Runs(service, "/nowhere")
    request = runs.request(values_of(attack="pgd", attacked_model="deployed"))
    assert service.estimate(request) > 0
    # the page looks no further
    result = next(result for _, result in runs.compare(request) if result and result.finished)
    assert service.estimate(request) == pytest.approx(result.seconds["total"])
    longer = runs.request(values_of(attack="pgd", attacked_model="deployed", steps=20))
    assert service.estimate(longer) > service.estimate(request)
    assert service.seconds("", "tapt") > 0


def test_visitors_load_what_the_server_allows(toy_folder: Path, monkeypatch: pytest.MonkeyPatch):
    name = f"local-dir:{toy_folder.name}"
    closed = Service(f"local-dir:{toy_folder}", device="cpu")
    assert list(closed.backbones) == [name, "small", "tiny"]
    assert closed.model("tiny").pack.name == "tiny/vli"
    for backbone in ("ViT-B-16", "hf-hub:someone/clip", "random:ViT-B-32"):
        with pytest.raises(InputError, match=f"offers the backbones {name}, small, tiny; got"):
            closed.model(backbone)
    with pytest.raises(InputError, match=r"offers the packs untrained prompts; got 'owner/repo'"):
        closed.model("", "owner/repo")
    assert closed.hub_packs("") == []

    monkeypatch.setattr("tapt.ui.service.load_pack", lambda *values, **options: 1 / 0)
    some = Service("tiny", device="cpu", allow_packs="owner/repo", allow_backbones="ViT-B-16")
    assert list(some.backbones) == ["tiny", "small", "ViT-B-16"]
    for pack in ("owner/repo", "owner/repo@v1"):
        with pytest.raises(ZeroDivisionError):
            some.model("", pack)
    with pytest.raises(InputError, match="got 'owner/other'"):
        some.model("", "owner/other")
    monkeypatch.undo()

    anything = Service(
        f"local-dir:{toy_folder}", device="cpu", allow_backbones="any", allow_packs="any"
    )
    assert "ViT-B-16" in anything.backbones
    with pytest.raises(InputError, match="and any public one; got 'local-dir:/etc'"):
        anything.model("local-dir:/etc")
    monkeypatch.chdir(ROOT)
    for pack in ("tapt/ui", "tapt/ui/", "./tapt/ui", str(ROOT / "tapt")):
        with pytest.raises(InputError, match="offers the packs untrained prompts"):
            anything.model("", pack)
    with pytest.raises(PackError, match="was made for backbone 'tiny'") as refused:
        anything.model("", "tiny/vli")
    assert str(toy_folder.parent) not in str(refused.value)


def test_a_server_is_set_by_its_variables(monkeypatch: pytest.MonkeyPatch):
    here = serve.parse_args([])
    assert (here.allow_backbones, here.allow_packs, here.mcp) == ("any", "any", False)
    monkeypatch.setenv("TAPT_BACKBONE", "ViT-B-16,tiny")
    monkeypatch.setenv("TAPT_PACK", "owner/repo@v1")
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7861")
    monkeypatch.setenv("GRADIO_MCP_SERVER", "True")
    monkeypatch.setenv("SPACE_ID", "someone/tapt")
    args = serve.parse_args(["--allow-packs", "owner/repo"])
    assert (args.backbone, args.pack, args.port) == ("ViT-B-16,tiny", "owner/repo@v1", 7861)
    assert (args.allow_backbones, args.allow_packs, args.mcp) == ("none", "owner/repo", True)
    monkeypatch.delenv("SPACE_ID")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    args = serve.parse_args(["--backbone", "tiny"])
    assert (args.host, args.backbone, args.allow_backbones) == ("0.0.0.0", "tiny", "none")


def test_names_that_are_too_long_are_told(toy_folder: Path):
    service = Service("tiny", device="cpu")
    long = "<b>" + "very " * 12 + "dog"
    assert service.too_long(["cat", long], "tiny") == [long]
    assert service.too_long([], "tiny") == []
    with pytest.raises(InputError, match=r"very very.*this model reads at most"):
        service.model("tiny").prepare(("cat", long))


def test_closing_a_run_ends_its_computation(service: Service, monkeypatch: pytest.MonkeyPatch):
    passes = []
    original = tapt.core.clip.logits

    def counted(*values: object, **options: object):
        passes.append(1)
        return original(*values, **options)

    monkeypatch.setattr("tapt.core.clip.logits", counted)
    runs = Runs(service, "/nowhere")
    before = set(threading.enumerate())
    running = runs.compare(runs.request(values_of(attack="pgd", steps=5000)))
    assert any(progress and progress.name == "attack" for progress, _ in running)
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
            raise InputError("No more.")
        finally:
            closed.set()

    items = background.with_heartbeat(steps(), beat=0.01)
    assert next(items) is None
    go.set()
    assert next(item for item in items if item) == 1
    with pytest.raises(InputError, match="No more"):
        list(items)
    assert closed.wait(60)


def test_gpu_function_takes_and_gives_what_can_be_pickled(
    service: Service, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []

    class FakeSpaces:
        """ZeroGPU's decorator, as far as pickling goes."""

        @staticmethod
        def GPU(function: Callable, duration: Callable) -> Callable:
            def forked(*values: object):
                asked.append(duration(*values))
                for item in function(*pickle.loads(pickle.dumps(values))):
                    yield pickle.loads(pickle.dumps(item))

            return forked

    monkeypatch.setattr(tapt.ui, "spaces", FakeSpaces)
    runs = Runs(service, "/nowhere")
    request = runs.request(values_of(attack="pgd", max_epsilon=1))
    assert service.estimate(request) > 0
    assert not asked
    *_, (_, result) = runs.compare(request)
    assert result.finished
    *_, (_, curves) = runs.sweep(request)
    assert len(curves.probabilities["tapt"]) == 2
    assert all(15 <= seconds <= 300 for seconds in asked)


def test_another_defence_is_there_once_it_is_registered(service: Service, flips: Defense):
    runs = Runs(service, "/nowhere")
    request = runs.request(values_of(settings={"views": 4, "flips.flips": 3}))
    *_, (_, result) = runs.compare(request)
    assert result.settings["test_time"]["flips"] == {"flips": 3}
    with pytest.raises(InputError, match="flips must be a whole number from 1 to 64, got 0"):
        runs.request(values_of(settings={"flips": 0}))


def test_the_front_matter_is_a_spaces():
    front = (ROOT / "README.md").read_text(encoding="utf-8").split("---")[1]
    card = SpaceCardData(**yaml.safe_load(front))
    assert (card.sdk, card.license, card.python_version) == ("gradio", "mit", "3.12")
    assert (ROOT / card.app_file).is_file()
    assert len(card.short_description) <= 60  # the Hub takes no more
    names = "title emoji tags colorFrom colorTo suggested_hardware startup_duration_timeout"
    assert all(card.get(name) for name in names.split())


def test_importing_the_app_makes_the_page(tmp_path: Path):
    zero = "import sys; early = 'torch' not in sys.modules; GPU = lambda f, duration: f"
    (tmp_path / "spaces.py").write_text(zero)
    code = "import app, os, spaces; print(len(app.demo.fns), os.environ['OMP_WAIT_POLICY'], "
    own = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    own["PYTHONPATH"] = f"{ROOT}:{tmp_path}"
    command = [sys.executable, "-c", code + "spaces.early)"]
    printed = subprocess.check_output(command, cwd=tmp_path, env=own, text=True)
    count, *rest = printed.split()
    assert (int(count) > 5, rest) == (True, ["passive", "True"])
