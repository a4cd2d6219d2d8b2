"""Test-Time Adversarial Prompt Tuning for CLIP: load a model, attack a picture, compare defences.

The names below are loaded when they are first used; `import tapt` alone loads no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapt.core.attacks import Attack as Attack
    from tapt.core.attacks import list_attacks as list_attacks
    from tapt.core.tuning import TuneConfig as TuneConfig
    from tapt.data import load_data as load_data
    from tapt.data.pictures import open_image as open_image
    from tapt.defenses import Defense as Defense
    from tapt.defenses import Prediction as Prediction
    from tapt.defenses import PreparedDefense as PreparedDefense
    from tapt.defenses import list_defenses as list_defenses
    from tapt.defenses import register as register
    from tapt.evaluation import evaluate as evaluate
    from tapt.model import Model as Model
    from tapt.model import load as load
    from tapt.packs.format import list_packs as list_packs

__version__ = "0.2.0"

_HOMES = {
    "Attack": "tapt.core.attacks",
    "Defense": "tapt.defenses",
    "Model": "tapt.model",
    "Prediction": "tapt.defenses",
    "PreparedDefense": "tapt.defenses",
    "TuneConfig": "tapt.core.tuning",
    "evaluate": "tapt.evaluation",
    "list_attacks": "tapt.core.attacks",
    "list_defenses": "tapt.defenses",
    "list_packs": "tapt.packs.format",
    "load": "tapt.model",
    "load_data": "tapt.data",
    "open_image": "tapt.data.pictures",
    "register": "tapt.defenses",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tapt' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
