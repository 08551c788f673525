"""Named arrays and a JSON manifest in one directory, hashed and written atomically.

    directory/state.safetensors   the arrays
    directory/manifest.json       {"schema", "sha256", "arrays": {name: {"dtype", "shape",
                                  "sha256"}}, "manifest": {...}, "manifest_sha256"}

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
    + ["float16", "float32", "float64", "complex64", np.dtype(ml_dtypes.bfloat16).name]
)


def hash_array(array: np.ndarray) -> str:
    """SHA-256 over type, shape and bytes (C order, little-endian), in hexadecimal."""
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

    Either the whole snapshot is there afterwards or nothing of it.

    Raises:
      InputError: the disk is full or not writable; the message names the path.
      TypeError: an array's type has no place in a safetensors file.
    """
    directory = Path(directory)
    stored = {name: _canonical(array) for name, array in arrays.items()}
    for name, array in stored.items():
        if array.dtype.name not in STORABLE:
            raise TypeError(f"array '{name}' of type {array.dtype} cannot be stored")
    with new_directory(directory) as temporary, ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(lambda: {name: hash_array(array) for name, array in stored.items()})
        _save(stored, temporary / STATE_FILE, directory)
        content = _content(stored, hashing.result(), manifest)
        (temporary / MANIFEST_FILE).write_text(json_text(content, indent=1) + "\n")
    return content["sha256"]


def _save(arrays: dict[str, np.ndarray], file: Path, directory: Path) -> None:
    try:
        save_file(arrays, file)
    except SafetensorError as error:
        # The library reports a full disk only in words: "... (os error 28)".
        match = re.search(r"os error (\d+)", str(error))
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
    user = plain(manifest)
    return {
        "schema": SCHEMA,
        "sha256": _combine(hashes),
        "manifest": user,
        "manifest_sha256": _hash_manifest(user),
        "arrays": described,
    }


def _hash_manifest(manifest: Any) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_snapshot(
    directory: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the manifest of a snapshot, every hash checked.

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
        if name not in arrays or name not in described:
            missing_from = STATE_FILE if name not in arrays else MANIFEST_FILE
            raise _damaged(directory, f"array '{name}' is missing from {missing_from}")
        if hash_array(arrays[name]) != described[name]["sha256"]:
            raise _damaged(directory / STATE_FILE, f"array '{name}' does not match its hash")
    if _combine({name: entry["sha256"] for name, entry in described.items()}) != content["sha256"]:
        raise _damaged(directory / MANIFEST_FILE, "the hashes do not match their total")
    return arrays, content["manifest"]


def _read_content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _damaged(file, "the file is missing") from error
    except OSError as error:
        raise InputError(
            f"cannot read {file}: {error.strerror}", "Check the permissions"
        ) from error
    except ValueError as error:
        raise _damaged(file, "it is not JSON") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise InputError(
            f"{file} has schema {schema}, this version reads {SCHEMA}",
            "Read it with the version that wrote it, or a newer one",
        )
    try:
        if _hash_manifest(content["manifest"]) != content["manifest_sha256"]:
            raise _damaged(file, "the manifest does not match its hash")
        for entry in content["arrays"].values():
            entry["sha256"].encode()
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, "it is not a snapshot's manifest") from error
    return content


def _load(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise _damaged(file, "the file is missing") from error
    except OSError as error:
        raise InputError(
            f"cannot read {file}: {error.strerror}", "Check the permissions"
        ) from error
    except SafetensorError as error:
        raise _damaged(file, str(error)) from error


def _damaged(path: Path, what: str) -> SnapshotDamaged:
    return SnapshotDamaged(
        f"snapshot damaged: {path}: {what}", "Use an earlier snapshot, or copy this one again"
    )
