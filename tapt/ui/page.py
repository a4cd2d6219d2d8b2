"""Layout and wiring of the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from tapt.core.attacks import METHODS
from tapt.core.settings import limits
from tapt.data.pictures import open_image
from tapt.defenses import all_defenses, find_defenses
from tapt.model import ATTACKED_MODELS
from tapt.ui import known, render
from tapt.ui.handlers import MODEL_FIELDS, Handlers
from tapt.ui.inputs import (
    FIELDS,
    MAX_BYTES,
    SWEEP_FIELDS,
    TEST_TIME,
    Fields,
    PictureInput,
    number,
    refusal,
)
from tapt.ui.service import Service

FOLDER = Path(__file__).parent
MAX_WAITING = 32
MAX_SESSIONS = 50  # of which gradio keeps the last results; each call of the API is one
DEFAULT_ATTACK = "pgd"
QUIET = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
UNFIT = (
    "This request does not fit: send every parameter in the order of /gradio_api/info, and "
    "pictures as uploaded files or data: URLs."
)
MOST = Fields.model_fields["epsilon"]
API_INPUTS = f"""
image: the picture. class_names: one per line or separated by commas, two at least.
attack: {", ".join(("none", *METHODS))}. epsilon: L-inf radius in 1/255, a whole number from 0 (no
attack) to {limits(MOST)[1]}. attacked_model: what the attack sees, {", ".join(ATTACKED_MODELS)}
(the deployed TAPT). true_class: one of the class names, or empty where it is not known. steps: of
the attack, 0 for its own number. step_size: in 1/255, 0 for automatic. target: a class name to move
towards, or empty. seed: of views and attack. defenses: a list of
{", ".join(row.name for row in all_defenses())}, or null for those ticked at first.
backbone, pack: names that the page offers.
views, keep, tune_steps, lr, alpha: test-time settings, the pack's own where they are left out."""
COMPARE_API = f"""Compares vanilla CLIP and its defences on one picture, attacked or not.
{API_INPUTS}
The last of the returned values is a JSON object with all numbers; the others are what the page
shows: HTML, and the original and the attacked 8-bit image as PNG files."""
ANALYZE_API = f"""Vanilla CLIP and its defences on one picture, attacked or not: every
probability as one JSON object.
{API_INPUTS}"""
SWEEP_API = f"""Attacks one picture with growing epsilon and returns every defence's probability
of the true class, as a JSON object in the last value; the others are what the page shows.
max_epsilon, epsilon_step: in 1/255; the sweep begins at 0.
{API_INPUTS}"""
# raw values: the handlers check each one and say what is wrong with it
MODEL_QUEUE = {"preprocess": False, "concurrency_limit": 1, "concurrency_id": "model"}
# gradio's dropdown would open its list again when Tab leaves it
TAB_LEAVES = """() => document.addEventListener("keydown", event => {
  if (event.key === "Tab" && event.target.role === "combobox") event.stopPropagation();
}, true)"""
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
    checkbox_border_color="*neutral_500",
    checkbox_border_color_dark="*neutral_400",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_700",
)


class Page(gr.Blocks):
    """Blocks that refuse a request which gradio cannot read in a sentence, with nothing in the
    log."""

    async def preprocess_data(self, *values: Any, **options: Any) -> Any:
        try:
            return await super().preprocess_data(*values, **options)
        except gr.Error:
            raise
        except Exception as error:
            raise refusal(UNFIT) from error


def launch_options() -> dict:
    """Options of `launch()` that belong to the page and not to the address it is served on."""
    return {
        "theme": THEME,
        "css": (FOLDER / "style.css").read_text(encoding="utf-8"),
        "js": TAB_LEAVES,
        "run_history": False,
        "state_session_capacity": MAX_SESSIONS,
        "footer_links": ["api"],
        "max_file_size": MAX_BYTES,
        "share": False,
        "ssr_mode": False,
        "_frontend": False,  # without the check of itself, which fails on a busy computer
    }


def build_page(service: Service) -> gr.Blocks:
    """The whole page for a service, with its queue."""
    # uploads live a day: a short age would delete a queued picture before its turn
    with Page(title="TAPT", delete_cache=(3600, 86400), analytics_enabled=False) as page:
        gr.HTML(render.header(), apply_default_css=False)
        model_line = gr.HTML(apply_default_css=False, elem_id="model-line")
        fields: dict[str, gr.components.Component] = {}
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=2, min_width=300, elem_id="inputs"):
                preview = _picture_inputs(fields)
                examples = gr.Column(elem_id="examples")
                preset, note = _class_inputs(fields)
                attack_notes = _attack_inputs(fields)
                reset = _defense_inputs(fields, service)
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Compare", elem_id="results"):
                    buttons = _buttons("run", "Run")
                    outputs = _outputs()
                with gr.Tab("Sweep", elem_id="sweep"):
                    _sweep_inputs(fields)
                    sweep_buttons = _buttons("run-sweep", "Run the sweep")
                    sweep_outputs = _sweep_outputs()
        handlers = Handlers(service, fields["image"].GRADIO_CACHE)
        inputs = [fields[name] for name in FIELDS]
        sweep_inputs = [fields[name] for name in SWEEP_FIELDS]
        _wire_run(handlers.compare, buttons, inputs, outputs, COMPARE_API)
        _wire_run(handlers.sweep, sweep_buttons, sweep_inputs, sweep_outputs, SWEEP_API)
        _wire_analyze(handlers, inputs)
        _wire_picture(handlers, fields, preview)
        _wire_classes(handlers, fields, preset, note)
        _wire_attack(handlers, fields, *attack_notes)
        _wire_model(handlers, fields, reset, model_line)
        with examples:
            _examples([fields[name] for name in ("image", "class_names", "attack", "true_class")])
        note.value = handlers.classes(known.TEN_KINDS, "", "", service.first.backbone.name)[0]
        # not the components' values, which would become the API's defaults
        link = gr.Textbox(visible=False)
        page.load(
            handlers.start,
            link,
            [*inputs, model_line],
            js="() => location.hash.slice(1)",
            show_progress="hidden",
            api_visibility="private",
        )
    return page.queue(max_size=MAX_WAITING)


def _buttons(elem_id: str, name: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        run = gr.Button(name, variant="primary", elem_id=elem_id, elem_classes="t-run", scale=2)
        stop = gr.Button("Stop", elem_classes="t-stop", scale=1, min_width=80)
    return run, stop


def _sweep_inputs(fields: dict) -> None:
    gr.HTML(
        '<p class="t-small">Attacks the picture once for every epsilon, with the class names, the '
        "attack and the defence that are set on this page.</p>",
        apply_default_css=False,
    )
    with gr.Row():
        fields["max_epsilon"] = number("max_epsilon")
        fields["epsilon_step"] = number("epsilon_step")


def _sweep_outputs() -> list[gr.components.Component]:
    """The values of `Handlers.sweep`."""
    bare = {"apply_default_css": False}
    status = gr.HTML(label="Status", elem_id="sweep-status", **bare)
    with gr.Row():
        with gr.Column(min_width=320):
            curves = gr.HTML(label="Curves", elem_id="curves", **bare)
        with gr.Column(min_width=320):
            published = gr.HTML(label="Published accuracy", elem_id="published", **bare)
    with gr.Accordion("The sweep as JSON", open=False, elem_id="sweep-json"):
        numbers = gr.JSON(label="Result", show_label=False, buttons=["copy"])
    return [status, curves, published, numbers]


def _picture_inputs(fields: dict) -> gr.HTML:
    with gr.Row(elem_id="picture-row"):
        fields["image"] = PictureInput(
            label="Picture",
            sources=["upload", "clipboard", "webcam"],
            webcam_options=gr.WebcamOptions(mirror=False),
            format="png",
            height=220,
            buttons=[],
            alt_text="The picture to classify",
            elem_id="in-image",
            min_width=180,
            scale=3,
        )
        with gr.Column(min_width=120, scale=2):
            return gr.HTML(label="What the model sees", apply_default_css=False, elem_id="preview")


def _class_inputs(fields: dict) -> tuple[gr.Dropdown, gr.HTML]:
    preset = gr.Dropdown(
        list(known.presets()),
        value=None,
        label="Class names from a data set",
        elem_id="preset",
    )
    fields["class_names"] = gr.Textbox(
        known.TEN_KINDS,
        label="Class names",
        info="What CLIP may answer: one per line, or separated by commas.",
        lines=3,
        max_lines=8,
        elem_id="classes",
    )
    note = gr.HTML(apply_default_css=False, elem_id="classes-note")
    fields["true_class"] = gr.Dropdown(
        [(render.NO_LABEL, ""), *known.KINDS],
        value="",
        label="True class",
        info="What counts as right. Not known: the attack leaves CLIP's own answer.",
        allow_custom_value=True,  # the choices follow the class names
        elem_id="true-class",
    )
    return preset, note


def _attack_inputs(fields: dict) -> tuple[gr.HTML, gr.HTML]:
    with gr.Group():
        fields["attack"] = gr.Dropdown(
            [("none", "none"), *((row.title, name) for name, row in METHODS.items())],
            value=DEFAULT_ATTACK,
            label="Attack",
            elem_id="attack",
        )
        fields["epsilon"] = number("epsilon", gr.Slider, elem_id="epsilon")
        fields["attacked_model"] = gr.Radio(
            [(render.attacked_name(name), name) for name in ATTACKED_MODELS],
            value=ATTACKED_MODELS[0],
            label="The attack sees",
            elem_id="attacked-model",
        )
        note = gr.HTML(
            render.attack_note(METHODS[DEFAULT_ATTACK], ATTACKED_MODELS[0]),
            apply_default_css=False,
            elem_id="attack-note",
        )
        estimate = gr.HTML(apply_default_css=False, elem_id="estimate")
    with gr.Accordion("More about the attack", open=False, elem_id="more-attack"):
        with gr.Row():
            fields["steps"] = number("steps")
            fields["step_size"] = number("step_size")
        fields["target"] = gr.Dropdown(
            [(render.NO_TARGET, ""), *known.KINDS],
            value="",
            label="Target",
            info="A class that the attack moves towards.",
            allow_custom_value=True,
            elem_id="target",
        )
        fields["seed"] = number("seed")
    return note, estimate


def _defense_inputs(fields: dict, service: Service) -> gr.Button:
    with gr.Accordion("Defence", open=False, elem_id="defense"):
        fields["backbone"] = gr.Dropdown(
            list(service.backbones),
            value=service.first.backbone.name,
            label="Backbone",
            allow_custom_value=not service.on_space,
            elem_id="backbone",
        )
        fields["pack"] = gr.Dropdown(
            service.packs(service.first.backbone.name),
            value=None,
            label="Prompts",
            info=render.PACK_INFO,
            allow_custom_value=True,
            elem_id="pack",
        )
        fields["defenses"] = gr.CheckboxGroup(
            [(row.title, row.name) for row in all_defenses()],
            value=[row.name for row in find_defenses()],
            label=Fields.model_fields["defenses"].title,
            info="Who answers; each one ticked costs its time on both pictures.",
            elem_id="defenses",
        )
        with gr.Row():
            for name in TEST_TIME:
                fields[name] = number(name)
        return gr.Button("Back to the pack's own settings", size="sm", elem_id="reset")


def _outputs() -> list[gr.components.Component]:
    """The values of `Handlers.compare`; empty ones are hidden by the stylesheet."""
    bare = {"apply_default_css": False}
    status = gr.HTML(label="Status", elem_id="status", **bare)
    verdict = gr.HTML(
        label="Verdict",
        html_template='<div role="status" aria-live="polite">${value}</div>',
        elem_id="verdict",
        **bare,
    )
    gr.HTML(render.welcome(), elem_id="welcome", **bare)
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
            perturbation = gr.HTML(label="Perturbation", elem_id="perturbation", **bare)
    gr.Checkbox(False, label="Show the five most probable answers", elem_id="top5")
    answers = gr.HTML(label="Answers", elem_id="answers", **bare)
    with gr.Accordion("What TAPT did", open=False, elem_id="did"):
        did = gr.HTML(label="What TAPT did", **bare)
    downloads = gr.HTML(label="Take away", elem_id="downloads", **bare)
    with gr.Accordion("All numbers as JSON", open=False, elem_id="json"):
        numbers = gr.JSON(label="Result", show_label=False, buttons=["copy"])
    return [status, verdict, answers, slider, perturbation, did, downloads, numbers]


def _wire_picture(handlers: Handlers, fields: dict, preview: gr.HTML) -> None:
    # queued, since the browser shows no error of a call that is not
    shown = gr.on(
        [fields["image"].change, fields["backbone"].change],
        handlers.preview,
        [fields["image"], fields["backbone"]],
        preview,
        trigger_mode="always_last",
        concurrency_limit=4,
        show_progress="hidden",
        api_visibility="private",
    )
    shown.failure(None, None, preview, js="() => ''", **QUIET)


def _wire_classes(handlers: Handlers, fields: dict, preset: gr.Dropdown, note: gr.HTML) -> None:
    classes, true_class, target = (fields[n] for n in ("class_names", "true_class", "target"))
    preset.select(  # queued, since the browser shows no word of a call that is not
        handlers.preset,
        [preset, fields["backbone"]],
        classes,
        concurrency_limit=4,
        show_progress="hidden",
        api_visibility="private",
    )
    gr.on(
        [classes.change, fields["backbone"].change],
        handlers.classes,
        [classes, true_class, target, fields["backbone"]],
        [note, true_class, target],
        preprocess=False,
        trigger_mode="always_last",
        **QUIET,
    )


def _wire_attack(handlers: Handlers, fields: dict, note: gr.HTML, estimate: gr.HTML) -> None:
    inputs = [fields["attack"], fields["attacked_model"]]
    shown = [note, *(fields[name] for name in ("epsilon", "attacked_model", "step_size", "target"))]
    changes = [field.change for field in inputs]
    gr.on(changes, handlers.attack, inputs, shown, trigger_mode="always_last", **QUIET)
    gr.on(
        [*changes, *(fields[name].change for name in ("steps", "views", "keep", "tune_steps"))],
        handlers.estimate,
        [fields[name] for name in FIELDS],
        estimate,
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
        **MODEL_QUEUE,
    )


def _wire_model(handlers: Handlers, fields: dict, reset: gr.Button, line: gr.HTML) -> None:
    backbone, pack = fields["backbone"], fields["pack"]
    common = {
        "outputs": [*(fields[name] for name in MODEL_FIELDS), line],
        "show_progress": "minimal",
        "show_progress_on": [line],
        "api_visibility": "private",
        "preprocess": False,
        "concurrency_limit": 4,  # not the model's queue: a download would stop everybody's runs
        "concurrency_id": "choice",
    }
    backbone.input(handlers.choose, backbone, **common)
    gr.on([pack.input, reset.click], handlers.choose, [backbone, pack], **common)
    # asked only when somebody looks: the page itself needs no network
    pack.focus(
        handlers.packs,
        [backbone, pack],
        pack,
        preprocess=False,
        show_progress="hidden",
        api_visibility="private",
    )


def _wire_run(handler: Callable, buttons: tuple, inputs: list, outputs: list, api: str) -> None:
    (run, stop), status = buttons, outputs[0]
    waiting, stopped = (json.dumps(html) for html in (render.waiting(), render.stopped()))
    private = {"api_visibility": "private"}
    start = f"() => {{ window.taptStopped = false; return {waiting} }}"
    run.click(None, None, status, js=start, **private)
    event = run.click(
        handler,
        inputs,
        outputs,
        show_progress="minimal",
        show_progress_on=[status],
        api_name=handler.__name__,
        api_description=api,
        trigger_mode="once",
        **MODEL_QUEUE,
    )
    # a last value may arrive after Stop, and a stopped run then counts as failed
    end = f"() => window.taptStopped ? {stopped} : ''"
    event.failure(None, None, status, js=end, **private)
    halt = f"() => {{ window.taptStopped = true; return {stopped} }}"
    stop.click(None, None, status, js=halt, cancels=[event], **private)


def _wire_analyze(handlers: Handlers, inputs: list) -> None:
    """An endpoint for programs; nothing on the page calls it."""
    gr.Button(visible=False).click(
        handlers.analyze,
        inputs,
        gr.JSON(visible=False, label="Result"),
        api_name="analyze",
        api_description=ANALYZE_API,
        **MODEL_QUEUE,
    )


def _examples(outputs: list) -> None:
    """Buttons with a picture and a name; `gr.Examples` gives its thumbnails no name to read out."""
    gr.HTML('<p class="t-label">Examples</p>', apply_default_css=False)
    with gr.Row(elem_id="example-buttons"):
        for example in known.EXAMPLES:
            button = gr.Button(example.name, icon=example.path, size="sm", min_width=40)
            button.click(partial(_example, example), None, outputs, **QUIET)


def _example(example: known.Example) -> tuple:
    return open_image(example.path), example.classes, DEFAULT_ATTACK, ""
