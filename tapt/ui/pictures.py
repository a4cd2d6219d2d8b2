"""Pictures as HTML."""

from __future__ import annotations

import base64
import io
from html import escape

import torch
from PIL import Image
from torch import Tensor

from tapt.core.images import to_picture

MOVE = "this.parentNode.style.setProperty('--at', this.value + '%')"


def data_url(data: bytes, kind: str) -> str:
    """Bytes of a media type as a URL of their own."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture_url(picture: Image.Image, kind: str = "PNG") -> str:
    """A picture as a `data:` URL; as PNG it keeps every pixel."""
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return data_url(buffer.getvalue(), f"image/{kind.lower()}")


def image(picture: Image.Image, text: str, kind: str = "PNG") -> str:
    """An `img` of hard pixels; text: what it shows, for those who do not see it."""
    return f'<img class="t-pixels" src="{picture_url(picture, kind)}" alt="{escape(text)}">'


def figure(picture: Image.Image, text: str) -> str:
    """A picture above its words."""
    return (
        f'<figure class="t-figure">{image(picture, text)}'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


def change_figure(change: Tensor, title: str, note: str = "") -> str:
    """A change of pixels (3, H, W), in 1/255, around mid-grey and enlarged to full range."""
    scale = max(1, int(127 / max(1.0, float(change.abs().max()))))
    picture = to_picture((change * scale + 128).clamp(0, 255).to(torch.uint8))
    return figure(picture, f"{title}, × {scale} around mid-grey{note}")


def slider(before: tuple[Image.Image, str], after: tuple[Image.Image, str]) -> str:
    """Two pictures of one size, each with what it shows, and a line between them that moves."""
    return (
        f'<figure class="t-figure"><div class="t-slider">{image(*before)}{image(*after)}'
        f'<input type="range" value="50" aria-label="Line between both" oninput="{MOVE}"></div>'
        "<figcaption>Original (left) and attacked (right)</figcaption></figure>"
    )
