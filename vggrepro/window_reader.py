"""The records of a window order, read as a few long runs instead of one by one.

A window's bytes are in memory while it is being used, and the next one's while it is
being read: twice the window times the size of an image. An example's bytes are taken out of
its window only where they are decoded.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from vggrepro.compiled_ops import CompiledOps
from vggrepro.config import SHUFFLE_RUN
from vggrepro.example_index import RecordTable
from vggrepro.example_reader import record_dataset
from vggrepro.graph_functions import as_written
from vggrepro.order import WindowShuffle

_BUFFER = 2**20  # bytes at a time; runs lie far apart


def record_windows(
    order: WindowShuffle, records: RecordTable, ops: CompiledOps | None, first_position: int
) -> tf.data.Dataset:
    """The windows of all positions from `first_position` on, endless.

    Returns:
      (bytes of all records of the window, string [n]; the places in them that the positions
      take in turn, int64 [m]; the first of these positions, int64).
    """
    windows_of_epoch = -(-order.count // order.window)
    epoch, place = divmod(first_position, order.count)
    first_window = epoch * windows_of_epoch + place // order.window
    runs = _Runs(order, records, ops)

    @as_written
    def from_first(data: tf.Tensor, places: tf.Tensor, start: tf.Tensor) -> tuple[tf.Tensor, ...]:
        skipped = tf.maximum(first_position - start, 0)
        return data, places[skipped:], start + skipped

    return (
        tf.data.Dataset.range(first_window, tf.int64.max)
        .map(as_written(lambda number: (number // windows_of_epoch, number % windows_of_epoch)))
        .flat_map(runs.window)
        .prefetch(1)
        .map(from_first)
    )


def from_window(ops: CompiledOps | None) -> Callable[..., tf.Tensor]:
    """(place, records of its window) -> that record; with ops it may be asked for once."""
    if ops is None or ops.take_record is None:
        return lambda place, records: tf.gather(records, place)
    take = ops.take_record
    return lambda place, records: take(records, place)


class _Runs:
    """Where the runs of a window lie; tables by place in storage."""

    def __init__(self, order: WindowShuffle, records: RecordTable, ops: CompiledOps | None) -> None:
        self._order = order
        self._read_records = None if ops is None else ops.read_records
        by_place = records.ids_in_storage_order
        shard = records.shard[by_place]
        with tf.device("CPU:0"):
            self._files = tf.constant(records.files)
            self._shard = tf.constant(shard, tf.int64)
            self._offset = tf.constant(records.offset[by_place])

    @as_written
    def window(self, epoch: tf.Tensor, window: tf.Tensor) -> tf.data.Dataset:
        """One element: the records, string [n], their order in training, the first position."""
        order = self._order
        first = window * order.window
        places = tf.range(first, tf.minimum(first + order.window, order.count))
        epochs = tf.fill(tf.shape(places), epoch)
        pieces = self._pieces(places, order.records(epochs, places))
        within, start = order.within(epochs, places) - first, epoch * order.count + first
        return self._read(pieces, tf.size(places, tf.int64)).map(
            as_written(lambda records: (records, within, start))
        )

    def _read(self, pieces: tuple[tf.Tensor, ...], size: tf.Tensor) -> tf.data.Dataset:
        """One element: the records of the pieces, string [size]."""
        if self._read_records is not None:
            return tf.data.Dataset.range(1).map(as_written(lambda one: self._read_records(*pieces)))
        records = tf.data.Dataset.from_tensor_slices(pieces).flat_map(_run)
        whole = tf.data.experimental.assert_cardinality(size)  # unless a shard was cut off
        return records.apply(whole).batch(size, drop_remainder=True)

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
def _run(file: tf.Tensor, offset: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
    return record_dataset(file, offset, _BUFFER).take(count)
