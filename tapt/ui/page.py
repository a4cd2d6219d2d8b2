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
from tapt.defenses import Defense, all_defenses, find_defenses
from tapt.ui import known, render
from tapt.ui.api import add_api
from tapt.ui.background import QUEUE, Runs
from tapt.ui.handlers import Handlers, attackable, conditions, placeholders, with_settings
from tapt.ui.inputs import MAX_BYTES, Fields, PictureInput, refusal
from tapt.ui.service import Service

FOLDER = Path(__file__).parent
MAX_WAITING, MAX_SESSIONS = 32, 50  # of a session gradio keeps the last results
SHOWN = ("clip", "static", "ensemble", "tapt", "tapt-ensemble", "rtpt", "ttc")
PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
QUIET: dict[str, Any] = {**PRIVATE, "queue": False}
RUN: dict[str, Any] = {**QUEUE, "preprocess": False, "api_visibility": "private"}
BARE: dict[str, Any] = {"apply_default_css": False}
FIRST = {"attack": "pgd", "epsilon": 4, "attacked_model": "clip"}
UNFIT = (
    "This request does not fit: send every parameter in the order of /gradio_api/info, and "
    "pictures as uploaded files or data: URLs."
)
# gradio's dropdown would open its list again when Tab leaves it
TAB_LEAVES = """() => document.addEventListener("keydown", event => {
  if (event.key === "Tab" && event.target.role === "combobox") event.stopPropagation();
}, true)"""
# gradio tells no handler which values a shown result belongs to
RAN = "(...v) => { window.taptRan = JSON.stringify(v); return '' }"
STALE = f"""(...v) => window.taptRan && window.taptRan !== JSON.stringify(v)
  ? {json.dumps(render.note("These results are from earlier inputs. Run again.", warn=True))} : ''"""
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
    first, rows = service.first, find_defenses(list(SHOWN))
    fields: dict[str, Any] = {}
    shown: dict[str, Any] = {"chosen": None}
    # uploads live a day: a short age would delete a queued picture before its turn
    with Page(title="TAPT", delete_cache=(3600, 86400), analytics_enabled=False) as page:
        shown["head"] = gr.HTML(render.header(first), elem_id="head", **BARE)
        shown["former"] = gr.State((first.backbone.name, first.pack.name))
        with gr.Tabs():
            with gr.Tab("Attack", elem_id="attack-tab"), gr.Row(elem_id="columns"):
                with gr.Column(scale=3, min_width=280, elem_id="left"):
                    _picture(fields, shown, first.backbone.name)
                    _settings(fields, shown, service)
                with gr.Column(scale=8, min_width=300, elem_id="right"):
                    _attack(fields, shown, first.backbone.name)
                    shown["stale"] = gr.HTML(elem_id="stale", **BARE)
                    shown["sentence"] = gr.HTML(
                        render.note(
                            "Press the button: the attack looks for a change of the "
                            "picture, too small to matter, that makes CLIP wrong."
                        ),
                        html_template='<div role="status" aria-live="polite">${value}</div>',
                        elem_id="sentence",
                        **BARE,
                    )
                    shown["rows"] = gr.HTML(
                        render.intro(rows), elem_id="rows", js_on_load=ATTACK_THIS, **BARE
                    )
                    _more(fields, shown)
            with gr.Tab("Evidence", elem_id="evidence"):
                _evidence(shown, first.pack.evaluation)
        runs = Runs(service, fields["image"].GRADIO_CACHE)
        handlers = Handlers(service, runs, fields)
        for component, update in zip(
            (c for name, c in fields.items() if "." in name),
            placeholders(first, fields),
            strict=True,
        ):
            component.placeholder = update.get("placeholder", None)
            component.info = update.get("info", component.info)
        _wire_runs(handlers, fields, shown)
        _wire_inputs(handlers, fields, shown)
        _wire_model(handlers, fields, shown, page)
        add_api(runs)
    return page.queue(max_size=MAX_WAITING)


def _picture(fields: dict, shown: dict, backbone: str) -> None:
    first = known.EXAMPLES[0]
    fields["image"] = PictureInput(
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
    shown["picture"] = gr.State(None)
    with gr.Row(elem_id="examples"):
        shown["examples"] = [
            (example, gr.Button(example.name, icon=example.path, size="sm", min_width=40))
            for example in known.EXAMPLES
        ]
    names = known.first_names(backbone)
    fields["true_class"] = gr.Dropdown(
        [("not known", "")],
        value=first.true_class,
        label="What is it?",
        info="What counts as right. Empty: answers are only kept or changed.",
        allow_custom_value=True,
        elem_id="true-class",
    )
    with gr.Accordion("It may answer …", open=False, elem_id="names") as shown["names"]:
        shown["preset"] = gr.Dropdown(
            list(known.presets(backbone)), value=None, label="A list of names", elem_id="preset"
        )
        fields["class_names"] = gr.Textbox(
            first.classes or names,
            label="Class names",
            info="One per line, or by commas; quotes keep commas.",
            lines=2,
            max_lines=6,
            elem_id="classes",
        )
    shown["chips"] = gr.HTML(elem_id="chips", **BARE)


def _settings(fields: dict, shown: dict, service: Service) -> None:
    with gr.Accordion("Who answers, model, settings", open=False, elem_id="settings"):
        fields["defenses"] = gr.CheckboxGroup(
            [(row.title, row.name) for row in all_defenses()],
            value=list(SHOWN),
            label="Who answers",
            info="With the seconds of one answer; each gives two.",
            elem_id="defenses",
        )
        fields["backbone"] = gr.Dropdown(
            list(service.backbones),
            value=service.first.backbone.name,
            label="Model",
            info="The CLIP that all of them use.",
            allow_custom_value=service.open_backbones,
            elem_id="backbone",
        )
        fields["pack"] = gr.Dropdown(
            service.packs(service.first.backbone.name),
            value=service.first.pack.name,
            label="Prompts",
            info="Trained once for a model; from the list, or owner/repo of the Hub.",
            allow_custom_value=service.open_packs,
            elem_id="pack",
        )
        fields["seed"] = _number("seed", Fields.model_fields["seed"])
        shown["folds"] = []
        for row in with_settings():
            with gr.Accordion(f"{row.title}: settings", open=False, visible=row.name in SHOWN) as f:
                _defense(fields, row)
            shown["folds"].append(f)


def _defense(fields: dict, row: Defense) -> None:
    """The settings of one defence, as its class declares them; left empty they are the pack's."""
    with gr.Row():
        for name, field in row.settings.model_fields.items():
            kind = plain_type(field)
            key, label = f"{row.name}.{name}", name.replace("_", " ")
            if kind in (int, float):
                fields[key] = _number(name, field, value=None, label=label)
            elif kind is bool or typing.get_origin(kind) is typing.Literal:
                values = [True, False] if kind is bool else typing.get_args(kind)
                choices = [("the pack's own", ""), *((str(v).lower(), v) for v in values)]
                fields[key] = gr.Dropdown(choices, value="", label=label, min_width=120)


def _number(name: str, field: FieldInfo, **options: Any) -> gr.Number:
    """The input of a number, as its class declares it."""
    low, high = limits(field)
    text = field.description or ""
    return gr.Number(
        **{
            "value": field.default,
            "label": field.title or name,
            "info": text[:1].upper() + text[1:],
            "minimum": low,
            "maximum": high,
            "step": 1 if plain_type(field) is int else 0.0001,
            "min_width": 120,
            **options,
        }
    )


def _attack(fields: dict, shown: dict, backbone: str) -> None:
    known_fields = Fields.model_fields
    with gr.Row(elem_id="go"):
        shown["run"] = gr.Button(
            "Attack this picture", variant="primary", elem_id="run", scale=3, min_width=180
        )
        shown["stop"] = gr.Button("Stop", elem_id="stop", visible=False, min_width=80)
    line = render.plan(*FIRST.values(), None)
    with gr.Accordion(line, open=False, elem_id="plan") as shown["plan"]:
        with gr.Row():
            fields["attack"] = gr.Dropdown(
                [("none", "none"), *((row.title, name) for name, row in METHODS.items())],
                value=FIRST["attack"],
                label="Attack",
                elem_id="attack",
                min_width=120,
            )
            fields["attacked_model"] = gr.Dropdown(
                attackable(SHOWN),
                value=FIRST["attacked_model"],
                label="The attack sees",
                elem_id="attacked-model",
                min_width=160,
            )
            field = known_fields["epsilon"]
            fields["epsilon"] = gr.Slider(
                *limits(field),
                value=FIRST["epsilon"],
                step=1,
                label=field.title,
                info=field.description,
                elem_id="epsilon",
                min_width=160,
            )
        shown["attack-note"] = gr.HTML(elem_id="attack-note", **BARE)
        with gr.Row():
            for name in ("steps", "step_size"):
                fields[name] = _number(name, known_fields[name])
            fields["target"] = gr.Dropdown(
                [("any other", "")],
                value="",
                label="Target",
                info="A class that the attack moves towards.",
                allow_custom_value=True,
                elem_id="target",
                min_width=120,
            )


def _more(fields: dict, shown: dict) -> None:
    with gr.Tabs(elem_id="more"):
        with gr.Tab("Take away"):
            shown["take"] = gr.HTML(
                '<p class="t-small">After a run: the attacked picture, all numbers, a link and '
                "the command.</p>",
                elem_id="take",
                **BARE,
            )
        with gr.Tab("Pictures"):
            shown["slider"] = gr.ImageSlider(
                label="Original (left) and attacked (right)",
                format="png",
                interactive=False,
                buttons=[],
                visible=False,
                elem_id="slider",
            )
            shown["pictures"] = gr.HTML(elem_id="pictures", **BARE)
        with gr.Tab("Sweep"):
            gr.HTML(
                '<p class="t-small">One attack for every epsilon, as set above: how the '
                "probability of the true class falls.</p>",
                **BARE,
            )
            with gr.Row():
                for name in ("max_epsilon", "epsilon_step"):
                    fields[name] = _number(name, Fields.model_fields[name])
            with gr.Row():
                shown["run-sweep"] = gr.Button("Sweep epsilon", elem_id="run-sweep", scale=3)
                shown["stop-sweep"] = gr.Button(
                    "Stop", elem_id="stop-sweep", visible=False, min_width=80
                )
            shown["falls"] = gr.HTML(elem_id="falls", **BARE)
            shown["curves"] = gr.LinePlot(
                x="epsilon",
                y="probability",
                color="defence",
                y_lim=[0, 1],
                x_title="epsilon, 1/255",
                height=300,
                buttons=[],
                elem_id="curves",
                label="Probability of the true class",
            )
            shown["points"] = gr.Dataframe(
                interactive=False, label="The same as numbers", elem_id="points"
            )
        with gr.Tab("Words"):
            gr.HTML(render.words(), **BARE)


def _evidence(shown: dict, rows: Any) -> None:
    heads, cells = render.evidence(rows)
    gr.HTML(
        '<p class="t-small">Accuracy over many pictures, as recorded with the loaded prompts; '
        f"rows of fewer than {render.THIN} pictures are thin evidence.</p>",
        **BARE,
    )
    first = conditions(rows)
    shown["condition"] = gr.Dropdown(
        first["choices"], value=first["value"], label="Attack of the chart", elem_id="condition"
    )
    chart = render.chart(rows, first["value"]) if rows else None
    shown["chart"] = gr.Plot(chart, label="Clean against attacked accuracy", elem_id="chart")
    shown["evidence"] = gr.Dataframe(
        cells,
        headers=heads,
        datatype=["number" if head in ("n", "Clean %", "Attacked %") else "str" for head in heads],
        interactive=False,
        show_search="filter",
        label="Recorded rows",
        elem_id="recorded",
    )


def _wire_runs(handlers: Handlers, fields: dict, shown: dict) -> None:
    every = list(fields.values())
    for name, fn, outputs in (
        ("run", handlers.compare, ("sentence", "rows", "slider", "pictures", "take", "stop")),
        ("run-sweep", handlers.sweep, ("falls", "curves", "points", "stop-sweep")),
    ):
        run, stop = shown[name], shown[name.replace("run", "stop")]
        targets = [shown[output] for output in outputs]
        event = run.click(
            fn,
            set(every),
            targets,
            show_progress="full",
            show_progress_on=targets[0],
            trigger_mode="once",
            validator=handlers.faults,
            **RUN,
        )
        text = targets[:2] if name == "run" else None
        hidden = partial(gr.update, visible=False)
        event.failure(hidden, None, stop, **QUIET)
        stop.click(hidden, None, stop, cancels=[event], **QUIET)
        if text:
            run.click(None, every, shown["stale"], js=RAN, **QUIET)
            for ended in (event.failure, stop.click):
                ended(None, text, text, js=ENDED, **QUIET)
        stop.click(None, js=TO_RUN, **QUIET)
    changes = [component.change for component in every]
    gr.on(changes, None, every, shown["stale"], js=STALE, **QUIET)


def _wire_inputs(handlers: Handlers, fields: dict, shown: dict) -> None:
    image, picture = fields["image"], shown["picture"]
    gr.on(
        [image.upload, image.input],
        handlers.picture,
        [image, picture],
        [image, picture],
        preprocess=False,
        **QUIET,
    )
    names = [fields[name] for name in ("class_names", "true_class", "target", "backbone")]
    gr.on(
        [fields["class_names"].change, fields["backbone"].change],
        handlers.classes,
        names,
        [shown["chips"], shown["names"], fields["true_class"], fields["target"]],
        preprocess=False,
        trigger_mode="always_last",
        **QUIET,
    )
    shown["preset"].select(
        handlers.preset, [shown["preset"], fields["backbone"]], fields["class_names"], **PRIVATE
    )
    planned = ["attack", "attacked_model", "epsilon", "steps", "defenses", "class_names"]
    views = [name for name in fields if name.endswith(".views")]
    plan = [shown["plan"], shown["attack-note"]]
    plan += [fields[name] for name in ("epsilon", "attacked_model", "step_size", "target")]
    changes = [fields[name].change for name in (*planned, *views)]
    ended = [shown["sentence"].change]
    gr.on(
        [*changes, *ended],
        handlers.plan,
        set(fields.values()),
        plan,
        preprocess=False,
        trigger_mode="always_last",
        **QUIET,
    )
    ticks = [fields[name] for name in ("defenses", "backbone", "attacked_model")]
    gr.on(
        [component.change for component in ticks],
        handlers.ticks,
        ticks,
        [fields["defenses"], fields["attacked_model"], *shown["folds"]],
        preprocess=False,
        trigger_mode="always_last",
        **QUIET,
    )
    shown["rows"].click(_attack_this, None, fields["attacked_model"], **QUIET)
    outputs = [image, fields["class_names"], fields["true_class"], shown["preset"], picture]
    for example, button in shown["examples"]:
        button.click(
            partial(_example, example), fields["backbone"], outputs, preprocess=False, **QUIET
        )


def _attack_this(event: gr.EventData) -> Any:
    attacked = getattr(event, "attacked", None)
    return attacked or gr.skip()


def _example(example: known.Example, backbone: str) -> tuple:
    names = example.classes or known.first_names(backbone)
    return str(example.path), names, example.true_class, None, None


def _wire_model(handlers: Handlers, fields: dict, shown: dict, page: gr.Blocks) -> None:
    backbone, pack = fields["backbone"], fields["pack"]
    settings = [component for name, component in fields.items() if "." in name]
    chosen = [backbone, pack, shown["head"], shown["former"], shown["evidence"]]
    gr.on(
        [backbone.input, pack.input],
        handlers.choose,
        [backbone, pack, shown["former"]],
        [*chosen, shown["condition"], *settings],
        preprocess=False,
        concurrency_limit=4,  # beside the runs: a download would stop everybody's
        concurrency_id="choice",
        show_progress="full",
        show_progress_on=backbone,
        api_visibility="private",
    )
    # asked only when somebody looks: the page itself needs no network
    pack.focus(handlers.packs, [backbone, pack], pack, preprocess=False, **PRIVATE)
    shown["condition"].change(
        handlers.evidence, [shown["condition"], shown["former"]], shown["chart"], **QUIET
    )
    link = gr.HTML(js_on_load=LINK, elem_id="link", **BARE)
    link.click(handlers.restore, None, list(fields.values()), **PRIVATE)
    names = [fields[name] for name in ("class_names", "true_class", "target", "backbone")]
    page.load(
        handlers.classes,
        names,
        [shown["chips"], shown["names"], fields["true_class"], fields["target"]],
        preprocess=False,
        **QUIET,
    )
    page.load(
        handlers.plan,
        set(fields.values()),
        [
            shown["plan"],
            shown["attack-note"],
            *(fields[name] for name in ("epsilon", "attacked_model", "step_size", "target")),
        ],
        preprocess=False,
        **QUIET,
    )
