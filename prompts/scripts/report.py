"""Measures the embedded packs and writes their reports.

    python prompts/scripts/report.py --data cifar10-test.zip
    python prompts/scripts/report.py --data cifar10-test.zip --only vli/pgd-100

The measurements are cut into cells. Killed and called again, the script goes on where it was;
finished cells cost seconds. After each one its rows are recorded in the pack and its card, and
the pack's `report.md` and plots are written anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tapt.__main__ import main as tapt
from tapt.evaluation.report import plot_files, report
from tapt.files import write_file

PACKS = Path(__file__).resolve().parents[1] / "tiny"
AT_2, AT_1_AND_4 = "--epsilon 2/255", "--epsilon 1/255,4/255"
TRANSFER = "--attacked clip,static"
DEPLOYED = f"--attacked deployed --limit 50 {AT_2} --steps 20 --eot 4 --rescore 20 --queries 100"
AUTOATTACK = "--attack pgd,autoattack"
RANDOM_START = "random-start"  # settings other than the pack's need a folder of their own
# folder and options of `python -m tapt evaluate`; two cells of one folder share their images
CELLS = {
    "pgd-20": ("pgd-20", f"{TRANSFER} --limit 1000 {AT_2} --steps 20"),
    "adaptive": ("deployed", DEPLOYED),
    "pgd-100": ("strong", f"{TRANSFER} --limit 200 {AT_2} --steps 100"),
    "autoattack": ("strong", f"{TRANSFER} --limit 200 {AT_2} --steps 100 --attack autoattack"),
    RANDOM_START: (
        RANDOM_START,
        f"{TRANSFER} --limit 200 {AT_2} --steps 100 {AUTOATTACK} --defenses tapt --random-start",
    ),
    "square": ("deployed", f"{DEPLOYED} --attack square"),
    "other-epsilons": ("other-epsilons", f"{TRANSFER} --limit 300 {AT_1_AND_4} --steps 20"),
}
ONLY_VLI = ("adaptive", "square", RANDOM_START)
GRID = [
    (pack, cell)
    for cell in CELLS
    for pack in ("vli", "v", "vlj")
    if pack == "vli" or cell not in ONLY_VLI
]


def measure(pack: str, cell: str, data: str, out: Path) -> None:
    """Runs one cell to its end."""
    folder, options = CELLS[cell]
    command = f"evaluate --backbone tiny --pack tiny/{pack} --record {options}".split()
    if tapt([*command, "--data", data, "--out", str(out / pack / folder)]):
        sys.exit(f"{pack}/{cell} failed.")


def write_report(pack: str, out: Path) -> None:
    """One report of all the pack's folders, with the settings that they share."""
    folders = dict.fromkeys(folder for folder, _ in CELLS.values())
    paths = [path for name in folders if (path := out / pack / name / "results.json").exists()]
    summaries = {path.parent.name: json.loads(path.read_text()) for path in paths}
    own = [name for name in summaries if name != RANDOM_START] or list(summaries)
    first, *others = (summaries[name]["settings"] for name in own)
    common = {k: v for k, v in first.items() if all(each.get(k) == v for each in others)}
    merged = {
        "settings": common,
        **{
            part: [row for summary in summaries.values() for row in summary[part]]
            for part in ("rows", "paired", "agreement")
        },
    }
    plots = plot_files(merged["rows"])
    for name, content in plots.items():
        write_file(PACKS / pack / name, content)
    write_file(PACKS / pack / "report.md", report(merged, list(plots)).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="test images, a folder or zip of classes")
    parser.add_argument("--only", help="one cell, such as vli/pgd-20")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="for the outcomes")
    args = parser.parse_args()
    names = [f"{pack}/{cell}" for pack, cell in GRID]
    if args.only and args.only not in names:
        parser.error(f"--only must be one of {', '.join(names)}")
    for pack, cell in GRID:
        if args.only in (None, f"{pack}/{cell}"):
            measure(pack, cell, args.data, args.out)
            write_report(pack, args.out)


if __name__ == "__main__":
    main()
