"""Links that hold a whole run's inputs, behind the `#`: nothing of them is kept on the server."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping

from PIL import Image

from tapt.core.errors import InputError
from tapt.ui.pictures import picture_url

MAX_LINK = 2_000_000  # characters; browsers take no longer ones


def to_link(values: Mapping[str, object], picture: Image.Image) -> str:
    """The part behind `#x=` for a request's values and the picture that the model saw."""
    text = json.dumps({**values, "image": {"url": picture_url(picture)}})
    return base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode()


def from_link(link: object) -> dict[str, object]:
    """The values of `to_link`, not yet checked.

    Raises:
        InputError: damaged or cut off.
    """
    try:
        if not isinstance(link, str) or len(link) > MAX_LINK:
            raise ValueError("not a link")
        inflate = zlib.decompressobj()
        text = inflate.decompress(base64.urlsafe_b64decode(link), 2 * MAX_LINK)
        if not inflate.eof:
            raise ValueError("cut off")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (ValueError, binascii.Error, zlib.error, RecursionError) as error:
        raise InputError("This link is damaged or cut off; nothing was changed.") from error
    return values
