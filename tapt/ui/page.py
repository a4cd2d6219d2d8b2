"""Layout of the page."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import gradio as gr

from tapt.core.attacks import METHODS
from tapt.core.settings import limits, plain_type
from tapt.defenses import Defense, all_defenses, find_defenses
from tapt.ui import evidence, known, render, take
from tapt.ui.api import add_api
from tapt.ui.background import Runs
from tapt.ui.browser import ATTACK_THIS, CHIPS, KEYS, LINK, THEME
from tapt.ui.details import table
from tapt.ui.handlers import Handlers, attackable
from tapt.ui.inputs import MAX_BYTES, Fields, refusal, setting_text
from tapt.ui.service import Service
from tapt.ui.wiring import wire

FOLDER = Path(__file__).parent
MAX_WAITING, MAX_SESSIONS = 32, 50  # of a session gradio keeps the last results
ANSWER = ("clip", "static", "ensemble", "tapt", "tapt-ensemble", "rtpt", "ttc")
FIRST = {"attack": "pgd", "epsilon": 4, "attacked_model": "clip"}
UNFIT = (
    "This request does not fit: send every parameter in the order of /gradio_api/info, and "
    "pictures as uploaded files or data: URLs."
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
        "js": KEYS,
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
        shown["head"] = _html("head", render.header(first))
        shown["former"] = gr.State((first.backbone.name, first.pack.name))
        with gr.Tabs():
            with gr.Tab("Attack"), gr.Row(elem_id="columns"):
                with gr.Column(scale=3, min_width=280, elem_id="left"):
                    _picture(fields, shown, first.backbone.name)
                    _settings(fields, shown, service)
                with gr.Column(scale=8, min_width=300, elem_id="right"):
                    _attack(fields, shown)
                    _results(shown)
                    _more(fields, shown)
            with gr.Tab("Evidence"):
                _evidence(shown, first.pack.evaluation)
        shown["link"] = _html("link", js_on_load=LINK)
        runs = Runs(service, fields["image"].GRADIO_CACHE)
        add_api(runs)  # its names come first
        wire(Handlers(service, runs, fields, shown), page)
    return page.queue(max_size=MAX_WAITING)


def _html(elem_id: str, value: str = "", **options: Any) -> gr.HTML:
    return gr.HTML(value, elem_id=elem_id, apply_default_css=False, **options)


def _field(fields: dict, name: str, kind: Any, *values: Any, **options: Any) -> None:
    """The component of a request's field, with the words of its declaration."""
    field = Fields.model_fields[name]
    words: Any = {"label": field.title, "info": field.description, "value": field.default}
    limited = _range(field) if kind in (gr.Number, gr.Slider) else {}
    own = {"min_width": 120, "elem_id": name.replace("_", "-"), **words, **limited}
    fields[name] = kind(*values, **{**own, **options})


def _range(field: Any) -> dict[str, Any]:
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
        shown["examples"] = [
            (example, gr.Button(example.name, icon=example.path, size="sm", min_width=40))
            for example in known.EXAMPLES
        ]
    _field(
        *(fields, "true_class", gr.Dropdown, [("not known", "")]),
        label="What is it?",
        info="What counts as right. Empty: kept or changed.",
        value=first.true_class,
        allow_custom_value=True,
    )
    with gr.Accordion("It may answer …", open=False, elem_id="names") as shown["names"]:
        lists = list(known.presets(backbone))
        shown["preset"] = gr.Dropdown(lists, value=None, label="A list of names", elem_id="preset")
        info = "By commas or one per line; quotes keep commas."
        start = {"value": known.first_names(backbone), "lines": 2, "max_lines": 6}
        _field(fields, "class_names", gr.Textbox, info=info, **start)
    shown["chips"] = _html("chips", js_on_load=CHIPS)


def _settings(fields: dict, shown: dict, service: Service) -> None:
    backbone, pack = service.first.backbone.name, service.first.pack.name
    with gr.Accordion("Who answers, model, settings", open=False, elem_id="settings"):
        choices = [(row.title, row.name) for row in all_defenses()]
        info = "With the time of one answer; each gives two."
        _field(fields, "defenses", gr.CheckboxGroup, choices, value=list(ANSWER), info=info)
        for name, value, offered, more in (
            ("backbone", backbone, list(service.backbones), service.open_backbones),
            ("pack", pack, service.packs(backbone), service.open_packs),
        ):
            _field(fields, name, gr.Dropdown, offered, value=value, allow_custom_value=more)
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
            kind, special = plain_type(field), dict[str, Any]()
            make: Any = gr.Textbox
            if kind in (int, float):
                make, special = gr.Number, _range(field)
            elif kind is bool or typing.get_origin(kind) is typing.Literal:
                values = [True, False] if kind is bool else typing.get_args(kind)
                make = gr.Dropdown
                special = {"choices": [(str(value).lower(), value) for value in values]}
            fields[f"{row.name}.{name}"] = make(
                value=setting_text(own[name]),
                label=name.replace("_", " "),
                info=field.description,
                min_width=120,
                **special,
            )


def _attack(fields: dict, shown: dict) -> None:
    _buttons(shown, "Attack this picture", "")
    with gr.Accordion(render.plan(FIRST, None), open=False, elem_id="plan") as shown["plan"]:
        with gr.Row():
            choices = [("none", "none"), *((row.title, name) for name, row in METHODS.items())]
            _field(fields, "attack", gr.Dropdown, choices, value=FIRST["attack"])
            _field(fields, "attacked_model", gr.Dropdown, attackable(ANSWER))
            _field(fields, "epsilon", gr.Slider)
        shown["attack-note"] = _html("attack-note")
        with gr.Row():
            _field(fields, "steps", gr.Number)
            _field(fields, "step_size", gr.Number)
            choices = [("any other", "")]
            _field(fields, "target", gr.Dropdown, choices, allow_custom_value=True)


def _buttons(shown: dict, text: str, suffix: str) -> None:
    """Start, Stop, and where the progress stands."""
    with gr.Row(elem_id=f"go{suffix}"):
        start: Any = {"elem_id": f"run{suffix}", "scale": 3, "min_width": 180}
        stop: Any = {"elem_id": f"stop{suffix}", "scale": 1, "min_width": 80}
        shown[f"run{suffix}"] = gr.Button(text, variant="primary", **start)
        shown[f"stop{suffix}"] = gr.Button("Stop", visible=False, **stop)
        shown[f"status{suffix}"] = _html(f"status{suffix}", scale=5, min_width=160)


def _results(shown: dict) -> None:
    shown["stale"] = _html("stale")
    live = '<div role="status" aria-live="polite">${value}</div>'
    shown["sentence"] = _html("sentence", render.note(render.WELCOME), html_template=live)
    about = [(row.title, row.about) for row in find_defenses(ANSWER)]
    intro = table(("Defence", "How"), about, render.WHO, "t-table")
    shown["rows"] = _html("rows", intro, js_on_load=ATTACK_THIS)


def _more(fields: dict, shown: dict) -> None:
    with gr.Tabs(elem_id="more"):
        with gr.Tab("Take away"):
            shown["take"] = _html("take", f'<p class="t-small">{take.ABOUT}</p>')
        with gr.Tab("Pictures"):
            shown["pictures"] = _html("pictures")
        with gr.Tab("Sweep"):
            with gr.Row():
                _field(fields, "max_epsilon", gr.Number)
                _field(fields, "epsilon_step", gr.Number)
            _buttons(shown, "Attack it with every epsilon", "-sweep")
            shown["falls"] = _html("falls")
            shown["curves"] = gr.LinePlot(
                label="Probability of the true class",
                x="epsilon",
                y="probability",
                color="defence",
                x_title="epsilon, 1/255",
                y_lim=[0, 1],
                height=360,
                buttons=[],
                elem_id="curves",
            )
            shown["points"] = gr.Dataframe(interactive=False, label="As numbers", elem_id="points")
        with gr.Tab("Words"):
            _html("words", render.words())


def _evidence(shown: dict, rows: Any) -> None:
    first, name = evidence.conditions(rows), "Clean against attacked accuracy"
    _html("recorded-note", f'<p class="t-small">{evidence.ABOUT}</p>')
    shown["condition"] = gr.Dropdown(label="Attack of the chart", elem_id="condition", **first)
    chart = evidence.chart(rows, first["value"]) if rows else None
    shown["chart"] = gr.Plot(chart, label=name, elem_id="chart", visible=bool(rows))
    options: Any = {"label": "Recorded rows", "show_search": "filter", "elem_id": "recorded"}
    shown["evidence"] = gr.Dataframe(evidence.recorded(rows), interactive=False, **options)
