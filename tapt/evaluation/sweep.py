"""What a stronger attack does to every defence on one picture."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from tapt.comparison import attacked_title, versions
from tapt.core.attacks import METHODS, Attack
from tapt.core.errors import InputError
from tapt.core.images import open_image
from tapt.core.views import image_seeds
from tapt.defenses import ImageBatch, find_defenses
from tapt.model import DRAWS, Changes, Model, Picture, Progress, Task, in_thread, timed

EPSILONS = tuple(range(9))
VARIES = ("epsilon", "epsilon_255", "step_size")


@dataclass(eq=False)
class Sweep:
    """Curves as far as they are there.

    label: the true class; `label_given` says whether a person named it.
    epsilons: in 1/255; 0 is the clean picture.
    probabilities: per defence, of the true class, for the first of the `epsilons`.
    answers: per defence, the top class name.
    """

    label: str
    label_given: bool
    epsilons: tuple[int, ...]
    settings: dict[str, Any]
    probabilities: dict[str, list[float]]
    answers: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return {**vars(self), "versions": versions()}

    def __str__(self) -> str:
        """The table of `tapt sweep`: probability of the true class in percent."""
        rows = [["epsilon", *self.probabilities]]
        done = min(map(len, self.probabilities.values()))
        for i, epsilon in enumerate(self.epsilons[:done]):
            values = (f"{100 * values[i]:.1f}" for values in self.probabilities.values())
            rows.append([f"{epsilon}/255", *values])
        width = max(10, *(len(name) + 2 for name in self.probabilities))
        lines = [f"{first:<9}" + "".join(f"{c:>{width}}" for c in rest) for first, *rest in rows]
        return "\n".join([f"probability of {self.label}, %", *lines])


def sweep_steps(
    model: Model,
    image: Picture,
    classes: str | Sequence[str],
    *,
    attack: Attack | None = None,
    attacked: str = "clip",
    label: str | None = None,
    target: str | None = None,
    epsilons: Sequence[int] = EPSILONS,
    defenses: Sequence[str] | None = None,
    settings: Changes = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Iterator[tuple[Progress, Sweep]]:
    """Attacks one picture at every epsilon and yields (progress, curves so far).

    Closing the generator stops the computation as in `Model.compare_steps`.

    attack: its epsilon is replaced; default PGD.
    epsilons: in 1/255, from 0 on.
    attacked, label, target, defenses, settings, seed, draws: as for `Model.compare_steps`.

    Raises:
        InputError: an argument is outside what is allowed, or CW, which has no epsilon.
    """
    attack = attack or Attack(seed=seed)
    if attack.method.norm != "Linf":
        raise InputError(
            f"A sweep needs an attack with an epsilon; {attack.method.title} has none."
        )
    if not epsilons or not all(0 <= epsilon <= 255 for epsilon in epsilons):
        raise InputError("epsilons must be whole numbers from 0 to 255.")
    clip = model.prepare(classes)
    task = Task(model, clip, attack, attacked, label, target, settings, draws)
    prepared = model.prepare_defenses(clip, defenses, settings)
    picture = image if isinstance(image, Image.Image) else open_image(image)
    pixels = model.backbone.preprocess(picture)[None]
    index = task.true_class(pixels)
    described = model.describe(task, prepared, seed)
    described["attack"] = {k: v for k, v in described["attack"].items() if k not in VARIES}
    described.pop("epsilon_255")
    result = Sweep(
        clip.classes[index],
        label is not None,
        tuple(epsilons),
        described,
        {name: [] for name in prepared},
        {name: [] for name in prepared},
    )
    for done, epsilon in enumerate(epsilons):
        phase, shown = f"epsilon {epsilon}/255", pixels
        if epsilon:
            method = attack.updated(epsilon=epsilon / 255)
            shown = yield from in_thread(
                f"{phase}, attack",
                result,
                partial(task.attack, pixels, index, method=method),
            )
        batch = ImageBatch(model.floats(shown), image_seeds(seed, [0]))
        for name, defense in prepared.items():
            prediction, _ = yield from in_thread(
                f"{phase}, {find_defenses([name])[0].title}",
                result,
                partial(timed, defense, batch, model),
            )
            probabilities = prediction.probabilities[0]
            result.probabilities[name].append(float(probabilities[index]))
            result.answers[name].append(clip.classes[int(probabilities.argmax())])
        yield Progress("sweep", done + 1, len(epsilons)), result


def curve_png(result: Sweep) -> bytes:
    """The curves as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(result.probabilities.items()):
        marker = "os^Dv<>P"[i % 8]
        axes.plot(result.epsilons[: len(values)], values, marker=marker, label=name)
    attack, attacked = result.settings["attack"], result.settings["attacked_model"]
    title = f"{METHODS[attack['name']].title}-{attack['steps']} on {attacked_title(attacked)}"
    axes.set_title(title if result.settings["trained"] else f"{title}, untrained prompts")
    axes.set_xlabel("epsilon, 1/255")
    axes.set_ylabel(f"probability of {result.label}")
    axes.set_ylim(-0.02, 1.02)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
