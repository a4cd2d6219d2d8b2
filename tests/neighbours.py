"""The rows of the neighbours, without leaving them in the registry that other tests loop over."""

from __future__ import annotations

from tapt.defenses import base

_before = dict(base._REGISTRY)
from tapt.defenses import dbd, tapt_ensemble, text_prompts, ttc  # noqa: E402, F401

ROWS = {
    name: base._REGISTRY[name] for name in ("tpt", "rtpt", "sstpt", "ttc", "dbd", "tapt-ensemble")
}
base._REGISTRY.clear()
base._REGISTRY.update(_before)
