"""What the handlers share: one loaded model and the class lists that were asked for last."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tapt.backbone import Backbone
from tapt.defense import Defender, make_defender
from tapt.hub import Progress, Token
from tapt.pack import Pack, embedded_packs, hub_packs, load_model, load_pack

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

    def with_pack(self, pack: str, progress: Progress | None = None) -> Service:
        """The same backbone with another pack; a visitor's, so without the server's token.

        pack: as for `tapt.pack.load_pack`.
        progress: called with bytes done and in all, from the calling thread.

        Raises:
            PackError, HubError: as `load_pack`; this service stays as it is.
        """
        return Service(self.backbone, load_pack(pack, self.backbone, progress=progress))

    def known_packs(self) -> list[str]:
        """Packs for this backbone: the embedded ones, then the Hub's.

        Raises:
            HubError: the Hub cannot be asked.
        """
        return [*embedded_packs(self.backbone.name), *hub_packs(self.backbone)]

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
        shown = self.pack.origin or not self.pack.trained
        return name if shown or name in embedded_packs(self.backbone.name) else Path(name).name

    @property
    def embedded(self) -> bool:
        """Whether this is the model that knows ten kinds only."""
        return self.backbone.name == EMBEDDED_BACKBONE

    @property
    def size(self) -> int:
        """Side of the model's input in pixels."""
        return self.backbone.image_size


def load_service(
    backbone: str | None = None,
    pack: str | None = None,
    device: str | None = None,
    *,
    token: Token = False,
    progress: Progress | None = None,
) -> Service:
    """Loads a backbone and a pack.

    backbone: default the one that the pack names, and `tiny` without a pack.
    pack: an embedded name, a folder or a Hub id; default the backbone's embedded pack, `vli`
        first, and untrained prompts where it has none.

    Raises:
        BackboneError, PackError, HubError: unknown, malformed, or not made for each other.
    """
    return Service(*load_model(backbone, pack, device=device, token=token, progress=progress))
