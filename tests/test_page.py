"""The page in a real browser, and its endpoint over HTTP; nothing here depends on how good the
model is."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import app

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "tapt" / "ui" / "examples" / "cat.png"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MODELS = ("Vanilla CLIP", "Static prompts", "Untuned view ensemble", "TAPT")
TIMEOUT = 30_000  # ms; only a busy computer needs it
expect.set_options(timeout=TIMEOUT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """app.py in a process of its own; yields its address."""
    folder = tmp_path_factory.mktemp("page")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # another working folder, so that nothing depends on where the command is run
    with open(folder / "log.txt", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--device", "cpu"],
            cwd=folder,
            env={**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads"), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/", process, folder / "log.txt")
            yield f"http://127.0.0.1:{port}"
            assert "Traceback" not in (folder / "log.txt").read_text()
        finally:
            process.terminate()
            process.wait(20)


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(720):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.25)
    raise AssertionError(f"app.py did not answer within three minutes:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.fail(f"The page's tests need a browser: install one of {', '.join(names)}.")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=path, headless=True, args=CHROMIUM_FLAGS
        )
        yield running
        running.close()


@pytest.fixture
def page(server: str, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A fresh page with its first picture loaded; at the end, no script error and no request to
    anywhere else."""
    width, height = getattr(request, "param", (1280, 900))
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    errors: list[str] = []
    strangers: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda r: None if _is_own(r.url, server) else strangers.append(r.url))
    page.goto(server)
    expect(page.locator("#preview img")).to_be_visible(timeout=TIMEOUT)
    yield page
    context.close()
    assert (errors, strangers) == ([], [])


def _is_own(url: str, server: str) -> bool:
    return url.startswith((server, "data:", "blob:"))


def run(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()


def finish(page: Page) -> None:
    run(page)
    expect(page.locator("#status")).to_contain_text("Finished")


def upload(page: Page, name: str, data: bytes) -> None:
    page.locator("#in-image").get_by_label("Remove Image").click()
    expect(page.locator("#preview img")).to_have_count(0)
    file = {"name": name, "mimeType": "image/png", "buffer": data}
    page.locator("#in-image input[type=file]").set_input_files(file)


def png(color: str = "red", size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def toast(page: Page) -> str:
    expect(page.get_by_test_id("toast-body")).to_have_count(1)
    return page.get_by_test_id("toast-body").inner_text()


def test_upload_and_run_with_attack(page: Page):
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#slider")).to_be_hidden()
    upload(page, "mine.png", png())
    expect(page.locator("#preview")).to_contain_text("32 × 32 pixels")
    finish(page)
    expect(page.locator("#welcome")).to_be_hidden()
    assert page.locator("#verdict").inner_text().count("TAPT") >= 1
    answers = page.locator("#answers")
    assert tuple(answers.locator(".t-model").all_inner_texts()) == MODELS
    terms, values = (answers.locator(tag).all_inner_texts() for tag in ("dt", "dd"))
    facts = dict(zip(terms, values, strict=True))
    assert facts["Attack"] == "PGD, 10 steps"
    assert facts["Epsilon"] == "4/255"
    assert facts["Measured L∞"] in ("1/255", "2/255", "3/255", "4/255")
    assert facts["Attacked model"].startswith("vanilla CLIP")
    assert answers.locator("td").count() == 8  # four models, two images
    assert answers.get_by_text("no answer yet").count() == 0
    expect(answers.locator("caption")).to_contain_text("vanilla CLIP's own answer")
    assert page.locator("#slider img").count() == 2
    expect(page.locator("#perturbation")).to_contain_text("Perturbation ×")
    with page.expect_download() as download:
        page.get_by_role("link", name="Attacked image").click()
    with Image.open(download.value.path()) as attacked:
        assert (attacked.format, attacked.size, attacked.mode) == ("PNG", (32, 32), "RGB")


def test_without_attack_there_is_one_column_and_no_slider(page: Page):
    page.get_by_label("Attack the picture").uncheck()
    expect(page.locator("#epsilon")).to_be_hidden()
    page.get_by_label("True class").fill("Cat")
    finish(page)
    expect(page.locator("#verdict")).to_contain_text("Without an attack")
    expect(page.locator("#answers caption")).to_contain_text("The true class is cat, as you said")
    assert page.locator("#answers td").count() == 4
    expect(page.locator("#slider")).to_be_hidden()


def test_example_fills_the_inputs_and_warns_about_unknown_classes(page: Page):
    note = page.locator("#classes-note")
    expect(note).to_contain_text("deer, dog, frog, horse, ship and truck")
    expect(note.locator(".t-warning")).to_have_count(0)
    before = page.locator("#preview img").get_attribute("src")
    page.get_by_role("button", name="Coffee").click()
    expect(page.get_by_label("Class names")).to_have_value("cup of coffee, teapot, cat, dog")
    expect(note.locator(".t-warning")).to_contain_text("cup of coffee, teapot.")
    expect(page.locator("#preview img")).not_to_have_attribute("src", before)
    finish(page)
    expect(page.locator("#verdict .t-warning")).to_contain_text("cup of coffee")
    page.get_by_label("Class names").fill("kitten, Puppy, a plane\nsports car")
    expect(note.locator(".t-warning")).to_have_count(0)


def test_stop_ends_the_run_and_keeps_results(page: Page):
    # the browser itself presses Stop as soon as CLIP's answer is there, with TAPT still running
    page.evaluate(
        """() => new MutationObserver((_, watcher) => {
             if (!document.querySelector('#answers .t-table')) return;
             if (!document.querySelector('#status progress')) return;
             watcher.disconnect();
             document.querySelector('#stop').click();
           }).observe(document.querySelector('#results'), {childList: true, subtree: true})"""
    )
    run(page)
    expect(page.locator("#status")).to_contain_text("Stopped", timeout=4000)
    page.wait_for_timeout(1500)
    expect(page.locator("#status")).to_contain_text("Stopped")
    expect(page.locator("#answers")).to_contain_text("Vanilla CLIP")
    expect(page.locator("#answers").get_by_text("no answer yet").first).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()
    finish(page)
    assert page.locator("#answers").get_by_text("no answer yet").count() == 0


def test_bad_files_give_one_clear_toast_each(page: Page):
    for data in (b"only text", b"", png(size=(200, 200))[:80]):
        upload(page, "picture.png", data)
        assert "not a readable picture" in toast(page)
        assert page.locator("#preview img").count() == 0
        page.get_by_test_id("toast-close").click()
        page.get_by_role("button", name="Frog").click()
        expect(page.locator("#preview img")).to_be_visible()
    finish(page)


def test_bad_class_names_give_one_clear_toast_each(page: Page):
    for classes, message in (
        ("cat", "at least two class names"),
        (" , \n,", "at least two class names"),
        ("cat, " + "supercalifragilistic " * 9, "tokens"),
    ):
        page.get_by_label("Class names").fill(classes)
        run(page)
        assert message in toast(page)
        expect(page.locator("#status progress")).to_have_count(0)
        page.get_by_test_id("toast-close").click()
        expect(page.get_by_test_id("toast-body")).to_have_count(0)


def test_missing_picture_gives_one_clear_toast(page: Page):
    page.locator("#in-image").get_by_label("Remove Image").click()
    expect(page.locator("#preview img")).to_have_count(0)
    run(page)
    assert "Choose a picture first" in toast(page)


def test_html_in_class_names_is_shown_as_text(page: Page):
    evil = "<img src=x>"
    page.get_by_label("Class names").fill(f"{evil}, <b>cat</b>")
    finish(page)
    expect(page.locator("#answers")).to_contain_text(evil)
    page.get_by_role("button", name="All numbers as JSON").click()
    page.get_by_label("True class").fill("<b>dog</b>")
    run(page)
    assert "'<b>dog</b>' is not one of" in toast(page)
    assert page.locator("img[src=x], #results b, .toast-body b").count() == 0


@pytest.mark.parametrize("page", [(390, 844)], indirect=True)
def test_phone_never_scrolls_sideways(page: Page):
    too_wide = "document.documentElement.scrollWidth > window.innerWidth"
    assert not page.evaluate(too_wide)
    page.get_by_label("Class names").fill("cat, " + "a" * 30)
    finish(page)
    assert not page.evaluate(too_wide)
    expect(page.locator("#slider img").first).to_be_visible()


def test_api_returns_every_value(server: str):
    client = Client(server, verbose=False)
    names = "cat, dog, ship"
    status, verdict, answers, slider, perturbation, result = client.predict(
        handle_file(PICTURE), names, True, 2, "static", "dog", api_name="/compare"
    )
    assert "Finished" in status
    assert "t-sentence" in verdict
    assert "</table>" in answers
    assert "data:image/png" in perturbation
    clean, attacked = (Image.open(path) for path in slider)
    assert clean.size == attacked.size == (32, 32)
    assert result["finished"] is True
    assert (result["label"], result["label_given"]) == ("dog", True)
    assert result["settings"]["threat"] == "static"
    assert 1 <= result["linf_255"] <= result["settings"]["epsilon_255"] == 2
    measured = max(abs(a - b) for a, b in zip(clean.tobytes(), attacked.tobytes(), strict=True))
    assert measured == result["linf_255"]
    for kinds in result["results"].values():
        for probabilities in kinds.values():
            assert sum(probabilities) == pytest.approx(1, abs=1e-4)


def test_only_compare_is_in_the_api(server: str):
    with urllib.request.urlopen(f"{server}/gradio_api/info") as answer:
        info = json.load(answer)
    assert list(info["named_endpoints"]) == ["/compare"]
    assert info["unnamed_endpoints"] == {}
    entry = info["named_endpoints"]["/compare"]
    names = [parameter["parameter_name"] for parameter in entry["parameters"]]
    assert names == ["image", "class_names", "attack", "epsilon", "threat", "true_class"]
    assert all(name in entry["description"] for name in names)


INLINE = {"url": "data:image/png;base64," + base64.b64encode(png()).decode()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: {"path": "/etc/hostname"}}, "not an uploaded file"),
        ({0: {"path": str(PICTURE)}}, "not an uploaded file"),
        ({0: {"path": "/etc/hostname", "url": "http://127.0.0.1/a.png"}}, "not an uploaded file"),
        ({0: None}, "Choose a picture first"),
        ({0: "cat.png"}, "Send the picture as"),
        ({0: {"url": "data:image/png;base64,AAAA"}}, "not a readable picture"),
        ({1: ["cat", "dog"]}, "Class names must be text"),
        ({1: "cat, \ud800"}, "must be valid Unicode"),
        ({2: "yes"}, "Attack must be true or false"),
        ({3: float("nan")}, "Epsilon must be a whole number"),
        ({3: "four"}, "Epsilon must be a whole number"),
        ({3: 99}, "Epsilon must be from 0 to 16"),
        ({4: "adaptive"}, "must be one of clip, static"),
        ({5: "<i>bird</i>"}, "&lt;i&gt;bird&lt;/i&gt;' is not one of the class names"),
    ],
)
def test_api_refuses_bad_values_in_words(server: str, changes: dict, message: str):
    values = [INLINE, "cat, dog", True, 4, "clip", ""]
    for index, value in changes.items():
        values[index] = value
    error = json.loads(_call(server, values)[-1].removeprefix("data: "))["error"]
    assert message in error
    assert str(ROOT) not in error


def _call(server: str, values: list) -> list[str]:
    """The lines of the last event of a raw call, as any HTTP client could make it."""
    address = f"{server}/gradio_api/call/compare"
    request = urllib.request.Request(
        address, json.dumps({"data": values}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/{event}", timeout=20) as answer:
        lines = answer.read().decode().strip().splitlines()
    assert lines[-2] == "event: error"
    return lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "nothing-of-the-kind"], "unknown"),
        (["--pack", "no-such-pack"], "There is no pack"),
        (["--pack", "no/such/pack"], "no/such is not in the local cache, and offline mode is on"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--port", "seven"], "whole number from 1 to 65535"),
    ],
)
def test_bad_command_line_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as end:
        app.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_busy_port_is_one_sentence(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        app.main(["--port", server.rsplit(":", 1)[1]])
    assert end.value.code == 2
    assert "the port is taken" in capsys.readouterr().err
