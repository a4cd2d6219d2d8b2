"""Accuracy of every defence with and without attack, with intervals.

On the attacked models `clip` and `static` one attacked image is shown to every defence: a transfer
attack for all rows but the attacked model's own. On `deployed` every row's attacked model is that
row's own defence as it is deployed (`tapt.defenses.deployed`).
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch

from tapt.comparison import versions
from tapt.core.attacks import Attack
from tapt.core.errors import InputError
from tapt.data import LabelledImages, digest, load_data
from tapt.defenses import all_defenses, find_defenses
from tapt.defenses.adaptive import Adaptive
from tapt.evaluation.evaluator import (
    Condition,
    Evaluator,
    default_batch_size,
    make_conditions,
    selection_agreement,
)
from tapt.evaluation.outcomes import Outcomes
from tapt.evaluation.store import Store
from tapt.files import check_output
from tapt.model import ATTACKED_MODELS, Changes, Model, Selection
from tapt.packs.rows import text_table
from tapt.processes import start_processes
from tapt.progress import Progress, quiet

Source = LabelledImages | str | os.PathLike[str]


@dataclass(frozen=True)
class Results:
    """rows: one per set, defence and attack, and the worst case over the attacks; see
        `tapt.packs.schema.Row`.
    paired: differences between two defences on the same images.
    agreement: where views were selected in bfloat16, how far that agrees with float32.
    settings: what the numbers depend on.
    """

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    paired: list[dict[str, Any]]
    agreement: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of results.json."""
        return dict(vars(self))

    def __str__(self) -> str:
        """The table of `tapt evaluate`."""
        return text_table(self.rows)


def evaluate(
    model: Model,
    data: Source | Sequence[Source],
    *,
    attacks: Attack | Sequence[Attack],
    attacked: str | Sequence[str] = ("clip", "static"),
    defenses: Sequence[str] | None = None,
    settings: Changes = None,
    out: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    adaptive: Adaptive | None = None,
    score_draws: int = 20,
    batch_size: int | None = None,
    selection: Selection = "float32",
    progress: Progress = quiet,
) -> Results:
    """Attacks every image of one or several data sets and asks every defence.

    data: data sets, or their sources as for `load_data`.
    attacks: with their own epsilons and numbers of steps or queries.
    attacked: the models that the attacks see, of `clip`, `static` and `deployed`.
    defenses: names, default all that are registered.
    settings: changes to the pack's test-time settings, as for `Model.settings`.
    out: folder for outcomes, report and plots. The same call goes on after an interruption, with
        any number of processes; further attacks and defences are added. None keeps all in memory.
    limit: a class-balanced subset of this many images.
    seed: of everything random, the attacks included.
    adaptive: what an attack on a defence as deployed may spend.
    score_draws: fresh draws that score a randomised defence as deployed.
    batch_size: images per pass; changes nothing but speed.
    selection: precision in which views are selected; attacks and answers are float32.
    progress: called with this process's (images done, images) of all conditions that are not
        there yet; may raise to stop.

    Raises:
        InputError: an argument is outside what is allowed, or the folder cannot be written or
            holds results of other data or settings; before any work.
        DataError: a data set is missing or malformed.
    """
    state = start_processes(model.backbone.device.type)
    names = [row.name for row in find_defenses(defenses)]
    adaptive = adaptive or Adaptive()
    counts = {"limit": limit, "score_draws": score_draws, "batch_size": batch_size}
    attacked = [attacked] if isinstance(attacked, str) else attacked
    attacks = [attacks] if isinstance(attacks, Attack) else attacks
    attacks = [attack.updated(seed=seed) for attack in attacks]
    _check(attacks, attacked, counts)
    if out is None and state.num_processes > 1:
        raise InputError("Several processes need a folder for their results: give out.")
    store = Store(None if out is None else check_output(out, folder=True), state)
    sets = _open(data, limit, seed)

    def evaluator(labelled: LabelledImages, selection: Selection) -> Evaluator:
        clip = model.prepare(
            labelled.classes, template=labelled.template, selection=selection, as_listed=True
        )
        prepared = model.prepare_defenses(clip, names, settings)
        return Evaluator(model, clip, prepared, labelled, seed, adaptive, score_draws)

    evaluators = [evaluator(labelled, selection) for labelled in sets]
    size = batch_size or min(map(default_batch_size, evaluators))
    described = _describe(model, sets, settings)
    described |= {"limit": limit, "adaptive": adaptive.model_dump(), "score_draws": score_draws}
    described |= {"seed": seed, "selection": selection}
    store.open(described)
    conditions = make_conditions(attacks, attacked, names)
    jobs = _jobs(evaluators, conditions, Outcomes(store.read()), size)
    _run(jobs[state.process_index :: state.num_processes], store, progress)
    state.wait_for_everyone()

    outcomes = Outcomes(store.read())
    changes = _changes(model, evaluators[0], selection)
    rows = [row | changes.get(row["defense"], {}) for row in outcomes.rows()]
    agreement = []
    if selection != "float32" and state.is_main_process:
        agreement = selection_agreement(evaluators[0], evaluator(sets[0], "float32"), size)
    results = Results(described, rows, outcomes.paired(), agreement)
    if state.is_main_process:
        store.finish(results.to_dict())
    return results


Job = tuple[Evaluator, Condition, list[int]]


def _check(
    attacks: Sequence[Attack], attacked: Sequence[str], counts: Mapping[str, int | None]
) -> None:
    if not attacks or not attacked:
        raise InputError("Give at least one attack and one attacked model.")
    for name in attacked:
        if name not in ATTACKED_MODELS:
            raise InputError(
                f"Attacked model {name!r} is unknown; choose from {', '.join(ATTACKED_MODELS)}."
            )
    for attack in attacks:
        if attack.updated(seed=0) != Attack(attack.name, attack.epsilon, attack.steps):
            raise InputError(
                "An evaluation runs attacks with their own step size and start: leave step_size "
                "and random_start as they are."
            )
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name} must be at least 1, got {count}.")


def _open(data: Source | Sequence[Source], limit: int | None, seed: int) -> list[LabelledImages]:
    sources = [data] if isinstance(data, (LabelledImages, str, os.PathLike)) else data
    sets = [s if isinstance(s, LabelledImages) else load_data(s) for s in sources]
    if not sets:
        raise InputError("Give at least one data set.")
    if len({each.name for each in sets}) < len(sets):
        raise InputError("Two data sets have the same name.")
    return sets if limit is None else [each.balanced(limit, seed) for each in sets]


def _jobs(
    evaluators: Sequence[Evaluator], conditions: Sequence[Condition], known: Outcomes, size: int
) -> list[Job]:
    """What is not there yet, cut into batches."""
    jobs = []
    for evaluator, condition in product(evaluators, conditions):
        key, names = condition.key(evaluator.data.name), condition.defenses
        images = range(len(evaluator.data))
        left = [i for i in images if not all(known.has(key, name, i) for name in names)]
        batches = (left[start : start + size] for start in range(0, len(left), size))
        jobs += [(evaluator, condition, batch) for batch in batches]
    return jobs


def _run(jobs: Sequence[Job], store: Store, progress: Progress) -> None:
    total, done = sum(len(images) for _, _, images in jobs), 0
    progress(done, total)
    for evaluator, condition, images in jobs:
        store.append(evaluator.outcomes(condition, images, partial(progress, done, total)))
        done += len(images)
        progress(done, total)


def _describe(model: Model, sets: Sequence[LabelledImages], settings: Changes) -> dict[str, Any]:
    """What two runs into one folder must share, and where they ran. Attacked models, attacks and
    defences are not among it: a folder may collect several."""
    pack = model.pack
    tensors = sorted(pack.prompts.tensors.items())
    tensors += [("", tensor) for tensor in pack.statistics_tensors().values()]
    content = hashlib.sha256()
    for name, tensor in tensors:
        content.update(name.encode() + tensor.cpu().numpy().tobytes())
    test_time = {
        row.name: model.settings(row, settings).model_dump(mode="json") for row in all_defenses()
    }
    return {
        "data": [data.name for data in sets],
        "data_sha256": [digest(data) for data in sets],
        "images": [len(data) for data in sets],
        "classes": [len(data.classes) for data in sets],
        "backbone": model.backbone.name,
        "base_model": pack.base_model,
        "pack": pack.name,
        "pack_commit": pack.origin and pack.origin.commit,
        "pack_sha256": content.hexdigest(),
        "trained": pack.trained,
        "test_time": {name: values for name, values in test_time.items() if values},
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _changes(model: Model, evaluator: Evaluator, selection: Selection) -> dict[str, dict]:
    """Per defence the test-time settings that are not the pack's own, as a part of its rows."""
    changes = {}
    for row in find_defenses(list(evaluator.defenses)):
        own = model.settings(row).model_dump(mode="json")
        used = evaluator.defenses[row.name].settings.model_dump(mode="json")
        changed = {name: value for name, value in used.items() if own[name] != value}
        if selection != "float32" and used:
            changed["selection"] = selection
        changes[row.name] = {"settings": changed} if changed else {}
    return changes
