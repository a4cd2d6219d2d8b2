"""Measures an embedded pack cell by cell and writes its report.

    python prompts/scripts/report.py --data cifar10-test.zip --pack tiny/vli
    python prompts/scripts/report.py --data cifar10-test.zip --pack tiny/vli --only deployed-tapt-2

A cell ends after an hour at the latest. Killed or called again, the script goes on where it was;
finished cells cost seconds. When a cell is done its rows are recorded in the pack and its card, and
the pack's `report.md` and plots are written anew. The `budget` cells attack TAPT as deployed, the
same images with more and more steps; they are drawn in `budget.png` and not recorded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tapt.defenses import list_defenses
from tapt.evaluation.report import plot_files, report
from tapt.files import write_file

ROOT = Path(__file__).resolve().parents[2]
MANY = ("static", "ensemble", "tapt", "tapt-ensemble")
OTHERS = [name for name in list_defenses() if name not in MANY]
DEPLOYED = "--attacked deployed --attack {attack} --defenses {name} --epsilon {epsilon}/255"
BUDGET = "--steps 40 --rescore 20 --batch-size 5"
TRANSFER = "--attacked {model} --attack {attack} --epsilon {epsilon}/255 --limit 500 --steps 100"
EVERYBODY = f" --defenses {','.join(list_defenses())}"
BUDGETS = ((5, 1, 5), (10, 2, 4), (20, 2, 4), (40, 4, 4), (80, 8, 2))  # steps, pool, refresh


def cells() -> dict[str, tuple[str, str]]:
    """Folder and options of `tapt evaluate` of each cell; cells of one folder share their images.
    Paired differences need that, so static and ensemble stand in both folders."""
    every = {}

    def deployed(epsilon: int, n: int, name: str) -> None:
        options = DEPLOYED.format(attack="pgd", name=name, epsilon=epsilon)
        few = "" if n == 200 else f"-{n}"
        every[f"deployed-{name}-{epsilon}{few}"] = (
            f"deployed-{n}",
            f"{options} {BUDGET} --limit {n}",
        )

    for epsilon in (2, 1):
        for name in MANY:
            deployed(epsilon, 200, name)
        for name in (*MANY[:2], *OTHERS):
            deployed(epsilon, 100, name)
    for attack in ("pgd", "apgd", "autoattack"):
        for epsilon in (2, 1):
            for model in ("clip", "static"):
                options = TRANSFER.format(model=model, attack=attack, epsilon=epsilon)
                every[f"transfer-{attack}-{model}-{epsilon}"] = "transfer", options + EVERYBODY
    for model in ("clip", "static"):  # CW knows no epsilon
        options = TRANSFER.format(model=model, attack="cw", epsilon=2)
        every[f"transfer-cw-{model}"] = "transfer", options + EVERYBODY
    for name in (*MANY, *OTHERS):
        deployed(4, 200, name)
    square = DEPLOYED.format(attack="square", name="tapt", epsilon=2)
    square += " --queries 1000 --draws 4 --rescore 20 --batch-size 5 --limit 20"
    every["square-tapt-2"] = "square", square
    for steps, pool, refresh in BUDGETS:
        options = DEPLOYED.format(attack="pgd", name="tapt", epsilon=2)
        options += f" --steps {steps} --pool {pool} --refresh {refresh} --limit 50 --rescore 20"
        every[f"budget-{steps}"] = f"budget-{steps}", f"{options} --batch-size 5"
    return every


def measure(pack: str, cell: str, data: str, out: Path, minutes: float) -> bool:
    """Runs one cell; False where the time was up."""
    folder, options = cells()[cell]
    record = "" if folder.startswith("budget") else "--record"
    command = f"-m tapt evaluate --pack {pack} {record} {options}".split()
    places = ["--data", str(Path(data).resolve()), "--out", str((out / pack / folder).resolve())]
    try:
        code = subprocess.run(
            [sys.executable, *command, *places], cwd=ROOT, timeout=60 * minutes
        ).returncode
    except subprocess.TimeoutExpired:
        return False
    if code:
        sys.exit(f"{pack}, {cell} failed.")
    return True


def write_report(pack: str, out: Path) -> None:
    """One report of all the pack's folders, with the settings that they share."""
    folders = dict.fromkeys(folder for folder, _ in cells().values())
    paths = [path for name in folders if (path := out / pack / name / "results.json").exists()]
    budgets = [path for path in paths if path.parent.name.startswith("budget")]
    if budgets:
        rows = [json.loads(path.read_text())["rows"][0] for path in budgets]
        budget_figure(rows).savefig(ROOT / "prompts" / pack / "budget.png", dpi=120)
    summaries = [json.loads(path.read_text()) for path in paths if path not in budgets]
    if not summaries:
        return
    first, *others = (summary["settings"] for summary in summaries)
    merged = {
        "settings": {k: v for k, v in first.items() if all(each.get(k) == v for each in others)},
        **{
            part: [row for summary in summaries for row in summary[part]]
            for part in ("rows", "paired", "agreement")
        },
    }
    plots = plot_files(merged["rows"])
    for name, content in plots.items():
        write_file(ROOT / "prompts" / pack / name, content)
    write_file(ROOT / "prompts" / pack / "report.md", report(merged, list(plots)).encode())


def budget_figure(rows: list[dict]) -> Figure:
    """Accuracy with its 95 % interval against the seconds that the attack takes for an image."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    seconds = [row["attack_seconds_per_image"] for row in rows]
    shares = [100 * row["accuracy"] for row in rows]
    below = [share - 100 * row["ci95"][0] for share, row in zip(shares, rows, strict=True)]
    above = [100 * row["ci95"][1] - share for share, row in zip(shares, rows, strict=True)]
    axes.errorbar(seconds, shares, yerr=[below, above], marker="o", capsize=3)
    for x, y, row in zip(seconds, shares, rows, strict=True):
        axes.annotate(f"{row['steps']} steps", (x, y), (5, 5), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.set_xlabel("seconds of attack per image")
    axes.set_ylabel(f"{rows[0]['defense']} left with, % of n = {rows[0]['n']}")
    return figure


def main() -> None:
    names = list(cells())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="test images, a folder or zip of classes")
    parser.add_argument("--pack", default="tiny/vli", help="an embedded pack")
    parser.add_argument("--only", choices=names, metavar="CELL", help=f"of {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=60, help="that a cell may take")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="for the outcomes")
    args = parser.parse_args()
    for cell in [args.only] if args.only else names:
        if measure(args.pack, cell, args.data, args.out, args.minutes):
            write_report(args.pack, args.out)
        else:
            print(f"{cell}: the time is up; the next call goes on.", file=sys.stderr)


if __name__ == "__main__":
    main()
