"""Which image goes where, before any is read: the same for any number of workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from vggrepro.example_index import fingerprint
from vggrepro.image_sources import Source
from vggrepro.rng import STREAM_DATA, fold_in, fold_in_tensor
from vggrepro.shards import RECORD_OVERHEAD, shard_name

SPLITS = ("train", "val")


@dataclass(frozen=True, eq=False)  # by identity: it holds an array
class ShardPlan:
    """One shard: which images of a split, by their numbers in it, in what order."""

    split: str
    number: int
    images: np.ndarray

    @property
    def file(self) -> str:
        """The shard's file name."""
        return shard_name(self.split, self.number)


@dataclass(frozen=True)
class BuildPlan:
    """A source, cut into shards.

    Attributes:
      fingerprints: of the listed images, by split.
    """

    source: Source
    shards: tuple[ShardPlan, ...]
    fingerprints: dict[str, str]


def plan_build(source: Source, shard_bytes: int) -> BuildPlan:
    """Permutes the images of each split and cuts them at every `shard_bytes`.

    Sorted, a run of images would be of one class; permuted, it is a fair sample.
    """
    shards: list[ShardPlan] = []
    for number, split in enumerate(SPLITS):
        images = source.splits[split]
        keys = fold_in_tensor(
            fold_in(0, STREAM_DATA, number), tf.range(len(images), dtype=tf.int64)
        )
        order = np.argsort(keys.numpy(), kind="stable")
        sizes = np.array([image.size + RECORD_OVERHEAD for image in images], np.int64)[order]
        cuts = (np.cumsum(sizes) - sizes) // shard_bytes
        starts = np.flatnonzero(np.diff(cuts, prepend=-1))
        shards += [ShardPlan(split, i, part) for i, part in enumerate(np.split(order, starts[1:]))]
    fingerprints = {
        split: fingerprint(
            (image.path, source.label_of(image), image.size) for image in source.splits[split]
        )
        for split in SPLITS
    }
    return BuildPlan(source, tuple(shards), fingerprints)
