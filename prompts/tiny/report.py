"""Measures the embedded packs and writes their reports.

    python prompts/tiny/report.py --data cifar10-test.zip
    python prompts/tiny/report.py --data cifar10-test.zip --only vli/pgd-100

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
from tapt.files import write_file
from tapt.plots import write_plots
from tapt.report import markdown

HERE = Path(__file__).resolve().parent
AT_2, AT_1_AND_4 = "--epsilon 2/255", "--epsilon 1/255,4/255"
REPLAYED = "--threats clip,static"
DEPLOYED = f"--limit 50 {AT_2} --steps 20 --eot 4 --rescore 20 --queries 100"
# folder and options of `python -m tapt evaluate`; two cells of one folder share their images
CELLS = {
    "pgd-20": ("pgd-20", f"{REPLAYED} --limit 1000 {AT_2} --steps 20"),
    "adaptive": ("deployed", f"--threats adaptive {DEPLOYED}"),
    "pgd-100": ("strong", f"{REPLAYED} --limit 200 {AT_2} --steps 100"),
    "autoattack": ("strong", f"{REPLAYED} --limit 200 {AT_2} --steps 100 --attack autoattack"),
    "square": ("deployed", f"--threats square {DEPLOYED}"),
    "other-epsilons": ("other-epsilons", f"{REPLAYED} --limit 300 {AT_1_AND_4} --steps 20"),
}
RANDOM_START = "--defenses clip,static,ensemble,tapt,random-start"
ONLY_VLI = ("adaptive", "square")
GRID = [
    (pack, cell)
    for cell in CELLS
    for pack in ("vli", "v", "vlj")
    if pack == "vli" or cell not in ONLY_VLI
]


def measure(pack: str, cell: str, data: str, out: Path) -> None:
    folder, options = CELLS[cell]
    if pack == "vli" and folder == "strong":
        options += f" {RANDOM_START}"
    command = f"evaluate --backbone tiny --pack tiny/{pack} --record {options}".split()
    if tapt([*command, "--data", data, "--out", str(out / pack / folder)]):
        sys.exit(f"{pack}/{cell} failed.")


def write_report(pack: str, out: Path) -> None:
    """One report of all the pack's folders, with the settings that they share."""
    summaries = [
        json.loads(path.read_text())
        for folder in dict.fromkeys(folder for folder, _ in CELLS.values())
        if (path := out / pack / folder / "results.json").exists()
    ]
    first = summaries[0]["settings"]
    common = {
        key: value
        for key, value in first.items()
        if all(summary["settings"][key] == value for summary in summaries)
    }
    merged = {
        "settings": common,
        "rows": [row for summary in summaries for row in summary["rows"]],
        "paired": [row for summary in summaries for row in summary["paired"]],
    }
    plots = write_plots(merged["rows"], HERE / pack)
    write_file(HERE / pack / "report.md", markdown(merged, plots).encode())


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
