"""Attacks on any of our classifiers, in [0, 1] pixels and float32.

The attacked image is rounded to 8 bits and held to epsilon in integers, so that a PNG keeps the
attack and its L-inf is exact. CW has no epsilon: it looks for the smallest L2 change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torchattacks
from pydantic import Field, field_validator
from torch import Generator, Tensor

from tapt.core.algorithms import CW, CW_WEIGHTS, AttackedModel, AutoAttack, Draws, Square, apgd
from tapt.core.clip import Classifier
from tapt.core.errors import InputError
from tapt.core.images import to_float
from tapt.core.settings import Settings
from tapt.core.views import generators, image_seeds
from tapt.progress import Progress, quiet

ONE = 1 / 255 - 1e-9
EPSILON: dict[str, Any] = {"rule": "a number from 1/255 to 1", "fraction": True}
STEP_SIZE: dict[str, Any] = {"rule": "a number above 0 and at most 1", "fraction": True}


class Attack(Settings):
    """What an attack may do; `name` is a row of `METHODS`. Epsilon counts in whole multiples of
    1/255, rounded down, since the attacked image is 8-bit. AutoAttack spends `steps` on each of
    its gradient attacks and 50 times as many queries on Square."""

    name: str = Field("pgd", description="the attack")
    epsilon: float = Field(
        4 / 255, ge=ONE, le=1, description="L-inf radius; CW has none", json_schema_extra=EPSILON
    )
    steps: int | None = Field(
        None, ge=1, le=10_000, description="attack steps, or queries; default: the attack's own"
    )
    step_size: float | None = Field(
        None, ge=1e-6, le=1, description="2.5 * epsilon / steps", json_schema_extra=STEP_SIZE
    )
    random_start: bool = Field(True, description="start PGD, DI and TI inside the ball")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of all that is random")

    def __init__(self, name: str = "pgd", *args: Any, **values: Any) -> None:
        super().__init__(name, *args, **values)  # said for type checkers, who know no positions

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METHODS:
            raise InputError(f"attack must be one of {', '.join(METHODS)}, got {name!r}")
        return name

    @property
    def method(self) -> Method:
        """The row of the table."""
        return METHODS[self.name]

    @property
    def budget_steps(self) -> int:
        """`steps`, or the attack's own number."""
        return self.steps or self.method.steps

    @property
    def epsilon_255(self) -> int | None:
        """Epsilon in whole 1/255 steps; None for an attack without epsilon."""
        return int(self.epsilon * 255 + 1e-6) if self.method.norm == "Linf" else None

    @property
    def step(self) -> float | None:
        """Step size in [0, 1]; None where the attack finds its own."""
        own = 2.5 * (self.epsilon_255 or 0) / 255 / self.budget_steps
        return self.step_size or own if self.method.step_size else None

    @property
    def options(self) -> dict[str, Any]:
        """What its algorithm is built with."""
        options: dict[str, Any] = {"steps": self.budget_steps}
        if self.epsilon_255 is not None:
            options["eps"] = self.epsilon_255 / 255
        if self.step:
            options |= {"alpha": self.step, "random_start": self.random_start}
        return options

    @property
    def budget(self) -> str:
        """What the attack may spend, in words."""
        steps, unit = self.budget_steps, self.method.unit
        return self.method.budget.format(steps=steps, unit=unit, queries=50 * steps)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object with what is really used."""
        epsilon = self.epsilon if self.epsilon_255 is not None else None
        used = {"steps": self.budget_steps, "step_size": self.step, "epsilon": epsilon}
        return {**self.model_dump(), **used}


@dataclass(frozen=True)
class Method:
    """A row of the table of attacks.

    title: display name; about: one line for the person who chooses.
    steps: default iterations; unit: what they are.
    build: takes the model and `Attack.options`, gives images and labels to attacked images.
    norm: `Linf`, or `L2` for an attack without epsilon.
    targeted: can move towards a class; step_size: has one that can be chosen.
    gradients: False for an attack that only asks for answers.
    budget: what it may spend, in words.
    passes: of steps and classes: passes through the model that it takes at most (about).
    """

    title: str
    steps: int
    build: Callable[..., Any]
    about: str
    unit: str = "steps"
    norm: str = "Linf"
    targeted: bool = True
    step_size: bool = False
    gradients: bool = True
    budget: str = "{steps} {unit}"
    passes: Callable[[int, int], int] = lambda steps, classes: steps


def _ti(model: AttackedModel, **options: Any) -> torchattacks.TIFGSM:
    # 15 pixels are the published kernel for 299; a small image needs a smaller one
    kernel = min(15, max(5, model.image_size // 15 | 1))
    return torchattacks.TIFGSM(model, **options, len_kernel=kernel)


METHODS: dict[str, Method] = {
    "pgd": Method(
        *("PGD", 10, torchattacks.PGD),
        "Steps along the sign of the gradient, kept inside the epsilon ball.",
        step_size=True,
    ),
    "apgd": Method(
        *("APGD", 50, apgd),
        "PGD with momentum that halves its own step size when it stops gaining.",
        targeted=False,
    ),
    "cw": Method(
        *("CW", 50, CW),
        "Carlini-Wagner: looks for the smallest L2 change that fools; it knows no epsilon.",
        norm="L2",
        budget=f"{{steps}} steps for each of {len(CW_WEIGHTS)} weights",
        passes=lambda steps, classes: len(CW_WEIGHTS) * steps,
    ),
    "di": Method(
        *("DI", 10, torchattacks.DIFGSM),
        "DI2-FGSM: PGD through random resizing and padding, made to transfer between models.",
        step_size=True,
    ),
    "ti": Method(
        *("TI", 10, _ti),
        "TI-FGSM: DI with a smoothed gradient, made to transfer between models.",
        step_size=True,
    ),
    "square": Method(
        *("Square", 500, Square),
        "Random squares, black-box: it only asks the model for its answers.",
        unit="queries",
        gradients=False,
    ),
    "autoattack": Method(
        *("AutoAttack", 100, AutoAttack),
        "APGD, targeted APGD, FAB and Square one after the other; thorough and slow.",
        targeted=False,
        budget="{steps} steps each, {queries} queries",
        passes=AutoAttack.passes,
    ),
}


def list_attacks() -> list[str]:
    """Names of the attacks, in the order in which they are shown."""
    return list(METHODS)


def attack_images(
    classifier: Classifier,
    pixels: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    images: Sequence[int] | None = None,
    targets: Tensor | None = None,
    on_progress: Progress = quiet,
) -> Tensor:
    """Attacks 8-bit images; the result has L-inf <= `attack.epsilon_255` in integers where there
    is one. Raises `InputError` for a target where the attack has no targeted mode, and for a model
    that is not float32.

    pixels: uint8, (N, 3, S, S).
    labels: the classes to move away from, (N,).
    images: number of each image, default 0 to N - 1; its randomness is that of (seed, number),
        whatever else is in the batch.
    targets: the classes to move towards instead, (N,).
    on_progress: called with (passes done, passes) before every pass; may raise to stop.
    """
    if classifier.backbone.dtype != torch.float32:
        raise InputError("Attacks run in float32: load the backbone with dtype=torch.float32.")
    if targets is not None and not attack.method.targeted:
        raise InputError(f"{attack.method.title} cannot aim at a class: leave the target out.")
    device = classifier.backbone.device
    clean = to_float(pixels.to(device))
    total, passes = attack.method.passes(attack.budget_steps, classifier.classes), count()

    def on_pass() -> None:
        on_progress(min(next(passes), total), total)

    seeds = image_seeds(attack.seed, range(len(pixels)) if images is None else images)
    draws = Draws(generators(seeds, "attack"), Generator().manual_seed(attack.seed))
    # the library makes its own tensors on the default device
    with torch.enable_grad(), torch.device("cpu"), draws:
        run: Any = attack.method.build(AttackedModel(classifier, on_pass, draws), **attack.options)
        if targets is not None:
            run.set_mode_targeted_by_label(quiet=True)
        attacked = run(clean, (labels if targets is None else targets).to(device))
    on_progress(total, total)
    # DI and TI divide by the gradient's size: where it is 0, the image stays
    attacked = torch.where(attacked.isfinite(), attacked, clean).detach().to(pixels.device)
    # rounded, not floored: floor weakens the attack and can leave the ball
    largest = 255 if attack.epsilon_255 is None else attack.epsilon_255
    delta = ((attacked * 255).round().int() - pixels.int()).clamp(-largest, largest)
    return (pixels.int() + delta).clamp(0, 255).to(torch.uint8)


def l2_norm(attacked: Tensor, pixels: Tensor) -> Tensor:
    """L2 size of each image's change in [0, 1] pixels, (N,), from uint8 images (N, 3, S, S)."""
    return ((attacked.float() - pixels.float()) / 255).flatten(1).norm(dim=1)


def linf_255(attacked: Tensor, pixels: Tensor) -> Tensor:
    """Largest pixel change of each image in 1/255, (N,), from uint8 images (N, 3, S, S)."""
    return (attacked.int() - pixels.int()).abs().flatten(1).amax(1)
