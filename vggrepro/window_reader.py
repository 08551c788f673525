"""The records of a window order, read as a few long runs instead of one by one.

A window's bytes are in memory while it is being used, and the next one's while it is
being read: twice the window times the size of an image. An example's bytes are copied out of
its window only where they are decoded.
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
    """Every position from `first_position` on, endless.

    Returns:
      (bytes of all records of the window, string [n]; this position's place in them, int64).
    """
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
    return loaded.flat_map(_positions).skip(place % order.window)


@as_written
def _positions(data: tf.Tensor, places: tf.Tensor) -> tf.data.Dataset:
    return tf.data.Dataset.zip(
        (tf.data.Dataset.from_tensors(data).repeat(), tf.data.Dataset.from_tensor_slices(places))
    )


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
        """One element: the window's records, string [n], and their order in training."""
        order = self._order
        first = window * order.window
        places = tf.range(first, tf.minimum(first + order.window, order.count))
        epochs = tf.fill(tf.shape(places), epoch)
        size = tf.size(places, tf.int64)
        whole = tf.data.experimental.assert_cardinality(size)  # unless a shard was cut off
        pieces = tf.data.Dataset.from_tensor_slices(
            self._pieces(places, order.records(epochs, places))
        )
        data = pieces.flat_map(_read).apply(whole).batch(size, drop_remainder=True)
        within = tf.data.Dataset.from_tensors(order.within(epochs, places) - first)
        return tf.data.Dataset.zip((data, within))

    def _pieces(self, places: tf.Tensor, records: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """File, offset and number of records that are read in one go; [m] each.

        A run is, except where it goes on in the next shard, or passes the end of the last.
        Each shard's own number: one that was cut off must not be made up for by the next.
        """
        shards = tf.gather(self._shard, records)
        first = (places % SHUFFLE_RUN == 0) | (records == 0)
        heads = tf.where(first | tf.concat([[True], shards[1:] != shards[:-1]], 0))[:, 0]
        counts = tf.concat([heads[1:], [tf.size(places, tf.int64)]], 0) - heads
        files = tf.gather(self._files, tf.gather(shards, heads))
        return files, tf.gather(self._offset, tf.gather(records, heads)), counts


@as_written
def _read(file: tf.Tensor, offset: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
    return record_dataset(file, offset, _BUFFER).take(count)
