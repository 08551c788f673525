"""The records of a window order, read as a few long runs instead of one by one.

A window's bytes are in memory while it is being used, and the next one's while it is
being read: twice the window times the size of an image.
"""

from __future__ import annotations

import tensorflow as tf

from vggrepro.config import SHUFFLE_RUN
from vggrepro.example_index import RecordTable
from vggrepro.example_reader import record_dataset
from vggrepro.graph_functions import as_written
from vggrepro.order import WindowShuffle

_BUFFER = 2**20  # bytes at a time; runs lie far apart


def window_records(
    order: WindowShuffle, records: RecordTable, first_position: int
) -> tf.data.Dataset:
    """The bytes at every position from `first_position` on, endless; scalar strings."""
    windows_of_epoch = -(-order.count // order.window)
    epoch, place = divmod(first_position, order.count)
    first_window = epoch * windows_of_epoch + place // order.window
    runs = _Runs(order, records)
    loaded = (
        tf.data.Dataset.range(first_window, tf.int64.max)
        .map(as_written(lambda number: (number // windows_of_epoch, number % windows_of_epoch)))
        .flat_map(runs.window)
        .prefetch(1)
    )
    return loaded.unbatch().skip(place % order.window)


class _Runs:
    """Where the runs of a window lie; tables by place in storage."""

    def __init__(self, order: WindowShuffle, records: RecordTable) -> None:
        self._order = order
        by_place = records.ids_in_storage_order
        shard = records.shard[by_place]
        with tf.device("CPU:0"):
            self._files = tf.constant(records.files)
            self._shard = tf.constant(shard, tf.int64)
            self._offset = tf.constant(records.offset[by_place])

    @as_written
    def window(self, epoch: tf.Tensor, window: tf.Tensor) -> tf.data.Dataset:
        """One element, string [size of the window]: its records in the order of training."""
        order = self._order
        first = window * order.window
        places = tf.range(first, tf.minimum(first + order.window, order.count))
        epochs = tf.fill(tf.shape(places), epoch)
        found = order.records(epochs, places)
        # A run is read in one go, except where it passes the end of the last shard.
        heads = tf.where((places % SHUFFLE_RUN == 0) | (found == 0))[:, 0]
        ends = tf.concat([heads[1:], [tf.size(places, tf.int64)]], 0)
        runs = tf.data.Dataset.from_tensor_slices((tf.gather(found, heads), ends - heads))
        size = tf.size(places, tf.int64)
        whole = tf.data.experimental.assert_cardinality(size)  # unless a shard was cut off
        data = runs.flat_map(self._read).apply(whole).batch(size, drop_remainder=True)
        return data.map(
            as_written(lambda strings: tf.gather(strings, order.within(epochs, places) - first))
        )

    @as_written
    def _read(self, place: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        """`count` records from a place on, which may go on in the next shards."""
        shards, _, counts = tf.unique_with_counts(self._shard[place : place + count], tf.int64)
        offsets = tf.concat([[self._offset[place]], tf.zeros_like(shards[1:])], 0)
        # Each shard's own number: one that was cut off must not be made up for by the next.
        pieces = tf.data.Dataset.from_tensor_slices(
            (tf.gather(self._files, shards), offsets, counts)
        )
        return pieces.flat_map(
            as_written(
                lambda file, offset, number: record_dataset(file, offset, _BUFFER).take(number)
            )
        )
