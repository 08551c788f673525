"""Shards against their index: every record is read as training reads it, and hashed."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import tensorflow as tf

from vggrepro.example_index import RecordTable
from vggrepro.example_reader import stored_records
from vggrepro.shards import index_shards, read_manifest, read_table
from vggrepro.storage import read_bytes

_BUFFER = 2**20  # bytes


def check_shards(
    root: str, workers: int, on_progress: Callable[[str, int, int], None]
) -> list[str]:
    """Reads all shards of a finished directory.

    Returns:
      One line for each damaged record or shard; empty: all is well.
    Raises:
      InputError: there is no readable manifest or index, or a shard is missing.
    """
    faults = []
    for split, known in read_manifest(root)["splits"].items():
        index = index_shards(root, split)
        assert index.records is not None
        if hashlib.sha256(read_bytes(f"{root}/{split}.safetensors")).hexdigest() != known["sha256"]:
            faults.append(f"{root}/{split}.safetensors: is not the index that was built")
        sha256 = read_table(root, split)["sha256"]
        shown = partial(on_progress, f"verify {split}")
        for example_id, fault in damaged(index.records, sha256, workers, shown):
            faults.append(f"{index.location(example_id)}: {fault}")
    return faults


def damaged(
    records: RecordTable,
    sha256: np.ndarray,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> list[tuple[int, str]]:
    """(example id, what is wrong) of every record that is not as the index says.

    Args:
      sha256: uint8 [n, 32], of the images.
      on_progress: called after every shard with (shards read, shards in all).
    """
    by_place = records.ids_in_storage_order
    ends = np.cumsum(np.bincount(records.shard, minlength=len(records.files)))
    shards = np.split(by_place, ends[:-1])
    found: list[tuple[int, str]] = []
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda ids: list(_damaged_in_shard(records, sha256, ids)), shards)
        for done, faults in enumerate(results, 1):
            found += faults
            on_progress(done, len(shards))
    return found


def _damaged_in_shard(
    records: RecordTable, sha256: np.ndarray, ids: np.ndarray
) -> Iterator[tuple[int, str]]:
    """Reads record after record, and beyond a damaged one by its successor's offset."""
    left = deque(ids.tolist())
    while left:
        file = records.files[records.shard[left[0]]]
        try:
            for data in stored_records(file, records.offset[left[0]], _BUFFER):
                if hashlib.sha256(data).digest() != sha256[left[0]].tobytes():
                    yield left[0], "is not the image that was stored"
                left.popleft()
                if not left:
                    return
        except tf.errors.OpError:
            yield left.popleft(), "the record is damaged"
        else:
            yield from ((missing, "the shard ends before it") for missing in left)
            return


def default_workers() -> int:
    """As many threads as cores: decoding and hashing do not hold Python's lock."""
    return os.cpu_count() or 1
