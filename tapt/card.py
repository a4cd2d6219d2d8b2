"""The model card of a pack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCardData

from tapt.backbone import hub_repo
from tapt.report import attack_name, epsilon_name

if TYPE_CHECKING:
    from tapt.pack import Pack

TAG = "tapt"
PICTURE = "accuracy.png"
NOTES = "## Notes"
USE = """\
```python
from tapt.compare import compare
from tapt.defense import make_defender
from tapt.images import open_image
from tapt.pack import load_model

backbone, pack = load_model(pack="{name}")
defender = make_defender(backbone, pack, ["cat", "dog"])
print(compare(defender, open_image("photo.jpg")).verdict())
```"""


def weights_tag(sha256: str | None) -> str:
    """The Hub's tag of packs for one set of weights."""
    return f"tapt-weights-{(sha256 or 'random')[:16]}"


def notes_of(card: str) -> str:
    """What people wrote into a card: everything from the line `## Notes` on, or nothing."""
    return card[start:] if (start := card.find(f"\n{NOTES}\n") + 1) else ""


def model_card(pack: Pack, name: str, *, picture: bool = False, notes: str = "") -> str:
    """Markdown with the Hub's metadata in front; numbers come from `pack.evaluation`.

    name: what `load_pack` takes.
    picture: whether `accuracy.png` lies beside the card.
    notes: from `notes_of` the card that is replaced.
    """
    source = pack.base_model["source"]
    repo = hub_repo(source)
    results = [*_clean_results(pack.evaluation), *map(_attacked_result, pack.evaluation)]
    data = ModelCardData(
        base_model=repo,
        base_model_relation="adapter" if repo else None,
        library_name="tapt",
        pipeline_tag="zero-shot-image-classification",
        tags=[
            TAG,
            weights_tag(pack.base_model["sha256"]),
            "adversarial-robustness",
            "prompt-tuning",
            "clip",
        ],
        license="mit",
        model_name=f"TAPT-{pack.prompts.config.design} prompts for {source}",
        eval_results=results or None,
    )
    config = pack.prompts.config
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# TAPT-{config.design} prompts for `{source}`",
        "",
        f"Defensive prompts for test-time adversarial prompt tuning: {config.tokens} tokens in "
        f"{config.visual_depth} image blocks"
        + (f" and {config.text_depth} text blocks" if config.text_depth else "")
        + ", with the token statistics that the test-time step aligns to.",
        "",
        USE.format(name=name),
        "",
        *([f"![Accuracy of every defence, clean and attacked]({PICTURE})", ""] if picture else []),
        *_table(pack.evaluation),
        *(["", notes.rstrip()] if notes else []),
    ]
    return "\n".join(lines) + "\n"


def _clean_results(rows: list[dict]) -> list[EvalResult]:
    """Clean accuracy, once per set and defence: of the row with the most images."""
    largest: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: row["n"]):
        largest[_dataset(row), row["defense"]] = row
    return [
        _result(row, f"clean accuracy ({row['defense']})", row["clean_accuracy"])
        for row in largest.values()
    ]


def _attacked_result(row: dict) -> EvalResult:
    attack = f"{attack_name(row)} {epsilon_name(row)} on {row['threat']}"
    epsilon = row["epsilon_255"]
    args = {
        "attack": row["attack"],
        "eps": None if epsilon is None else epsilon / 255,
        "steps": row["steps"],
    }
    name = f"accuracy under {attack} ({row['defense']})"
    return _result(row, name, row["accuracy"], metric_args=args)


def _result(row: dict, name: str, value: float, **more: object) -> EvalResult:
    dataset = _dataset(row)
    return EvalResult(
        task_type="zero-shot-image-classification",
        dataset_type=dataset.lower(),
        dataset_name=dataset,
        metric_type="accuracy",
        metric_name=name,
        metric_value=value,
        **more,
    )


def _dataset(row: dict) -> str:
    return row.get("dataset", "unknown")


def _table(rows: list[dict]) -> list[str]:
    if not rows:
        return ["This pack has not been evaluated yet."]
    lines = [
        "| data | defence | attacked model | attack | n | clean % | attacked % | 95 % interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ci95"]
        lines.append(
            f"| {_dataset(row)} | {row['defense']} | {row['threat']} | "
            f"{attack_name(row)}, {epsilon_name(row)} | {row['n']} | "
            f"{100 * row['clean_accuracy']:.1f} | {100 * row['accuracy']:.1f} | "
            f"{100 * low:.1f}-{100 * high:.1f} |"
        )
    return lines
