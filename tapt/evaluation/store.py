"""Where outcomes are kept: a folder that survives interruptions, or memory.

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
from pathlib import Path
from typing import Any, Protocol

from tapt.core.errors import InputError
from tapt.evaluation.outcomes import Outcome, read_outcomes, to_lines
from tapt.evaluation.plots import plot_files
from tapt.evaluation.tables import report
from tapt.files import describe, write_file

SETTINGS, OUTCOMES, RESULTS, REPORT = (
    "settings.json",
    "outcomes.jsonl",
    "results.json",
    "report.md",
)
MAY_DIFFER = {"versions", "machine"}


class Processes(Protocol):
    """What runs an evaluation; `accelerate.PartialState` is one."""

    @property
    def is_main_process(self) -> bool: ...
    def wait_for_everyone(self) -> None: ...


class Store:
    """folder: None keeps the outcomes in memory."""

    def __init__(self, folder: Path | None, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self._held: list[Outcome] = []

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
        differ = _differences(_read_settings(path), json.loads(_json(settings)))
        if differ:
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
            return list(self._held)
        outcomes = read_outcomes(self.folder / OUTCOMES)
        self.processes.wait_for_everyone()  # nobody writes before everybody has read
        return outcomes

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Adds the outcomes of a batch.

        Raises:
            InputError: the file cannot be written.
        """
        if self.folder is None:
            self._held += outcomes
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
        plots = plot_files(results["rows"])
        with _writing(self.folder):
            for name, content in plots.items():
                write_file(self.folder / name, content)
            write_file(self.folder / REPORT, report(results, list(plots)).encode())
            write_file(self.folder / RESULTS, _json(results))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder.name} cannot be written: {describe(error)}.") from error


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{path.name} in {path.parent.name} is damaged: use another folder.")
    return settings


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ; a defence that only one of them knows is none."""
    one, other = (dict(settings) for settings in (before, now))
    old, new = one.get("test_time"), other["test_time"]
    if isinstance(old, dict):
        common = old.keys() & new.keys()
        one["test_time"], other["test_time"] = ({k: d[k] for k in common} for d in (old, new))
    names = {*one, *other} - MAY_DIFFER
    return sorted(name for name in names if one.get(name) != other.get(name))
