"""What a stronger attack does to every defence on one picture."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tapt.comparison import UNTRAINED, attack_title, versions
from tapt.core.attacks import Attack
from tapt.core.errors import InputError
from tapt.defenses import find_defense
from tapt.model import Model, Picture, Task, timed
from tapt.running import Phase, in_thread

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
        for epsilon, *values in zip(self.epsilons, *self.probabilities.values(), strict=False):
            rows.append([f"{epsilon}/255", *(f"{100 * value:.1f}" for value in values)])
        width = max(10, *(len(name) + 2 for name in self.probabilities))
        lines = [f"{first:<9}" + "".join(f"{c:>{width}}" for c in rest) for first, *rest in rows]
        return "\n".join([f"probability of {self.label}, %", *lines])


def sweep_steps(
    model: Model,
    image: Picture,
    classes: str | Sequence[str],
    *,
    attack: Attack | None = None,
    epsilons: Sequence[int] = EPSILONS,
    **options: Any,
) -> Iterator[tuple[Phase, Sweep]]:
    """Attacks one picture at every epsilon and yields (phase, curves so far).

    Closing the generator stops the computation as in `Model.compare_steps`.

    attack: its epsilon is replaced; default PGD.
    epsilons: in 1/255, from 0 on.
    options: as for `Task`.

    Raises:
        InputError: an argument is outside what is allowed, or CW, which has no epsilon.
    """
    attack = attack or Attack()
    if attack.method.norm != "Linf":
        title = attack.method.title
        raise InputError(f"A sweep needs an attack with an epsilon; {title} has none.")
    if not epsilons or not all(0 <= epsilon <= 255 for epsilon in epsilons):
        raise InputError("epsilons must be whole numbers from 0 to 255.")
    task = Task(model, image, classes, attack, **options)
    names, true = task.clip.classes, task.true_class
    described = task.describe()
    described["attack"] = {k: v for k, v in described["attack"].items() if k not in VARIES}
    described.pop("epsilon_255")
    curves: list[dict[str, list]] = [{name: [] for name in task.prepared} for _ in range(2)]
    result = Sweep(names[true], task.label is not None, tuple(epsilons), described, *curves)
    for done, epsilon in enumerate(epsilons, 1):
        phase, shown = f"epsilon {epsilon}/255", task.pixels
        if epsilon:
            work = partial(task.attacked_by, attack.updated(epsilon=epsilon / 255))
            shown = yield from in_thread(f"{phase}, attack", result, work)
        batch = task.batch(shown)
        for name, defense in task.prepared.items():
            title = find_defense(name).title
            prediction, _ = yield from in_thread(
                f"{phase}, {title}", result, partial(timed, defense, batch, model)
            )
            probabilities = prediction.probabilities[0]
            result.probabilities[name].append(float(probabilities[true]))
            result.answers[name].append(names[int(probabilities.argmax())])
        yield Phase("sweep", done, len(epsilons)), result


def curve_png(result: Sweep) -> bytes:
    """The curves as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(result.probabilities.items()):
        marker = "os^Dv<>P"[i % 8]
        axes.plot(result.epsilons[: len(values)], values, marker=marker, label=name)
    untrained = "" if result.settings["trained"] else f", {UNTRAINED}"
    axes.set_title(attack_title(result.settings) + untrained)
    axes.set_xlabel("epsilon, 1/255")
    axes.set_ylabel(f"probability of {result.label}")
    axes.set_ylim(-0.02, 1.02)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
