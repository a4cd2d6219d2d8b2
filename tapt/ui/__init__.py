"""The page; only this package imports gradio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

try:
    import spaces  # on a Hugging Face Space; wants to be there before torch
except ImportError:
    spaces = None

T = TypeVar("T", bound=Callable[..., Any])


def on_gpu(generator: T, duration: Callable[..., int]) -> T:
    """On ZeroGPU, runs a generator function where the GPU is: in a forked process, so that
    arguments and items must be picklable. Elsewhere the function itself.

    duration: seconds that a call may take, of the same arguments.
    """
    return generator if spaces is None else spaces.GPU(generator, duration=duration)
