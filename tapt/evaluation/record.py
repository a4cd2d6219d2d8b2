"""Results in the pack that they belong to, and in its card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tapt.core.errors import InputError
from tapt.files import check_output
from tapt.packs.card import read_notes, write_pack
from tapt.packs.format import Pack, pack_folder

IDENTITY = ("dataset", "defense", "attacked_model", "attack", "epsilon_255", "steps", "n")


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


def record(pack: Pack, rows: Sequence[Mapping[str, Any]]) -> Pack:
    """Puts rows into a pack's own table and its card; rows of the same defence, settings, attack
    and number of images are replaced.

    Raises:
        InputError, PackError: as `check_record` says.
    """
    check_record(pack)

    def identity(row: Mapping[str, Any]) -> str:
        return json.dumps([*(row[key] for key in IDENTITY), row.get("settings", {})])

    merged = {identity(row): dict(row) for row in [*pack.evaluation, *rows]}
    changed = replace(pack, evaluation=list(merged.values()))
    write_pack(changed, pack_folder(pack.name))
    return changed
