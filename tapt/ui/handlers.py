"""From a request to the values on the screen."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import gradio as gr
from PIL import Image

from tapt.attacks import AttackConfig
from tapt.compare import Comparison, Progress, compare_steps
from tapt.defense import parse_classes
from tapt.errors import InputError, TaptError
from tapt.images import to_picture
from tapt.ui import inputs, render
from tapt.ui.background import with_heartbeat
from tapt.ui.known import unknown_names
from tapt.ui.service import Service

OUTPUTS = 6
BROKEN = "This run failed on the server, for a reason that its log names. Please try again."


class Handlers:
    """The page's event handlers; they keep nothing between two calls.

    uploads: the folder that pictures of requests may be read from.
    """

    def __init__(self, service: Service, uploads: str) -> None:
        self.service = service
        self.uploads = uploads

    def compare(
        self,
        image: dict | None,
        class_names: str | None,
        attack: bool,
        epsilon: float,
        threat: str,
        true_class: str | None = None,
    ) -> Iterator[tuple]:
        """Yields (status, verdict, table, pictures, perturbation, JSON) until all is there.

        Only changed values are sent in between; the last yield carries every one.
        """
        try:
            yield from self._compare(image, class_names, attack, epsilon, threat, true_class)
        except TaptError as error:
            raise inputs.refusal(error) from error
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(BROKEN) from error  # with its traceback in the log

    def _compare(self, image, class_names, attack, epsilon, threat, true_class) -> Iterator[tuple]:
        payload = None if image is None else inputs.PictureInput.data_model(**image)
        picture = inputs.read_picture(payload, self.uploads)
        if picture is None:
            raise InputError("Choose a picture first: upload one, paste one or pick an example.")
        classes = tuple(parse_classes(inputs.read_text("Class names", class_names)))
        label = inputs.read_label(inputs.read_text("True class", true_class), classes)
        config = inputs.read_attack(attack, epsilon, threat)
        yield render.status("Reading the class names"), "", "", None, "", None

        seen = None
        for step in with_heartbeat(self._steps(picture, classes, config, threat, label)):
            if step is None:
                yield (gr.skip(),) * OUTPUTS
                continue
            progress, result = step
            if result.finished:
                break
            bar = render.status(progress.phase, progress.done, progress.total)
            answers = _answers(result)
            if answers == seen:
                yield bar, *(gr.skip(),) * (OUTPUTS - 1)
            else:
                seen = answers
                yield bar, *self._values(result)
        yield render.finished(result.seconds["total"]), *self._values(result)

    def _steps(
        self,
        picture: Image.Image,
        classes: tuple[str, ...],
        config: AttackConfig | None,
        threat: str,
        label: str | None,
    ) -> Generator[tuple[Progress, Comparison], None, None]:
        service = self.service
        names = {"backbone": service.backbone_name, "pack": service.pack_name}
        steps = compare_steps(
            service.defender(classes), picture, attack=config, threat=threat, label=label
        )
        with closing(steps):
            for progress, result in steps:
                result.settings.update(names)  # visitors need not know the server's folders
                yield progress, _snapshot(result)

    def _values(self, result: Comparison) -> tuple[Any, ...]:
        attacked = result.attacked is not None
        unknown = unknown_names(result.classes) if self.service.embedded else []
        trained = self.service.pack.trained
        return (
            render.verdict(result, trained=trained, unknown=unknown),
            render.facts(result, trained=trained) + render.table(result, trained=trained),
            (to_picture(result.clean), to_picture(result.attacked)) if attacked else None,
            render.perturbation(result),
            {
                "verdict": result.verdict(),
                "finished": result.finished,
                "unknown_classes": unknown,
                **result.to_dict(),
            },
        )

    def preview(self, picture: Image.Image | None) -> str:
        """What the model will see of a picture."""
        if picture is None:
            return ""
        return render.preview(to_picture(self.service.backbone.preprocess(picture)))

    def classes_note(self, class_names: str) -> str:
        """What the embedded model makes of the class names; nothing for other backbones."""
        if not self.service.embedded:
            return ""
        try:
            names = parse_classes(class_names or "")
        except InputError:
            names = []
        return render.classes_note(unknown_names(names))


def _snapshot(result: Comparison) -> Comparison:
    """A copy to read while the run goes on in its own thread."""
    return replace(
        result,
        results={name: dict(kinds) for name, kinds in result.results.items()},
        traces=dict(result.traces),
        seconds=dict(result.seconds),
    )


def _answers(result: Comparison) -> set[tuple[str, str]]:
    return {
        (name, kind)
        for name, kinds in result.results.items()
        for kind, probabilities in kinds.items()
        if probabilities is not None
    }
