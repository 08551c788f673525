"""TFRecord shards with an index, as `vggrepro data build` leaves them.

    shards.json              the manifest: classes, splits, shards, what was found
    train-00000.tfrecord …   one record an image: the bytes of its file, nothing else
    train.safetensors        the index: label, shard, offset, size, height and width, SHA-256, path

An example's id is its place in the sorted list of paths, as in a directory of images;
its place in the shards is a fixed pseudo-random permutation of that, so that any run of
records is a fair sample of the classes. The manifest exists only when all the rest does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, overload

import numpy as np
from safetensors.numpy import load

from diagnostics.errors import InputError
from vggrepro.example_index import ExampleIndex, RecordTable
from vggrepro.storage import exists, file_size, join, read_bytes

MANIFEST = "shards.json"
BUILD = "build.json"  # what an unfinished directory is built from
VERSION = 1
QUESTIONS = 16  # at a time: a bucket takes its time to answer each
RECORD_HEADER = 12  # bytes before the image: its length and the length's checksum
RECORD_OVERHEAD = RECORD_HEADER + 4  # and a checksum after it


class PathTable(Sequence[str]):
    """The paths of a split in one block of memory; no object each."""

    def __init__(self, ends: np.ndarray, text: np.ndarray) -> None:
        self._ends = ends
        self._text = text

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return self._text[start : int(self._ends[index])].tobytes().decode()


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:05d}.tfrecord"


def index_name(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.safetensors"


def holds_shards(root: str | os.PathLike[str]) -> bool:
    """Whether a directory holds shards, finished or not (an unfinished one is refused)."""
    return exists(join(root, MANIFEST)) or exists(join(root, BUILD))


def read_manifest(root: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a finished shard directory.

    Raises:
      InputError: it is missing, damaged or of another version.
    """
    path = join(root, MANIFEST)
    if not exists(path):
        raise InputError(
            f"{root} holds no finished shards", "Make or finish them with `vggrepro data build`"
        )
    try:
        manifest = json.loads(read_bytes(path))
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}", "Build the shards again") from error
    if version != VERSION:
        raise InputError(f"{path} is of version {version}, not {VERSION}", "Build them again")
    return manifest


def read_table(root: str | os.PathLike[str], split: str) -> dict[str, np.ndarray]:
    """The arrays of a split's index, by example id.

    Raises:
      InputError: the index is missing or damaged.
    """
    path = join(root, index_name(split))
    try:
        return load(read_bytes(path))
    except InputError:
        raise
    except Exception as error:  # safetensors raises its own, undocumented kinds
        raise InputError(f"{path} is damaged: {error}", "Build the shards again") from error


def check_sizes(index: ExampleIndex) -> None:
    """Whether every shard is as long as the index says.

    Raises:
      InputError: one is not; reading from it would give other images, or none.
    """
    records = index.records
    assert records is not None
    ends = np.zeros(len(records.files), np.int64)
    np.maximum.at(ends, records.shard, records.offset + records.size + RECORD_OVERHEAD)
    with ThreadPoolExecutor(QUESTIONS) as pool:
        sizes = list(pool.map(file_size, records.files))
    for file, found, end in zip(records.files, sizes, ends.tolist(), strict=True):
        if found != end:
            raise InputError(
                f"shard {file} has {found:,} bytes, its index says {end:,}",
                f"Restore it or build the shards again; `vggrepro data check {index.root}` lists "
                "what is damaged",
            )


def index_shards(root: str | os.PathLike[str], split: str) -> ExampleIndex:
    """The examples of a split of a shard directory; reads no shard.

    Raises:
      InputError: manifest or index are missing or damaged, or a shard is missing.
    """
    root = os.fspath(root)
    manifest = read_manifest(root)
    known = manifest["splits"][split]
    table = read_table(root, split)
    if len(table["label"]) != known["examples"]:
        raise InputError(
            f"{join(root, index_name(split))} lists {len(table['label']):,} examples, "
            f"{MANIFEST} {known['examples']:,}",
            "Build the shards again",
        )
    files = tuple(join(root, shard["file"]) for shard in known["shards"])
    with ThreadPoolExecutor(QUESTIONS) as pool:
        there = list(pool.map(exists, files))
    for file, found in zip(files, there, strict=True):
        if not found:
            raise InputError(f"shard {file} is missing", "Restore it or build the shards again")
    return ExampleIndex(
        root,
        split,
        PathTable(table["path_end"], table["path_text"]),
        table["label"],
        tuple(manifest["class_names"]),
        known["fingerprint"],
        # Earlier builds did not write down heights and widths.
        RecordTable(files, table["shard"], table["offset"], table["size"], table.get("image_size")),
    )
