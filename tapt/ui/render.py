"""HTML pieces of the page. Every string that a person typed goes through `html.escape`."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image
from torch import Tensor

from tapt.compare import Comparison
from tapt.defense import DEFENSES
from tapt.images import amplified_difference, to_picture
from tapt.ui.known import KINDS

UNTRAINED = "untrained prompts, entropy only"
TOP = 3
MODELS = {
    "clip": ("Vanilla CLIP", "no defence"),
    "static": ("Static prompts", "before the test-time step"),
    "ensemble": ("Untuned view ensemble", "the kept views under the static prompts, no step"),
    "tapt": ("TAPT", "prompts tuned for this one picture"),
}
THREAT_NAMES = {"clip": "vanilla CLIP", "static": "the static prompts"}
PHASES = {
    "vanilla CLIP": "Asking vanilla CLIP",
    "attack": "Attacking the picture",
    "TAPT on the clean image": "TAPT on the original image",
}
KNOWS = f"{', '.join(list(KINDS)[:-1])} and {list(KINDS)[-1]}"


def header(service_line: str, *, trained: bool) -> str:
    """Title, one sentence and what is loaded; `service_line` is escaped here."""
    warning = "" if trained else _badge("The prompts are untrained: TAPT runs on entropy only.")
    return f"""<header class="t-header">
<h1>TAPT: CLIP under attack, with and without a defence</h1>
<p>Pixel changes that nobody sees can make CLIP name the wrong thing. TAPT tunes CLIP's prompts
for each single picture, without labels, and asks again. Here you see both answers side by side.</p>
<p class="t-small">{escape(service_line)}</p>{warning}</header>"""


def welcome() -> str:
    """What stands in the place of the results before the first run."""
    return """<section class="t-card t-welcome"><h2>How it works</h2><ol>
<li><strong>Pick a picture</strong> and the class names that CLIP may choose from.</li>
<li><strong>Press Run.</strong> An attack (PGD) moves every pixel by at most epsilon, so that the
attacked model changes its mind.</li>
<li><strong>Compare the answers</strong> of vanilla CLIP, of the static prompts, of an untuned
ensemble of views, and of TAPT, on the original and on the attacked picture.</li>
</ol></section>"""


def classes_note(unknown: Sequence[str]) -> str:
    """The ten kinds of the embedded model, and a warning where names are outside them."""
    note = f'<p class="t-small">The embedded model knows ten kinds only: {escape(KNOWS)}.</p>'
    return note + (_unknown_warning(unknown) if unknown else "")


def _unknown_warning(unknown: Sequence[str]) -> str:
    names = ", ".join(escape(_cut(name)) for name in unknown[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return (
        f'<p class="t-warning"><strong>Outside the ten kinds:</strong> {names}{more}. '
        "The model has never seen these; its answers about them mean little.</p>"
    )


def preview(picture: Image.Image) -> str:
    """The model's input, enlarged, with a caption."""
    size = picture.width
    return f"""<figure class="t-figure t-preview">
<img class="t-pixels" src="{_png_url(picture)}" alt="The picture at {size} by {size} pixels">
<figcaption><strong>What the model sees:</strong> the central square at {size} × {size} pixels,
enlarged.</figcaption></figure>"""


def status(phase: str, done: int | None = None, total: int | None = None) -> str:
    """A progress bar; without numbers it only says that something runs."""
    text = escape(PHASES.get(phase, phase))
    if done is None or not total:
        return f'<div class="t-status"><span>{text}…</span><progress></progress></div>'
    if phase == "attack" and total > 1:
        text += f": step {done} of {total}"
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


def verdict(result: Comparison, *, trained: bool, unknown: Sequence[str] = ()) -> str:
    """The sentence that says what happened."""
    badge = "" if trained or "tapt" not in result.results else f" {_badge(f'TAPT: {UNTRAINED}')}"
    warning = _unknown_warning(unknown) if unknown else ""
    return (
        f'<section class="t-card t-verdict"><p class="t-sentence">{escape(result.verdict())}'
        f"{badge}</p>{warning}</section>"
    )


def table(result: Comparison, *, trained: bool) -> str:
    """Top answers of every model on the original and the attacked image."""
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
            f"{_model(name, trained)}</th></tr><tr>{cells}</tr></tbody>"
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
        return f"Top answers. The true class is {true_class}, as you said."
    return (
        f"Top answers. The true class was left empty, so {true_class}, vanilla CLIP's own answer "
        "to the original, counts as right."
    )


def _cell(result: Comparison, name: str, kind: str) -> str:
    probabilities = result.results.get(name, {}).get(kind)
    if probabilities is None:
        return '<p class="t-small t-pending">no answer yet</p>'
    order = probabilities.argsort(descending=True).tolist()
    shown = order[:TOP]
    if result.label not in shown:
        shown = [*shown, result.label]
    items = "".join(
        _answer(result, probabilities, index, first=index == order[0]) for index in shown
    )
    return f'<ul class="t-answers">{items}</ul>'


def _answer(result: Comparison, probabilities: Tensor, index: int, *, first: bool) -> str:
    right = index == result.label
    mark = ""
    if first:
        word, sign = ("right", "✓") if right else ("wrong", "✗")
        mark = f' <span class="t-mark t-{word}">{sign} {word}</span>'
    value = float(probabilities[index])
    classes = " ".join(c for c, on in (("t-first", first), ("t-truth", right)) if on)
    return (
        f'<li class="{classes}"><span class="t-name">{escape(_cut(result.classes[index]))}{mark}'
        f'</span><span class="t-value">{_percent(value)}</span>'
        f'<span class="t-bar" aria-hidden="true"><i style="width:{100 * value:.1f}%"></i></span>'
        "</li>"
    )


def facts(result: Comparison, *, trained: bool) -> str:
    """Attack, attacked model, epsilon, measured L-inf, test-time settings and times, in words."""
    settings, seconds = result.settings, result.seconds
    test_time = settings["test_time"]
    kept = max(1, int(test_time["views"] * test_time["keep"]))
    steps = f"{test_time['steps']} step{'' if test_time['steps'] == 1 else 's'}"
    prompts = settings["pack"] if trained else UNTRAINED
    tapt = [v for k, v in seconds.items() if k.startswith("tapt_")]
    times = [("CLIP", seconds.get("clip")), ("attack", seconds.get("attack"))]
    times.append(("TAPT, per image", sum(tapt) / len(tapt) if tapt else None))
    rows = [
        *_attack_facts(result, trained),
        ("TAPT", f"{prompts}; {test_time['views']} views, {kept} kept, {steps}"),
        ("Time", ", ".join(f"{k} {v:.2f} s" for k, v in times if v is not None)),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in rows)
    return f'<dl class="t-card t-facts">{items}</dl>'


def _attack_facts(result: Comparison, trained: bool) -> list[tuple[str, str]]:
    settings, measured = result.settings, result.linf_255
    if settings["attack"] is None:
        return [("Attack", "none")]
    threat, attack = settings["threat"], settings["attack"]
    note = f" ({UNTRAINED})" if threat == "static" and not trained else ""
    return [
        ("Attack", f"{attack['name'].upper()}, {attack['steps']} steps"),
        ("Epsilon", f"{settings['epsilon_255']}/255"),
        ("Measured L∞", "not yet" if measured is None else f"{measured}/255"),
        ("Attacked model", f"{THREAT_NAMES[threat]}{note}, white-box"),
        ("For TAPT", "a transfer attack: it gets the same image"),
    ]


def perturbation(result: Comparison) -> str:
    """The amplified perturbation with its scale, and the attacked image as a PNG."""
    if result.attacked is None:
        return ""
    picture, scale = amplified_difference(result.attacked, result.clean)
    size = picture.width
    png = _png_url(to_picture(result.attacked))
    return f"""<figure class="t-figure">
<img class="t-pixels" src="{_png_url(picture)}"
alt="The perturbation, amplified {scale} times around mid-grey">
<figcaption><strong>Perturbation × {scale}</strong> around mid-grey; the largest change of a pixel
is {result.linf_255}/255.</figcaption></figure>
<p class="t-downloads"><a href="{png}" download="attacked-{size}.png">Attacked image
(PNG, {size} × {size} pixels)</a></p>"""


def _badge(text: str) -> str:
    return f'<span class="t-badge">{escape(text)}</span>'


def _percent(value: float) -> str:
    if value >= 0.9995 or value < 0.0005:
        return "100 %" if value > 0.5 else "0 %"
    return f"{100 * value:.1f} %"


def _cut(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."


def _png_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
