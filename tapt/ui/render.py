"""HTML pieces of the page. Every string that a person typed goes through `html.escape`."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from tapt.comparison import UNTRAINED, Answer, Comparison, attacked_title
from tapt.core.attacks import METHODS, Method
from tapt.core.images import to_picture
from tapt.data.names import names_text
from tapt.defenses import Defense, find_defenses
from tapt.evaluation.sweep import Sweep
from tapt.model import Model
from tapt.packs.rows import Row, attack_name, defense_name, epsilon_name
from tapt.ui.details import how
from tapt.ui.links import png_url

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP, CHIPS, THIN = 5, 60, 200
WAITING, NOT_RUN, STOPPED = "…", "not run", "Stopped."
WELCOME = (
    "Press the button: an attack looks for a change of the picture, too small to matter to you, "
    "that makes CLIP wrong."
)
TAKE = "After a run: the attacked picture, all numbers, a link, and the command for a terminal."
RECORDED = (
    "Accuracy over many pictures, as recorded with the loaded prompts. Rows of fewer than "
    f"{THIN} pictures are thin evidence, and pale in the chart."
)
NUMBERS = ("n", "Clean %", "Attacked %")
EARLIER = "These results are from earlier inputs. Run again."
SIGNS = {"held": "✓", "fooled": "✗", "wrong before": "○", "recovered": "↑"}
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
    """Title, one sentence, and what is loaded."""
    space = os.environ.get("SPACE_ID")
    code = f' <a href="https://huggingface.co/spaces/{space}/tree/main">code</a>' if space else ""
    return f"""<a class="t-skip" href="#run">Skip to the attack</a><header class="t-header">
<h1>Can you fool CLIP?</h1><p>CLIP names what is in a picture; tiny changes can fool it. Here
different ways to answer face one attack. <a href="{PAPER}">paper</a>{code}</p>
{model_line(model)}</header>"""


def model_line(model: Model) -> str:
    """What is loaded, and a warning where the prompts are untrained."""
    size = model.backbone.image_size
    line = f"Model {model.backbone.name}, {size} × {size} pixels; prompts {model.pack.name}."
    for what, origin in zip(("Model", "Prompts"), model.origins, strict=True):
        line += f" {what}: {origin}." if origin else ""
    warning = "" if model.pack.trained else f' <span class="t-badge">{UNTRAINED}</span>'
    return f'<p class="t-small" id="model-line">{escape(line)}{warning}</p>'


def words() -> str:
    """The words of the page, and how to cite."""
    items = "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in WORDS.items())
    return f'<dl class="t-words">{items}<dt>Cite</dt><dd>{CITE}</dd></dl>'


def chips(
    names: Sequence[str], repeated: int, unknown: Sequence[str], too_long: Sequence[str]
) -> str:
    """What was understood of the class names, one chip each."""
    marks = {**dict.fromkeys(unknown, "never seen"), **dict.fromkeys(too_long, "too long")}
    items = "".join(
        f"<li{' class=t-odd' if name in marks else ''}>{escape(_cut(name))}"
        f"{f' <em>{marks[name]}</em>' if name in marks else ''}</li>"
        for name in sorted(names, key=lambda name: name not in marks)[:CHIPS]
    )
    more = len(names) - CHIPS
    notes = [f"and {more:,} more"] * (more > 0) + [f"{repeated:,} repeated"] * (repeated > 0)
    note = f'<p class="t-small">{", ".join(notes)}</p>' if notes else ""
    return f'<ul class="t-chips">{items}</ul>{note}'


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
    text = f"{method.about} {method.steps} {method.unit} by default. {_how(method, attacked)}"
    return f'<p class="t-small">{escape(text)}</p>'


def _how(method: Method, attacked: str) -> str:
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


def intro(rows: Sequence[Defense]) -> str:
    """The rows before the first run: who will answer, and how."""
    body = "".join(
        f'<tr><th scope="row">{escape(row.title)}</th><td>{escape(row.about)}</td></tr>'
        for row in rows
    )
    return (
        '<table class="t-table"><caption>Who will answer, each on the picture as it is and on the '
        'attacked one</caption><thead><tr><th scope="col">Defence</th><th scope="col">How</th>'
        f"</tr></thead><tbody>{body}</tbody></table>"
    )


def results(result: Comparison) -> str:
    """One row for each defence, and below it what opens: five answers, how it decided."""
    attacked = result.settings["attack"] is not None
    true = None if result.label is None else escape(_cut(result.classes[result.label]))
    heads = {"name": "Defence", "first": "Original", "last": "Attacked", "p": f"p({true})"}
    heads |= {"time": "Time", "it": '<span class="t-hidden">Attack this one</span>'}
    heads = {key: head for key, head in heads.items() if attacked or key != "last"}
    cells = "".join(f'<th scope="col" class="t-{k}">{head}</th>' for k, head in heads.items())
    body = "".join(_row(result, row, len(heads)) for row in find_defenses(list(result.answers)))
    return (
        f'<table class="t-table"><caption>{_caption(result)}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
        f'<p class="t-small">{_facts(result)}</p>'
    )


def _row(result: Comparison, defense: Defense, width: int) -> str:
    name, answers, attacked = defense.name, result[defense.name], result.settings["attack"]
    title = escape(result.title(name))
    seen = ' <span title="attacked directly">◎</span>' if name == result.attacked_row else ""
    cells = [f'<td class="t-first">{_cell(answers.clean, _right(result, answers.clean))}</td>']
    if attacked:
        cells.append(f"<td>{_cell(answers.attacked, _mark(result.state(name)))}</td>")
    last = answers.attacked if attacked else answers.clean
    if last is None or result.label is None:
        cells += [f"<td>{WAITING}</td>", f'<td class="t-time">{WAITING}</td>']
    else:
        cells.append(
            f"<td>{_bar(float(last.probabilities[result.label]), result.label_given)}</td>"
        )
        cells.append(f'<td class="t-time">{last.seconds:.2f} s</td>')
    victim = name if name in ("clip", "static") else f"deployed:{name}"
    button = (
        f'<button type="button" data-attack="{escape(victim)}" title="Attack this one" '
        f'aria-label="Attack {title}">◎</button>'
    )
    more = _fives(result, name) + how(result, name) if result.finished else f"<p>{WAITING}</p>"
    return (
        f'<tr><th scope="row"><details><summary>{title}{seen}</summary></details></th>'
        + "".join([*cells, f'<td class="t-it">{button}</td></tr>'])
        + f'<tr class="t-more"><td colspan="{width}">{more}</td></tr>'
    )


def _cell(answer: Answer | None, mark: str) -> str:
    if answer is None:
        return WAITING
    name, value = answer.top
    return f"{mark}{escape(_cut(name))} {100 * value:.0f}&nbsp;%"


def _mark(state: str | None) -> str:
    """A state by sign and word; where nobody knows the truth, by its word alone and no colour."""
    if state is None:
        return ""
    kind = f"t-{state.partition(' ')[0]}" if state in SIGNS else ""
    return f'<span class="t-mark {kind}">{SIGNS.get(state, "")} {state}</span> '


def _right(result: Comparison, answer: Answer | None) -> str:
    """Without an attack, whether an answer is right, where somebody said what is."""
    if result.settings["attack"] is not None or answer is None or not result.label_given:
        return ""
    if answer.top[0] == result.classes[result.label or 0]:
        return '<span class="t-mark t-held">✓ right</span> '
    return '<span class="t-mark t-fooled">✗ wrong</span> '


def _bar(value: float, sure: bool) -> str:
    return (
        f'<span class="t-bar{" t-true" if sure else ""}" aria-hidden="true"><i style="width:'
        f'{100 * value:.0f}%"></i></span> {_percent(value)}'
    )


def _caption(result: Comparison) -> str:
    if result.label is None or not result.label_given:
        return "Nobody said what it is: answers are kept or changed, not right or wrong."
    return (
        f"It is <strong>{escape(_cut(result.classes[result.label]))}</strong>. Tap a row for more."
    )


def _facts(result: Comparison) -> str:
    attack = result.settings["attack"]
    if attack is None:
        return "No attack."
    method, attacked = METHODS[attack["name"]], result.settings["attacked_model"]
    target = result.settings["target"]
    towards = f", towards {_cut(target)}" if target else ""
    text = f"{method.title}, {attack['steps']} {method.unit}{towards}"
    if result.settings["epsilon_255"] is not None:
        text += f", epsilon {result.settings['epsilon_255']}/255"
    if result.attacked is not None:
        text += f"; measured L∞ {result.linf_255}/255, L2 {result.l2:.2f}"
    return escape(f"◎ attacked directly. {text}. {_how(method, attacked)}")


def _fives(result: Comparison, name: str) -> str:
    rows = []
    for kind, word in (("clean", "Original"), ("attacked", "Attacked")):
        if (answer := getattr(result[name], kind)) is not None:
            best = answer.probabilities.argsort(descending=True)[:TOP].tolist()
            items = (
                f"{escape(_cut(result.classes[i]))} {_percent(float(answer.probabilities[i]))}"
                for i in best
            )
            rows.append(f"<p><strong>{word}:</strong> {', '.join(items)}</p>")
    return "".join(rows)


def pictures(result: Comparison) -> str:
    """What the model saw, and what the attack added, enlarged."""
    figures = [("What the model sees", to_picture(result.clean), "the central square")]
    if result.attacked is not None:
        change, scale = amplified_difference(result.attacked, result.clean)
        epsilon = result.settings["epsilon_255"]
        limit = "" if epsilon is None else f", epsilon {epsilon}/255"
        text = f"largest change {result.linf_255}/255{limit}"
        figures.append((f"What the attack changed, × {scale} around mid-grey", change, text))
    return "".join(
        f'<figure class="t-figure"><img class="t-pixels" src="{png_url(picture)}" '
        f'alt="{title}: {text}"><figcaption>{title}: {text}.</figcaption></figure>'
        for title, picture, text in figures
    )


def amplified_difference(attacked: Tensor, clean: Tensor) -> tuple[Image.Image, int]:
    """The change from one uint8 image (3, H, W) to the other around mid-grey, scaled so that its
    largest entry reaches full range, and that scale."""
    delta = attacked.int() - clean.int()
    scale = max(1, 127 // max(1, int(delta.abs().max())))
    return to_picture((delta * scale + 128).clamp(0, 255).to(torch.uint8)), scale


def take_away(result: Comparison, link: str, changes: Mapping[str, Any]) -> str:
    """The attacked picture, the numbers, a link with the inputs and the command, nothing of which
    stays on the server."""
    size, items = result.clean.shape[-1], []
    if result.attacked is not None:
        url = png_url(to_picture(result.attacked))
        items.append(("attacked.png", url, f"Attacked picture (PNG, {size} × {size}, lossless)"))
    numbers = {"verdict": result.verdict(), **result.to_dict()}
    for file, kind, text, name in (
        ("tapt.json", "application/json", json.dumps(numbers), "All numbers (JSON)"),
        ("tapt.csv", "text/csv", _csv(result), "The rows (CSV)"),
    ):
        data = base64.b64encode(text.encode()).decode()
        items.append((file, f"data:{kind};base64,{data}", name))
    rows = "".join(f'<li><a href="{u}" download="{f}">{text}</a></li>' for f, u, text in items)
    copy = "navigator.clipboard?.writeText(this.href).then(() => this.nextSibling.hidden = false)"
    return (
        f'<ul class="t-links">{rows}<li><a href="#x={link}" onclick="{copy}">Link to these inputs'
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
    parts += [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    return shlex.join([*parts, "--json"])


def _csv(result: Comparison) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(
        ["defence", "picture", "state", "answer", "probability", "true", "p", "seconds"]
    )
    true = None if result.label is None else result.classes[result.label]
    for name, row in result.answers.items():
        for kind, answer in vars(row).items():
            if answer is not None:
                value = float(answer.probabilities[result.label or 0])
                states = [name, kind, result.state(name), *answer.top, true, value, answer.seconds]
                writer.writerow(states)
    return out.getvalue()


def sweep_notes(result: Sweep) -> str:
    """Up to where each defence is right, of what has been measured."""
    titles = {row.name: row.title for row in find_defenses(list(result.answers))}
    items = "".join(
        f"<li>{escape(titles[name])}: {_falls(result, answers)}</li>"
        for name, answers in result.answers.items()
    )
    return f'<ul class="t-list">{items}</ul>'


def _falls(result: Sweep, answers: Sequence[str]) -> str:
    if not answers:
        return "not measured"
    measured, asked = len(answers), len(result.epsilons)
    right, good, bad = result.label, "right", "wrong"
    if not result.label_given:
        right, good, bad = answers[0], "kept", "changed"
    wrong = [e for e, answer in zip(result.epsilons, answers, strict=False) if answer != right]
    if not wrong:
        text = f"{good} up to {result.epsilons[measured - 1]}/255"
    elif len(wrong) == sum(epsilon >= wrong[0] for epsilon in result.epsilons[:measured]):
        text = f"{bad} from {wrong[0]}/255 on"
    else:
        text = f"{bad} at {', '.join(f'{epsilon}/255' for epsilon in wrong)}"
    return text + (f" ({measured} of {asked} measured)" if measured < asked else "")


def sweep_points(result: Sweep) -> list[dict[str, Any]]:
    """One object for each point of the curves."""
    titles = {row.name: row.title for row in find_defenses(list(result.answers))}
    return [
        {"epsilon": epsilon, "probability": round(value, 4), "defence": titles[name]}
        for name, values in result.probabilities.items()
        for epsilon, value in zip(result.epsilons, values, strict=False)
    ]


def evidence(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows of the recorded results; numbers stay numbers, to be sorted."""
    heads = ["Defence", "Attacked model", "Attack", "ε/255", "n", "Clean %", "Attacked %"]
    cells = [
        [
            _row_title(row),
            "the worst of all" if row["attacked_model"] == "all" else row["attacked_model"],
            attack_name(row),
            epsilon_name(row).removesuffix("/255"),
            row["n"],
            round(100 * row["clean_accuracy"], 1),
            round(100 * row["accuracy"], 1),
            " to ".join(f"{100 * end:.1f}" for end in row["ci95"]),
            row["dataset"],
            f"thin: n < {THIN}" if row["n"] < THIN else "",
        ]
        for row in rows
    ]
    return [*heads, "95 % interval", "Data", "Evidence"], cells


def condition(row: Row) -> str:
    """What was attacked and how, as one choice of the chart."""
    name = f"{attack_name(row)} on {row['attacked_model']}, {epsilon_name(row)}"
    return f"{name}, {row['dataset']}, n = {row['n']}"


def chart(rows: Sequence[Row], chosen: str) -> Figure:
    """Clean against attacked accuracy of every defence under one attack, with 95 % intervals;
    few pictures look pale."""
    from matplotlib.figure import Figure

    figure = Figure((6.5, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(row for row in rows if condition(row) == chosen):
        x, y = 100 * row["clean_accuracy"], 100 * row["accuracy"]
        spread: list[list[list[float]]] = []
        for value, key in ((x, "clean_ci95"), (y, "ci95")):
            spread.append([[abs(value - 100 * row[key][0])], [abs(100 * row[key][1] - value)]])
        look: dict[str, Any] = {
            "alpha": 0.35 if row["n"] < THIN else 1.0,
            "color": f"C{number % 10}",
        }
        marker = "os^Dv<>P*X"[number % 10]
        axes.errorbar(x, y, spread[1], spread[0], marker, capsize=3, label=_row_title(row), **look)
    axes.set(xlabel="accuracy on clean pictures, %", ylabel="on attacked pictures, %")
    axes.set_ylim(-2, 102)
    axes.set_title(chosen, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _row_title(row: Row) -> str:
    try:
        title = find_defenses([row["defense"]])[0].title
    except ValueError:  # of a defence that is not registered here
        title = row["defense"]
    return defense_name({**row, "defense": title})


def _percent(value: float) -> str:
    if value >= 0.995 or value < 0.005:
        return "100 %" if value > 0.5 else "0 %"
    return f"{100 * value:.0f} %"


def _cut(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."
