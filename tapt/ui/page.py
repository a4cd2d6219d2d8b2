"""Layout and wiring of the page."""

from __future__ import annotations

import json
import typing
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic.fields import FieldInfo

from tapt.core.attacks import METHODS
from tapt.core.settings import limits, plain_type
from tapt.data.pictures import open_image
from tapt.defenses import Defense, all_defenses, find_defenses
from tapt.ui import known, render
from tapt.ui.api import add_api
from tapt.ui.background import QUEUE, Runs
from tapt.ui.handlers import Handlers, attackable, conditions
from tapt.ui.inputs import MAX_BYTES, Fields, refusal
from tapt.ui.service import Service

FOLDER = Path(__file__).parent
MAX_WAITING, MAX_SESSIONS = 32, 50  # of a session gradio keeps the last results
ANSWER = ("clip", "static", "ensemble", "tapt", "tapt-ensemble", "rtpt", "ttc")
Options = dict[str, Any]
FIRST = {"attack": "pgd", "epsilon": 4, "attacked_model": "clip"}
HIDDEN: Options = {"show_progress": "hidden", "api_visibility": "private"}
QUIET: Options = {**HIDDEN, "queue": False}
UNFIT = (
    "This request does not fit: send every parameter in the order of /gradio_api/info, and "
    "pictures as uploaded files or data: URLs."
)
# gradio's dropdown would open its list again when Tab leaves it, or lose the focus to a long one
TAB_LEAVES = """() => document.addEventListener("keydown", event => {
  if (event.key !== "Tab" || event.target.role !== "combobox") return;
  event.stopPropagation();
  document.querySelectorAll("[role=listbox]").forEach(list => list.tabIndex = -1);
}, true)"""
# gradio tells no handler which values a shown result belongs to
ASKED = "(...v) => { window.taptAsked = JSON.stringify(v) }"
RUNS = "() => { window.taptRan = window.taptAsked; return '' }"  # it was not refused
STALE = f"""(...v) => window.taptRan && window.taptRan !== JSON.stringify(v)
  ? {json.dumps(render.note(render.EARLIER, warn=True))} : ''"""
# after Stop or a fault, rows without an answer will not get one
ENDED = f"""(text, rows) => [text.replace(/Running…|So far/, '{render.STOPPED}'),
  rows.replaceAll('>{render.WAITING}<', '>{render.NOT_RUN}<')]"""
TO_RUN = "() => document.querySelector('#run').focus()"
ATTACK_THIS = """element.addEventListener('click', event => {
  const button = event.target.closest('[data-attack]');
  if (button) trigger('click', {attacked: button.dataset.attack});
})"""
LINK = """const follow = () => { if (location.hash.startsWith('#x='))
  trigger('click', {link: location.hash.slice(3)}) };
window.addEventListener('hashchange', follow); setTimeout(follow, 500);"""
# gradio's own colours of these stay under the contrast that WCAG AA asks for
THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    **{
        name + dark: f"*neutral_{shade}"
        for names, shades in (
            (("body_text_color_subdued", "block_info_text_color"), (600, 400)),
            (("block_label_text_color", "block_title_text_color"), (700, 200)),
            (("checkbox_border_color", "input_placeholder_color"), (500, 400)),
        )
        for name in names
        for dark, shade in zip(("", "_dark"), shades, strict=True)
    },
    **{
        f"button_primary_background_fill{hover}{dark}": f"*primary_{shade}"
        for hover, shade in (("", 600), ("_hover", 700))
        for dark in ("", "_dark")
    },
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


def launch_options() -> dict[str, Any]:
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
    first, fields, shown = service.first, dict[str, Any](), dict[str, Any]()
    # uploads live a day: a short age would delete a queued picture before its turn
    with Page(title="TAPT", delete_cache=(3600, 86400), analytics_enabled=False) as page:
        shown["head"] = _html(render.header(first), "head")
        shown["former"] = gr.State((first.backbone.name, first.pack.name))
        with gr.Tabs():
            with gr.Tab("Attack"), gr.Row(elem_id="columns"):
                with gr.Column(scale=3, min_width=280, elem_id="left"):
                    _picture(fields, shown, first.backbone.name)
                    _settings(fields, shown, service)
                with gr.Column(scale=8, min_width=300, elem_id="right"):
                    _attack(fields, shown)
                    shown["stale"] = _html("", "stale")
                    live = '<div role="status" aria-live="polite">${value}</div>'
                    text = render.note(render.WELCOME)
                    shown["sentence"] = _html(text, "sentence", html_template=live)
                    rows = render.intro(find_defenses(ANSWER))
                    shown["rows"] = _html(rows, "rows", js_on_load=ATTACK_THIS)
                    _more(fields, shown)
            with gr.Tab("Evidence"):
                _evidence(shown, first.pack.evaluation)
        shown["link"] = _html("", "link", js_on_load=LINK)
        runs = Runs(service, fields["image"].GRADIO_CACHE)
        add_api(runs)  # its names come first
        handlers = Handlers(service, runs, fields, shown)
        _wire_runs(handlers)
        _wire_inputs(handlers, page)
        _wire_model(handlers)
    return page.queue(max_size=MAX_WAITING)


def _html(value: str, elem_id: str, **options: Any) -> gr.HTML:
    return gr.HTML(value, elem_id=elem_id, apply_default_css=False, **options)


def _field(fields: dict, name: str, kind: Any, *values: Any, **options: Any) -> None:
    """The component of a request's field, with the words of its declaration."""
    field = Fields.model_fields[name]
    own: Options = {"min_width": 120, "elem_id": name.replace("_", "-")}
    own |= {"label": field.title, "info": field.description, "value": field.default}
    if kind in (gr.Number, gr.Slider):
        own |= _range(field)
    fields[name] = kind(*values, **{**own, **options})


def _range(field: FieldInfo) -> dict[str, Any]:
    low, high = limits(field)
    return {"minimum": low, "maximum": high, "step": 1 if plain_type(field) is int else 0.0001}


def _picture(fields: dict, shown: dict, backbone: str) -> None:
    first = known.EXAMPLES[0]
    fields["image"] = gr.Image(
        str(first.path),
        label="Picture",
        sources=["upload", "clipboard", "webcam"],
        webcam_options=gr.WebcamOptions(mirror=False),
        format="png",
        height=210,
        buttons=[],
        alt_text="The picture to attack",
        elem_id="in-image",
    )
    shown["picture"] = gr.State({"path": str(first.path)})
    with gr.Row(elem_id="examples"):
        buttons = [gr.Button(e.name, icon=e.path, size="sm", min_width=40) for e in known.EXAMPLES]
        shown["examples"] = list(zip(known.EXAMPLES, buttons, strict=True))
    words: Options = {
        "label": "What is it?",
        "info": "What counts as right. Empty: kept or changed.",
    }
    options: Options = {**words, "value": first.true_class, "allow_custom_value": True}
    _field(fields, "true_class", gr.Dropdown, [("not known", "")], **options)
    with gr.Accordion("It may answer …", open=False, elem_id="names") as shown["names"]:
        lists = list(known.presets(backbone))
        shown["preset"] = gr.Dropdown(lists, value=None, label="A list of names", elem_id="preset")
        info = "By commas or one per line; quotes keep commas."
        options = {"value": known.first_names(backbone), "info": info, "lines": 2, "max_lines": 6}
        _field(fields, "class_names", gr.Textbox, **options)
    shown["chips"] = _html("", "chips")


def _settings(fields: dict, shown: dict, service: Service) -> None:
    backbone, pack = service.first.backbone.name, service.first.pack.name
    with gr.Accordion("Who answers, model, settings", open=False, elem_id="settings"):
        options: Options = {
            "value": list(ANSWER),
            "info": "With the time of one answer; each gives two.",
        }
        choices = [(row.title, row.name) for row in all_defenses()]
        _field(fields, "defenses", gr.CheckboxGroup, choices, **options)
        options = {"value": backbone, "allow_custom_value": service.open_backbones}
        _field(fields, "backbone", gr.Dropdown, list(service.backbones), **options)
        options = {"value": pack, "allow_custom_value": service.open_packs}
        _field(fields, "pack", gr.Dropdown, service.packs(backbone), **options)
        _field(fields, "seed", gr.Number)
        shown["folds"] = {}
        for row in all_defenses():
            if row.settings.model_fields:
                name, on = f"{row.title}: settings", row.name in ANSWER
                with gr.Accordion(name, open=False, visible=on) as shown["folds"][row.name]:
                    _defense(fields, row, service.first.settings(row).model_dump())


def _defense(fields: dict, row: Defense, own: dict[str, Any]) -> None:
    """The settings of one defence, as its class declares them; at first the pack's own."""
    with gr.Row():
        for name, field in row.settings.model_fields.items():
            key, kind = f"{row.name}.{name}", plain_type(field)
            options: Options = {
                "label": name.replace("_", " "),
                "info": field.description,
                "min_width": 120,
            }
            if kind in (int, float) and field.default is not None:
                fields[key] = gr.Number(own[name], **options, **_range(field))
            elif kind is bool or typing.get_origin(kind) is typing.Literal:
                values = [True, False] if kind is bool else typing.get_args(kind)
                choices = [(str(value).lower(), value) for value in values]
                fields[key] = gr.Dropdown(choices, value=own[name], **options)


def _attack(fields: dict, shown: dict) -> None:
    shown["run"], shown["stop"], shown["status"] = _buttons("Attack this picture", "run", "go")
    with gr.Accordion(render.plan(FIRST, None), open=False, elem_id="plan") as shown["plan"]:
        with gr.Row():
            choices = [("none", "none"), *((row.title, name) for name, row in METHODS.items())]
            _field(fields, "attack", gr.Dropdown, choices, value=FIRST["attack"])
            _field(fields, "attacked_model", gr.Dropdown, attackable(ANSWER))
            _field(fields, "epsilon", gr.Slider)
        shown["attack-note"] = _html("", "attack-note")
        with gr.Row():
            _field(fields, "steps", gr.Number)
            _field(fields, "step_size", gr.Number)
            options: Options = {"value": "", "allow_custom_value": True}
            _field(fields, "target", gr.Dropdown, [("any other", "")], **options)


def _buttons(text: str, run: str, row: str) -> tuple[gr.Button, gr.Button, gr.HTML]:
    """Start, Stop, and where the progress stands."""
    with gr.Row(elem_id=row, elem_classes="t-go"):
        start = gr.Button(text, variant="primary", elem_id=run, scale=3, min_width=180)
        name = run.replace("run", "stop")
        stop = gr.Button("Stop", elem_id=name, visible=False, scale=1, min_width=80)
        return start, stop, _html("", run.replace("run", "status"), scale=5, min_width=160)


def _more(fields: dict, shown: dict) -> None:
    with gr.Tabs(elem_id="more"):
        with gr.Tab("Take away"):
            shown["take"] = _html(f'<p class="t-small">{render.TAKE}</p>', "take")
        with gr.Tab("Pictures"):
            name = "Original (left) and attacked (right)"
            options: Options = {"interactive": False, "buttons": [], "visible": False}
            shown["slider"] = gr.ImageSlider(label=name, format="png", elem_id="slider", **options)
            shown["pictures"] = _html("", "pictures")
        with gr.Tab("Sweep"):
            with gr.Row():
                _field(fields, "max_epsilon", gr.Number)
                _field(fields, "epsilon_step", gr.Number)
            names = ("run-sweep", "stop-sweep", "status-sweep")
            parts = _buttons("Attack it with every epsilon", "run-sweep", "go-sweep")
            shown.update(zip(names, parts, strict=True))
            shown["falls"] = _html("", "falls")
            options = {"y_lim": [0, 1], "x_title": "epsilon, 1/255", "height": 360, "buttons": []}
            axes: Options = {
                "x": "epsilon",
                "y": "probability",
                "color": "defence",
                "elem_id": "curves",
            }
            shown["curves"] = gr.LinePlot(label="Probability of the true class", **axes, **options)
            shown["points"] = gr.Dataframe(interactive=False, label="As numbers", elem_id="points")
        with gr.Tab("Words"):
            _html(render.words(), "words")


def _evidence(shown: dict, rows: Any) -> None:
    (heads, cells), first = render.evidence(rows), conditions(rows)
    _html(f'<p class="t-small">{render.RECORDED}</p>', "recorded-note")
    shown["condition"] = gr.Dropdown(label="Attack of the chart", elem_id="condition", **first)
    chart = render.chart(rows, first["value"]) if rows else None
    shown["chart"] = gr.Plot(chart, label="Clean against attacked accuracy", elem_id="chart")
    kinds = ["number" if head in render.NUMBERS else "str" for head in heads]
    options: Options = {
        "headers": heads,
        "datatype": kinds,
        "show_search": "filter",
        "interactive": False,
    }
    shown["evidence"] = gr.Dataframe(cells, label="Recorded rows", elem_id="recorded", **options)


def _wire_runs(handlers: Handlers) -> None:
    shown, every = handlers.shown, list(handlers.fields.values())
    named = {
        "": (handlers.compare, ("sentence", "rows", "slider", "pictures", "take", "stop")),
        "-sweep": (handlers.sweep, ("falls", "curves", "points", "stop-sweep")),
    }
    for suffix, (fn, outputs) in named.items():
        run, stop = shown["run" + suffix], shown["stop" + suffix]
        if not suffix:  # first: gradio comes to it when the run has ended otherwise
            run.click(None, every, js=ASKED, **QUIET)
            shown["sentence"].change(None, None, shown["stale"], js=RUNS, **QUIET)
        event = run.click(
            fn,
            set(every),
            [shown[name] for name in outputs],
            show_progress_on=shown["status" + suffix],
            trigger_mode="once",
            validator=handlers.faults,
            api_visibility="private",
            preprocess=False,
            **QUEUE,
        )
        event.failure(partial(gr.update, visible=False), None, stop, **QUIET)
        halt = stop.click(partial(gr.update, visible=False), None, stop, cancels=[event], **QUIET)
        halt.then(None, js=TO_RUN if not suffix else None, **QUIET)
        if not suffix:
            texts = [shown["sentence"], shown["rows"]]
            for ended in (event.failure, stop.click):
                ended(None, texts, texts, js=ENDED, **QUIET)
    changes = [component.change for component in every]
    gr.on(changes, None, every, shown["stale"], js=STALE, **QUIET)


def _wire_inputs(handlers: Handlers, page: gr.Blocks) -> None:
    fields, shown = handlers.fields, handlers.shown
    image, raw = fields["image"], {**QUIET, "preprocess": False}
    pictures = [image, shown["picture"]]
    # queued, since the browser shows no word of a call that is not
    told = {**HIDDEN, "preprocess": False}
    image.upload(handlers.picture, pictures, pictures, **told)
    names = ["class_names", "backbone", "attack", "attacked_model", "epsilon", "steps", "defenses"]
    names += [name for name in fields if name.endswith(".views")]
    changes = [fields[name].change for name in names]
    follow = ["epsilon", "attacked_model", "step_size", "target", "true_class", "defenses"]
    outputs = [shown[name] for name in ("chips", "names", "plan", "attack-note")]
    outputs += [*(fields[name] for name in follow), *shown["folds"].values()]
    gr.on(
        [page.load, shown["sentence"].change, *changes],
        handlers.refresh,
        set(fields.values()),
        outputs,
        trigger_mode="always_last",
        **raw,
    )
    preset, classes = shown["preset"], fields["class_names"]
    preset.select(handlers.preset, [preset, fields["backbone"]], classes, **HIDDEN)
    shown["rows"].click(_attack_this, None, fields["attacked_model"], **QUIET)
    outputs = [*pictures, classes, fields["true_class"], preset]
    for example, button in shown["examples"]:
        button.click(partial(_example, example), fields["backbone"], outputs, **raw)


def _attack_this(event: gr.EventData) -> Any:
    return getattr(event, "attacked", None) or gr.skip()


def _example(example: known.Example, backbone: str) -> tuple:
    names = example.classes or known.first_names(backbone)
    path = {"path": str(example.path)}
    return open_image(example.path), path, names, example.true_class, None


def _wire_model(handlers: Handlers) -> None:
    fields, shown = handlers.fields, handlers.shown
    backbone, pack, former = fields["backbone"], fields["pack"], shown["former"]
    outputs = [backbone, pack, former]
    outputs += [shown[name] for name in ("head", "preset", "evidence", "condition")]
    gr.on(
        [backbone.input, pack.input],
        handlers.choose,
        [backbone, pack, former],
        [*outputs, *(fields[name] for name in fields if "." in name)],
        preprocess=False,
        concurrency_limit=None,  # a download keeps nobody else waiting
        show_progress_on=backbone,
        api_visibility="private",
    )
    # asked only when somebody looks: the page itself needs no network
    pack.focus(handlers.packs, [backbone, pack], pack, preprocess=False, **HIDDEN)
    condition = shown["condition"]
    condition.change(handlers.evidence, [condition, former], shown["chart"], **QUIET)
    told = {**HIDDEN, "trigger_mode": "always_last"}
    shown["link"].click(handlers.restore, None, [*fields.values(), former], **told)
