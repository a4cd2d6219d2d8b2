"""Defences of CLIP behind one registry; another one is one file that registers itself."""

# the order in which they are shown
from tapt.defenses import fixed, ensemble, tapt, tapt_ensemble, text_prompts, ttc, dbd  # noqa: F401, I001
from tapt.defenses.base import (
    Defense,
    ImageBatch,
    Prediction,
    PreparedDefense,
    all_defenses,
    find_defense,
    find_defenses,
    list_defenses,
    register,
)

__all__ = [
    "Defense",
    "ImageBatch",
    "Prediction",
    "PreparedDefense",
    "all_defenses",
    "find_defense",
    "find_defenses",
    "list_defenses",
    "register",
]
