"""Where results are kept: a folder that survives interruptions, or memory; and the pack.

settings.json    what all runs into the folder share
outcomes.jsonl   one line per image and condition, appended per batch
results.json     rows and paired differences
report.md        the same for people, with its plots
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapt.core.errors import InputError
from tapt.evaluation.outcomes import Outcome, read_outcomes, to_lines
from tapt.evaluation.report import plot_files, report
from tapt.files import check_output, describe, write_file
from tapt.packs.card import read_notes, write_pack
from tapt.packs.format import Pack, pack_folder

if TYPE_CHECKING:
    from accelerate import PartialState

SETTINGS, OUTCOMES, RESULTS = "settings.json", "outcomes.jsonl", "results.json"
MAY_DIFFER = {"versions", "machine"}
IDENTITY = ("dataset", "defense", "attacked_model", "attack", "epsilon_255", "steps", "n")


class Store:
    """folder: None keeps the outcomes in memory."""

    def __init__(self, folder: Path | None, processes: PartialState) -> None:
        self.folder, self.processes = folder, processes
        self._outcomes: list[Outcome] = []

    def open(self, settings: Mapping[str, Any]) -> None:
        """Starts the folder, or checks that it was started with the same settings and drops what
        an interruption cut short.

        Raises:
            InputError: it was started with others, is damaged, or cannot be written.
        """
        if self.folder is None:
            return
        path = self.folder / SETTINGS
        if self.processes.is_main_process and not path.exists():
            with _writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_file(self.folder / OUTCOMES, b"")
                write_file(path, _json(settings))
        self.processes.wait_for_everyone()
        if differ := _differences(path, settings):
            raise InputError(
                f"{self.folder.name} was started with other settings ({', '.join(differ)}): use "
                "them again, or another folder."
            )
        if self.processes.is_main_process:
            outcomes = to_lines(read_outcomes(self.folder / OUTCOMES))
            with _writing(self.folder):
                write_file(self.folder / OUTCOMES, outcomes)
        self.processes.wait_for_everyone()

    def read(self) -> list[Outcome]:
        """All outcomes that are there, of every process that has come this far."""
        if self.folder is None:
            return list(self._outcomes)
        outcomes = read_outcomes(self.folder / OUTCOMES)
        self.processes.wait_for_everyone()  # nobody writes before everybody has read
        return outcomes

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Adds the outcomes of a batch.

        Raises:
            InputError: the file cannot be written.
        """
        if self.folder is None:
            self._outcomes += outcomes
            return
        data = to_lines(outcomes)
        # one unbuffered write in append mode: lines of several processes never mix
        with _writing(self.folder), open(self.folder / OUTCOMES, "ab", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "disk full")

    def finish(self, results: Mapping[str, Any]) -> None:
        """Writes results, report and plots."""
        if self.folder is None:
            return
        files = plot_files(results["rows"])
        files["report.md"] = report(results, list(files)).encode()
        files[RESULTS] = _json(results)
        with _writing(self.folder):
            for name, content in files.items():
                write_file(self.folder / name, content)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder.name} cannot be written: {describe(error)}.") from error


def _differences(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ from a file's; of test-time settings those of defences
    that both know count."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        known = before["test_time"].keys() & settings["test_time"].keys()
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path.name} in {path.parent.name} is damaged: use another folder."
        ) from error
    one, other = (
        {**each, "test_time": {name: each["test_time"][name] for name in known}}
        for each in (before, json.loads(_json(settings)))
    )
    names = {*one, *other} - MAY_DIFFER
    return sorted(name for name in names if one.get(name) != other.get(name))


def check_record(pack: Pack) -> None:
    """Says before the work begins whether `record` can write into a pack.

    Raises:
        InputError: it is not a folder of this computer, or cannot be written.
        PackError: its card is not text.
    """
    folder = pack_folder(pack.name)
    if pack.origin or not pack.trained or not folder.is_dir():
        raise InputError("Rows are recorded in a pack's folder: give one as the pack.")
    check_output(folder, folder=True)
    read_notes(folder)


def record(pack: Pack, rows: Sequence[Mapping[str, Any]]) -> None:
    """Puts rows into a pack's own table and its card; rows of the same defence, settings, attack
    and number of images are replaced. Raises what `check_record` says."""
    check_record(pack)
    merged = {}
    for row in [*pack.evaluation, *rows]:
        identity = [*(row[key] for key in IDENTITY), row.get("settings", {})]
        merged[json.dumps(identity)] = dict(row)
    write_pack(replace(pack, evaluation=list(merged.values())), pack_folder(pack.name))
