"""Tensors of a PyTorch checkpoint (.pth, .pt) without PyTorch and without running code.

Such a file is a pickle that may call any function. Here only the few that rebuild
tensors and dictionaries are known, each replaced by one of ours; anything else ends
the reading. Both formats of `torch.save`: zip (1.6 and later) and the stream before.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from diagnostics.errors import InputError

_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
}
_NESTED = ("state_dict", "model")  # where training scripts keep the weights among other things


@dataclass
class _Storage:
    """A flat run of numbers; the stream format fills it after the pickle."""

    dtype: np.dtype
    values: np.ndarray | None = None


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage: offset and strides in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name; one level of nesting is opened (`_NESTED`).

    Raises:
      InputError: not such a file, damaged, or it asks for code to be run.
    """
    try:
        with path.open("rb") as file:
            read = _read_zip if zipfile.is_zipfile(file) else _read_stream
            file.seek(0)
            content = read(file)
        return _tensors(content)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except _Refused as error:
        raise InputError(
            f"{path} asks for {error} to be run: it is not a plain file of weights",
            "Save only the state_dict, or convert it to safetensors",
        ) from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, *_MALFORMED) as error:
        raise InputError(
            f"{path} is not a PyTorch checkpoint, or is damaged: {type(error).__name__}: {error}",
            "Get the file again",
        ) from error


class _Refused(Exception):
    """The pickle names something that is not on the list."""


# What a hostile or cut pickle makes of the machinery below.
_MALFORMED = (
    *(ValueError, TypeError, LookupError, AttributeError, EOFError, MemoryError),
    *(ArithmeticError, RuntimeError),  # of zip: unknown compression or version, encrypted
)


class _Unpickler(pickle.Unpickler):
    """Knows dictionaries, storages and tensors, nothing else."""

    def __init__(self, file: BinaryIO, storage: Callable[[np.dtype, str, int], _Storage]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, count, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(part for part in view):
            raise ValueError(f"unknown storage {pid}")
        return self._storage(dtype, str(key), int(count))


def _rebuilt(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("the archive holds no data.pkl")
        top = names[0].removesuffix("data.pkl")
        if f"{top}byteorder" in archive.namelist() and archive.read(f"{top}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        known: dict[str, _Storage] = {}

        def storage(dtype: np.dtype, key: str, count: int) -> _Storage:
            if key not in known:
                values = np.frombuffer(archive.read(f"{top}data/{key}"), dtype, count)
                known[key] = _Storage(dtype, values)
            return known[key]

        return _Unpickler(BytesIO(archive.read(names[0])), storage).load()


def _read_stream(file: BinaryIO) -> Any:
    known: dict[str, tuple[_Storage, int]] = {}

    def storage(dtype: np.dtype, key: str, count: int) -> _Storage:
        return known.setdefault(key, (_Storage(dtype), count))[0]

    def load() -> Any:
        return _Unpickler(file, storage).load()

    if load() != _STREAM_MAGIC:
        raise ValueError("it does not begin as one")
    load()  # protocol version
    if load().get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    content, keys = load(), load()
    for key in keys:
        into, count = known[key]
        if int.from_bytes(file.read(8), "little") != count:
            raise ValueError(f"storage {key} has another length")
        into.values = np.frombuffer(file.read(count * into.dtype.itemsize), into.dtype, count)
    return content


def _tensors(content: Any) -> dict[str, np.ndarray]:
    if isinstance(content, dict):
        nested = [content[name] for name in _NESTED if isinstance(content.get(name), dict)]
        content = nested[0] if nested else content
    if not isinstance(content, dict):
        raise ValueError("it holds no dictionary of tensors")
    return {str(k): _array(value) for k, value in content.items() if isinstance(value, _Tensor)}


def _array(tensor: _Tensor) -> np.ndarray:
    """The view as an array of its own; one that reaches outside its storage is refused."""
    values = tensor.storage.values
    pairs = list(zip(tensor.size, tensor.stride, strict=True))
    last = tensor.offset + sum((extent - 1) * step for extent, step in pairs)
    negative = any(extent < 1 or step < 0 for extent, step in pairs)
    if values is None or tensor.offset < 0 or negative or last >= len(values):
        raise ValueError("a tensor reaches outside its storage")
    strides = [step * values.itemsize for step in tensor.stride]
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.size, strides)
    return np.array(view)
