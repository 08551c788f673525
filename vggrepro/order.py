"""Which example comes when: stateless permutations of an epoch, by position.

full    any example may come anywhere.
window  the shards are cut into runs of SHUFFLE_RUN consecutive records; the runs are permuted,
        and the examples of every N positions (the window) are permuted among
        themselves. So a window is read as a few long runs. Needs shards, whose records
        lie in a random order to begin with.

Neither keeps any state or table but the window order's list of record places, 8 bytes an
example (10 MB for ImageNet).
"""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro.config import SHUFFLE_RUN, window_of
from vggrepro.example_index import ExampleIndex
from vggrepro.rng import STREAM_ORDER, fold_in, fold_in_tensor

_START, _RUNS, _WITHIN = 1, 2, 3  # what a key of the window order is for


@dataclass(frozen=True)
class FullShuffle:
    """Epoch e is a permutation of the n examples, keyed by (seed, STREAM_ORDER, e)."""

    count: int
    seed: int

    def example_ids(self, epochs: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """The examples at `places` (int64 [m], in [0, n)) of `epochs` (int64 [m]); int64 [m]."""
        keys = fold_in_tensor(fold_in(self.seed, STREAM_ORDER), epochs)
        return shuffled(places, keys, self.count)


class WindowShuffle:
    """Runs of records permuted, then examples within a window; see the module.

    Record v of an epoch is the record (v + start) % n of the shards, with another start
    in every epoch, so that the n % SHUFFLE_RUN records that fill no run are others each time.
    """

    def __init__(self, index: ExampleIndex, window: int, seed: int) -> None:
        if index.records is None:
            raise InputError(
                f"order window:{window} needs shards; {index.root} holds image files",
                "Use --order full, or make shards with `vggrepro data build`",
            )
        self.count = len(index)
        self.window = window
        self._key = fold_in(seed, STREAM_ORDER)
        with tf.device("CPU:0"):
            self._ids = tf.constant(index.records.ids_in_storage_order, tf.int64)

    def example_ids(self, epochs: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """As `FullShuffle.example_ids`."""
        return self.stored_ids(epochs, self.within(epochs, places))

    def stored_ids(self, epochs: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """The same before they are permuted in their windows: in the order of their runs."""
        return tf.gather(self._ids, self.records(epochs, places))

    def within(self, epochs: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """The places that the examples have before they are permuted in their windows."""
        windows = places // self.window
        sizes = tf.minimum(self.count - windows * self.window, self.window)
        keys = fold_in_tensor(self._key, epochs, _constant(_WITHIN), windows)
        return windows * self.window + shuffled(places % self.window, keys, sizes)

    def records(self, epochs: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """Runs in permuted order, one after the other: the record at each place; int64 [m]."""
        runs = self.count // SHUFFLE_RUN
        # The op walks 2^16 / count times for a small count: once a run, not once a record.
        last = max(runs - 1, 0)
        asked, which = tf.unique(epochs * (last + 1) + tf.minimum(places // SHUFFLE_RUN, last))
        keys = fold_in_tensor(self._key, asked // (last + 1), _constant(_RUNS))
        run = tf.gather(shuffled(asked % (last + 1), keys, last + 1), which)
        inside = tf.where(
            places < runs * SHUFFLE_RUN, run * SHUFFLE_RUN + places % SHUFFLE_RUN, places
        )
        start = fold_in_tensor(self._key, epochs, _constant(_START)) % self.count
        return (inside + start) % self.count


def example_order(index: ExampleIndex, order: str, seed: int) -> FullShuffle | WindowShuffle:
    """The order that a configuration names: 'full' or 'window:N'."""
    if order == "full":
        return FullShuffle(len(index), seed)
    return WindowShuffle(index, window_of(order), seed)


def shuffled(indices: tf.Tensor, seeds: tf.Tensor, count: tf.Tensor | int) -> tf.Tensor:
    """Element `indices[i]` of the permutation of range(count[i]) that `seeds[i]` names.

    Args:
      indices: int64 [n], each in [0, count).
      seeds: int64 [n], each in [0, 2^63) and hashed (`fold_in`): the op gives related
        seeds related permutations.
      count: int64, scalar or [n].
    Returns:
      int64 [n].
    """
    low, high = seeds % 2**32, seeds // 2**32  # the op takes three words of 32 bits
    last = tf.cast(count, tf.int64) - 1
    return tf.raw_ops.RandomIndexShuffle(
        index=indices,
        seed=tf.stack([low, high, tf.zeros_like(low)], axis=1),
        max_index=last,
        rounds=4,
    )


def _constant(value: int) -> tf.Tensor:
    return tf.constant(value, tf.int64)
