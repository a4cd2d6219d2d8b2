"""The page in a real browser; nothing here depends on how good the model is."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import TIMEOUT
from PIL import Image
from playwright.sync_api import Page, expect

from tapt.ui import serve

MODELS = ("Vanilla CLIP", "Static prompts", "Untuned view ensemble", "TAPT")
PHONE = {"viewport": {"width": 390, "height": 844}}
WCAG = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "resultTypes": ["violations"]}
expect.set_options(timeout=TIMEOUT)


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


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def unfold(page: Page, name: str) -> None:
    page.get_by_role("button", name=name).click()


def facts(page: Page) -> dict[str, str]:
    terms, values = (page.locator(f"#answers {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(terms, values, strict=True))


def shown_answers(page: Page) -> list[str]:
    return page.locator("#answers .t-answers").all_inner_texts()


def download(page: Page, name: str) -> Path:
    with page.expect_download() as started:
        page.get_by_role("link", name=name).click()
    return started.value.path()


def test_upload_and_run_with_attack(page: Page):
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#slider")).to_be_hidden()
    upload(page, "mine.png", png())
    expect(page.locator("#preview")).to_contain_text("32 × 32 pixels")
    finish(page)
    expect(page.locator("#welcome")).to_be_hidden()
    verdict = re.compile(r"\d (kept|changed) the answer \(.*TAPT")
    expect(page.locator("#verdict")).to_contain_text(verdict)
    answers = page.locator("#answers")
    assert tuple(answers.locator(".t-model").all_inner_texts()) == MODELS
    known = facts(page)
    assert known["Attack"] == "PGD, 10 steps"
    assert known["Epsilon"] == "4/255"
    assert re.fullmatch(r"L∞ [1-4]/255, L2 \d\.\d\d", known["Measured"])
    assert known["Attacked model"] == "Vanilla CLIP, white-box"
    assert answers.locator(".t-answers").count() == 8  # four models, two images
    assert answers.get_by_text("no answer yet").count() == 0
    expect(answers.locator("caption")).to_contain_text("No true class was given")
    marks = answers.locator(".t-mark").all_inner_texts()
    assert len(marks) == 4  # of the attacked image's answers
    assert set(marks) <= {"kept", "changed"}
    assert page.locator("#slider img").count() == 2
    expect(page.locator("#perturbation")).to_contain_text("Perturbation ×")
    expect(page.locator("#perturbation")).to_contain_text("epsilon is 4/255")


@pytest.mark.parametrize(
    "page", [{"permissions": ["clipboard-read", "clipboard-write"]}], indirect=True
)
def test_a_picture_may_be_pasted_or_come_from_the_camera(page: Page):
    preview, remove = page.locator("#preview img"), page.get_by_label("Remove Image")
    remove.click()
    expect(preview).to_have_count(0)
    page.evaluate(
        """async data => {
             const picture = await (await fetch('data:image/png;base64,' + data)).blob();
             await navigator.clipboard.write([new ClipboardItem({'image/png': picture})]);
           }""",
        base64.b64encode(png()).decode(),
    )
    page.get_by_label("Paste from clipboard").click()
    pasted = preview.get_attribute("src")
    remove.click()
    expect(preview).to_have_count(0)
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    # before the camera has sent a picture, the button takes none
    page.wait_for_function("[...document.querySelectorAll('video')].some(v => v.videoWidth > 0)")
    page.get_by_label("capture photo").click()
    assert preview.get_attribute("src") != pasted


def test_without_attack_and_right_and_wrong_by_word_and_colour(page: Page):
    choose(page, "Attack", "none")
    for name in ("#epsilon", "#attacked-model", "#top5"):
        expect(page.locator(name)).to_be_hidden()
    finish(page)
    expect(page.locator("#slider")).to_be_hidden()
    expect(page.get_by_role("link", name="Attacked image")).to_have_count(0)
    first = page.locator("#answers .t-answers").first.locator(".t-first")
    expect(page.locator("#answers .t-mark")).to_have_count(0)  # nobody knows
    answer = first.locator(".t-name").inner_text()
    choose(page, "True class", answer)
    finish(page)
    expect(first.locator(".t-mark")).to_have_text("✓ right")
    green = first.locator(".t-mark").evaluate("mark => getComputedStyle(mark).color")
    wrong = "cat" if answer != "cat" else "dog"
    choose(page, "True class", wrong)
    finish(page)
    expect(first.locator(".t-mark")).to_have_text("✗ wrong")
    assert first.locator(".t-mark").evaluate("mark => getComputedStyle(mark).color") != green
    assert page.locator("#answers .t-mark").count() == 4  # each model's
    expect(page.locator("#verdict")).to_contain_text(f"The true class is {wrong}.")
    expect(page.locator("#answers caption")).to_contain_text(f"true class is {wrong}, as you said")
    visible = page.locator("#answers td").first.locator("li:visible")
    assert visible.count() == 2  # the answer and the true class
    page.get_by_label("Show the five most probable answers").check()
    assert visible.count() >= 5
    values = [float(v.rstrip(" %")) for v in visible.locator(".t-value").all_inner_texts()]
    assert values == sorted(values, reverse=True)


def test_attack_on_the_deployed_defence_tells_its_time_first(page: Page):
    unfold(page, "Defence")
    page.get_by_label("Views").fill("4")
    unfold(page, "More about the attack")
    page.get_by_label("Attack steps").fill("1")
    expect(page.locator("#estimate p")).to_have_count(0)
    page.get_by_label("TAPT as deployed").check()
    expect(page.locator("#estimate")).to_contain_text(re.compile(r"about \d+ (s|minutes)"))
    expect(page.locator("#attack-note")).to_contain_text("It sees TAPT as deployed, adaptive")
    finish(page)
    assert facts(page)["Attacked model"].startswith("TAPT as deployed, adaptive")
    page.get_by_label("Attack", exact=True).click()
    page.get_by_role("option", name="Square", exact=True).click()
    expect(page.locator("#attack-note")).to_contain_text("It sees TAPT as deployed, black-box")
    page.get_by_role("radio", name="Vanilla CLIP").check()
    expect(page.locator("#estimate p")).to_have_count(0)


def test_cw_is_explained_and_measured_as_an_l2_attack(page: Page):
    choose(page, "Attack", "CW")
    expect(page.locator("#attack-note")).to_contain_text("L2")
    expect(page.locator("#epsilon")).to_be_hidden()
    unfold(page, "More about the attack")
    expect(page.get_by_label("Step size")).to_be_hidden()
    page.get_by_label("Attack steps").fill("3")
    choose(page, "Target", "ship")
    finish(page)
    known = facts(page)
    assert known["Attack"] == "CW, 3 steps, towards ship"
    assert known["Epsilon"] == "none: L2 attack"
    assert "L2" in known["Measured"]


def test_presets_and_the_count_of_class_names(page: Page):
    note = page.locator("#classes-note")
    choose(page, "Class names from a data set", "OxfordIIITPet")
    expect(note).to_contain_text("37 class names.")
    choose(page, "Class names from a data set", "ImageNet")
    assert "Left out, too long for this model: Mexican hairless dog" in toast(page)
    expect(note).to_contain_text("997 class names; 2 repeated, counted once.")
    page.locator("#classes textarea").fill("cat,,dog , cat\n\nship")
    expect(note).to_contain_text("3 class names; 1 repeated, counted once.")
    expect(note.locator(".t-warning")).to_have_count(0)
    page.get_by_label("True class", exact=True).click()
    names = page.get_by_role("option").all_inner_texts()
    assert [name.strip(" ✓\n") for name in names][1:] == ["cat", "dog", "ship"]


def test_defence_settings_are_the_packs_own_until_changed(page: Page):
    unfold(page, "Defence")
    views = page.get_by_label("Views")
    own = views.input_value()
    assert int(own) > 1
    views.fill("8")
    page.get_by_label("Kept share").fill("0.5")
    choose(page, "Attack", "none")
    finish(page)
    assert facts(page)["TAPT"].startswith("views 8, keep 0.5, steps 1,")
    page.get_by_role("button", name="Back to the pack's own settings").click()
    expect(views).to_have_value(own)
    choose(page, "Prompts", "untrained prompts")
    expect(page.locator("#model-line")).to_contain_text("untrained prompts, entropy only")
    finish(page)
    expect(page.locator("#verdict")).to_contain_text("TAPT, untrained prompts")


def test_what_tapt_did(page: Page):
    finish(page)
    unfold(page, "What TAPT did")
    expect(page.locator("#did section")).to_have_count(2)
    for section in page.locator("#did section").all():
        assert section.locator(".t-views li").count() == 64
        kept = section.locator(".t-views .t-kept")
        assert kept.count() == 6
        every = section.locator(".t-views li").all_inner_texts()
        entropies = [float(text.split()[-1]) for text in every]
        assert max(entropies[:6]) <= min(entropies[6:])
        rows = section.locator(".t-plain").first.locator("tbody tr").all_inner_texts()
        assert len(rows) == 4
        section.get_by_text("As numbers").click()
        blocks = section.locator(".t-chart tbody tr").count()
        assert blocks == section.locator(".t-chart .t-line-0 circle").count() > 1
        assert "s in all" in section.inner_text()


def test_take_away(page: Page):
    page.locator("#classes textarea").fill('kitten, "dog" & <cat>, ship')
    page.get_by_role("radio", name="Static prompts").check()
    finish(page)
    answers = shown_answers(page)
    with Image.open(download(page, "Attacked image")) as attacked:
        assert (attacked.format, attacked.size, attacked.mode) == ("PNG", (32, 32), "RGB")
    numbers = json.loads(download(page, "All numbers").read_text())
    assert numbers["settings"]["attacked_model"] == "static"
    assert numbers["settings"]["seed"] == 0
    assert set(numbers["versions"]) >= {"python", "torch"}
    assert "pack_commit" in numbers["settings"]

    picture = download(page, "Attacked image").read_bytes()
    link = page.get_by_role("link", name="Link to these inputs").evaluate("a => a.href")
    page.goto("about:blank")
    page.goto(link)
    expect(page.locator("#classes textarea")).to_have_value('kitten, "dog" & <cat>, ship')
    expect(page.get_by_role("radio", name="Static prompts")).to_be_checked()
    expect(page.locator("#preview img")).to_be_visible()
    finish(page)
    assert shown_answers(page) == answers
    upload(page, "attacked.png", picture)
    expect(page.locator("#preview img")).to_be_visible()
    choose(page, "Attack", "none")
    finish(page)
    again = json.loads(download(page, "All numbers").read_text())["results"]
    for name, kinds in numbers["results"].items():
        assert again[name]["clean"] == kinds["attacked"]


def test_damaged_link_opens_the_start_page_with_a_word(page: Page, server: str):
    page.goto("about:blank")
    page.goto(f"{server}/#eJyrVkrOzy0oSi0uTk3xzSxRslJQS")
    assert "damaged or cut off" in toast(page)
    expect(page.locator("#preview img")).to_be_visible()


def test_sweep_draws_every_curve_and_can_be_stopped(page: Page):
    page.get_by_role("tab", name="Sweep").click()
    page.wait_for_timeout(500)  # gradio sets a tab's first values a moment after it has opened
    page.get_by_label("Largest epsilon").fill("4")
    page.locator("#sweep").get_by_label("Step").fill("2")
    go = page.get_by_role("button", name="Run the sweep")
    go.click()
    expect(page.locator("#sweep-status")).to_contain_text("Finished")
    curves = page.locator("#curves")
    for index in range(4):
        assert curves.locator(f".t-line-{index} circle").count() == 3  # 0, 2 and 4
    curves.get_by_text("As numbers").click()
    assert curves.locator("tbody th").all_inner_texts() == ["0", "2", "4"]
    expect(curves).to_contain_text("vanilla CLIP's own answer to the original")
    expect(page.locator("#published")).to_contain_text("published")
    page.get_by_label("Largest epsilon").fill("16")
    page.locator("#sweep").get_by_label("Step").fill("1")
    go.click()
    expect(curves.locator(".t-line-0 circle")).not_to_have_count(3)  # those of the first run
    page.locator("#sweep .t-stop").click()
    expect(page.locator("#sweep-status")).to_contain_text("Stopped")
    page.wait_for_timeout(1500)
    assert curves.locator(".t-line-0 circle").count() < 17
    expect(page.locator("#sweep .t-stop")).to_be_hidden()


def test_example_fills_the_inputs_and_warns_about_unknown_classes(page: Page):
    note = page.locator("#classes-note")
    expect(note).to_contain_text("deer, dog, frog, horse, ship and truck")
    expect(note.locator(".t-warning")).to_have_count(0)
    before = page.locator("#preview img").get_attribute("src")
    page.get_by_role("button", name="Coffee").click()
    classes = page.locator("#classes textarea")
    expect(classes).to_have_value("cup of coffee, teapot, cat, dog")
    expect(note.locator(".t-warning")).to_contain_text("cup of coffee, teapot.")
    expect(page.locator("#preview img")).not_to_have_attribute("src", before)
    finish(page)
    expect(page.locator("#verdict .t-warning")).to_contain_text("cup of coffee")
    classes.fill("kitten, Puppy, a plane\nsports car")
    expect(note.locator(".t-warning")).to_have_count(0)


def test_stop_ends_the_run_and_keeps_results(page: Page):
    # the browser itself presses Stop as soon as CLIP's answer is there, with TAPT still running
    page.evaluate(
        """() => new MutationObserver((_, watcher) => {
             if (!document.querySelector('#answers .t-table')) return;
             if (!document.querySelector('#status progress')) return;
             watcher.disconnect();
             document.querySelector('#results .t-stop').click();
           }).observe(document.querySelector('#results'), {childList: true, subtree: true})"""
    )
    run(page)
    expect(page.locator("#status")).to_contain_text("Stopped", timeout=4000)
    page.wait_for_timeout(1500)
    expect(page.locator("#status")).to_contain_text("Stopped")
    expect(page.locator("#answers")).to_contain_text("Vanilla CLIP")
    expect(page.locator("#answers").get_by_text("no answer yet").first).to_be_visible()
    expect(page.locator("#results .t-stop")).to_be_hidden()
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


def test_bad_requests_give_one_clear_toast_each(page: Page):
    cases = [
        ("cat", "at least two class names"),
        (" , \n,", "at least two class names"),
        ("cat, " + "supercalifragilistic " * 9, "supercalifragilistic"),
        ("cat, dog", "Choose a picture first"),
    ]
    for classes, message in cases:
        if "picture" in message:
            page.locator("#in-image").get_by_label("Remove Image").click()
            expect(page.locator("#preview img")).to_have_count(0)
        page.locator("#classes textarea").fill(classes)
        run(page)
        assert message in toast(page)
        expect(page.locator("#status progress")).to_have_count(0)
        page.get_by_test_id("toast-close").click()
        expect(page.get_by_test_id("toast-body")).to_have_count(0)


def test_html_in_class_names_is_shown_as_text(page: Page):
    evil = "<img src=x>"
    page.locator("#classes textarea").fill(f"{evil}, <b>cat</b>")
    choose(page, "True class", "<b>cat</b>")
    finish(page)
    expect(page.locator("#answers")).to_contain_text(evil)
    unfold(page, "All numbers as JSON")
    unfold(page, "Defence")
    page.locator("#pack input").fill("<b>pack</b>")
    page.locator("#pack input").press("Enter")
    assert "<b>pack</b>" in toast(page)
    assert page.locator("img[src=x], #results b, .toast-body b").count() == 0


def test_keyboard_alone_runs_and_always_shows_where_it_is(page: Page):
    page.locator("body").press("Tab")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    for _ in range(80):
        assert page.evaluate(f"document.activeElement === document.body || {outline} !== 'none'")
        if page.evaluate("document.activeElement.id") == "run":
            break
        page.keyboard.press("Tab")
    expect(page.get_by_role("listbox")).to_have_count(0)  # Tab has closed each one behind it
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Finished")


def sweep(page: Page) -> None:
    page.get_by_role("tab", name="Sweep").click()
    page.get_by_label("Largest epsilon").fill("1")
    page.get_by_role("button", name="Run the sweep").click()
    expect(page.locator("#sweep-status")).to_contain_text("Finished")


def unfold_all(page: Page) -> None:
    for name in ("More about the attack", "Defence", "What TAPT did", "All numbers as JSON"):
        unfold(page, name)
    page.get_by_label("Show the five most probable answers").check()


@pytest.mark.parametrize(
    "page", [{"color_scheme": "light"}, {"color_scheme": "dark", **PHONE}], indirect=True
)
def test_nothing_for_axe_to_complain_about(page: Page):
    for state in (
        lambda: None,
        lambda: finish(page),
        lambda: unfold_all(page),
        lambda: sweep(page),
    ):
        state()
        page.wait_for_timeout(500)  # colours fade
        found = Axe().run(page, options=WCAG)
        assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_phone_never_scrolls_sideways(page: Page):
    too_wide = "document.documentElement.scrollWidth > window.innerWidth"
    assert not page.evaluate(too_wide)
    page.locator("#classes textarea").fill("cat, " + "a" * 30)
    finish(page)
    assert not page.evaluate(too_wide)
    expect(page.locator("#slider img").first).to_be_visible()
    for state in (unfold_all, sweep):
        state(page)
        page.wait_for_timeout(500)
        assert not page.evaluate(too_wide)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "nothing-of-the-kind"], "unknown"),
        (["--pack", "no-such-pack"], "There is no pack"),
        (["--pack", "no/such/pack"], "no/such is not in the local cache, and offline mode is on"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--port", "seven"], "whole number from 1 to 65535"),
        (["--mcp"], 'pip install "gradio[mcp]"'),
    ],
)
def test_bad_command_line_is_one_sentence(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    # with or without the extra
    monkeypatch.setattr(serve, "find_spec", lambda name: name != "mcp" or None)
    with pytest.raises(SystemExit) as end:
        serve.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_busy_port_is_one_sentence(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        serve.main(["--port", server.rsplit(":", 1)[1]])
    assert end.value.code == 2
    assert "the port is taken" in capsys.readouterr().err
