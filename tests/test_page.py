"""The page in a real browser; nothing here depends on how good the model is."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT, TIMEOUT
from example_defense import Flips
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tapt.defenses import Prediction
from tapt.ui import known, links, pictures, render, results, serve
from tapt.ui.page import ANSWER

TITLES = ["Vanilla CLIP", "Static prompts", "Untuned view ensemble", "TAPT", "TAPT + ensemble"]
TITLES += ["R-TPT", "TTC"]
STATES = ("✓ held", "✗ fooled", "○ wrong before", "↑ recovered")
ROWS = ".t-table > tbody > tr:not(.t-more)"
PHONE = {"viewport": {"width": 390, "height": 844}}
WCAG = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "resultTypes": ["violations"]}
HORSE = known.EXAMPLES[0].path
QUICK = {"class_names": "cat, dog, horse", "attack": "pgd", "steps": 1, "true_class": "horse"}
QUICK |= {"defenses": ["clip", "static"]}
NUMBERS = itertools.count(1)
expect.set_options(timeout=TIMEOUT)


def run(page: Page) -> None:
    page.get_by_role("button", name="Attack this picture").click()


def finish(page: Page) -> None:
    expect(page.locator("#stop")).to_be_hidden()
    page.evaluate("document.querySelector('#sentence p').textContent = ''")
    run(page)
    expect(page.locator("#sentence")).to_contain_text("Done in")
    expect(page.locator("#rows tbody tr").filter(has_text=results.WAITING)).to_have_count(0)


def fill(page: Page, picture: Path = HORSE, **values: object) -> None:
    """Brings in a request by a link, in the tab that is open."""
    mark = f"name {next(NUMBERS)}"  # by which it is seen to have arrived
    asked = {**QUICK, **values}
    asked["class_names"] = f"{asked['class_names']}, {mark}"
    with Image.open(picture) as image:
        link = links.to_link(asked, image.convert("RGB"))
    page.evaluate("link => location.hash = 'x=' + link", link)
    expect(page.locator("#chips")).to_contain_text(mark)
    page.evaluate("location.hash = ''")


def unfold(page: Page, name: str) -> None:
    page.locator(f"#{name} button").first.click()


def choose(page: Page, field: str, option: str) -> None:
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def upload(page: Page, data: bytes, name: str = "picture.png") -> None:
    page.locator("#in-image").get_by_label("Remove Image").click()
    file = {"name": name, "mimeType": "image/png", "buffer": data}
    page.locator("#in-image input[type=file]").set_input_files(file)


def png(color: str = "red", size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def message(page: Page) -> str:
    expect(page.get_by_test_id("toast-body")).to_have_count(1)
    text = page.get_by_test_id("toast-body").inner_text()
    page.get_by_test_id("toast-close").click()
    expect(page.get_by_test_id("toast-body")).to_have_count(0)
    return text


def rows(page: Page) -> list[str]:
    return page.locator(ROWS).all_inner_texts()


def saved(page: Page, name: str) -> bytes:
    with page.expect_download() as started:
        page.get_by_role("link", name=name).click()
    return started.value.path().read_bytes()


def test_the_whole_answer_is_on_the_first_screen(page: Page):
    expect(page.locator("#plan")).to_contain_text("PGD, 4/255, on Vanilla CLIP")
    finish(page)
    shown = page.locator(ROWS)
    names = [name.strip(" ◎") for name in shown.locator("summary").all_inner_texts()]
    assert names == TITLES
    expect(page.locator("#rows .t-mark")).to_have_count(7)
    for row in rows(page):
        assert any(state in row for state in STATES)
        assert re.search(r"\d\s%.*\d\s%.*\d\s%.*\d\.\d\d s", row, re.DOTALL)
    bottom = shown.last.bounding_box()
    assert bottom
    assert bottom["y"] + bottom["height"] <= 800
    sentence = page.locator("#sentence").inner_text()
    assert re.match(r"Vanilla CLIP, attacked directly: \w.* In all \d", sentence)
    expect(page.locator("#rows")).to_contain_text("epsilon 4/255; measured L∞ ")
    expect(page.locator("#plan")).to_contain_text(re.compile(r"about [\d.]+ s"))
    assert page.locator("#rows caption").count() == 1
    page.get_by_role("tab", name="Pictures").click()
    shown = [image.get_attribute("alt") for image in page.locator("#pictures img").all()]
    assert re.match("original picture: Vanilla CLIP says horse", shown[0])
    assert re.match(r"attacked picture: Vanilla CLIP (now|still) says \w", shown[1])
    assert "largest change" in shown[-1]
    line = page.get_by_role("slider", name="Line between both")
    line.press("End")
    assert line.evaluate("line => line.parentNode.style.getPropertyValue('--at')") == "100%"


def test_nothing_is_right_that_nobody_called_right(page: Page):
    """Fault 1: a wrong answer was certified right."""
    page.get_by_role("button", name="Rocket").click()
    expect(page.locator("#true-class input")).to_have_value("rocket")
    expect(page.locator("#chips .t-odd")).to_have_count(4)
    fill(page, known.EXAMPLES[-1].path, class_names="cat, dog", true_class="", steps=0)
    finish(page)
    assert all(re.search("kept|changed", row) for row in rows(page))
    assert page.locator("#rows .t-good, #rows .t-bad, #rows .t-true").count() == 0
    expect(page.locator("#rows caption")).to_contain_text("Nobody said what it is")
    fill(page, true_class="dog", attack="none")
    finish(page)
    assert all(re.search("✓ right|✗ wrong", row) for row in rows(page))
    expect(page.locator("#sentence")).to_contain_text("The true class is dog.")
    page.get_by_role("tab", name="Pictures").click()
    expect(page.locator("#pictures img")).to_have_count(1)


def test_an_attack_says_what_it_sees_and_what_it_costs(page: Page):
    """Faults 2 and 5: Square was called white-box; an estimate was computed in the queue."""
    finish(page)
    unfold(page, "plan")
    choose(page, "attack", "Square")
    expect(page.locator("#attack-note")).to_contain_text("Black-box")
    choose(page, "attack", "CW")
    expect(page.locator("#epsilon")).to_be_hidden()
    expect(page.locator("#step-size")).to_be_hidden()
    choose(page, "attack", "PGD")
    page.get_by_role("button", name="Attack TAPT", exact=True).click()
    expect(page.locator("#attacked-model input")).to_have_value("TAPT, deployed")
    plan = re.compile(r"on TAPT as deployed, about \d+ (s|minutes)")
    expect(page.locator("#plan")).to_contain_text(plan)
    expect(page.locator("#attack-note")).to_contain_text("Adaptive")
    fill(page, defenses=["clip", "tapt"], attacked_model="deployed:tapt", settings={"views": 4})
    finish(page)
    expect(page.locator("#sentence")).to_contain_text("TAPT, attacked directly:")


def test_a_sweep_claims_no_more_than_it_measured(page: Page):
    """Fault 3: a stopped sweep said "right everywhere"."""
    fill(page)
    page.get_by_role("tab", name="Sweep").click()
    page.get_by_label("Largest epsilon").fill("2")
    go, falls = page.locator("#run-sweep"), page.locator("#falls li")
    go.click()
    expect(page.locator("#points")).to_contain_text("Static prompts")
    expect(page.locator("#stop-sweep")).to_be_hidden()
    expect(falls).to_have_count(2)
    assert not any("measured" in text for text in falls.all_inner_texts())
    expect(page.locator("#curves canvas, #curves svg").first).to_be_visible()
    fill(page, steps=300)
    page.get_by_label("Largest epsilon").fill("16")
    go.click()
    expect(falls.first).to_contain_text(re.compile(r"\(\d+ of 17 measured\)"))
    page.locator("#stop-sweep").click()
    page.wait_for_timeout(1000)
    assert re.search(r"(right|wrong|kept).*\(\d+ of 17 measured\)", falls.first.inner_text())


def test_results_of_earlier_inputs_look_so(page: Page):
    """Fault 4: old results stood beside new inputs, and beside a refusal."""
    stale = page.locator("#stale")
    fill(page)
    finish(page)
    before = rows(page)
    expect(stale).not_to_contain_text(render.EARLIER)
    unfold(page, "names")
    names = page.locator("#class-names textarea").input_value()
    page.locator("#class-names textarea").fill("cat")
    expect(stale).to_contain_text(render.EARLIER)
    run(page)
    expect(page.locator("#class-names")).to_contain_text("at least two class names")
    wrong = page.locator("#class-names textarea")
    expect(wrong).to_have_attribute("aria-invalid", "true")
    expect(wrong).to_be_focused()
    assert rows(page) == before
    wrong.fill(names)
    expect(stale).not_to_contain_text(render.EARLIER)
    fill(page)
    finish(page)
    expect(wrong).not_to_have_attribute("aria-invalid", "true")


def test_whoever_waits_is_told_why(page: Page, browser: Browser, server: str):
    """Fault 6: waiting was nearly invisible, with a promise that was wrong."""
    other = browser.new_page()
    other.goto(server)
    other.locator("#chips li").first.wait_for()
    fill(other, steps=1500)
    fill(page)
    run(other)
    expect(other.locator("#status")).to_contain_text("Attacking")
    run(page)
    expect(page.locator("#status")).to_contain_text("Waiting for 1 run")
    other.locator("#stop").click()
    expect(page.locator("#sentence")).to_contain_text("Done in")
    other.close()


def test_class_names_are_shown_as_they_were_understood(page: Page):
    """Faults 7, 8 and 12: one class twice, quotes and semicolons ignored, a frozen browser."""
    unfold(page, "names")
    text, chips = page.locator("#class-names textarea"), page.locator("#chips li")
    text.fill('Cat, cat; "dog, the hot one", sports  car, SportsCar, rocket')
    names = ["dog, the hot one never seen", "rocket never seen", "Cat", "sports car"]
    expect(chips).to_have_text(names)
    expect(page.locator("#names")).to_contain_text("4 names, 2 never seen")
    chips.get_by_role("button", name="Cat").click()
    expect(text).to_have_value('"dog, the hot one", sports car, SportsCar, rocket')
    expect(chips.last.get_by_role("button")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Delete")
    expect(text).to_have_value('"dog, the hot one", sports car, SportsCar')
    text.fill("kitten, Puppy, a plane\nsports cars")
    expect(page.locator("#chips .t-odd")).to_have_count(0)
    choose(page, "preset", "OxfordIIITPet")
    expect(page.locator("#names")).to_contain_text("37 names")
    page.get_by_role("button", name="Frog").click()
    expect(page.locator("#preset input")).to_have_value("")
    text.fill(", ".join(f"thing {i}" for i in range(1500)))
    expect(page.locator("#names")).to_contain_text("1,500 names")
    assert chips.count() <= 60
    page.locator("#true-class input").click()
    assert page.get_by_role("option").count() <= 101
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body")
    run(page)
    expect(page.locator("#class-names")).to_contain_text("at most 1,000 class names; got 1,500")


def test_a_refused_picture_leaves_the_former_one(page: Page):
    """Fault 9: a broken image, beside old results."""
    picture = page.locator("#in-image img")
    for data in (b"only text", b"", png(size=(200, 200))[:80]):
        upload(page, data)
        assert "not a readable picture" in message(page)
        expect(picture).to_be_visible()
        page.wait_for_function("document.querySelector('#in-image img')?.naturalWidth > 100")
    large = io.BytesIO()
    Image.new("RGB", (8200, 6100)).save(large, "JPEG", quality=5)  # a phone's 50 megapixels
    former = picture.get_attribute("src")
    upload(page, large.getvalue(), "large.jpg")
    expect(picture).not_to_have_attribute("src", former)
    fill(page)
    finish(page)


@pytest.mark.parametrize(
    "page", [{"permissions": ["clipboard-read", "clipboard-write"]}], indirect=True
)
def test_a_picture_may_be_pasted_or_come_from_the_camera(page: Page):
    picture, remove = page.locator("#in-image img"), page.get_by_label("Remove Image")
    remove.click()
    page.evaluate(
        """async data => {
             const picture = await (await fetch('data:image/png;base64,' + data)).blob();
             await navigator.clipboard.write([new ClipboardItem({'image/png': picture})]);
           }""",
        base64.b64encode(png()).decode(),
    )
    page.get_by_label("Paste from clipboard").click()
    pasted = picture.get_attribute("src")
    remove.click()
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    # before the camera has sent a picture, the button takes none
    page.wait_for_function("[...document.querySelectorAll('video')].some(v => v.videoWidth > 0)")
    page.get_by_label("capture photo").click()
    assert picture.get_attribute("src") != pasted


def test_a_model_that_is_not_there_leaves_the_former_one(page: Page):
    """Fault 10: three messages, and the field stayed on the model that is not there."""
    unfold(page, "settings")
    choose(page, "backbone", "ViT-B-16")
    assert "not in the local cache" in message(page)
    expect(page.locator("#backbone input")).to_have_value("small")
    page.locator("#pack input").fill("<b>pack</b>")
    page.locator("#pack input").press("Enter")
    assert "<b>pack</b>" in message(page)
    expect(page.locator("#pack input")).to_have_value("small/vli")
    choose(page, "pack", "untrained prompts")
    expect(page.locator("#model-line .t-badge")).to_have_text("untrained prompts")
    fill(page, pack="untrained prompts")
    finish(page)
    expect(page.locator("#rows")).to_contain_text("Static prompts, untrained prompts")
    tab(page, "Evidence")
    expect(page.locator("#condition")).to_be_visible()
    expect(page.locator("#chart")).to_be_hidden()


@pytest.mark.parametrize(
    "page", [{"permissions": ["clipboard-read", "clipboard-write"]}], indirect=True
)
def test_take_away(page: Page, server: str, tmp_path: Path):
    """Fault 11 among others: copying gave no sign, and a link in an open tab did nothing."""
    settings = {"ensemble.views": 8, "ensemble.keep": 0.5}
    names = 'kitten, "dog" & <cat>, "ship, large"'
    answer = {"attacked_model": "static", "defenses": ["clip", "ensemble"], "settings": settings}
    fill(page, class_names=names, true_class="", **answer)
    finish(page)
    numbers = json.loads(saved(page, "All numbers"))
    assert numbers["settings"]["test_time"]["ensemble"] == {"views": 8, "keep": 0.5}
    (tmp_path / "attacked.png").write_bytes(saved(page, "Attacked picture"))
    with Image.open(tmp_path / "attacked.png") as attacked:
        assert (attacked.format, attacked.size, attacked.mode) == ("PNG", (64, 64), "RGB")
    table = list(csv.DictReader(io.StringIO(saved(page, "The rows").decode())))
    assert [row["defence"] for row in table] == ["clip", "clip", "ensemble", "ensemble"]
    link = page.get_by_role("link", name="Link to these inputs")
    link.click()
    expect(page.locator("#take")).to_contain_text("copied")
    unfold(page, "names")
    names = page.locator("#class-names textarea").input_value()
    page.get_by_role("button", name="Frog").click()
    expect(page.locator("#class-names textarea")).not_to_have_value(names)
    page.evaluate("location.hash = ''")
    link.click()
    expect(page.locator("#class-names textarea")).to_have_value(names)

    page.get_by_role("tab", name="Pictures").click()
    seen = (
        page.locator("#pictures figure")
        .nth(1)
        .locator("img")
        .get_attribute("src")
        .partition(",")[2]
    )
    (tmp_path / "seen.png").write_bytes(base64.b64decode(seen))
    page.get_by_role("tab", name="Take away").click()
    command = shlex.split(page.locator("#take pre").inner_text())
    command[:1] = [sys.executable, "-m", "tapt"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    printed = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    assert json.loads(printed.stdout)["results"] == numbers["results"]
    assert page.locator("#rows cat").count() == 0


def test_damaged_link_changes_nothing_but_says_so(page: Page):
    page.evaluate("location.hash = 'x=eJyrVkrOzy0oSi0uTk3xzSxRslJQS'")
    assert "damaged or cut off" in message(page)
    expect(page.locator("#in-image img")).to_be_visible()


def test_how_each_row_decided(page: Page):
    """Fault 12: the loss could not be recomputed from what was shown."""
    fill(
        page,
        defenses=["tapt", "ttc"],
        settings={"tapt.views": 20, "tapt.alpha": 0.25, "ttc.tau_threshold": 0.3},
    )
    finish(page)
    opened = page.locator("#rows .t-more")
    for summary in page.locator("#rows summary").all():
        summary.click()
    tapt, ttc = opened.nth(0), opened.nth(1)
    assert len(re.findall("%", tapt.locator("p").first.inner_text())) == 4
    part = tapt.locator("section").first
    assert part.locator(".t-views li").count() == 16
    entropies = [
        float(re.search(r"entropies ([\d.]+)", text)[1])
        for text in part.locator(".t-views li").all_inner_texts()
    ]
    kept = part.locator(".t-kept").count()
    assert kept == 2
    assert max(entropies[:kept]) <= min(entropies[kept:])
    losses = {
        row.locator("th").inner_text(): float(row.locator("td").first.inner_text())
        for row in part.locator(".t-plain tbody tr").all()[:4]
    }
    formula = re.search(r"total = (.*);", part.inner_text())[1].replace("×", "*")
    assert eval(formula, {}, losses) == pytest.approx(losses["total"], rel=1e-3)
    assert part.locator(".t-views img").count() == 16
    assert "threshold 0.3" in ttc.inner_text()
    assert "perturbation" in ttc.locator("img").first.get_attribute("alt")


def test_settings_of_every_kind_have_fields_and_no_step_is_called_none(page: Page):
    """Fault 12: 0 steps still spoke of tuning."""
    fill(page, defenses=["tapt", "dbd"], settings={"tapt.steps": 0, "tapt.views": 4})
    unfold(page, "settings")
    page.get_by_role("button", name="TAPT: settings").click()
    betas = page.get_by_label("betas").first
    betas.fill("0.5, 2")
    run(page)
    expect(page.locator("#settings")).to_contain_text("betas must be two numbers from 0 to below 1")
    betas.fill("0.5, 0.9")
    page.get_by_label("align to").first.fill("1")
    finish(page)
    used = json.loads(saved(page, "All numbers"))["settings"]["test_time"]["tapt"]
    assert (used["betas"], used["align_to"]) == ([0.5, 0.9], 1)
    assert "--set tapt.betas=0.5, 0.9" in page.locator("#take pre").inner_text().replace("'", "")
    tapt, dbd = page.locator("#rows .t-more").all()
    assert "no step was taken" in tapt.text_content()
    assert dbd.locator(".t-views img").count() == 32


def test_recorded_evidence_is_one_table_and_one_chart(page: Page):
    unfold(page, "settings")
    choose(page, "backbone", "tiny")
    expect(page.locator("#pack input")).to_have_value("tiny/vli")
    page.get_by_role("tab", name="Evidence").click()
    table = page.locator("#recorded")
    expect(table).to_contain_text("thin: n < 200")
    expect(table).to_contain_text("attacked 95 %")
    expect(page.locator("#chart img")).to_be_visible()
    before = page.locator("#chart img").get_attribute("src")
    page.locator("#condition input").click()
    page.get_by_role("option").last.click()
    expect(page.locator("#chart img")).not_to_have_attribute("src", before)


def test_stop_ends_the_run_and_keeps_what_is_there(page: Page):
    fill(page, defenses=["clip", "tapt"], settings={"views": 256, "steps": 20})
    run(page)
    expect(page.locator("#rows tbody tr").first).to_contain_text("%")
    page.locator("#stop").click()
    expect(page.locator("#sentence")).to_contain_text("Stopped.")
    expect(page.locator("#stop")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "run"
    page.wait_for_timeout(1500)
    expect(page.locator("#sentence")).to_contain_text("Stopped.")
    assert "%" in rows(page)[0]
    assert "not run" in rows(page)[1]
    fill(page)
    finish(page)


def test_html_in_class_names_is_shown_as_text(page: Page):
    evil = "<img src=x>"
    fill(page, class_names=f"{evil}, <b>cat</b>", true_class="<b>cat</b>")
    finish(page)
    expect(page.locator("#rows")).to_contain_text("<b>cat</b>")
    expect(page.locator("#chips")).to_contain_text(evil)
    assert page.locator("img[src=x], #right b, #chips b").count() == 0


def test_keyboard_alone_from_load_to_result(page: Page):
    for presses in range(1, 13):
        page.keyboard.press("Tab" if presses != 2 else "Enter")  # the first is the skip link
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        if presses != 2:
            assert page.evaluate(f"{outline} !== 'none'")
        if page.evaluate("document.activeElement.id") == "run":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#sentence [role=status]")).to_contain_text("Done in")


def everything(page: Page) -> None:
    for name in ("names", "settings", "plan"):
        unfold(page, name)
    for summary in page.locator("#rows summary").all():
        summary.click()


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


@pytest.mark.parametrize(
    "page", [{"color_scheme": "light"}, {"color_scheme": "dark", **PHONE}], indirect=True
)
def test_nothing_for_axe_to_complain_about(page: Page):
    states = [lambda: None, lambda: (fill(page), finish(page)), lambda: everything(page)]
    for state in [*states, lambda: tab(page, "Pictures"), lambda: tab(page, "Evidence")]:
        state()
        page.wait_for_timeout(500)  # colours fade
        found = Axe().run(page, options=WCAG)
        assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_phone_has_the_button_at_hand_and_never_scrolls_sideways(page: Page):
    too_wide = "document.documentElement.scrollWidth > window.innerWidth"
    button = page.locator("#run").bounding_box()
    assert button
    assert 700 < button["y"] < 844
    fill(page, class_names="horse, " + "a" * 30, defenses=["clip"])
    finish(page)
    assert not page.evaluate(too_wide)
    fill(page, defenses=[*ANSWER], settings={"views": 4})
    finish(page)
    assert not page.evaluate(too_wide)
    last = page.locator(ROWS).last.bounding_box()
    assert last
    assert last["y"] + last["height"] <= 1.5 * 844
    small = "[...document.querySelectorAll('#rows button, #run, #examples button')]"
    assert page.evaluate(f"{small}.every(b => b.getBoundingClientRect().height >= 40)")
    for state in (lambda: everything(page), lambda: tab(page, "Evidence")):
        state()
        page.wait_for_timeout(500)
        assert not page.evaluate(too_wide)


def test_a_defence_of_somebody_else_has_its_fields_its_row_and_its_trace(flips, monkeypatch):
    def predict(self: Flips, batch, **options) -> Prediction:
        logits = self.logits(batch)
        trace = {"coins_thrown": logits.new_full((len(logits),), self.settings.flips)}
        return Prediction(logits.softmax(-1), trace)

    monkeypatch.setattr(Flips, "predict", predict)
    monkeypatch.setattr("tapt.ui.page.ANSWER", ("clip", "flips"))
    page = serve.build(serve.parse_args(["--device", "cpu"]))
    fn = next(fn for fn in page.fns.values() if fn.name == "compare" and fn.inputs_as_dict)
    values = {block: block.value for block in fn.inputs}
    labels = {block.label: block for block in fn.inputs}
    assert labels["flips"].info == "how often a coin is thrown"
    values[labels["flips"]] = 7
    values[labels["Picture"]] = {"url": pictures.picture_url(Image.open(HORSE))}
    updates = [each for update in fn.fn(values) for each in update.items()]
    *_, shown = [value for block, value in updates if block.elem_id == "rows"]
    assert "Median over flips" in shown
    assert '<th scope="row">coins thrown</th><td>7</td>' in shown


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
