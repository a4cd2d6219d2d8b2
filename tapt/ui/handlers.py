"""From a request to the values on the screen."""

from __future__ import annotations

import html
import inspect
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields, is_dataclass, replace
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from tapt.comparison import Comparison
from tapt.core.attacks import METHODS
from tapt.core.errors import InputError, TaptError
from tapt.core.images import to_picture
from tapt.data.names import MAX_CLASSES, class_names
from tapt.data.pictures import open_image
from tapt.defenses import find_defenses
from tapt.defenses.deployed import attack_seconds
from tapt.evaluation.sweep import Sweep, sweep_steps
from tapt.model import DRAWS, VICTIM, Model, Progress, in_thread
from tapt.ui import details, inputs, known, links, on_gpu, render
from tapt.ui.background import with_heartbeat
from tapt.ui.service import EMBEDDED_BACKBONE, Service

BROKEN = "This run failed on the server, for a reason that its log names. Please try again."
MODEL_FIELDS = ("backbone", "pack", *inputs.TEST_TIME)


def _endpoint(names: Sequence[str]) -> Callable[[Callable], Callable]:
    """Names the parameters of an API endpoint, checks the request, and shows the person one
    sentence whatever goes wrong."""

    def decorate(function: Callable) -> Callable:
        def run(self: Handlers, *values: object) -> Iterator:
            try:
                raw = dict(zip(names, values, strict=True))
                yield from function(self, inputs.read_request(raw, self.uploads))
            except TaptError as error:
                raise inputs.refusal(error) from error
            except gr.Error:
                raise
            except Exception as error:
                raise gr.Error(BROKEN) from error  # with its traceback in the log

        kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        parameters = [
            inspect.Parameter(name, kind, default=empty if name in ("self", "image") else None)
            for name in ("self", *names)
        ]
        run.__signature__ = inspect.Signature(parameters)
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        return run

    return decorate


class Handlers:
    """The page's event handlers; nothing is left of a call when it ends.

    uploads: the folder that pictures of requests may be read from.
    """

    OUTPUTS = 8

    def __init__(self, service: Service, uploads: str) -> None:
        self.service = service
        self.uploads = uploads
        self._gpu_steps, self._gpu_sweep = on_gpu(self._steps), on_gpu(self._sweep_steps)
        self._gpu_estimate = on_gpu(self._estimate)

    @_endpoint(inputs.FIELDS)
    def compare(self, request: inputs.Request) -> Iterator[tuple]:
        """Yields (status, verdict, answers, pictures, perturbation, details, downloads, JSON).

        Only changed values are sent in between; the last yield carries every one.
        """
        yield render.status("Reading the class names"), "", "", None, "", "", "", None
        before = None
        for bar, result in self._progress(request, self._gpu_steps):
            now = None if result is None else _answered(result)
            if result is not None and result.finished:
                break
            if now == before:
                yield bar, *(gr.skip(),) * (self.OUTPUTS - 1)
            else:
                # a picture that is written again could reach the browser by halves
                pictures = before is None or before[0] != now[0]
                before = now
                yield bar, *self._values(result, request, pictures=pictures)
        yield render.finished(result.seconds["total"]), *self._values(result, request)

    @_endpoint(inputs.SWEEP_FIELDS)
    def sweep(self, request: inputs.Request) -> Iterator[tuple]:
        """Yields (status, curves, published accuracy, JSON), filling in."""
        if request.attack is None:
            raise InputError("Choose an attack first: a sweep shows what more of it does.")
        yield render.status("Reading the class names"), "", "", None
        began, before, published, result = time.monotonic(), None, "", None
        for bar, result in self._progress(request, self._gpu_sweep):
            points = result and [len(values) for values in result.probabilities.values()]
            if points == before:
                yield bar, gr.skip(), gr.skip(), gr.skip()
                continue
            before = points
            published = published or render.published(self._model(request).pack)
            yield bar, render.sweep(result), published, result.to_dict()
        bar = render.finished(time.monotonic() - began)
        yield bar, render.sweep(result), published, result.to_dict()

    @_endpoint(inputs.FIELDS)
    def analyze(self, request: inputs.Request) -> Iterator[dict]:
        """The JSON object of `python -m tapt predict --json`, once all is there."""
        result = None
        for _, now in self._progress(request, self._gpu_steps):
            result = now
            yield gr.skip()
        yield result.to_dict()

    def _progress(
        self, request: inputs.Request, steps: Callable[[inputs.Request], Generator]
    ) -> Iterator[tuple[Any, Any]]:
        """Pairs of the status and what is there by then, nothing before the model is loaded."""

        def work() -> Generator[tuple[Progress, Any], None, None]:
            yield from self._load(request.fields.backbone, request.fields.pack)  # not in a fork
            with closing(steps(request)) as computed:
                yield from computed

        phase, began, result = "", 0.0, None
        for step in with_heartbeat(work()):
            if step is None:
                yield gr.skip(), result
                continue
            progress, result = step
            if progress.phase != phase:
                phase, began = progress.phase, time.monotonic()
            bar = render.status(phase, progress.done, progress.total, time.monotonic() - began)
            yield bar, result

    def _load(self, backbone: str, pack: str) -> Generator[tuple[Progress, None], None, Model]:
        def load(report: Callable[[int, int], None]) -> Model:
            return self.service.model(backbone, pack, report)

        return (yield from in_thread("download", None, load))

    def _model(self, request: inputs.Request) -> Model:
        return self.service.model(request.fields.backbone, request.fields.pack)

    def _steps(self, request: inputs.Request) -> Generator[tuple[Progress, Comparison], None, None]:
        yield from self._computed(request, Model.compare_steps)

    def _sweep_steps(
        self, request: inputs.Request
    ) -> Generator[tuple[Progress, Sweep], None, None]:
        yield from self._computed(request, sweep_steps, epsilons=request.epsilons)

    def _computed(
        self, request: inputs.Request, compute: Callable, **options: object
    ) -> Generator[tuple[Progress, Any], None, None]:
        try:
            model = self._model(request)
            steps = compute(
                model,
                request.picture,
                request.classes,
                attack=request.attack,
                attacked=request.fields.attacked_model,
                label=request.label,
                target=request.target,
                draws=_draws(request),
                defenses=request.fields.defenses,
                settings=_changes(model, request),
                seed=request.fields.seed,
                **options,
            )
            with closing(steps):
                for progress, result in steps:
                    yield progress, _snapshot(result)
        except TaptError as error:  # another process can only hand on gradio's own errors
            raise inputs.refusal(error) from error

    def _values(
        self, result: Comparison, request: inputs.Request, *, pictures: bool = True
    ) -> tuple[Any, ...]:
        both = None
        if result.attacked is not None:
            both = to_picture(result.clean), to_picture(result.attacked)
        embedded = result.settings["backbone"] == EMBEDDED_BACKBONE
        unknown = known.unknown_names(result.classes) if embedded else []
        numbers = {
            "verdict": result.verdict(),
            "finished": result.finished,
            "unknown_classes": unknown,
            **result.to_dict(),
        }
        take_away = ""
        if result.finished:
            link = links.to_link(request.values, to_picture(result.clean))
            take_away = render.downloads(result, numbers, link)
        return (
            render.verdict(result, unknown),
            render.table(result) + render.facts(result),
            both if pictures else gr.skip(),
            render.perturbation(result),
            details.what_happened(result),
            take_away,
            numbers,
        )

    def start(self, link: str) -> tuple:
        """The inputs as the page opens, in the order of `inputs.FIELDS`: an example, or what a
        link restores; then the line about the model."""
        try:
            if link:
                values = links.from_link(link)
                request = inputs.read_request(values, self.uploads)
                model = self._model(request)
                values |= {"true_class": request.label or "", "target": request.target or ""}
                values["defenses"] = [row.name for row in find_defenses(request.fields.defenses)]
                names = [("", ""), *((name, name) for name in request.classes)]
                for name in ("true_class", "target"):
                    values[name] = gr.update(value=values[name], choices=names)
                rest = (values.get(name) for name in inputs.FIELDS[1 : -len(MODEL_FIELDS)])
                return request.picture, *rest, *self._model_values(model, values)
        except TaptError as error:
            gr.Warning(html.escape(str(error), quote=False))
        skipped = (gr.skip(),) * (len(inputs.FIELDS) - 1 - len(MODEL_FIELDS))
        return (
            open_image(known.EXAMPLES[0].path),
            *skipped,
            *self._model_values(self.service.model(), {}),
        )

    def choose(self, backbone: str, pack: str = "") -> Iterator[tuple]:
        """The fields of the defence for a backbone and a pack, with the pack's own settings, and
        the line about the model."""
        try:
            asked = inputs.read_fields({"backbone": backbone, "pack": pack})
            at = Progress("Loading the model", 0, 0)
            for step in with_heartbeat(self._load(asked.backbone, asked.pack)):
                at = step[0] if step else at
                bar = render.status(at.phase, at.done, at.total)
                yield *(gr.skip(),) * len(MODEL_FIELDS), bar
            yield self._model_values(self.service.model(asked.backbone, asked.pack), {})
        except TaptError as error:
            text = f'<p class="t-warning">{html.escape(str(error))}</p>'
            yield *(gr.skip(),) * len(MODEL_FIELDS), text  # in the place of the progress
            raise inputs.refusal(error) from error

    def packs(self, backbone: str, pack: str) -> dict:
        """The choices of the pack, those of the Hub among them, and a word where it is silent."""
        backbone = backbone or self.service.first.backbone.name
        names, info = self.service.packs(backbone), render.PACK_INFO
        try:
            names += self.service.hub_packs(backbone)
        except TaptError as error:
            info = f"{error} Only the packs at hand are listed."
        return gr.update(choices=list(dict.fromkeys([*names, pack])), info=info)

    def _model_values(self, model: Model, changed: Mapping[str, object]) -> tuple:
        own = _own_settings(model)
        values = {name: own[setting] for name, setting in inputs.TEST_TIME.items()}
        values |= {k: v for k, v in changed.items() if k in values and v is not None}
        backbone, pack = model.backbone.name, model.pack.name
        names = list(dict.fromkeys([*self.service.packs(backbone), pack]))
        packs = gr.update(choices=names, value=pack)
        return backbone, packs, *values.values(), render.model_line(model)

    def preview(self, picture: Image.Image | None, backbone: str) -> str:
        """What the model gets of a picture."""
        if picture is None:
            return ""
        try:
            model = self.service.model(backbone)
        except TaptError as error:
            raise inputs.refusal(error) from error
        return render.preview(to_picture(model.backbone.preprocess(picture)))

    def preset(self, name: str, backbone: str) -> str | dict:
        """The class names of a data set, without those that the embedded model cannot read."""
        text = known.presets().get(name)
        if text is None:
            return gr.skip()
        names = class_names(text)
        too_long = self.service.too_long(names) if backbone == EMBEDDED_BACKBONE else []
        if too_long:
            gr.Info(f"Left out, too long for this model: {render.listed(too_long)}.")
            text = "\n".join(each for each in names if each not in too_long)
        return text

    def classes(self, text: str, true_class: str, target: str, backbone: str) -> tuple:
        """What is to say about the class names, and the choices of the true class and target."""
        every = class_names((text or "")[: inputs.MAX_TEXT])
        first: dict[str, str] = {}
        for name in every:
            first.setdefault(name.casefold(), name)
        names = list(first.values())
        choices = names[:MAX_CLASSES]
        unknown, too_long = None, []
        if backbone == EMBEDDED_BACKBONE:
            unknown, too_long = known.unknown_names(names), self.service.too_long(choices)
        note = render.classes_note(len(names), len(every) - len(names), unknown, too_long)
        return note, *(
            gr.update(choices=[(empty, ""), *choices], value=value if value in choices else "")
            for empty, value in ((render.NO_LABEL, true_class), (render.NO_TARGET, target))
        )

    def attack(self, name: str, attacked: str) -> tuple:
        """The lines that explain an attack and the attacked model, and which fields apply to it:
        epsilon, attacked model, step size, target."""
        method = METHODS.get(name)
        shown = (
            method is not None and method.norm == "Linf",
            method is not None,
            method is not None and method.step_size,
            method is not None and method.targeted,
        )
        return render.attack_note(method, attacked), *(gr.update(visible=on) for on in shown)

    def estimate(self, *values: object) -> str:
        """How long an attack on the deployed defence will take; nothing for the other attacks."""
        try:
            raw = dict(zip(inputs.FIELDS, values, strict=True))
            request = inputs.read_request(raw, self.uploads)
            if request.attack is None or request.fields.attacked_model != "deployed":
                return ""
            self._model(request)  # loaded here, not in a fork
            return render.estimate(*self._gpu_estimate(request))
        except (TaptError, gr.Error):
            return ""  # Run says what is wrong

    def _estimate(self, request: inputs.Request) -> Generator[float, None, None]:
        model = self._model(request)
        clip, changes = model.prepare(request.classes), _changes(model, request)
        prepared = model.prepare_defenses(clip, [VICTIM], changes)[VICTIM]
        yield attack_seconds(prepared, request.attack, draws=_draws(request))


def _own_settings(model: Model) -> dict[str, Any]:
    """The pack's test-time settings by name; where two defences have one, the later one's."""
    own: dict[str, Any] = {}
    for defense in find_defenses():
        own |= model.settings(defense).model_dump()
    return own


def _changes(model: Model, request: inputs.Request) -> dict[str, float]:
    """The test-time settings that the request changes."""
    own = _own_settings(model)
    return {name: value for name, value in request.changes.items() if value != own[name]}


def _draws(request: inputs.Request) -> int:
    """A query is one draw; a gradient is an average."""
    return DRAWS if request.attack is None or request.attack.method.gradients else 1


def _snapshot(value: Any) -> Any:
    """A copy to read while the run goes on in its own thread, with its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _snapshot(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(value)
    if is_dataclass(value):
        return replace(value, **{f.name: _snapshot(getattr(value, f.name)) for f in fields(value)})
    return value


def _answered(result: Comparison) -> tuple[bool, list[bool]]:
    """What is there, to be compared."""
    answers = [answer for row in result.answers.values() for answer in (row.clean, row.attacked)]
    return result.attacked is not None, [answer is not None for answer in answers]
