"""From what a person does to what is on the screen."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import gradio as gr

from tapt.comparison import Comparison
from tapt.core.attacks import METHODS
from tapt.core.errors import InputError, TaptError
from tapt.core.images import to_picture
from tapt.data.names import MAX_CLASSES, class_names, distinct, names_text, parse_classes
from tapt.data.pictures import open_image
from tapt.defenses import all_defenses, find_defenses
from tapt.evaluation.sweep import Sweep
from tapt.model import Model
from tapt.ui import curves, evidence, inputs, known, links, render, results, take
from tapt.ui.background import BEAT, Runs, with_heartbeat
from tapt.ui.service import Service

Raw = Mapping[Any, Any]
Values = dict[str, Any]
Updates = dict[Any, Any]
CHOICES = 100  # of a dropdown; longer lists are typed
PHASES = {"attack": "Attacking", "download": "Fetching the model"}
PROGRESS = gr.Progress()


class Handlers:
    """The page's event handlers; nothing is left of a call when it ends.

    fields: the components of a request by name, those of a defence's settings as `DEFENCE.NAME`.
    shown: the other components by name.
    """

    def __init__(self, service: Service, runs: Runs, fields: Values, shown: Values) -> None:
        self.service, self.runs, self.fields, self.shown = service, runs, fields, shown

    def values(self, raw: Raw) -> Values:
        """The request in the components; of the settings, those that are not the pack's own."""
        given = {name: raw[component] for name, component in self.fields.items()}
        own = self._own(self.service.at_hand(given["backbone"], given["pack"]))
        settings = {
            name: given[name]
            for row in given["defenses"]
            for name in given
            if name.startswith(f"{row}.") and given[name] not in (None, own.get(name))
        }
        return {**{n: v for n, v in given.items() if "." not in n}, "settings": settings}

    def _own(self, model: Model | None) -> Values:
        """The settings of a pack, as the fields hold them."""
        names = (name.split(".") for name in self.fields if "." in name and model)
        every = {row.name: model.settings(row).model_dump() for row in all_defenses() if model}
        return {f"{row}.{name}": inputs.setting_text(every[row][name]) for row, name in names}

    def compare(self, raw: Raw, progress: gr.Progress = PROGRESS) -> Iterator[Updates]:
        """The rows as they fill, then everything else."""
        running = {self.shown["sentence"]: render.note("Running…")}
        yield from self._watch(raw, self.runs.compare, self._compared, "stop", running, progress)

    def _compared(self, request: inputs.Request, result: Comparison) -> Updates:
        shown, counts = self.shown, result.counts()
        sentence = f"So far {counts}." if counts else "Running…"
        updates: Updates = {shown["rows"]: results.results(result)}
        if result.finished:
            sentence = f"{result.verdict()} Done in {result.seconds['total']:.1f} s."
            link = links.to_link(request.values, to_picture(result.clean))
            taken = take.take_away(result, link, request.fields.settings or {})
            updates |= {shown["pictures"]: results.pictures(result), shown["take"]: taken}
        return {shown["sentence"]: render.note(sentence), **updates}

    def sweep(self, raw: Raw, progress: gr.Progress = PROGRESS) -> Iterator[Updates]:
        """The curves as they grow."""
        empty = {self.shown["falls"]: ""}
        yield from self._watch(raw, self.runs.sweep, self._swept, "stop-sweep", empty, progress)

    def _swept(self, request: inputs.Request, result: Sweep) -> Updates:
        points, shown = curves.points(result), self.shown
        table = points.pivot_table(index="epsilon", columns="defence", values="probability")
        limits: list[float | None] = [0, max(1, result.epsilons[-1])]
        return {
            shown["falls"]: curves.falls(result),
            shown["curves"]: gr.LinePlot(points, y_title=f"p({result.label})", x_lim=limits),
            shown["points"]: table[list(points.defence.unique())].reset_index(),
        }

    def _watch(
        self, raw: Raw, run: Callable, show: Callable, stop: str, first: Updates, progress: Any
    ) -> Iterator[Updates]:
        """What `show` makes of a run's results whenever there are more of them."""
        with inputs.in_words():
            request, before, sent = self.runs.request(self.values(raw)), None, 0.0
            yield {**first, self.shown[stop]: _visible(True)}
            for at, result in run(request):
                now = (_filled(result.answers), vars(result).get("finished")) if result else before
                if now == before and time.monotonic() - sent < BEAT:
                    continue  # each word to the browser costs the run some time
                _report(progress, at)
                # where Stop takes hold
                yield {self.shown[stop]: gr.skip()} if now == before else show(request, result)
                before, sent = now, time.monotonic()
            yield {self.shown[stop]: _visible(False)}

    def faults(self, raw: Raw) -> list[dict]:
        """For each component, in the order of the page, what is wrong with its value."""
        values, found = self.values(raw), dict[str, str]()
        settings = values.pop("settings")
        checks: dict[str, Callable] = {
            **{n: partial(inputs.read_fields, {n: values[n]}) for n in inputs.NAMES if n in values},
            "class_names": partial(self._classes, values),
            **{n: partial(inputs.read_fields, {"settings": {n: settings[n]}}) for n in settings},
            "image": partial(self.runs.request, {**values, "settings": settings}),
        }
        names = tuple(distinct(class_names(values["class_names"] or "")))
        for name in ("true_class", "target"):
            word, text = name.replace("_", " "), values[name] or ""
            checks[name] = partial(inputs.read_class, word, text, names)
        for name, check in checks.items():
            follows = "class_names" in found and name in ("true_class", "target")
            if follows or (found and name == "image"):  # of the whole request
                continue
            try:
                check()
            except InputError as error:
                found[name] = str(error)
        return [gr.validate(name not in found, found.get(name, "")) for name in self.fields]

    def _classes(self, values: Values) -> None:
        asked = inputs.read_fields({"class_names": values["class_names"]})
        if long := self.service.too_long(parse_classes(asked.class_names), values["backbone"]):
            raise InputError(f"Too long for this model: {', '.join(long[:3])}.")

    def refresh(self, raw: Raw) -> Updates:
        """What follows from the inputs: chips, choices, the line on the attack with its time, costs
        of the defences, which fields apply."""
        values, shown, fields = self.values(raw), self.shown, self.fields
        every = class_names((values["class_names"] or "")[: inputs.MAX_TEXT])
        names, backbone = distinct(every), values["backbone"]
        unknown = known.unknown_names(names, backbone)
        too_long = self.service.too_long(names[:MAX_CLASSES], backbone)
        strange = f", {len(unknown)} never seen" if unknown else ""
        label: dict[str, Any] = {"label": f"It may answer: {len(names):,} names{strange}"}
        if not 2 <= len(names) <= MAX_CLASSES or too_long:
            label["open"] = True  # what is wrong will stand there
        method, attacked = METHODS.get(values["attack"]), values["attacked_model"]
        seconds = None
        with suppress(TaptError, gr.Error):  # the button says what is wrong
            seconds = self.service.estimate(self.runs.request(values))
        applies = {
            "epsilon": method is not None and method.norm == "Linf",
            "attacked_model": method is not None,
            "step_size": method is not None and method.step_size,
            "target": method is not None and method.targeted,
        }
        updates: dict[str, Values] = {name: {"visible": bool(on)} for name, on in applies.items()}
        updates["attacked_model"]["choices"] = attackable([*values["defenses"], attacked])
        updates["target"]["choices"] = [("any other", ""), *names[:CHOICES]]
        updates["true_class"] = {"choices": [("not known", ""), *names[:CHOICES]]}
        updates["defenses"] = {"choices": [self._cost(row, backbone) for row in all_defenses()]}
        return {
            shown["chips"]: render.chips(names, len(every) - len(names), unknown, too_long),
            shown["names"]: gr.update(**label),
            shown["plan"]: gr.update(label=render.plan(values, seconds)),
            shown["attack-note"]: render.attack_note(method, attacked),
            **{fields[name]: gr.update(**update) for name, update in updates.items()},
            **{f: _visible(name in values["defenses"]) for name, f in shown["folds"].items()},
        }

    def _cost(self, row: Any, backbone: str) -> tuple[str, str]:
        seconds = self.service.seconds(backbone, row.name)
        return row.title + ("" if seconds is None else f" · {render.duration(seconds)}"), row.name

    def picture(self, payload: Any, former: Any) -> tuple[Any, Any]:
        """A new picture, and itself to be remembered; or the former one and a word."""
        try:
            inputs.read_picture(payload, self.runs.uploads)
        except (InputError, gr.Error) as error:
            _warn(error)
            return open_image(former["path"]), former
        return gr.skip(), payload

    def remove(self, text: str, event: gr.EventData) -> str:
        """The class names without the one whose chip was clicked."""
        return names_text(n for n in class_names(text) if len(distinct([n, event.name])) == 2)

    def preset(self, name: str, backbone: str) -> str | dict:
        """The class names of a data set, without those that the model cannot read."""
        text = known.presets(backbone).get(name)
        if text is None:
            return gr.skip()
        names = class_names(text)
        if too_long := self.service.too_long(names, backbone):
            gr.Info(f"Left out, too long for this model: {html.escape(', '.join(too_long[:5]))}.")
        return names_text(name for name in names if name not in too_long)

    def choose(
        self, backbone: str, pack: str, former: tuple[str, str], progress: gr.Progress = PROGRESS
    ) -> Iterator[Updates]:
        """Loads another model; what cannot be had leaves the former one, with one message."""
        try:
            asked = backbone, pack if backbone == former[0] else ""
            for at in with_heartbeat(self.runs.load(*asked)):
                _report(progress, at and at[0])
                yield {self.shown["former"]: gr.skip()}
            model = self.service.model(*asked)
        except (TaptError, gr.Error) as error:
            _warn(error)
            model = self.service.model(*former)
        yield self._chosen(model)

    def _chosen(self, model: Model) -> Updates:
        backbone, pack, shown = model.backbone.name, model.pack.name, self.shown
        packs = list(dict.fromkeys([*self.service.packs(backbone), pack]))
        return {
            self.fields["backbone"]: backbone,
            self.fields["pack"]: gr.update(choices=packs, value=pack),
            shown["head"]: render.header(model),
            shown["former"]: (backbone, pack),
            shown["preset"]: gr.update(choices=list(known.presets(backbone)), value=None),
            shown["evidence"]: evidence.recorded(model.pack.evaluation),
            shown["condition"]: gr.update(**evidence.conditions(model.pack.evaluation)),
            **{self.fields[name]: value for name, value in self._own(model).items()},
        }

    def packs(self, backbone: str, pack: str) -> dict:
        """The choices of the pack, those of the Hub among them, and a word where it is silent."""
        names, info = self.service.packs(backbone), "From the list, or owner/repo of the Hub."
        try:
            names += self.service.hub_packs(backbone)
        except TaptError as error:
            info = f"{error} Only the packs at hand are listed."
        return gr.update(choices=list(dict.fromkeys([*names, pack])), info=info)

    def chart(self, chosen: str, former: tuple[str, str]) -> Any:
        """The chart of one condition of the pack's recorded rows."""
        model = self.service.at_hand(*former)
        figure = evidence.chart(model.pack.evaluation, chosen) if model and chosen else None
        return gr.Plot(figure, visible=figure is not None)

    def restore(self, event: gr.EventData) -> Updates:
        """The inputs of a link."""
        try:
            values = links.from_link(event.link)
            request = self.runs.request(values)
            asked, changes = request.fields, request.fields.settings or {}
            model = self.service.at_hand(asked.backbone, asked.pack)
            if model is None:
                raise InputError(f"Choose the model {asked.backbone} with {asked.pack} first.")
        except (TaptError, gr.Error) as error:
            _warn(error)
            return {self.shown["former"]: gr.skip()}
        plain = {**asked.model_dump(), "image": request.picture, "true_class": request.label or ""}
        plain["defenses"] = [row.name for row in find_defenses(asked.defenses)]
        for name, value in self._own(model).items():
            changed = changes.get(name, changes.get(name.partition(".")[2], value))
            plain[name] = inputs.setting_text(changed)
        return {component: plain[name] for name, component in self.fields.items()}


def attackable(names: Sequence[str]) -> list[tuple[str, str]]:
    """What the attack may see: both fixed models, and the named defences as they are deployed."""
    fixed = [("Vanilla CLIP", "clip"), ("Static prompts", "static")]
    rows = [row for row in all_defenses() if row.name not in ("clip", "static")]
    every = [(f"{row.title}, deployed", f"deployed:{row.name}") for row in rows]
    return fixed + [row for row in every if {row[1], row[1].partition(":")[2]} & {*names}]


def _visible(on: bool) -> dict:
    return gr.update(visible=on)


def _warn(error: Exception) -> None:
    text = getattr(error, "message", None) or html.escape(str(error), quote=False)
    gr.Warning(text)


def _filled(answers: Mapping[str, Any]) -> int:
    """How many answers are there of a comparison, or of a sweep."""
    rows = (row if isinstance(row, list) else vars(row).values() for row in answers.values())
    return sum(answer is not None for row in rows for answer in row)


def _report(progress: gr.Progress, at: Any) -> None:
    if at is None:
        return
    phase, done, unit = PHASES.get(at.name, at.name), at.done, "steps"
    if at.name == "download":
        unit = "bytes"
    if at.name == "waiting":
        phase, done = f"Waiting for {done} run{'s' * (done > 1)}", 0
    progress((done, max(1, at.total)), desc=phase, unit=unit)
