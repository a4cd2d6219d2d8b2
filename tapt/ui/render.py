"""HTML pieces of the page. Every string that a person typed goes through `html.escape`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape

from PIL import Image
from torch import Tensor

from tapt.adaptive import DEPLOYED_THREATS
from tapt.attacks import ATTACKS, Attack
from tapt.compare import Comparison
from tapt.defense import DEFENSES
from tapt.images import amplified_difference, to_picture
from tapt.losses import kept_views_count
from tapt.pack import Pack
from tapt.report import attack_name
from tapt.sweep import Sweep
from tapt.ui.chart import line_chart, plain_table
from tapt.ui.known import KINDS
from tapt.ui.service import Model

UNTRAINED = "untrained prompts, entropy only"
TOP = 5
PACK_INFO = "A pack for this backbone: one from the list, or owner/repo of the Hub."
NO_LABEL = "CLIP's own answer to the original"
NO_TARGET = "none: away from the true class"
MODELS = {
    "clip": ("Vanilla CLIP", "no defence"),
    "static": ("Static prompts", "before the test-time step"),
    "ensemble": ("Untuned view ensemble", "the kept views under the static prompts, no step"),
    "tapt": ("TAPT", "prompts tuned for this one picture"),
}
# per attacked model its name, what the attack then is, and a line for the person who chooses
THREATS = {
    "clip": (
        "vanilla CLIP",
        "white-box",
        "White-box on CLIP without prompts; the other rows then face a transferred attack.",
    ),
    "static": (
        "static prompts",
        "white-box",
        "White-box on the prompts before the test-time step, as in the paper's own protocol; for "
        "TAPT still a transferred attack.",
    ),
    "adaptive": (
        "deployed TAPT",
        "adaptive: through the test-time step, over fresh views",
        "Adaptive: every step of the attack runs the whole defence on fresh views. Slow.",
    ),
    "square": (
        "deployed TAPT",
        "black-box: by its answers alone",
        "Black-box: every query runs the whole defence on fresh views. Slow.",
    ),
}
PHASES = {
    "vanilla CLIP": "Asking vanilla CLIP",
    "attack": "Attacking the picture",
    "download": "Fetching the model",
    "TAPT on the clean image": "TAPT on the original image",
}
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
    size, name = model.backbone.image_size, model.backbone_name
    name = f"{name}, the embedded CLIP" if model.embedded else name
    line = f"Model: {name} ({size} × {size} pixels). Prompts: {model.pack_name}."
    for what, origin in (("Backbone", model.backbone.origin), ("Pack", model.pack.origin)):
        line += f" {what}: {origin}." if origin else ""
    warning = "" if model.pack.trained else _badge(f"TAPT: {UNTRAINED}")
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


def attack_note(row: Attack | None, threat: str) -> str:
    """One line on the attack and one on the model that it sees."""
    if row is None:
        return '<p class="t-small">The picture stays as it is.</p>'
    lines = (
        f"<strong>{row.title}:</strong> {escape(row.about)} ({row.steps} {row.unit} by default.)"
    )
    if threat in THREATS:
        by_queries = threat == "adaptive" and row is ATTACKS["square"]
        title, _, about = THREATS["square" if by_queries else threat]
        lines += f"<br><strong>It sees {title}.</strong> {escape(about)}"
    return f'<p class="t-small">{lines}</p>'


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
    plain = result.settings["trained"] or "tapt" not in result.results
    badge = "" if plain else f" {_badge(f'TAPT: {UNTRAINED}')}"
    warning = _unknown_warning(unknown) if unknown else ""
    return (
        f'<section class="t-card t-verdict"><p class="t-sentence">{escape(result.verdict())}'
        f"{badge}</p>{warning}</section>"
    )


def table(result: Comparison) -> str:
    """The answer of every model on the original and the attacked image; the stylesheet shows the
    five most probable ones when they are asked for."""
    kinds = [("clean", "Original image")]
    if result.settings["attack"] is not None:
        kinds.append(("attacked", "Attacked image"))
    heads = "".join(f'<th scope="col">{title}</th>' for _, title in kinds)
    rows = []
    for name in DEFENSES:
        cells = "".join(f"<td>{_cell(result, name, kind)}</td>" for kind, _ in kinds)
        emphasis = ' class="t-tapt"' if name == "tapt" else ""
        rows.append(
            f'<tbody{emphasis}><tr><th scope="rowgroup" colspan="{len(kinds)}">'
            f"{_model(name, result.settings['trained'])}</th></tr><tr>{cells}</tr></tbody>"
        )
    return (
        f'<div class="t-card"><table class="t-table"><caption>{_caption(result)}</caption>'
        f"<thead><tr>{heads}</tr></thead>{''.join(rows)}</table></div>"
    )


def _model(name: str, trained: bool) -> str:
    title, what = MODELS[name]
    badge = f" {_badge(UNTRAINED)}" if name in ("static", "tapt") and not trained else ""
    return f'<span class="t-model">{title}</span> <span class="t-small">{what}</span>{badge}'


def _caption(result: Comparison) -> str:
    true_class = f"<strong>{escape(_cut(result.classes[result.label]))}</strong>"
    if result.label_given:
        return f"The true class is {true_class}, as you said."
    return f"{true_class}, vanilla CLIP's own answer to the original, counts as right."


def _cell(result: Comparison, name: str, kind: str) -> str:
    probabilities = result.results.get(name, {}).get(kind)
    if probabilities is None:
        return '<p class="t-small t-pending">no answer yet</p>'
    order = probabilities.argsort(descending=True).tolist()
    shown = list(dict.fromkeys([*order[:TOP], result.label]))
    items = "".join(_answer(result, probabilities, i, first=i == order[0]) for i in shown)
    return f'<ul class="t-answers">{items}</ul>'


def _answer(result: Comparison, probabilities: Tensor, index: int, *, first: bool) -> str:
    right = index == result.label
    mark = ""
    if first:
        word, sign = ("right", "✓") if right else ("wrong", "✗")
        mark = f' <span class="t-mark t-{word}">{sign} {word}</span>'
    value = float(probabilities[index])
    marks = (("t-first", first), ("t-truth", right), ("t-rest", not first and not right))
    classes = " ".join(mark for mark, on in marks if on)
    return (
        f'<li class="{classes}"><span class="t-name">{escape(_cut(result.classes[index]))}{mark}'
        f'</span><span class="t-value">{_percent(value)}</span>'
        f'<span class="t-bar" aria-hidden="true"><i style="width:{100 * value:.1f}%"></i></span>'
        "</li>"
    )


def facts(result: Comparison) -> str:
    """Attack, attacked model, epsilon, measured size, test-time settings and times, in words."""
    settings, seconds = result.settings, result.seconds
    config = settings["test_time"]
    kept = kept_views_count(config["views"], config["keep"])
    steps = f"{config['steps']} step{'' if config['steps'] == 1 else 's'}"
    prompts = settings["pack"] if settings["trained"] else UNTRAINED
    tapt = [v for k, v in seconds.items() if k.startswith("tapt_")]
    times = [("CLIP", seconds.get("clip")), ("attack", seconds.get("attack"))]
    times.append(("TAPT, per image", sum(tapt) / len(tapt) if tapt else None))
    rows = [
        *_attack_facts(result),
        ("TAPT", f"{prompts}; {config['views']} views, {kept} kept, {steps}"),
        ("Time", ", ".join(f"{k} {v:.2f} s" for k, v in times if v is not None)),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in rows)
    return f'<dl class="t-card t-facts">{items}</dl>'


def _attack_facts(result: Comparison) -> list[tuple[str, str]]:
    settings, attack = result.settings, result.settings["attack"]
    if attack is None:
        return [("Attack", "none")]
    row = ATTACKS[attack["name"]]
    towards = f", towards {_cut(settings['target'])}" if settings["target"] else ""
    note = f" ({UNTRAINED})" if settings["threat"] == "static" and not settings["trained"] else ""
    name, how, _ = THREATS[settings["threat"]]
    measured = "not yet"
    if result.attacked is not None:
        measured = f"L∞ {result.linf_255}/255, L2 {result.l2:.2f}"
    return [
        ("Attack", f"{row.title}, {attack['steps']} {row.unit}{towards}"),
        ("Epsilon", f"{settings['epsilon_255']}/255" if row.norm == "Linf" else "none: L2 attack"),
        ("Measured", measured),
        ("Attacked model", f"{name}{note}, {how}"),
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
    source = "" if result.label_given else ", vanilla CLIP's own answer to the original"
    attack = ATTACKS[result.settings["attack"]["name"]].title
    label, seen = escape(_cut(result.label)), THREATS[result.settings["threat"]][0]
    curves = {
        MODELS[name][0]: list(zip(result.epsilons, values, strict=False))  # as far as they are
        for name, values in result.probabilities.items()
    }
    chart = line_chart(
        curves,
        title=f"Probability of the true class under {attack}",
        x_label="epsilon, 1/255",
        x_range=(0, result.epsilons[-1]),
        x_ticks=result.epsilons,
        y_max=1,
        show=_percent,
    )
    falls = "".join(
        f"<li>{MODELS[name][0]}: {_wrong_at(result, answers)}</li>"
        for name, answers in result.answers.items()
    )
    return (
        f'<section class="t-card t-curves"><p>The true class is <strong>{label}</strong>{source}. '
        f"The attack sees {seen}.</p>{chart}<ul>{falls}</ul></section>"
    )


def _wrong_at(result: Sweep, answers: Sequence[str]) -> str:
    wrong = [answer != result.label for answer in answers]
    if not any(wrong):
        return "right everywhere"
    first = wrong.index(True)
    if all(wrong[first:]) and len(wrong) - first > 1:
        return f"wrong from {result.epsilons[first]}/255 on"
    at = (f"{e}/255" for e, is_wrong in zip(result.epsilons, wrong, strict=False) if is_wrong)
    return f"wrong at {', '.join(at)}"


def published(pack: Pack) -> str:
    """The accuracies of a pack's card: a chart for each attack with epsilon, and a table. Of the
    charts, one for each attacked model is open, that of most pictures."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    rows = sorted(filter(_may_be_drawn, pack.evaluation), key=lambda row: row["epsilon_255"])
    for row in rows:
        clean = [(0, row["clean_accuracy"])]
        groups.setdefault(_published_title(row), {}).setdefault(_defense(row), clean).append(
            (row["epsilon_255"], row["accuracy"])
        )
    by_pictures = sorted(rows, key=lambda row: row["n"])
    largest = {row["threat"]: _published_title(row) for row in by_pictures}.values()
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


def _published_table(rows: Sequence[dict]) -> str:
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


def _defense(row: dict) -> str:
    if row["defense"] == "random-start":
        return "TAPT from random prompts"
    return MODELS.get(row["defense"], (row["defense"],))[0]


def _may_be_drawn(row: object) -> bool:
    """Whether a row has an epsilon and what a chart needs; a pack may come from anybody."""
    if not isinstance(row, dict) or not isinstance(row.get("ci95"), list) or len(row["ci95"]) != 2:
        return False
    numbers = [row.get(key) for key in ("epsilon_255", "clean_accuracy", "accuracy")] + row["ci95"]
    texts = (row.get(key) for key in ("dataset", "threat", "attack", "defense"))
    return (
        all(isinstance(n, (int, float)) and 0 <= n <= 255 for n in numbers)
        and isinstance(row.get("n"), int)
        and all(isinstance(text, str) for text in texts)
    )


def _published_title(row: dict) -> str:
    """The condition of a row of a pack's table, in words."""
    threat, images = row["threat"], f"{_cut(row['dataset'])}, n = {row['n']}"
    if threat == "all":
        return f"The worst, for each picture, of the attacks run on it ({images})"
    name = ATTACKS[row["attack"]].title if row["attack"] in ATTACKS else row["attack"]
    attack = attack_name({"steps": row.get("steps"), "attack": name})
    own = threat in DEPLOYED_THREATS  # then each row's own defence was attacked
    seen = "each defence as deployed" if own else THREATS.get(threat, (threat,))[0]
    return f"{attack} on {seen} ({images})"


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
