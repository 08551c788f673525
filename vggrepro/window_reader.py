"""The records of a window order, asked for as a few long runs instead of one by one.

read_ahead      asks the kernel for what will be read; records are then read, as in the full
                order, where they are decoded. Local files, with the compiled ops.
record_windows  reads whole windows. A window's bytes are in memory while it is being used, and
                the next one's while it is being read: twice the window times the size of an
                image.
"""

from __future__ import annotations

import tensorflow as tf

from vggrepro.config import SHUFFLE_RUN
from vggrepro.example_index import RecordTable
from vggrepro.example_reader import LocalRecordReader, record_dataset
from vggrepro.graph_functions import as_written
from vggrepro.order import WindowShuffle

_BUFFER = 2**20  # bytes at a time; runs lie far apart


def read_ahead(
    order: WindowShuffle, reader: LocalRecordReader, first_step: int, batch_size: int
) -> tf.data.Dataset:
    """The steps from `first_step` on, endless; the kernel is asked for what they will read.

    Asked in the order in which records are stored, for some steps at a time: for as many as
    these take, of the positions that a window and a batch further on begin. So a window has been
    asked for before it begins. The first steps ask for all up to there.
    """
    window = min(order.window, order.count)  # longer ones end where an epoch does
    steps = max(1, window // (2 * batch_size))

    @as_written
    def asked(step: tf.Tensor) -> tf.Tensor:
        first = step * batch_size
        end = first + window + (steps + 1) * batch_size
        window_begin = first - first % order.count % window
        begin = tf.where(step == first_step, window_begin, end - steps * batch_size)
        positions = tf.range(begin, end)
        ids = order.stored_ids(positions // order.count, positions % order.count)
        return reader.will_need(reader.look_up(ids), step)

    return (
        tf.data.Dataset.range(first_step, tf.int64.max, steps)
        .map(asked)
        .prefetch(1)  # asking takes its time where a disk has much to do
        .flat_map(as_written(lambda step: tf.data.Dataset.range(step, step + steps)))
    )


def record_windows(
    order: WindowShuffle, records: RecordTable, first_position: int
) -> tf.data.Dataset:
    """The windows of all positions from `first_position` on, endless.

    Returns:
      (bytes of all records of the window, string [n]; the places in them that the positions
      take in turn, int64 [m]; the first of these positions, int64).
    """
    windows_of_epoch = -(-order.count // order.window)
    epoch, place = divmod(first_position, order.count)
    first_window = epoch * windows_of_epoch + place // order.window
    runs = _Runs(order, records)

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


def from_window(
    places: tf.Tensor, records: tf.Tensor, number: tf.Tensor | None = None
) -> tf.Tensor:
    """The record at a place in those of its window; with a number, at that one of the places."""
    return tf.gather(records, places if number is None else tf.gather(places, number))


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
        """One element: the records, string [n], their order in training, the first position."""
        order = self._order
        first = window * order.window
        places = tf.range(first, tf.minimum(first + order.window, order.count))
        epochs = tf.fill(tf.shape(places), epoch)
        pieces = self._pieces(places, order.records(epochs, places))
        within, start = order.within(epochs, places) - first, epoch * order.count + first
        size = tf.size(places, tf.int64)
        whole = tf.data.experimental.assert_cardinality(size)  # unless a shard was cut off
        return (
            tf.data.Dataset.from_tensor_slices(pieces)
            .flat_map(_run)
            .apply(whole)
            .batch(size, drop_remainder=True)
            .map(as_written(lambda records: (records, within, start)))
        )

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
