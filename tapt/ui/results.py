"""The rows of a run, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from tapt.comparison import Answer, Comparison
from tapt.core.attacks import METHODS
from tapt.core.images import to_picture
from tapt.defenses import Defense, ImageBatch, find_defenses
from tapt.ui.details import how, shown_batches
from tapt.ui.pictures import change_figure, figure, slider
from tapt.ui.render import cut, sees

Batches = Mapping[str, ImageBatch]
TOP = 5
WAITING, NOT_RUN, STOPPED = "…", "not run", "Stopped."
SIGNS = {
    "held": "✓",
    "fooled": "✗",
    "wrong before": "○",
    "recovered": "↑",
    "right": "✓",
    "wrong": "✗",
}


def results(result: Comparison) -> str:
    """One row for each defence, and below it what opens: five answers, how it decided."""
    true = "" if result.label is None else f"({escape(cut(result.classes[result.label]))})"
    heads = {"name": "Defence", "first": "Original", "last": "Attacked"}
    heads |= {"p": f'p<span class="t-of">{true}</span>', "time": "Time"}
    if result.settings["attack"] is None:
        heads["last"] = heads.pop("first")
    cells = "".join(f'<th scope="col" class="t-{k}">{head}</th>' for k, head in heads.items())
    cells += '<th scope="col" class="t-it" aria-label="Attack this one"></th>'
    batches = shown_batches(result) if result.finished else {}
    rows = find_defenses(list(result.answers))
    body = "".join(_row(result, row, len(heads) + 1, batches) for row in rows)
    return (
        f'<table class="t-table"><caption>{_caption(result)}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
        f'<p class="t-small">{_facts(result)}</p>'
    )


def _row(result: Comparison, defense: Defense, width: int, batches: Batches) -> str:
    name, answers, title = defense.name, result[defense.name], escape(result.title(defense.name))
    last, word = answers.attacked, result.state(name)
    cells = [f'<td class="t-first">{_cell(answers.clean)}</td>', f"<td>{_cell(last, word)}</td>"]
    if result.settings["attack"] is None:
        last = answers.clean
        if last is not None and result.label_given and result.label is not None:
            word = "right" if last.top[0] == result.classes[result.label] else "wrong"
        cells = [f"<td>{_cell(last, word)}</td>"]
    bar = time = WAITING
    if last is not None and result.label is not None:
        bar = _bar(float(last.probabilities[result.label]), result.label_given)
        time = f"{last.seconds:.2f} s"
    cells += [f'<td class="t-p">{bar}</td>', f'<td class="t-time">{time}</td>']
    seen = ' <span title="attacked directly">◎</span>' if name == result.attacked_row else ""
    victim = name if name in ("clip", "static") else f"deployed:{name}"
    button = (
        f'<button type="button" data-attack="{escape(victim)}" title="Attack this one" '
        f'aria-label="Attack {title}">◎</button>'
    )
    more = f"<p>{WAITING}</p>"
    if result.finished:
        more = _fives(result, name) + how(result, name, batches)
    return (
        f'<tr><th scope="row"><details><summary>{title}{seen}</summary></details></th>'
        + "".join([*cells, f'<td class="t-it">{button}</td></tr>'])
        + f'<tr class="t-more"><td colspan="{width}">{more}</td></tr>'
    )


def _cell(answer: Answer | None, word: str | None = None) -> str:
    """An answer behind its state by sign and word; where nobody knows the truth, by its word alone
    and no colour."""
    if answer is None:
        return WAITING
    mark = ""
    if word is not None:
        sign = SIGNS.get(word, "")
        kind = {"✓": " t-good", "↑": " t-good", "✗": " t-bad"}.get(sign, "")
        mark = f'<span class="t-mark{kind}">{sign} {word}</span> '
    name, value = answer.top
    return f"{mark}{escape(cut(name))} {100 * value:.0f}&nbsp;%"


def _bar(value: float, sure: bool) -> str:
    return (
        f'<span class="t-bar{" t-true" if sure else ""}" aria-hidden="true"><i style="width:'
        f'{100 * value:.0f}%"></i></span> {100 * value:.0f}&nbsp;%'
    )


def _caption(result: Comparison) -> str:
    if result.label is None or not result.label_given:
        return "Nobody said what it is: answers are kept or changed, not right or wrong."
    return (
        f"It is <strong>{escape(cut(result.classes[result.label]))}</strong>. Tap a row for more."
    )


def _facts(result: Comparison) -> str:
    attack = result.settings["attack"]
    if attack is None:
        return "No attack."
    method, target = METHODS[attack["name"]], result.settings["target"]
    text = f"{method.title}, {attack['steps']} {method.unit}"
    text += f", towards {cut(target)}" if target else ""
    if result.settings["epsilon_255"] is not None:
        text += f", epsilon {result.settings['epsilon_255']}/255"
    if result.attacked is not None:
        text += f"; measured L∞ {result.linf_255}/255, L2 {result.l2:.2f}"
    text += f". {sees(method, result.settings['attacked_model'])}"
    return f"◎ attacked directly. {escape(text)}"


def _fives(result: Comparison, name: str) -> str:
    rows = []
    for kind, answer in vars(result[name]).items():
        if answer is not None:
            values, best = answer.probabilities.sort(descending=True)
            items = [
                f"{escape(cut(result.classes[i]))} {100 * value:.0f}&nbsp;%"
                for value, i in zip(values[:TOP].tolist(), best.tolist(), strict=False)
            ]
            word = "Original" if kind == "clean" else "Attacked"
            rows.append(f"<p><strong>{word}:</strong> {', '.join(items)}</p>")
    return "".join(rows)


def pictures(result: Comparison) -> str:
    """What the model saw, before and after, and what the attack added, enlarged."""
    clean = to_picture(result.clean)
    shown = figure(clean, "What the model sees: the central square")
    if result.attacked is None:
        return shown
    name = result.attacked_row or next(iter(result.answers))
    title, answers = result.title(name), result[name]
    before, after = (answer.top[0] if answer else "" for answer in vars(answers).values())
    again = "still" if before == after else "now"
    both = slider(
        (clean, f"original picture: {title} says {before}"),
        (to_picture(result.attacked), f"attacked picture: {title} {again} says {after}"),
    )
    epsilon = result.settings["epsilon_255"]
    limit = "" if epsilon is None else f", epsilon {epsilon}/255"
    note = f": largest change {result.linf_255}/255{limit}"
    change = result.attacked.int() - result.clean.int()
    return both + shown + change_figure(change, "What the attack changed", note)
