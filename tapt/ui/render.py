"""Words of the page as HTML. Every string that a person typed goes through `html.escape`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tapt.comparison import UNTRAINED, attacked_title
from tapt.core.attacks import METHODS, Method
from tapt.model import Model

CHIPS = 60
WELCOME = (
    "Press the button: an attack looks for a change of the picture, too small to matter to you, "
    "that makes CLIP wrong."
)
WHO = "Who will answer, each on the picture as it is and on the attacked one"
EARLIER = "These results are from earlier inputs. Run again."
PAPER = "https://arxiv.org/abs/2411.13136"
WORDS = {
    "CLIP": "a model that says which of some names fits a picture best.",
    "Attack": "a search for a change of the pixels, too small to matter to people, that makes a "
    "model wrong.",
    "Epsilon": "the largest change of any pixel, in steps of 1/255: at 4/255 a grey of 100 stays "
    "between 96 and 104.",
    "White-box": "the attack knows the model and follows its gradients. Black-box: it only asks "
    "for answers.",
    "Transfer": "the picture was made to fool another model; easier to withstand than an attack "
    "that sees the defence itself.",
    "Prompts": "numbers put beside picture and names that steer CLIP; trained once (static), or "
    "tuned anew for each picture (TAPT).",
    "Views": "the picture and random crops of it; a defence looks at many and keeps the certain "
    "ones.",
    "Entropy": "how undecided an answer is, in nats: 0 is certain, more is less certain.",
}
CITE = (
    "Xin Wang, Kai Chen, Jiaming Zhang, Jingjing Chen, Xingjun Ma: TAPT: Test-Time Adversarial "
    "Prompt Tuning for Robust Inference in Vision-Language Models. CVPR 2025."
)


def header(model: Model) -> str:
    """Title, one sentence, what is loaded, and a warning where the prompts are untrained."""
    space = os.environ.get("SPACE_ID")
    code = f' <a href="https://huggingface.co/spaces/{space}/tree/main">code</a>' if space else ""
    size = model.backbone.image_size
    line = f"Model {model.backbone.name}, {size} × {size} pixels; prompts {model.pack.name}."
    for what, origin in zip(("Model", "Prompts"), model.origins, strict=True):
        line += f" {what}: {origin}." if origin else ""
    warning = "" if model.pack.trained else f' <span class="t-badge">{UNTRAINED}</span>'
    return f"""<a class="t-skip" href="#run">Skip to the attack</a><header class="t-header">
<h1>Can you fool CLIP?</h1><p>CLIP names what is in a picture; tiny changes can fool it. Here
different ways to answer face one attack. <a href="{PAPER}">paper</a>{code}</p>
<p class="t-small" id="model-line">{escape(line)}{warning}</p></header>"""


def words() -> str:
    """The words of the page, and how to cite."""
    items = "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in WORDS.items())
    return f'<dl class="t-words">{items}<dt>Cite</dt><dd>{CITE}</dd></dl>'


def chips(
    names: Sequence[str], repeated: int, unknown: Sequence[str], too_long: Sequence[str]
) -> str:
    """What was understood of the class names, one chip each: a click or Delete removes it."""
    marks = {**dict.fromkeys(unknown, "never seen"), **dict.fromkeys(too_long, "too long")}
    items = ""
    for number, name in enumerate(sorted(names, key=lambda name: name not in marks)[:CHIPS]):
        odd = (" class=t-odd", f" <em>{marks[name]}</em>") if name in marks else ("", "")
        items += (
            f'<li{odd[0]}><button type="button" tabindex="{-1 if number else 0}" title="Remove" '
            f'data-name="{escape(name)}">{escape(cut(name))}{odd[1]}</button></li>'
        )
    more = len(names) - CHIPS
    notes = [f"and {more:,} more"] * (more > 0) + [f"{repeated:,} repeated"] * (repeated > 0)
    note = f'<p class="t-small">{", ".join(notes)}</p>' if notes else ""
    return f'<ul class="t-chips" aria-label="Names; Delete removes one">{items}</ul>{note}'


def plan(values: Mapping[str, Any], seconds: float | None) -> str:
    """What the button will do, and about how long that takes; plain text."""
    what, method = "no attack, only the answers", METHODS.get(values["attack"])
    if method is not None:
        radius = f"{values['epsilon']}/255, " if method.norm == "Linf" else ""
        what = f"{method.title}, {radius}on {attacked_title(values['attacked_model'])}"
    return what + ("" if seconds is None else f", about {duration(seconds)}") + " ✎"


def attack_note(method: Method | None, attacked: str) -> str:
    """What an attack does, and what it is for the model that it sees."""
    if method is None:
        return '<p class="t-small">The picture stays as it is.</p>'
    text = f"{method.about} {method.steps} {method.unit} by default. {sees(method, attacked)}"
    return f'<p class="t-small">{escape(text)}</p>'


def sees(method: Method, attacked: str) -> str:
    """What the attack knows of the model that it sees, and what that is to the others."""
    title = attacked_title(attacked)
    if not method.gradients:
        return f"Black-box: it asks {title} for answers, no gradients."
    if attacked.startswith("deployed"):
        return f"Adaptive: every step runs the whole of {title}, on fresh views. Slow."
    return f"White-box for {title}; every other row gets the same picture, a transferred attack."


def duration(seconds: float) -> str:
    """For people: `0.3 s`, `12 s`, `4 minutes`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 3 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes"


def note(text: str, *, warn: bool = False) -> str:
    """A sentence in the place of the results."""
    return f'<p class="{"t-warning" if warn else "t-sentence"}">{escape(text)}</p>'


def cut(name: str) -> str:
    """A name, short enough for a line."""
    return name if len(name) <= 60 else name[:57] + "..."
