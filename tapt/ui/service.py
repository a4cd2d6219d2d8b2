"""What the handlers share: one loaded model and the class lists that were asked for last."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tapt.backbone import Backbone, load_backbone
from tapt.defense import Defender, make_defender
from tapt.pack import Pack, default_pack, embedded_packs, load_pack

EMBEDDED_BACKBONE = "tiny"
REMEMBERED_CLASS_LISTS = 8


class Service:
    """A backbone with its pack; safe to share between requests, since neither ever changes."""

    def __init__(self, backbone: Backbone, pack: Pack) -> None:
        self.backbone = backbone
        self.pack = pack
        self._defender = lru_cache(REMEMBERED_CLASS_LISTS)(
            lambda classes: make_defender(backbone, pack, classes)
        )

    def defender(self, classes: Sequence[str]) -> Defender:
        """The defender for a class list; its text features are computed once."""
        return self._defender(tuple(classes))

    @property
    def backbone_name(self) -> str:
        """The backbone as visitors see it; of a folder, only the last part."""
        kind, _, rest = self.backbone.name.partition(":")
        return f"{kind}:{Path(rest).name}" if kind == "local-dir" else self.backbone.name

    @property
    def pack_name(self) -> str:
        """The pack as visitors see it; of a folder, only the last part."""
        name = self.pack.name
        embedded = not self.pack.trained or name in embedded_packs(self.backbone.name)
        return name if embedded else Path(name).name

    @property
    def embedded(self) -> bool:
        """Whether this is the model that knows ten kinds only."""
        return self.backbone.name == EMBEDDED_BACKBONE

    @property
    def size(self) -> int:
        """Side of the model's input in pixels."""
        return self.backbone.image_size


def load_service(backbone: str, pack: str | None = None, device: str | None = None) -> Service:
    """Loads a backbone and a pack.

    pack: an embedded name or a folder; default the backbone's embedded pack, `vli` first, and
        untrained prompts where it has none.

    Raises:
        BackboneError, PackError: unknown, malformed, or not made for each other.
    """
    loaded = load_backbone(backbone, device=device)
    return Service(loaded, load_pack(pack, loaded) if pack else default_pack(loaded))
