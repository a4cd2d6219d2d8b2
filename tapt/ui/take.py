"""What a person takes away from a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd

from tapt.comparison import Comparison
from tapt.core.images import to_picture
from tapt.data.names import names_text
from tapt.ui.inputs import setting_text
from tapt.ui.pictures import data_url, picture_url

ABOUT = "After a run: the attacked picture, all numbers, a link, and the command for a terminal."
COPY = "navigator.clipboard?.writeText(this.href).then(() => this.nextSibling.hidden = false)"


def take_away(result: Comparison, link: str, changes: Mapping[str, Any]) -> str:
    """The attacked picture, the numbers, a link with the inputs and the command, nothing of which
    stays on the server."""
    numbers = {"verdict": result.verdict(), **result.to_dict()}
    text, size = json.dumps(numbers).encode(), result.clean.shape[-1]
    items = [
        ("tapt.json", data_url(text, "application/json"), "All numbers (JSON)"),
        ("tapt.csv", data_url(_csv(result).encode(), "text/csv"), "The rows (CSV)"),
    ]
    if result.attacked is not None:
        url, name = picture_url(to_picture(result.attacked)), f"PNG, {size} × {size}, lossless"
        items.insert(0, ("attacked.png", url, f"Attacked picture ({name})"))
    rows = "".join(f'<li><a href="{u}" download="{f}">{name}</a></li>' for f, u, name in items)
    return (
        f'<ul class="t-links">{rows}<li><a href="#x={link}" onclick="{COPY}">Link to these inputs'
        '</a><span role="status" hidden> copied</span></li></ul>'
        f'<p class="t-small">The same numbers from "What the model sees", saved as seen.png:</p>'
        f"<pre>{escape(command(result, changes))}</pre>"
    )


def command(result: Comparison, changes: Mapping[str, Any]) -> str:
    """The command line that gives the same numbers."""
    settings, attack = result.settings, result.settings["attack"]
    parts = ["tapt", "predict", "seen.png", "--classes", names_text(result.classes)]
    parts += ["--backbone", settings["backbone"]]
    parts += ["--pack", settings["pack"]] if settings["trained"] else []
    parts += ["--defenses", ",".join(result.answers)]
    parts += ["--label", result.classes[result.label or 0]] if result.label_given else []
    if attack is not None:
        parts += ["--attack", attack["name"], "--attacked", settings["attacked_model"]]
        parts += ["--steps", str(attack["steps"])]
        if settings["epsilon_255"] is not None:
            parts += ["--epsilon", f"{settings['epsilon_255']}/255"]
        if attack["step_size"]:
            parts += ["--step-size", str(attack["step_size"])]
    parts += ["--seed", str(settings["seed"])]
    for key, value in changes.items():
        parts += ["--set", f"{key}={setting_text(value)}"]
    return shlex.join([*parts, "--json"])


def _csv(result: Comparison) -> str:
    true = None if result.label is None else result.classes[result.label]
    return pd.DataFrame(
        {
            "defence": name,
            "picture": kind,
            "state": result.state(name),
            "answer": answer.top[0],
            "probability": answer.top[1],
            "true": true,
            "p": float(answer.probabilities[result.label or 0]),
            "seconds": answer.seconds,
        }
        for name, row in result.answers.items()
        for kind, answer in vars(row).items()
        if answer is not None
    ).to_csv(index=False)
