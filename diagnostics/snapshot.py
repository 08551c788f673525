"""Named arrays and a JSON manifest in one directory, hashed and written atomically.

    directory/state.safetensors   the arrays
    directory/manifest.json       schema; manifest: the caller's; arrays: {name: {dtype, shape,
                                  sha256}}; sha256 of all arrays; self_sha256 of this file

The round trip is exact to the bit, NaN payloads and -0.0 included. Nothing is
pickled, so a snapshot from a stranger cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes  # also teaches numpy the name 'bfloat16', which safetensors looks up
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from diagnostics.durable_files import json_text, new_directory, plain, write_error
from diagnostics.errors import InputError, SnapshotDamaged

SCHEMA = 1
STATE_FILE = "state.safetensors"
MANIFEST_FILE = "manifest.json"
STORABLE = frozenset(
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    + ["float16", "float32", "float64", np.dtype(ml_dtypes.bfloat16).name]
)


def hash_array(array: np.ndarray) -> str:
    """SHA-256, in hexadecimal, of type and shape (as 'float32[2, 3]') and the bytes.

    The bytes are those of C order and little-endian, whatever the array's own layout.
    """
    array = _canonical(array)
    digest = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """One SHA-256 over names and arrays; the order of the mapping does not matter."""
    return _combine({name: hash_array(array) for name, array in arrays.items()})


def _combine(hashes: Mapping[str, str]) -> str:
    lines = [json.dumps([name, hashes[name]]) for name in sorted(hashes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _canonical(array: np.ndarray) -> np.ndarray:
    """The array as it lies in the file; no copy if it already does."""
    array = np.asarray(array, order="C")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def write_snapshot(
    directory: str | os.PathLike, arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any]
) -> str:
    """Writes a snapshot, replacing one of the same name; returns `hash_arrays(arrays)`.

    Either the whole snapshot is there afterwards or nothing of it. In the manifest,
    NaN and infinities become strings (`durable_files.plain`).

    Raises:
      InputError: the disk is full or not writable; the message names the path.
      TypeError: an array's type has no place in a safetensors file.
      ValueError: an array has the one name that the format keeps for itself.
    """
    directory = Path(directory)
    if "__metadata__" in arrays:
        raise ValueError("'__metadata__' cannot name an array in a safetensors file")
    stored = {name: _canonical(array) for name, array in arrays.items()}
    for name, array in stored.items():
        if array.dtype.name not in STORABLE:
            raise TypeError(f"array '{name}' of type {array.dtype} cannot be stored")
    with new_directory(directory) as temporary, ThreadPoolExecutor(1) as pool:
        # Hashing and writing both release the interpreter lock: they overlap.
        hashing = pool.submit(lambda: {name: hash_array(array) for name, array in stored.items()})
        _save(stored, temporary / STATE_FILE, directory)
        content = _content(stored, hashing.result(), manifest)
        file = temporary / MANIFEST_FILE
        file.write_text(json_text(content, indent=1) + "\n", encoding="ascii")
        # safetensors makes its file for the owner only, whatever the umask.
        (temporary / STATE_FILE).chmod(file.stat().st_mode)
    return content["sha256"]


def _save(arrays: dict[str, np.ndarray], file: Path, directory: Path) -> None:
    try:
        save_file(arrays, file)
    except SafetensorError as error:
        # The library tells a full disk only in words: "(os error 28)", before 0.7 "code: 28".
        match = re.search(r"(?:os error|code:) (\d+)", str(error))
        if match is None:
            raise
        code = int(match.group(1))
        raise write_error(directory, code, os.strerror(code)) from error


def _content(
    arrays: Mapping[str, np.ndarray], hashes: dict[str, str], manifest: Mapping[str, Any]
) -> dict[str, Any]:
    described = {
        name: {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": hashes[name]}
        for name, array in arrays.items()
    }
    content = {
        "schema": SCHEMA,
        "sha256": _combine(hashes),
        "manifest": plain(manifest),
        "arrays": described,
    }
    return {**content, "self_sha256": _hash_content(content)}


def _hash_content(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "self_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_snapshot(
    directory: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the caller's manifest, every hash checked.

    Raises:
      SnapshotDamaged: a file is missing or its bytes are not those that were
        written; the message names the file or the array.
      InputError: a newer version wrote it, or it may not be read.
    """
    directory = Path(directory)
    content = _read_content(directory / MANIFEST_FILE)
    arrays = _load(directory / STATE_FILE)
    described = content["arrays"]
    for name in sorted(described.keys() | arrays.keys()):
        if name not in arrays:
            raise _damaged(directory / STATE_FILE, f"array '{name}' is missing")
        if name not in described:
            raise _damaged(directory / STATE_FILE, f"array '{name}' is not in {MANIFEST_FILE}")
        if hash_array(arrays[name]) != described[name]["sha256"]:
            raise _damaged(directory / STATE_FILE, f"array '{name}' does not match its hash")
    return arrays, content["manifest"]


def _read_content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "it is not JSON") from error
    if not isinstance(content, dict) or content.get("self_sha256") != _hash_content(content):
        raise _damaged(file, "it does not match its own hash")
    if content["schema"] > SCHEMA:
        raise InputError(
            f"{file} has schema {content['schema']}, this version reads {SCHEMA}",
            "Read it with the version that wrote it, or a newer one",
        )
    return content


def _load(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except OSError as error:
        raise _unreadable(file, error) from error
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        # Beside its own error the library lets through those of a type numpy lacks.
        raise _damaged(file, str(error)) from error


def _unreadable(file: Path, error: OSError) -> InputError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return _damaged(file, "the file is missing")
    return InputError(f"cannot read {file}: {error.strerror or error}", "Check the permissions")


def _damaged(file: Path, what: str) -> SnapshotDamaged:
    return SnapshotDamaged(
        f"snapshot damaged: {file}: {what}", "Use an earlier snapshot, or copy this one again"
    )
