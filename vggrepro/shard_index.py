"""Puts what the shards of a split hold into one index, by example id."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save

from diagnostics.errors import InputError
from vggrepro.example_index import RecordTable, fingerprint
from vggrepro.image_inspection import KINDS
from vggrepro.image_sources import Source
from vggrepro.shard_plan import ShardPlan
from vggrepro.shard_writer import kinds_of
from vggrepro.storage import join

Part = dict[str, np.ndarray]  # `shard_writer.Records.arrays()` of one shard


@dataclass(frozen=True)
class SplitIndex:
    """The index of a split.

    Attributes:
      data: the content of its file.
      records: where the examples are.
      sha256: uint8 [n, 32].
    """

    data: bytes
    records: RecordTable
    sha256: np.ndarray


def index_split(
    directory: str, source: Source, split: str, parts: Mapping[ShardPlan, Part]
) -> tuple[SplitIndex, dict[str, Any]]:
    """The index, and what the manifest says of the split.

    Args:
      directory: path or URL of the shards.
    Raises:
      InputError: no image of some class was kept.
    """
    # Shards that hold nothing but skipped images have no file.
    filled = [shard for shard, part in parts.items() if (part["offset"] >= 0).any()]
    joined = _joined(parts, filled)
    kept = joined["offset"] >= 0
    images = [source.splits[split][i] for i in joined["image"][kept]]
    table = _table(source, images, {name: array[kept] for name, array in joined.items()})
    _check_classes(source, split, table["label"])
    files = tuple(join(directory, shard.file) for shard in filled)
    records = RecordTable(files, table["shard"], table["offset"], table["size"])
    data = save(table)
    known = {
        "examples": len(images),
        "bytes": int(table["size"].sum()),
        "fingerprint": fingerprint(
            (image.path, int(label), int(size))
            for image, label, size in zip(images, table["label"], table["size"], strict=True)
        ),
        "sha256": hashlib.sha256(data).hexdigest(),
        "shards": [
            {"file": shard.file, "records": int((parts[shard]["offset"] >= 0).sum())}
            for shard in filled
        ],
        "found": _counts(joined["kinds"]),
        "skipped": {
            source.splits[split][number].path: kinds_of(int(bits))
            for number, bits in zip(joined["image"][~kept], joined["kinds"][~kept], strict=True)
        },
    }
    return SplitIndex(data, records, table["sha256"]), known


def _joined(parts: Mapping[ShardPlan, Part], filled: list[ShardPlan]) -> Part:
    """The parts as one, in the order of the source's images, with the shard of each."""
    number = {shard: i for i, shard in enumerate(filled)}
    joined = {
        name: np.concatenate([part[name] for part in parts.values()])
        for name in next(iter(parts.values()))
    }
    joined["shard"] = np.concatenate(
        [np.full(len(part["image"]), number.get(shard, -1)) for shard, part in parts.items()]
    )
    order = np.argsort(joined["image"], kind="stable")
    return {name: array[order] for name, array in joined.items()}


def _table(source: Source, images: list, kept: Part) -> Part:
    paths = [image.path.encode() for image in images]
    return {
        "label": np.array([source.label_of(image) for image in images], np.int32),
        "shard": kept["shard"].astype(np.int32),
        "offset": kept["offset"],
        "size": kept["size"],
        "image_size": kept["image_size"].astype(np.int32),
        "sha256": np.ascontiguousarray(kept["sha256"]),
        "kinds": kept["kinds"].astype(np.int32),
        "path_end": np.cumsum([len(path) for path in paths], dtype=np.int64),
        "path_text": np.frombuffer(b"".join(paths), np.uint8),
    }


def _counts(bits: np.ndarray) -> dict[str, int]:
    """How many images are of each kind."""
    numbers, counts = np.unique(bits, return_counts=True)
    pairs = list(zip(numbers.tolist(), counts.tolist(), strict=True))
    return {kind: sum(n for b, n in pairs if kind in kinds_of(b)) for kind in KINDS}


def _check_classes(source: Source, split: str, labels: np.ndarray) -> None:
    counts = np.bincount(labels, minlength=len(source.class_names))
    if not counts.all():
        name = source.class_names[int(counts.argmin())]
        raise InputError(
            f"every image of class '{name}' in {split} was skipped", "Change --dirty, or its images"
        )
