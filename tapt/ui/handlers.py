"""From what a person does to what is on the screen."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
import pandas as pd

from tapt.comparison import Comparison
from tapt.core.attacks import METHODS
from tapt.core.errors import InputError, TaptError
from tapt.core.images import to_picture
from tapt.core.settings import shown
from tapt.data.names import MAX_CLASSES, class_names, distinct, names_text, parse_classes
from tapt.defenses import all_defenses, find_defenses
from tapt.evaluation.sweep import Sweep
from tapt.model import Model
from tapt.ui import inputs, known, links, render
from tapt.ui.background import Runs, with_heartbeat
from tapt.ui.inputs import FIELDS, SWEEP_ONLY, read_fields, read_picture, read_request
from tapt.ui.service import Service

Raw = Mapping[Any, Any]
CHOICES = 100  # of a dropdown; longer lists are typed
PHASES = {"attack": "Attacking", "download": "Fetching the model", "waiting": "Waiting, runs ahead"}


class Handlers:
    """The page's event handlers; nothing is left of a call when it ends.

    fields: the components of a request by name; those of a defence's settings as `DEFENCE.NAME`.
    """

    def __init__(self, service: Service, runs: Runs, fields: Mapping[str, Any]) -> None:
        self.service, self.runs, self.fields = service, runs, fields

    def values(self, raw: Raw) -> dict[str, Any]:
        """The request in components' values; settings that are left empty are the pack's own."""
        given = {name: raw.get(component) for name, component in self.fields.items()}
        settings = {
            name: value
            for name, value in given.items()
            if "." in name
            and value not in (None, "")
            and name.partition(".")[0] in given["defenses"]
        }
        plain = {name: value for name, value in given.items() if "." not in name}
        return {**plain, "settings": settings}

    def compare(self, raw: Raw, progress: gr.Progress = gr.Progress()) -> Iterator[tuple]:  # noqa: B008
        """Yields (sentence, rows, slider, pictures, take-away, Stop, ...) as they come."""
        values = self.values(raw)
        with inputs.in_words():
            request = self.runs.request(values)
            before: list[bool] | None = None
            result: Comparison | None = None
            yield render.note("Running…"), *(gr.skip(),) * 4, gr.update(visible=True)
            for at, result in self.runs.compare(request):
                _show(progress, at)
                answers = [a for r in (result.answers if result else {}).values() for a in _both(r)]
                now = [answer is not None for answer in answers]
                if result is None or now == before or result.finished:
                    yield (gr.skip(),) * 6
                    continue
                before = now
                sentence = render.note(f"So far {result.counts()}." if any(now) else "Running…")
                yield sentence, render.results(result), *(gr.skip(),) * 4
            assert result is not None
            yield self._finished(result, request)

    def _finished(self, result: Comparison, request: inputs.Request) -> tuple:
        both = None
        if result.attacked is not None:
            both = to_picture(result.clean), to_picture(result.attacked)
        link = links.to_link(request.values, to_picture(result.clean))
        seconds = result.seconds["total"]
        return (
            render.note(f"{result.verdict()} Done in {seconds:.1f} s."),
            render.results(result),
            gr.update(value=both, visible=both is not None),
            render.pictures(result),
            render.take_away(result, link, request.fields.settings or {}),
            gr.update(visible=False),
        )

    def sweep(self, raw: Raw, progress: gr.Progress = gr.Progress()) -> Iterator[tuple]:  # noqa: B008
        """Yields (notes, points of the chart, rows of the table, Stop)."""
        with inputs.in_words():
            request = self.runs.request(self.values(raw))
            if request.attack is None:
                raise InputError("Choose an attack first: a sweep shows what more of it does.")
            before, result = -1, None
            yield "", None, None, gr.update(visible=True)
            for at, result in self.runs.sweep(request):
                _show(progress, at)
                count = -1 if result is None else sum(map(len, result.probabilities.values()))
                yield self._swept(result) if result and count != before else (gr.skip(),) * 4
                before = count
            assert result is not None
            yield *self._swept(result)[:3], gr.update(visible=False)

    def _swept(self, result: Sweep) -> tuple:
        points = pd.DataFrame(render.sweep_points(result))
        if points.empty:
            return (gr.skip(),) * 4
        order = list(points.defence.unique())
        rows = points.pivot_table(index="epsilon", columns="defence", values="probability")[order]
        title = f"p({result.label})"
        chart = gr.LinePlot(points, y_title=title, x_lim=[0, max(1, result.epsilons[-1])])
        return render.sweep_notes(result), chart, rows.reset_index(), gr.skip()

    def faults(self, raw: Raw) -> Any:
        """For each component, in the order of the page, what is wrong with its value."""
        values = self.values(raw)
        found: dict[str, str] = {}
        for name, value in values.items():
            if name not in ("image", "settings"):
                _try(found, name, lambda n=name, v=value: read_fields({n: v}))  # type: ignore[misc]
        for name, value in values["settings"].items():
            _try(found, name, lambda n=name, v=value: read_fields({"settings": {n: v}}))  # type: ignore[misc]
        classes = _try(found, "class_names", lambda: parse_classes(values["class_names"] or ""))
        for name, word in (("true_class", "true class"), ("target", "target")):
            if classes:
                text = values[name] or ""
                _try(found, name, lambda t=text, w=word: inputs.read_class(w, t, tuple(classes)))  # type: ignore[misc]
        if values["image"] is None:
            found["image"] = "Choose a picture first: upload one, paste one or pick an example."
        if not found:
            _try(found, "class_names", lambda: self._too_long(values, classes or []))
        return [gr.validate(name not in found, found.get(name, "")) for name in self.fields]

    def _too_long(self, values: Mapping[str, Any], classes: Sequence[str]) -> None:
        if long := self.service.too_long(classes, values["backbone"]):
            raise InputError(f"Too long for this model: {', '.join(map(shown, long[:3]))}.")

    def picture(self, payload: Any, former: Any) -> tuple[Any, Any]:
        """A new picture and itself to be remembered, or the former one and a word."""
        try:
            data = None if payload is None else inputs.PictureData.model_validate(payload)
            read_picture(data, self.runs.uploads)
        except (InputError, gr.Error) as error:
            gr.Warning(str(getattr(error, "message", error)))
            return (former and former["path"]), former
        return gr.skip(), payload

    def classes(self, text: str, true_class: str, target: str, backbone: str) -> tuple:
        """What was understood of the class names: chips, the fold's label, choices of classes."""
        every = class_names((text or "")[: inputs.MAX_TEXT])
        names = distinct(every)
        unknown = known.unknown_names(names, backbone)
        too_long = self.service.too_long(names[:MAX_CLASSES], backbone)
        found: dict[str, str] = {}
        _try(found, "fault", lambda: parse_classes(names))
        chips = render.chips(
            names, len(every) - len(names), unknown, too_long, found.get("fault", "")
        )
        strange = f", {len(unknown)} never seen" if unknown else ""
        label = f"It may answer one of {len(names):,} names{strange} ✎"
        return (
            chips,
            gr.update(label=label),
            *(
                gr.update(choices=[("not known" if i == 0 else "any other", ""), *names[:CHOICES]])
                for i, _ in enumerate((true_class, target))
            ),
        )

    def preset(self, name: str, backbone: str) -> str | dict:
        """The class names of a data set, without those that the model cannot read."""
        text = known.presets(backbone).get(name)
        if text is None:
            return gr.skip()
        names = class_names(text)
        if too_long := self.service.too_long(names, backbone):
            listed = html.escape(", ".join(too_long[:5]))
            gr.Info(f"Left out, too long for this model: {listed}.")
        return names_text(name for name in names if name not in too_long)

    def plan(self, raw: Raw) -> tuple:
        """The line on the attack with its time, what it is, and which of its fields apply."""
        values = self.values(raw)
        method, attacked = METHODS.get(values["attack"]), values["attacked_model"]
        seconds = None
        try:
            seconds = self.service.estimate(self.runs.request(values))
        except (TaptError, gr.Error):
            pass  # the button says what is wrong
        epsilon = values["epsilon"]
        line = render.plan(values["attack"], epsilon, attacked, seconds)
        linf = method is not None and method.norm == "Linf"
        fields = (linf, method is not None, method and method.step_size, method and method.targeted)
        return (
            gr.update(label=line),
            render.attack_note(method, attacked),
            *(gr.update(visible=bool(on)) for on in fields),
        )

    def ticks(self, names: Sequence[str], backbone: str, attacked: str) -> tuple:
        """Costs of the defences, the settings of those that answer, and what may be attacked."""
        choices = []
        for row in all_defenses():
            seconds = self.service.seconds(backbone, row.name)
            cost = "" if seconds is None else f" · {render.duration(seconds)}"
            choices.append((row.title + cost, row.name))
        return (
            gr.update(choices=choices),
            gr.update(choices=attackable(names, attacked)),
            *(gr.update(visible=row.name in names) for row in with_settings()),
        )

    def choose(
        self,
        backbone: str,
        pack: str,
        former: tuple[str, str],
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:
        """Backbone, pack, what is loaded, both to be remembered, evidence; then own settings as
        placeholders. What cannot be had leaves the former ones, with one message."""
        try:
            if backbone != former[0]:
                pack = ""
            for at in with_heartbeat(self.runs.load(backbone, pack)):
                _show(progress, at and at[0])
                yield (gr.skip(),) * self.chosen_count
            model = self.service.model(backbone, pack)
        except (TaptError, gr.Error) as error:
            gr.Warning(html.escape(str(getattr(error, "message", error)), quote=False))
            model = self.service.model(*former)
        yield self.chosen(model)

    @property
    def chosen_count(self) -> int:
        return 6 + sum("." in name for name in self.fields)

    def chosen(self, model: Model) -> tuple:
        """The values of `choose` for a loaded model."""
        backbone, pack = model.backbone.name, model.pack.name
        packs = list(dict.fromkeys([*self.service.packs(backbone), pack]))
        rows = model.pack.evaluation
        return (
            backbone,
            gr.update(choices=packs, value=pack),
            render.header(model),
            (backbone, pack),
            render.evidence(rows)[1],
            conditions(rows),
            *placeholders(model, self.fields),
        )

    def packs(self, backbone: str, pack: str) -> dict:
        """The choices of the pack, those of the Hub among them, and a word where it is silent."""
        names, info = self.service.packs(backbone), "From the list, or owner/repo of the Hub."
        try:
            names += self.service.hub_packs(backbone)
        except TaptError as error:
            info = f"{error} Only the packs at hand are listed."
        return gr.update(choices=list(dict.fromkeys([*names, pack])), info=info)

    def evidence(self, chosen: str, former: tuple[str, str]) -> Any:
        """The chart of one condition of the pack's recorded rows."""
        model = self.service.at_hand(*former)
        return render.chart(model.pack.evaluation, chosen) if model and chosen else None

    def restore(self, event: gr.EventData) -> list:
        """Every field as a link says, in the order of the page; what it lacks stays."""
        try:
            values = links.from_link(event.link)  # type: ignore[attr-defined]
            request = read_request(values, self.runs.uploads)
            asked = request.fields
            if self.service.at_hand(asked.backbone, asked.pack) is None:
                raise InputError(
                    f"This link asks for model {asked.backbone} with {asked.pack}: choose them "
                    "under Settings first, then open it again."
                )
        except (TaptError, gr.Error) as error:
            gr.Warning(html.escape(str(getattr(error, "message", error)), quote=False))
            return [gr.skip()] * len(self.fields)
        plain = {name: values[name] for name in FIELDS if name in values} | {
            "image": request.picture,
            "defenses": [row.name for row in find_defenses(asked.defenses)],
            "true_class": request.label or "",
            "target": request.target or "",
        }
        changes = asked.settings or {}
        filled = {n: changes.get(n, changes.get(n.rpartition(".")[2])) for n in self.fields}
        return [filled[name] if "." in name else plain.get(name, gr.skip()) for name in self.fields]


def conditions(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The choices of the chart; that of most pictures first."""
    ordered = sorted(rows, key=lambda row: -row["n"])
    choices = list(dict.fromkeys(map(render.condition, ordered)))
    return gr.update(choices=choices, value=choices[0] if choices else None)


def attackable(names: Sequence[str], attacked: str = "clip") -> list[tuple[str, str]]:
    """What the attack may see: both fixed models, and every shown defence as it is deployed."""
    fixed = [("Vanilla CLIP", "clip"), ("Static prompts", "static")]
    rows = [row for row in all_defenses() if row.name not in ("clip", "static")]
    return fixed + [
        (f"{row.title}, deployed", f"deployed:{row.name}")
        for row in rows
        if row.name in names or attacked == f"deployed:{row.name}"
    ]


def with_settings() -> list[Any]:
    """The defences that have settings."""
    return [row for row in all_defenses() if row.settings.model_fields]


def placeholders(model: Model, fields: Mapping[str, Any]) -> list[Any]:
    """The pack's own settings, as they look in fields that are left empty."""
    own = {
        f"{row.name}.{key}": value
        for row in with_settings()
        for key, value in model.settings(row).model_dump().items()
    }
    return [
        gr.update(placeholder=f"{own[name]:g}" if isinstance(own[name], float) else str(own[name]))
        if isinstance(component, gr.Number)
        else gr.update(info=f"Own: {own[name]}")
        for name, component in fields.items()
        if "." in name
    ]


def _both(row: Any) -> tuple:
    return row.clean, row.attacked


def _try(found: dict[str, str], name: str, check: Any) -> Any:
    """The value of `check`; what it refuses is noted under the field's name."""
    try:
        return check()
    except InputError as error:
        found.setdefault(name, str(error))
        return None


def _show(progress: gr.Progress, at: Any) -> None:
    if at is not None:
        phase = PHASES.get(at.phase, at.phase)
        total = max(1, at.total)
        progress((at.done, total), desc=phase, unit="bytes" if at.phase == "download" else "steps")
