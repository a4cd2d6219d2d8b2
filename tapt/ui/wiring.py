"""What happens when something on the page is clicked, changed or loaded."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from tapt.data.pictures import open_image
from tapt.ui import known
from tapt.ui.background import QUEUE
from tapt.ui.browser import ASKED, ENDED, RUNS, STALE
from tapt.ui.handlers import Handlers

HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
QUIET: dict[str, Any] = {**HIDDEN, "queue": False}


def wire(handlers: Handlers, page: gr.Blocks) -> None:
    """Binds every component of the page to its handler."""
    run = _wire_runs(handlers)
    _wire_inputs(handlers, page, run)
    _wire_model(handlers)


def _wire_runs(handlers: Handlers) -> Any:
    shown, every = handlers.shown, list(handlers.fields.values())
    # first: gradio comes to it when the run has ended otherwise
    shown["run"].click(None, every, js=ASKED, **QUIET)
    shown["sentence"].change(None, None, shown["stale"], js=RUNS, **QUIET)
    event = _wire_run(handlers, "", handlers.compare, "sentence rows pictures take stop")
    texts = [shown["sentence"], shown["rows"]]
    for ended in (event.failure, shown["stop"].click):
        ended(None, texts, texts, js=ENDED, **QUIET)
    _wire_run(handlers, "-sweep", handlers.sweep, "falls curves points stop-sweep")
    changes = [component.change for component in every]
    gr.on(changes, None, every, shown["stale"], js=STALE, **QUIET)
    return event


def _wire_run(handlers: Handlers, suffix: str, fn: Any, outputs: str) -> Any:
    shown, hide = handlers.shown, partial(gr.update, visible=False)
    stop = shown[f"stop{suffix}"]
    event = shown[f"run{suffix}"].click(
        fn,
        set(handlers.fields.values()),
        [shown[name] for name in outputs.split()],
        show_progress_on=shown[f"status{suffix}"],
        trigger_mode="once",
        validator=handlers.faults,
        api_visibility="private",
        preprocess=False,
        **QUEUE,
    )
    event.failure(hide, None, stop, **QUIET)
    halt = stop.click(hide, None, stop, cancels=[event], **QUIET)
    halt.then(None, js=f"() => document.querySelector('#run{suffix}').focus()", **QUIET)
    return event


def _wire_inputs(handlers: Handlers, page: gr.Blocks, run: Any) -> None:
    fields, shown = handlers.fields, handlers.shown
    image, raw = fields["image"], {**QUIET, "preprocess": False}
    pictures = [image, shown["picture"]]
    # queued, since the browser shows no word of a call that is not
    image.upload(handlers.picture, pictures, pictures, preprocess=False, **HIDDEN)
    names = ["class_names", "backbone", "attack", "attacked_model", "epsilon", "steps", "defenses"]
    names += [name for name in fields if name.endswith(".views")]
    changes = [fields[name].change for name in names]
    follow = ["epsilon", "attacked_model", "step_size", "target", "true_class", "defenses"]
    outputs = [shown[name] for name in ("chips", "names", "plan", "attack-note")]
    outputs += [*(fields[name] for name in follow), *shown["folds"].values()]
    refresh: Any = (handlers.refresh, set(fields.values()), outputs)
    gr.on([page.load, *changes], *refresh, trigger_mode="always_last", **raw)
    run.then(*refresh, **raw)  # the run has shown how long things take
    preset, classes = shown["preset"], fields["class_names"]
    shown["chips"].click(handlers.remove, classes, classes, **HIDDEN)
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
    condition.change(handlers.chart, [condition, former], shown["chart"], **QUIET)
    every = [*fields.values(), former]
    shown["link"].click(handlers.restore, None, every, trigger_mode="always_last", **HIDDEN)
