"""Accuracy of every defence with and without attack, with intervals.

Under the threats `clip` and `static` one attacked image is shown to every defence: a transfer
attack for all rows but the attacked model's own. Under `square` and `adaptive` every row's
attacked model is that row's own defence as it is deployed (`tapt.adaptive`).

Outcomes are appended per batch to DIR/outcomes.jsonl. Batches are cut by image index and seeded
by (seed, batch): the same command goes on after an interruption, with any number of processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from tapt.attacks import ATTACKS, AttackConfig
from tapt.compare import ALL_THREATS
from tapt.data import LabelledImages, load_data
from tapt.defense import DEFENSES, THREATS, make_defender
from tapt.errors import InputError
from tapt.files import write_file
from tapt.options import (
    add_model_options,
    add_tuning_options,
    fractions,
    model_of,
    names,
    tuning_config,
)
from tapt.pack import Pack, pack_folder, save_pack
from tapt.panel import (
    Condition,
    Panel,
    Unit,
    bfloat16_agreement,
    default_batch_size,
    make_units,
    read_pixels,
)
from tapt.plots import write_plots
from tapt.processes import start_processes
from tapt.report import Outcomes, markdown, table
from tapt.tuning import TuneConfig

ALL_DEFENSES = (*DEFENSES, "random-start")
OUTCOMES, SETTINGS, RESULTS = "outcomes.jsonl", "settings.json", "results.json"


def make_conditions(args: argparse.Namespace) -> list[Condition]:
    """Clean images first, then every threat, attack and epsilon of the command."""
    defenses = tuple(args.defenses)
    conditions = [Condition(None, None, defenses)]
    for threat in args.threats:
        for name in ["square"] if threat == "square" else args.attack:
            steps = args.queries if threat == "square" else args.steps
            # an attack without epsilon runs once
            for epsilon in args.epsilon if ATTACKS[name].norm == "Linf" else [1.0]:
                attack = AttackConfig(name, epsilon, steps, seed=args.seed)
                if threat in THREATS:
                    conditions.append(Condition(threat, attack, defenses))
                else:
                    conditions += [Condition(threat, attack, (name,)) for name in defenses]
    return conditions


def read_outcomes(path: Path) -> list[dict]:
    """Whole lines of outcomes.jsonl; a line that an interruption cut short is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "peak_memory_mb" in record:
            records.append(record)
    return records


def _lines(records: Sequence[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _append(path: Path, records: Sequence[dict]) -> None:
    # one unbuffered write in append mode: lines of several processes never mix
    with open(path, "ab", buffering=0) as file:
        file.write(_lines(records))


def _identity(record: dict) -> tuple:
    keys = ("dataset", "threat", "attack", "epsilon_255", "steps", "image")
    return tuple(record[key] for key in keys)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="folders or zips of class folders, NAME:FOLDER, torchvision:NAME[:ROOT], "
        "split_zhou_*.json",
    )
    add_model_options(parser)
    known = ", ".join(ALL_DEFENSES)
    parser.add_argument("--defenses", type=names, default=list(DEFENSES), help=f"of {known}")
    known = ", ".join(ALL_THREATS)
    parser.add_argument("--threats", type=names, default=list(THREATS), help=f"of {known}")
    parser.add_argument("--attack", type=names, default=["pgd"], help=f"of {', '.join(ATTACKS)}")
    parser.add_argument("--epsilon", type=fractions, default=[1 / 255], help="1/255,2/255")
    parser.add_argument("--steps", type=int, default=100, help="attack steps")
    parser.add_argument("--queries", type=int, default=1000, help="of the threat square")
    parser.add_argument("--eot", type=int, default=4, help="view sets per adaptive gradient")
    parser.add_argument(
        "--rescore", type=int, default=20, help="fresh draws that score a deployed random defence"
    )
    parser.add_argument("--limit", type=int, help="a class-balanced subset of this many images")
    parser.add_argument("--batch-size", type=int, help="images per pass; default by memory")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the defence's view selection; attacks are float32",
    )
    parser.add_argument("--seed", type=int, default=0)
    add_tuning_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--record", action="store_true", help="also write the table into the pack and its card"
    )


def _checked(args: argparse.Namespace) -> None:
    if args.record and not args.pack:
        raise InputError("--record needs --pack: the pack that the table belongs to.")
    for option, allowed in (
        ("defenses", ALL_DEFENSES),
        ("threats", ALL_THREATS),
        ("attack", tuple(ATTACKS)),
    ):
        given = getattr(args, option)
        for name in given:
            if name not in allowed:
                raise InputError(
                    f"--{option}: {name!r} is unknown; choose from {', '.join(allowed)}."
                )
        if not given:
            raise InputError(f"--{option} is empty; choose from {', '.join(allowed)}.")
    for option in ("limit", "batch_size", "eot", "rescore"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            name = option.replace("_", "-")
            raise InputError(f"--{name} must be at least 1, got {getattr(args, option)}.")


def run(args: argparse.Namespace) -> int:
    _checked(args)
    conditions = make_conditions(args)
    state = start_processes(args.device)
    device = args.device or (state.device if state.num_processes > 1 else None)
    sets = [load_data(source) for source in args.data]
    if len({data.name for data in sets}) < len(sets):
        raise InputError("--data: two sets have the same name.")
    if args.limit is not None:
        sets = [data.balanced(args.limit, args.seed) for data in sets]
    args.device = device
    backbone, pack = model_of(args)
    if args.record and pack.origin:
        raise InputError("--record writes into the pack: give --pack its folder, not a Hub id.")
    config = tuning_config(args, pack.test_time)
    coarse = backbone.in_bfloat16() if args.precision == "bfloat16" else None
    panels = []
    for data in sets:
        defender = make_defender(
            backbone, pack, data.classes, template=data.template, coarse=coarse
        )
        panels.append(Panel(defender, config, seed=args.seed, draws=args.eot, rescore=args.rescore))
    batch_size = args.batch_size or min(
        default_batch_size(backbone, config, panel.defender.prompted, state.num_processes)
        for panel in panels
    )
    settings = _settings(args, sets, pack, config, batch_size)
    if state.is_main_process:
        _prepare(args.out, settings, keep_batch_size=args.batch_size is None)
    state.wait_for_everyone()
    batch_size = json.loads((args.out / SETTINGS).read_text())["batch_size"]
    done = {
        (*_identity(r), name) for r in read_outcomes(args.out / OUTCOMES) for name in r["right"]
    }
    state.wait_for_everyone()  # nobody writes before everybody has read

    work = [
        (panel, data, unit)
        for panel, data in zip(panels, sets, strict=True)
        for unit in make_units(conditions, len(data), batch_size, args.eot)
    ]
    mine = work[state.process_index :: state.num_processes]
    total = sum(len(unit.images) for _, _, unit in mine)
    with tqdm(
        total=total, unit="image", dynamic_ncols=True, disable=not state.is_main_process
    ) as bar:
        for panel, data, unit in mine:
            if not _finished(unit, data.name, done):
                pixels = read_pixels(data, unit.images, backbone)
                labels = torch.tensor([data.labels[i] for i in unit.images])
                records = panel.records(unit, pixels, labels)
                _append(args.out / OUTCOMES, [{"dataset": data.name, **r} for r in records])
            bar.update(len(unit.images))
    state.wait_for_everyone()
    if not state.is_main_process:
        return 0
    summary = _summary(args.out, {**settings, "batch_size": batch_size})
    if coarse is not None:
        summary["bfloat16"] = bfloat16_agreement(panels[0], sets[0], batch_size)
    plots = write_plots(summary["rows"], args.out)
    write_file(args.out / "report.md", markdown(summary, plots).encode())
    write_file(args.out / RESULTS, (json.dumps(summary, indent=2) + "\n").encode())
    if args.record:
        _record(pack, summary["rows"])
    print(table(summary["rows"]))
    return 0


def _finished(unit: Unit, dataset: str, done: set[tuple]) -> bool:
    condition = {"dataset": dataset, **unit.condition.key}
    return all(
        (*_identity({**condition, "image": image}), name) in done
        for image in unit.images
        for name in unit.condition.defenses
    )


def _prepare(out: Path, settings: dict, *, keep_batch_size: bool) -> None:
    """Starts a folder, or checks that it was started with the same settings and drops what an
    interruption cut short."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if not path.exists():
        write_file(path, (json.dumps(settings, indent=2) + "\n").encode())
        write_file(out / OUTCOMES, b"")
        return
    before = json.loads(path.read_text())
    loose = {"versions", "python", "machine", *(["batch_size"] if keep_batch_size else [])}
    differ = sorted(k for k in {*before, *settings} - loose if before.get(k) != settings.get(k))
    if differ:
        raise InputError(
            f"{out.name} was started with other settings ({', '.join(differ)}): use them again, or "
            "another --out."
        )
    write_file(out / OUTCOMES, _lines(read_outcomes(out / OUTCOMES)))


def _summary(out: Path, settings: dict) -> dict:
    outcomes = Outcomes(read_outcomes(out / OUTCOMES))
    return {"settings": settings, "rows": outcomes.rows(), "paired": outcomes.paired()}


def _record(pack: Pack, result_rows: list[dict]) -> None:
    """Puts rows into the pack's own table; rows of the same defence, attack and n are replaced."""
    keys = ("dataset", "defense", "threat", "attack", "epsilon_255", "steps", "n")
    evaluation = {tuple(row[k] for k in keys): row for row in [*pack.evaluation, *result_rows]}
    save_pack(replace(pack, evaluation=list(evaluation.values())), pack_folder(pack.name))


def _settings(
    args: argparse.Namespace,
    sets: Sequence[LabelledImages],
    pack: Pack,
    config: TuneConfig,
    batch_size: int,
) -> dict:
    """What two runs into one folder must share, and where they ran. Threats, attacks and defences
    are not among it: a folder may collect several."""
    digest = hashlib.sha256()
    for name, tensor in sorted(pack.prompts.tensors.items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    packages = ("torch", "open_clip_torch", "torchattacks")
    return {
        "data": [data.name for data in sets],
        "images": [len(data) for data in sets],
        "classes": [len(data.classes) for data in sets],
        "backbone": args.backbone or pack.base_model["source"],
        "base_model": pack.base_model,
        "pack": pack.name,
        "pack_commit": pack.origin and pack.origin.commit,
        "prompts_sha256": digest.hexdigest(),
        "trained": pack.trained,
        "test_time": config.to_dict(),
        "limit": args.limit,
        "seed": args.seed,
        "eot": args.eot,
        "rescore": args.rescore,
        "precision": args.precision,
        "batch_size": batch_size,
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
