"""Layout and wiring of the page."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import gradio as gr

from tapt.images import open_image
from tapt.ui import render
from tapt.ui.handlers import Handlers
from tapt.ui.inputs import MAX_BYTES, MAX_EPSILON, PGD_STEPS, PictureInput
from tapt.ui.known import KINDS
from tapt.ui.service import Service

FOLDER = Path(__file__).parent
EXAMPLES = FOLDER / "examples"
TEN_KINDS = ", ".join(KINDS)
# name, picture, class names
EXAMPLE_ROWS = [
    ("Cat", "cat.png", TEN_KINDS),
    ("Plane", "tuxpaint-gpl2/airplane.png", TEN_KINDS),
    ("Horse", "tuxpaint-gpl2/horse.png", TEN_KINDS),
    ("Frog", "tuxpaint-gpl2/frog.png", TEN_KINDS),
    ("Truck", "tuxpaint-gpl2/fire-truck.png", "fire truck, sports car, airplane, ship"),
    ("Coffee", "coffee.png", "cup of coffee, teapot, cat, dog"),
]
DEFAULT_EPSILON = 4
QUIET = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
API_DESCRIPTION = f"""Compares vanilla CLIP and TAPT on one picture, attacked or not.
image: the picture. class_names: one per line or separated by commas, two at least.
attack: whether to attack the picture by PGD. epsilon: L-inf radius in 1/255, a whole number from
0 (no attack) to {MAX_EPSILON}. threat: the attacked model, `clip` (vanilla CLIP) or `static` (the
static prompts). true_class: one of the class names, or empty for vanilla CLIP's own clean answer.
The last of the returned values is a JSON object with all numbers; the first four are what the page
shows: status, verdict, tables and perturbation as HTML, and the original and the attacked 8-bit
image as PNG files."""
THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(  # the defaults of these stay under the contrast that WCAG AA asks for
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_700",
)


def launch_options() -> dict:
    """Options of `launch()` that belong to the page and not to the address it is served on."""
    return {
        "theme": THEME,
        "css": (FOLDER / "style.css").read_text(encoding="utf-8"),
        "run_history": False,
        "footer_links": ["api"],
        "max_file_size": MAX_BYTES,
        "share": False,
        "mcp_server": False,
        "ssr_mode": False,
        "_frontend": False,  # without the check of itself, which fails on a busy computer
    }


def build_page(service: Service) -> gr.Blocks:
    """The whole page for a loaded model, with its queue."""
    # uploads live a day: a short age would delete a queued picture before its turn
    with gr.Blocks(title="TAPT", delete_cache=(3600, 86400), analytics_enabled=False) as page:
        gr.HTML(
            render.header(_service_line(service), trained=service.pack.trained),
            apply_default_css=False,
        )
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=2, min_width=300, elem_id="inputs"):
                picture, preview = _picture_inputs()
                examples = gr.Column(elem_id="examples")
                classes, note = _class_inputs(service)
                attack, epsilon, threat, true_class = _attack_inputs(service)
            with gr.Column(scale=3, min_width=300, elem_id="results"):
                with gr.Row(elem_id="actions"):
                    run = gr.Button("Run", variant="primary", elem_id="run", scale=2)
                    stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
                outputs = _outputs()
        handlers = Handlers(service, picture.GRADIO_CACHE)
        _wire_inputs(handlers, picture, preview, classes, note)
        inputs = [picture, classes, attack, epsilon, threat, true_class]
        _wire_run(handlers, run, stop, inputs, outputs)
        with examples:
            _examples([picture, classes, attack, epsilon, true_class])
        note.value = handlers.classes_note(TEN_KINDS)
        # not the component's value, which would become the API's default for `image`
        first = EXAMPLES / EXAMPLE_ROWS[0][1]
        page.load(lambda: open_image(first), None, picture, **QUIET)
    return page.queue(max_size=16)


def _service_line(service: Service) -> str:
    size = service.size
    model = "tiny, the embedded CLIP" if service.embedded else service.backbone_name
    return f"Model: {model} ({size} × {size} pixels). Prompts: {service.pack_name}."


def _picture_inputs() -> tuple[PictureInput, gr.HTML]:
    with gr.Row(elem_id="picture-row"):
        picture = PictureInput(
            label="Picture",
            sources=["upload", "clipboard"],
            format="png",
            height=220,
            buttons=[],
            alt_text="The picture to classify",
            elem_id="in-image",
            min_width=180,
            scale=3,
        )
        with gr.Column(min_width=120, scale=2):
            preview = gr.HTML(
                label="What the model sees", apply_default_css=False, elem_id="preview"
            )
    return picture, preview


def _class_inputs(service: Service) -> tuple[gr.Textbox, gr.HTML]:
    classes = gr.Textbox(
        TEN_KINDS,
        label="Class names",
        info="What CLIP may answer: one per line, or separated by commas.",
        lines=3,
        max_lines=8,
        elem_id="classes",
    )
    note = gr.HTML(apply_default_css=False, elem_id="classes-note", visible=service.embedded)
    return classes, note


def _attack_inputs(service: Service) -> tuple[gr.Checkbox, gr.Slider, gr.Radio, gr.Textbox]:
    with gr.Group():
        attack = gr.Checkbox(
            True,
            label="Attack the picture",
            info=f"PGD, {PGD_STEPS} steps, within epsilon of every pixel (L∞).",
            elem_id="attack",
        )
        epsilon = gr.Slider(
            0,
            MAX_EPSILON,
            value=DEFAULT_EPSILON,
            step=1,
            label="Epsilon",
            info="In steps of 1/255; 0 is no attack.",
            elem_id="epsilon",
        )
        untrained = "" if service.pack.trained else f" ({render.UNTRAINED})"
        threat = gr.Radio(
            [("vanilla CLIP", "clip"), (f"static prompts{untrained}", "static")],
            value="clip",
            label="The attack sees",
            elem_id="threat",
        )
    true_class = gr.Textbox(
        "",
        label="True class (optional)",
        info="One of the names above. Empty: vanilla CLIP's own answer to the original.",
        max_lines=1,
        elem_id="true-class",
    )
    return attack, epsilon, threat, true_class


def _outputs() -> list[gr.components.Component]:
    """Status, verdict, table, pictures, perturbation, JSON; empty ones are hidden by the CSS."""
    status = gr.HTML(label="Status", apply_default_css=False, elem_id="status")
    verdict = gr.HTML(
        label="Verdict",
        html_template='<div role="status" aria-live="polite">${value}</div>',
        apply_default_css=False,
        elem_id="verdict",
    )
    gr.HTML(render.welcome(), apply_default_css=False, elem_id="welcome")
    with gr.Row(elem_id="pictures"):
        slider = gr.ImageSlider(
            label="Original (left) and attacked (right)",
            format="png",
            interactive=False,
            buttons=[],
            elem_id="slider",
            scale=1,
            min_width=240,
        )
        with gr.Column(scale=1, min_width=240):
            perturbation = gr.HTML(
                label="Perturbation", apply_default_css=False, elem_id="perturbation"
            )
    table = gr.HTML(label="Answers", apply_default_css=False, elem_id="answers")
    with gr.Accordion("All numbers as JSON", open=False, elem_id="json"):
        numbers = gr.JSON(label="Result", show_label=False, buttons=["copy"])
    return [status, verdict, table, slider, perturbation, numbers]


def _wire_inputs(
    handlers: Handlers,
    picture: PictureInput,
    preview: gr.HTML,
    classes: gr.Textbox,
    note: gr.HTML,
) -> None:
    # queued, since the browser shows no error of a call that is not
    shown = picture.change(
        handlers.preview,
        picture,
        preview,
        trigger_mode="always_last",
        concurrency_limit=4,
        show_progress="hidden",
        api_visibility="private",
    )
    shown.failure(None, None, preview, js="() => ''", **QUIET)
    classes.change(handlers.classes_note, classes, note, trigger_mode="always_last", **QUIET)


def _wire_run(handlers: Handlers, run, stop, inputs: list, outputs: list) -> None:
    status = outputs[0]
    waiting, stopped = (json.dumps(html) for html in (render.waiting(), render.stopped()))
    private = {"api_visibility": "private"}
    start = f"() => {{ window.taptStopped = false; return {waiting} }}"
    run.click(None, None, status, js=start, **private)
    event = run.click(
        handlers.compare,
        inputs,
        outputs,
        # raw values: handlers.compare checks each one and says what is wrong with it
        preprocess=False,
        show_progress="minimal",
        show_progress_on=[status],
        api_name="compare",
        api_description=API_DESCRIPTION,
        concurrency_limit=1,
        concurrency_id="model",
        trigger_mode="once",
    )
    # a last value may arrive after Stop, and a stopped run then counts as failed
    end = f"() => window.taptStopped ? {stopped} : ''"
    event.failure(None, None, status, js=end, **private)
    halt = f"() => {{ window.taptStopped = true; return {stopped} }}"
    stop.click(None, None, status, js=halt, cancels=[event], **private)


def _examples(outputs: list) -> None:
    """Buttons with a picture and a name; `gr.Examples` gives its thumbnails no name to read out."""
    gr.HTML('<p class="t-label">Examples</p>', apply_default_css=False)
    with gr.Row(elem_id="example-buttons"):
        for name, file, classes in EXAMPLE_ROWS:
            path = EXAMPLES / file
            button = gr.Button(name, icon=path, size="sm", min_width=40)
            button.click(partial(_example, path, classes), None, outputs, **QUIET)


def _example(path: Path, classes: str) -> tuple:
    return open_image(path), classes, True, DEFAULT_EPSILON, ""
