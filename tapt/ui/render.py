"""HTML pieces of the page. Every string that a person typed goes through `html.escape`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape

from PIL import Image
from torch import Tensor

from tapt.comparison import UNTRAINED, Comparison, attacked_title
from tapt.core.attacks import METHODS, Method
from tapt.core.images import to_picture
from tapt.defenses import Defense, find_defenses, list_defenses
from tapt.evaluation.sweep import Sweep
from tapt.model import VICTIM, Model
from tapt.packs.format import Pack
from tapt.packs.rows import Row, attack_name, defense_name
from tapt.ui.chart import line_chart, plain_table
from tapt.ui.inputs import TEST_TIME
from tapt.ui.known import KINDS
from tapt.ui.service import EMBEDDED_BACKBONE

TOP = 5
PACK_INFO = "A pack for this backbone: one from the list, or owner/repo of the Hub."
NO_LABEL = "not known"
NO_TARGET = "none: away from the true class"
ABOUT = {  # the attacked models
    "clip": "CLIP without prompts; the other rows then face a transferred attack.",
    "static": "The prompts before the test-time step, as in the paper's own protocol; for TAPT "
    "still a transferred attack.",
    "deployed": "Every pass of the attack runs the whole defence on fresh views. Slow.",
}
PHASES = {"attack": "Attacking the picture", "download": "Fetching the model"}
KNOWS = f"{', '.join(list(KINDS)[:-1])} and {list(KINDS)[-1]}"


def header() -> str:
    """Title and one sentence."""
    return """<header class="t-header">
<h1>TAPT: CLIP under attack, with and without a defence</h1>
<p>Pixel changes that nobody sees can make CLIP name the wrong thing. TAPT tunes CLIP's prompts
for each single picture, without labels, and asks again. Here you see both answers side by side.</p>
</header>"""


def model_line(model: Model) -> str:
    """What is loaded, and a warning where the prompts are untrained."""
    size, name = model.backbone.image_size, model.backbone.name
    name = f"{name}, the embedded CLIP" if name == EMBEDDED_BACKBONE else name
    line = f"Model: {name} ({size} × {size} pixels). Prompts: {model.pack.name}."
    for what, origin in zip(("Backbone", "Pack"), model.origins, strict=True):
        line += f" {what}: {origin}." if origin else ""
    warning = "" if model.pack.trained else _badge(f"{UNTRAINED}, entropy only")
    return f'<p class="t-small">{escape(line)}</p>{warning}'


def welcome() -> str:
    """What stands in the place of the results before the first run."""
    return """<section class="t-card t-welcome"><h2>How it works</h2><ol>
<li><strong>Pick a picture</strong> and the class names that CLIP may choose from.</li>
<li><strong>Press Run.</strong> An attack moves every pixel by at most epsilon, so that the attacked
model changes its mind.</li>
<li><strong>Compare the answers</strong> of vanilla CLIP, of the static prompts, of an untuned
ensemble of views, and of TAPT, on the original and on the attacked picture.</li>
</ol></section>"""


def classes_note(
    count: int, repeated: int, unknown: Sequence[str] | None, too_long: Sequence[str] = ()
) -> str:
    """How many class names there are; for the embedded model (`unknown` is not None) the ten kinds,
    and warnings where names are outside them or too long for it."""
    note = f"{count:,} class name{'' if count == 1 else 's'}"
    if repeated:
        note += f"; {repeated:,} repeated, counted once"
    note += "."
    if unknown is not None:
        note += f" The embedded model knows ten kinds only: {escape(KNOWS)}."
    warning = _unknown_warning(unknown) if unknown else ""
    if too_long:
        names = listed(too_long)
        warning = (
            f'<p class="t-warning"><strong>Too long for this model:</strong> {names}. Shorten '
            f"them or take them out; none is ever cut.</p>{warning}"
        )
    return f'<p class="t-small">{note}</p>{warning}'


def attack_note(method: Method | None, attacked: str) -> str:
    """One line on the attack and one on the attacked model."""
    if method is None:
        return '<p class="t-small">The picture stays as it is.</p>'
    lines = (
        f"<strong>{method.title}:</strong> {escape(method.about)} "
        f"({method.steps} {method.unit} by default.)"
    )
    if attacked in ABOUT:
        title = attacked_name(attacked)
        lines += (
            f"<br><strong>It sees {title}, {_how(method, attacked)}.</strong> {ABOUT[attacked]}"
        )
    return f'<p class="t-small">{lines}</p>'


def attacked_name(attacked: str) -> str:
    """An attacked model in words, the deployed defence by its name."""
    return attacked_title(f"deployed:{VICTIM}" if attacked == "deployed" else attacked)


def _how(method: Method, attacked: str) -> str:
    """What an attack is for the model that it sees."""
    if not method.gradients:
        return "black-box: by its answers alone"
    if attacked.startswith("deployed"):
        return "adaptive: through the whole defence, over fresh views"
    return "white-box"


def _unknown_warning(unknown: Sequence[str]) -> str:
    return (
        f'<p class="t-warning"><strong>Outside the ten kinds:</strong> {listed(unknown)}. '
        "The model has never seen these; its answers about them mean little.</p>"
    )


def listed(names: Sequence[str]) -> str:
    """The first few names, as HTML, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(escape(_cut(name)) for name in names[:5]) + more


def preview(picture: Image.Image) -> str:
    """The model's input, enlarged, with a caption."""
    size = picture.width
    return f"""<figure class="t-figure t-preview">
<img class="t-pixels" src="{png_url(picture)}" alt="The picture at {size} by {size} pixels">
<figcaption><strong>What the model sees:</strong> the central square at {size} × {size} pixels,
enlarged.</figcaption></figure>"""


def estimate(seconds: float) -> str:
    """How long an attack on the deployed defence will take."""
    time = _duration(seconds)
    return f'<p class="t-small">On this computer it takes <strong>about {time}</strong>.</p>'


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def status(
    phase: str, done: int | None = None, total: int | None = None, seconds: float = 0.0
) -> str:
    """A progress bar; without numbers it only says that something runs.

    seconds: since the phase began; with some done, they tell how long the rest will take.
    """
    text = escape(PHASES.get(phase, phase))
    if done is None or not total:
        return f'<div class="t-status"><span>{text}…</span><progress></progress></div>'
    if phase == "attack" and total > 1:
        text += f": {done} of {total}"
    if phase == "download":
        text += f": {done / 1e6:.0f} of {total / 1e6:.0f} MB"
    if done and (left := seconds / done * (total - done)) > 5:
        text += f", about {_duration(left)} left"
    return (
        f'<div class="t-status"><span>{text}</span>'
        f'<progress value="{done}" max="{total}"></progress></div>'
    )


def waiting() -> str:
    """The status while another run has the model."""
    return status("Waiting for the model")


def finished(seconds: float) -> str:
    """The status after a complete run."""
    return f'<div class="t-status"><span>Finished in {seconds:.1f} s.</span></div>'


def stopped() -> str:
    """The status after Stop."""
    return '<div class="t-status"><span>Stopped. What was there already stays here.</span></div>'


def verdict(result: Comparison, unknown: Sequence[str] = ()) -> str:
    """The sentence that says what happened."""
    warning = _unknown_warning(unknown) if unknown else ""
    return (
        f'<section class="t-card t-verdict"><p class="t-sentence">{escape(result.verdict())}'
        f"</p>{warning}</section>"
    )


def table(result: Comparison) -> str:
    """The answer of every defence on the original and the attacked image; the stylesheet shows the
    five most probable ones when they are asked for."""
    kinds = [("clean", "Original image")]
    if result.settings["attack"] is not None:
        kinds.append(("attacked", "Attacked image"))
    heads = "".join(f'<th scope="col">{title}</th>' for _, title in kinds)
    rows = []
    for defense in find_defenses(list(result.answers)):
        cells = "".join(f"<td>{_cell(result, defense.name, kind)}</td>" for kind, _ in kinds)
        rows.append(
            f'<tbody class="t-{escape(defense.name)}"><tr><th scope="rowgroup" '
            f'colspan="{len(kinds)}">{_title(defense, result.settings["trained"])}</th></tr>'
            f"<tr>{cells}</tr></tbody>"
        )
    return (
        f'<div class="t-card"><table class="t-table"><caption>{_caption(result)}</caption>'
        f"<thead><tr>{heads}</tr></thead>{''.join(rows)}</table></div>"
    )


def _title(defense: Defense, trained: bool) -> str:
    badge = f" {_badge(UNTRAINED)}" if defense.uses_prompts and not trained else ""
    return (
        f'<span class="t-model">{escape(defense.title)}</span> '
        f'<span class="t-small">{escape(defense.about)}</span>{badge}'
    )


def _caption(result: Comparison) -> str:
    if result.label is None or not result.label_given:
        return "No true class was given: an answer is kept or changed, not right or wrong."
    name = escape(_cut(result.classes[result.label]))
    return f"The true class is <strong>{name}</strong>, as you said."


def _cell(result: Comparison, name: str, kind: str) -> str:
    answer = getattr(result[name], kind)
    if answer is None:
        return '<p class="t-small t-pending">no answer yet</p>'
    order = answer.probabilities.argsort(descending=True).tolist()
    true = result.label if result.label_given else order[0]
    shown = list(dict.fromkeys([*order[:TOP], true]))
    mark = _mark(result, name, kind, order[0])
    items = "".join(
        _answer(result, answer.probabilities, i, mark if i == order[0] else None) for i in shown
    )
    return f'<ul class="t-answers">{items}</ul>'


def _mark(result: Comparison, name: str, kind: str, answer: int) -> str:
    """Right or wrong where the true class is known, else whether the attack changed the answer."""
    if result.label_given:
        word, sign = ("right", "✓") if answer == result.label else ("wrong", "✗")
        return f' <span class="t-mark t-{word}">{sign} {word}</span>'
    state = result.state(name) if kind == "attacked" else None
    return f' <span class="t-mark">{state}</span>' if state else ""


def _answer(result: Comparison, probabilities: Tensor, index: int, mark: str | None) -> str:
    """A class with its probability; of the most probable one, with its mark."""
    first, true = mark is not None, result.label_given and index == result.label
    value = float(probabilities[index])
    marks = (("t-first", first), ("t-truth", true), ("t-rest", not first and not true))
    classes = " ".join(name for name, on in marks if on)
    return (
        f'<li class="{classes}"><span class="t-name">{escape(_cut(result.classes[index]))}'
        f'{mark or ""}</span><span class="t-value">{_percent(value)}</span>'
        f'<span class="t-bar" aria-hidden="true"><i style="width:{100 * value:.1f}%"></i></span>'
        "</li>"
    )


def facts(result: Comparison) -> str:
    """Attack, attacked model, epsilon, measured size, test-time settings and times, in words."""
    settings = result.settings
    rows = [*_attack_facts(result), ("Prompts", settings["pack"])]
    for name, own in settings["test_time"].items():
        shown = [f"{key} {own[key]:g}" for key in TEST_TIME.values() if key in own]
        rows += [(result.title(name), ", ".join(shown))] if shown else []
    times = [f"attack {result.seconds['attack']:.2f} s"] if "attack" in result.seconds else []
    for name, answers in result.answers.items():
        own = [answer.seconds for answer in (answers.clean, answers.attacked) if answer]
        times += [f"{result.title(name)} {sum(own) / len(own):.2f} s"] if own else []
    rows.append(("Time, per image", ", ".join(times)))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in rows
    )
    return f'<dl class="t-card t-facts">{items}</dl>'


def _attack_facts(result: Comparison) -> list[tuple[str, str]]:
    settings, attack = result.settings, result.settings["attack"]
    if attack is None:
        return [("Attack", "none")]
    row = METHODS[attack["name"]]
    towards = f", towards {_cut(settings['target'])}" if settings["target"] else ""
    attacked = settings["attacked_model"]
    measured = "not yet"
    if result.attacked is not None:
        measured = f"L∞ {result.linf_255}/255, L2 {result.l2:.2f}"
    return [
        ("Attack", f"{row.title}, {attack['steps']} {row.unit}{towards}"),
        ("Epsilon", f"{settings['epsilon_255']}/255" if row.norm == "Linf" else "none: L2 attack"),
        ("Measured", measured),
        ("Attacked model", f"{attacked_name(attacked)}, {_how(row, attacked)}"),
        ("For the other rows", "a transfer attack: they get the same image"),
    ]


def perturbation(result: Comparison) -> str:
    """The amplified perturbation with its scale and its size beside epsilon."""
    if result.attacked is None:
        return ""
    picture, scale = amplified_difference(result.attacked, result.clean)
    epsilon = result.settings["epsilon_255"]
    limit = "" if epsilon is None else f" and epsilon is {epsilon}/255"
    return f"""<figure class="t-figure">
<img class="t-pixels" src="{png_url(picture)}"
alt="The perturbation, amplified {scale} times around mid-grey">
<figcaption><strong>Perturbation × {scale}</strong> around mid-grey; the largest change of a pixel
(L∞) is {result.linf_255}/255{limit}.</figcaption></figure>"""


def amplified_difference(attacked: Tensor, clean: Tensor) -> tuple[Image.Image, int]:
    """The change from one uint8 image (3, H, W) to the other around mid-grey, scaled so that its
    largest entry reaches full range, and that scale."""
    delta = attacked.int() - clean.int()
    scale = max(1, 127 // max(1, int(delta.abs().max())))
    return to_picture((delta * scale + 128).clamp(0, 255).byte()), scale


def downloads(result: Comparison, numbers: dict, link: str) -> str:
    """The attacked image as a PNG, all numbers as JSON, and a link that restores the inputs."""
    size, items = result.clean.shape[-1], []
    if result.attacked is not None:
        png = png_url(to_picture(result.attacked))
        items.append(
            f'<a href="{png}" download="attacked-{size}.png">Attacked image</a> (PNG, {size} × '
            f"{size} pixels; uploaded again, it gets the same answers)"
        )
    data = base64.b64encode(json.dumps(numbers).encode()).decode()
    items.append(
        f'<a href="data:application/json;base64,{data}" download="tapt.json">All numbers</a> '
        "(JSON: settings, seed, versions, probabilities)"
    )
    items.append(
        f'<a href="#{link}" onclick="navigator.clipboard?.writeText(this.href)">Link to these '
        f"inputs</a> ({len(link) / 1000:.0f} KB: it holds the picture too, at {size} × {size} "
        "pixels; a click copies it)"
    )
    rows = "".join(f"<li>{item}</li>" for item in items)
    return f'<section class="t-card t-downloads"><h2>Take away</h2><ul>{rows}</ul></section>'


def sweep(result: Sweep) -> str:
    """Every defence's probability of the true class against epsilon."""
    attack = METHODS[result.settings["attack"]["name"]].title
    name, label = attacked_name(result.settings["attacked_model"]), escape(_cut(result.label))
    what = f"The true class is <strong>{label}</strong>."
    if not result.label_given:
        what = f"<strong>{label}</strong> is vanilla CLIP's own answer to the original."
    titles = {row.name: row.title for row in find_defenses(list(result.probabilities))}
    curves = {
        titles[name]: list(zip(result.epsilons, values, strict=False))  # as far as they are
        for name, values in result.probabilities.items()
    }
    chart = line_chart(
        curves,
        title=f"Probability of {label} under {attack}",
        x_label="epsilon, 1/255",
        x_range=(0, result.epsilons[-1]),
        x_ticks=result.epsilons,
        y_max=1,
        show=_percent,
    )
    falls = "".join(
        f"<li>{escape(titles[name])}: {_falls(result, answers)}</li>"
        for name, answers in result.answers.items()
    )
    return (
        f'<section class="t-card t-curves"><p>{what} The attack sees {name}.</p>{chart}'
        f"<ul>{falls}</ul></section>"
    )


def _falls(result: Sweep, answers: Sequence[str]) -> str:
    """Where answers are wrong; where the true class is not known, others than without an attack."""
    right, word, still = result.label, "wrong", "right everywhere"
    if not result.label_given and answers:
        right, word, still = answers[0], "changed", "kept everywhere"
    wrong = [answer != right for answer in answers]
    if not any(wrong):
        return still
    first = wrong.index(True)
    if all(wrong[first:]) and len(wrong) - first > 1:
        return f"{word} from {result.epsilons[first]}/255 on"
    at = (f"{e}/255" for e, is_wrong in zip(result.epsilons, wrong, strict=False) if is_wrong)
    return f"{word} at {', '.join(at)}"


def published(pack: Pack) -> str:
    """The accuracies of a pack's card: a chart for each attack with epsilon, and a table. Of the
    charts, one for each attacked model is open, that of most pictures."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with_epsilon = [row for row in pack.evaluation if row["epsilon_255"] is not None]
    rows = sorted(with_epsilon, key=lambda row: row["epsilon_255"])
    for row in rows:
        clean = [(0, row["clean_accuracy"])]
        groups.setdefault(_published_title(row), {}).setdefault(_defense(row), clean).append(
            (row["epsilon_255"], row["accuracy"])
        )
    by_pictures = sorted(rows, key=lambda row: row["n"])
    largest = {row["attacked_model"]: _published_title(row) for row in by_pictures}.values()
    shown, folded = "", ""
    for title, series in groups.items():
        ticks = sorted({x for points in series.values() for x, _ in points})
        chart = line_chart(
            series,
            title=escape(title),
            x_label="epsilon, 1/255",
            x_range=(0, ticks[-1]),
            x_ticks=ticks,
            y_max=1,
            show=_percent,
        )
        if title in largest:
            shown += chart
        else:
            folded += chart
    if folded:
        shown += f"<details><summary>More attacks and epsilons</summary>{folded}</details>"
    body = shown + _published_table(rows) if rows else "<p>None yet.</p>"
    return (
        '<section class="t-card t-curves"><h2>Accuracy over many pictures, as published with the '
        f"pack</h2>{body}</section>"
    )


def _published_table(rows: Sequence[Row]) -> str:
    heads = ("Defence", "Attack", "Epsilon", "Clean", "Attacked", "95 % interval")
    cells = [
        (
            _defense(row),
            _published_title(row),
            f"{row['epsilon_255']}/255",
            _percent(row["clean_accuracy"]),
            _percent(row["accuracy"]),
            " to ".join(map(_percent, row["ci95"])),
        )
        for row in rows
    ]
    summary = "<summary>All of them, with 95 % intervals</summary>"
    return f"<details>{summary}{plain_table(heads, cells)}</details>"


def _defense(row: Row) -> str:
    titles = {name: find_defenses([name])[0].title for name in list_defenses()}
    return defense_name({**row, "defense": titles.get(row["defense"], row["defense"])})


def _published_title(row: Row) -> str:
    """The condition of a row of a pack's table, in words."""
    attacked, images = row["attacked_model"], f"{_cut(row['dataset'])}, n = {row['n']}"
    if attacked == "all":
        return f"The worst, for each picture, of the attacks run on it ({images})"
    title = METHODS[row["attack"]].title if row["attack"] in METHODS else row["attack"]
    attack = attack_name({**row, "attack": title})
    return f"{attack} on {attacked_title(attacked)} ({images})"


def _badge(text: str) -> str:
    return f'<span class="t-badge">{escape(text)}</span>'


def _percent(value: float) -> str:
    if value >= 0.9995 or value < 0.0005:
        return "100 %" if value > 0.5 else "0 %"
    return f"{100 * value:.1f} %"


def _cut(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."


def png_url(picture: Image.Image) -> str:
    """A picture as a lossless `data:` URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
