"""Tensors out of a file that `torch.save` wrote, without executing anything in it.

`torch.load(weights_only=True)` refuses these files whole for one foreign class, allows classes
for the entire process only, and lets a file ask for more memory than it has.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tapt.core.errors import PackError

_TYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_checkpoint(path: Path) -> Any:
    """The pickled value, with a `StoredTensor` for every tensor.

    Dictionaries, lists, numbers and text come as they are; an object of any class that tensors
    do not need becomes an inert `Placeholder`, and no code of that class runs. `PackError` where
    there is no such file, or not one that `torch.save` wrote.
    """
    with _readable(path), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1 or any(info.compress_type for info in archive.infolist()):
            raise ValueError("torch.save stores one pickle, uncompressed")
        pickled = io.BytesIO(archive.read(names[0]))
        return _Reader(pickled, path, names[0].removesuffix("data.pkl")).load()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise PackError(f"There is no file {path.name!r}.") from error
    except Exception as error:  # a hostile file can fail in any way that pickle and zip have
        raise PackError(
            f"{path.name!r} is not a whole checkpoint in the zip format of torch.save."
        ) from error


class StoredTensor(NamedTuple):
    """Where a tensor lies; most of a checkpoint is never read."""

    path: Path
    entry: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor in float32, on the CPU; `PackError` where it is not wholly in the file."""
        with _readable(self.path), zipfile.ZipFile(self.path) as archive:
            values = torch.frombuffer(bytearray(archive.read(self.entry)), dtype=self.dtype)
            if math.prod(self.size) > len(values):
                raise ValueError("larger than its storage")
            values = values.as_strided(self.size, self.stride, self.offset)
            return values.to(torch.float32, copy=True)


class Placeholder:
    """Stands for an object of a class outside the allow-list; takes whatever a pickle does."""

    def __new__(cls, *_: object, **__: object) -> Placeholder:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> Placeholder:
        return self

    __setstate__ = __setitem__ = append = extend = __init__


class _Reader(pickle.Unpickler):
    """Nothing that a pickle can name is called, but for the methods of this class."""

    def __init__(self, pickled: io.BytesIO, path: Path, folder: str) -> None:
        super().__init__(pickled)
        self.path, self.folder = path, folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        # methods, since a pickle could set attributes on functions and classes
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        return allowed.get((module, name), Placeholder)

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        _, dtype, key, *_ = pid
        return f"{self.folder}data/{key}", dtype

    def _tensor(
        self, storage: tuple[str, torch.dtype], offset: int, size: Any, stride: Any, *_: Any
    ) -> StoredTensor:
        return StoredTensor(self.path, *storage, offset, tuple(size), tuple(stride))

    def _parameter(self, data: StoredTensor, *_: Any) -> StoredTensor:
        return data
