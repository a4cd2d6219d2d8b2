"""What the defences answered to one picture, attacked or not."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from torch import Tensor

from tapt.core.attacks import METHODS, l2_norm, linf_255
from tapt.defenses import find_defense

UNTRAINED = "untrained prompts"


@dataclass(frozen=True, eq=False)
class Answer:
    """One defence's answer to one image.

    probabilities: (C,), on the CPU.
    trace: how the answer came about: names to plain numbers, lists, None, or such mappings.
    """

    classes: tuple[str, ...]
    probabilities: Tensor
    trace: Mapping[str, Any]
    seconds: float

    @property
    def top(self) -> tuple[str, float]:
        """The most probable class and its probability."""
        value, index = self.probabilities.max(0)
        return self.classes[int(index)], float(value)


@dataclass(eq=False)
class Answers:
    """One defence's answers; None where there is none, or none yet."""

    clean: Answer | None = None
    attacked: Answer | None = None


@dataclass(eq=False)
class Comparison:
    """Results as far as they are there; `comparison["tapt"]` are one defence's answers.

    settings: what the numbers depend on, as a JSON object.
    clean, attacked: the 8-bit images that every defence got, uint8 (3, S, S).
    answers: by defence, in the registry's order.
    label: the true class as an index; `label_given` says whether a person named it, otherwise it
        is vanilla CLIP's own answer to the clean image.
    seconds: of the attack, and in all.
    """

    classes: tuple[str, ...]
    settings: dict[str, Any]
    clean: Tensor
    answers: dict[str, Answers]
    attacked: Tensor | None = None
    label: int | None = None
    label_given: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    finished: bool = False

    def __getitem__(self, defense: str) -> Answers:
        return self.answers[defense]

    @property
    def linf_255(self) -> int | None:
        """Measured L-inf of the attack in 1/255; None without an attack."""
        if self.attacked is None:
            return None
        return int(linf_255(self.attacked[None], self.clean[None])[0])

    @property
    def l2(self) -> float | None:
        """Measured L2 size of the attack in [0, 1] pixels; None without an attack."""
        if self.attacked is None:
            return None
        return float(l2_norm(self.attacked[None], self.clean[None])[0])

    def state(self, defense: str) -> str | None:
        """What the attack did to a defence: `held`, `fooled`, `wrong before` or `recovered` where
        the true class is known, else `kept` or `changed`; None without both answers."""
        clean, attacked = self[defense].clean, self[defense].attacked
        if clean is None or attacked is None or self.label is None:
            return None
        before, after = clean.top[0], attacked.top[0]
        if not self.label_given:
            return "kept" if after == before else "changed"
        true = self.classes[self.label]
        if before == true:
            return "held" if after == true else "fooled"
        return "recovered" if after == true else "wrong before"

    def title(self, defense: str) -> str:
        """A defence's name for people."""
        row = find_defense(defense)
        untrained = row.uses_prompts and not self.settings["trained"]
        return f"{row.title}, {UNTRAINED}" if untrained else row.title

    @property
    def attacked_row(self) -> str | None:
        """The defence that the attack saw, where it is among the answers."""
        kind, _, name = (self.settings["attacked_model"] or "").partition(":")
        return (name or kind) if (name or kind) in self.answers else None

    def counts(self) -> str:
        """How many defences are in which state, the attacked model's first; names where they are
        few. Without an attack right and wrong, or what was answered."""
        groups: dict[str, list[str]] = {}
        for name in sorted(self.answers, key=lambda name: name != self.attacked_row):
            clean, word = self[name].clean, self.state(name)
            if self.settings["attack"] is None and clean is not None and self.label is not None:
                right = clean.top[0] == self.classes[self.label]
                word = ("right" if right else "wrong") if self.label_given else clean.top[0]
            if word is not None:
                groups.setdefault(word, []).append(self.title(name))
        few = {word: f" ({', '.join(names)})" for word, names in groups.items() if len(names) < 3}
        return ", ".join(f"{len(names)} {w}{few.get(w, '')}" for w, names in groups.items())

    def verdict(self) -> str:
        """What happened, the attacked model first; plain text, empty before the first state."""
        row, sentences = self.attacked_row, []
        if row and (state := self.state(row)) is not None:
            answers = [answer.top[0] for answer in (self[row].clean, self[row].attacked) if answer]
            change = ", then ".join(dict.fromkeys(answers))
            sentences.append(f"{self.title(row)}, attacked directly: {state} ({change}).")
        if counts := self.counts():
            sentences.append(f"In all {counts}.")
            if self.label_given and self.label is not None:
                sentences.append(f"The true class is {self.classes[self.label]}.")
        return " ".join(sentences)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `tapt predict --json`."""

        def each(value: Callable[[Answer], Any]) -> dict[str, dict[str, Any]]:
            return {
                name: {kind: answer and value(answer) for kind, answer in vars(row).items()}
                for name, row in self.answers.items()
            }

        return {
            "settings": self.settings,
            "classes": list(self.classes),
            "label": None if self.label is None else self.classes[self.label],
            "label_given": self.label_given,
            "results": each(lambda answer: answer.probabilities.double().tolist()),
            "states": {name: self.state(name) for name in self.answers},
            "linf_255": self.linf_255,
            "l2": self.l2,
            "trace": each(lambda answer: answer.trace),
            "seconds": {
                **{k: round(v, 4) for k, v in self.seconds.items()},
                "defenses": each(lambda answer: round(answer.seconds, 4)),
            },
            "versions": versions(),
        }

    def __str__(self) -> str:
        """The table of `tapt predict`."""
        titles = {name: self.title(name) for name in self.answers}
        width = max(map(len, titles.values()))
        columns = ["clean"] if self.attacked is None else ["clean", "attacked"]
        rows = [[" " * width, *(f"{column:<26}" for column in columns)]]
        for name, title in titles.items():
            answers = [getattr(self[name], column) for column in columns]
            tops = [answer.top if answer else ("...", 0.0) for answer in answers]
            cells = [f"{top[:17]:<17} {100 * value:5.1f} %  " for top, value in tops]
            rows.append([f"{title:<{width}}", *cells])
        lines = ["  ".join(row).rstrip() for row in rows]
        if self.attacked is not None:
            epsilon = self.settings["epsilon_255"]
            radius = "no epsilon" if epsilon is None else f"epsilon {epsilon}/255"
            measured = f"measured L-inf {self.linf_255}/255, L2 {self.l2:.2f}"
            lines.append(f"{attack_title(self.settings)}, {radius}, {measured}")
        return "\n".join([*lines, self.verdict()])


def attacked_title(attacked: str) -> str:
    """An attacked model in words: `clip`, `static`, `deployed` or `deployed:NAME`."""
    if attacked == "deployed":
        return "each defence as deployed"
    kind, _, name = attacked.partition(":")
    title = find_defense(name or kind).title
    return f"{title} as deployed" if name else title


def attack_title(settings: Mapping[str, Any]) -> str:
    """The attack of a comparison or a sweep in words: `PGD-100 on Vanilla CLIP`."""
    attack = settings["attack"]
    where = attacked_title(settings["attacked_model"])
    return f"{METHODS[attack['name']].title}-{attack['steps']} on {where}"


def versions() -> dict[str, str]:
    """What the numbers depend on, beside the settings."""
    packages = ("torch", "open_clip_torch", "torchattacks")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def plain(value: Any, index: int) -> Any:
    """One image's part of a trace, as plain numbers."""
    if isinstance(value, Mapping):
        return {name: plain(item, index) for name, item in value.items()}
    if isinstance(value, Tensor):
        return value[index].tolist()
    return value
