"""The model card of a pack, and finished packs, which have one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tapt.core.errors import PackError
from tapt.files import write_file
from tapt.packs.backbones import hub_repo
from tapt.packs.format import CARD, TAG, Pack, pack_name, save_pack, weights_tag
from tapt.packs.rows import Row, attack_name, clean_rows, defense_name, epsilon_name, markdown_table

PICTURE = "accuracy.png"
NOTES = "## Notes"
TEXT = """\
---
{metadata}
---

# TAPT-{design} prompts for `{source}`

Defensive prompts for test-time adversarial prompt tuning: {tokens} tokens in {places}, with the \
token statistics that the test-time step aligns to.

```python
import tapt

model = tapt.load("{name}")
print(model.compare("photo.jpg", ["cat", "dog"]))
```

{results}
"""


def write_pack(pack: Pack, folder: str | os.PathLike) -> None:
    """Saves a finished pack with its card; of an older card, the section `## Notes` is kept.
    `PackError`, and nothing written, where that card is not text."""
    notes = read_notes(folder)
    save_pack(pack, folder)
    card = model_card(pack, pack_name(folder), notes=notes)
    write_file(Path(folder) / CARD, card.encode())


def read_notes(folder: str | os.PathLike) -> str:
    """What people wrote into the card in a folder: everything from the line `## Notes` on;
    `PackError` where the card is not a UTF-8 text."""
    path = Path(folder) / CARD
    try:
        card = "\n" + path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise PackError(
            f"{CARD} in {Path(folder).name!r} is not a UTF-8 text; save it as one or remove it."
        ) from error
    return card[start:] if (start := card.find(f"\n{NOTES}\n") + 1) else ""


def model_card(pack: Pack, name: str, *, picture: bool = False, notes: str = "") -> str:
    """Markdown with the Hub's metadata in front; numbers come from `pack.evaluation`.

    name: what `tapt.load` takes.
    picture: whether `accuracy.png` lies beside the card.
    notes: from `read_notes`.
    """
    config, source = pack.prompts.config, pack.base_model["source"]
    repo, weights = hub_repo(source), weights_tag(pack.base_model["sha256"])
    data = ModelCardData(
        base_model=repo,
        base_model_relation="adapter" if repo else None,
        library_name="tapt",
        pipeline_tag="zero-shot-image-classification",
        tags=[TAG, weights, "adversarial-robustness", "prompt-tuning", "clip"],
        license="mit",
        model_name=f"TAPT-{config.design} prompts for {source}",
        eval_results=_results(pack.evaluation) or None,
    )
    image = f"![Accuracy of every defence, clean and attacked]({PICTURE})\n\n" if picture else ""
    table = markdown_table(pack.evaluation) or "This pack has not been evaluated yet."
    text = f" and {config.text_blocks} text blocks" if config.text_blocks else ""
    card = TEXT.format(
        metadata=data.to_yaml(),
        design=config.design,
        source=source,
        tokens=config.tokens,
        places=f"{config.visual_depth} image blocks{text}",
        name=name,
        results=image + table,
    )
    return f"{card}\n{notes.rstrip()}\n" if notes else card


def _results(rows: list[dict[str, Any]]) -> list[EvalResult]:
    """Clean accuracy, once per set and defence; then each row."""
    results: list[tuple[Row, str, float, dict[str, Any] | None]] = [
        (row, "clean accuracy", row["clean_accuracy"], None) for row in clean_rows(rows)
    ]
    for row in rows:
        name = f"accuracy under {attack_name(row)} {epsilon_name(row)} on {row['attacked_model']}"
        epsilon = None if row["epsilon_255"] is None else row["epsilon_255"] / 255
        args = {"attack": row["attack"], "eps": epsilon, "steps": row["steps"]}
        results.append((row, name, row["accuracy"], args))
    return [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type=row["dataset"].lower(),
            dataset_name=row["dataset"],
            metric_type="accuracy",
            metric_name=f"{name} ({defense_name(row)})",
            metric_value=value,
            metric_args=args,
        )
        for row, name, value, args in results
    ]
