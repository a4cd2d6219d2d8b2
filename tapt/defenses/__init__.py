"""Defences of CLIP behind one registry; another one is one file that registers itself."""

from tapt.defenses import fixed, ensemble, tapt  # noqa: F401, I001  the order that is shown
from tapt.defenses.base import (
    Defense,
    ImageBatch,
    Prediction,
    PreparedDefense,
    find_defenses,
    list_defenses,
    register,
)

__all__ = [
    "Defense",
    "ImageBatch",
    "Prediction",
    "PreparedDefense",
    "find_defenses",
    "list_defenses",
    "register",
]
