"""Examples made one by one, put together to batches.

Stacked  makes every image by itself, then copies it into its batch: TensorFlow's own ops.
InPlace  a batch's memory comes first; images are written into their places, a few by every
         call of the graph, as handing work to a thread takes as long as resampling does.
         Needs the compiled ops.

Both give the same batches in the same order. They take plans, the rows of a batch: dicts of
[b, ...]. A window is (its records, string [n]; the places in it that rows take from
it, int64 [m]; the first of these rows, counted from the first step, int64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf

from vggrepro.compiled_ops import CompiledOps
from vggrepro.graph_functions import as_written, parallel
from vggrepro.resampling import BatchRow

Batch = dict[str, tf.Tensor]
Rows = dict[str, Any]  # tensors, or what holds tensors, of the same leading dimensions
# (row, records of its window if any, into=…) -> the image; into a row of a batch:
# (rows, …) -> the batch.
ImageOf = Callable[..., tf.Tensor]

_PIECE = 8  # rows
_BATCH = ("images", "labels", "example_ids")


class Batching(Protocol):
    """How rows become batches; see the module."""

    def rows(self, plans: tf.data.Dataset) -> tf.data.Dataset:
        """The rows of plans, for `batches`."""

    def rows_by_window(self, plans: tf.data.Dataset, windows: tf.data.Dataset) -> tf.data.Dataset:
        """The same, each with its window's records and the place of its own: row["stored"].

        Rows of plans say where a window begins: bool row["window_begins"].
        """

    def batches(self, rows: tf.data.Dataset, image: ImageOf) -> tf.data.Dataset:
        """{"images", "labels", "example_ids"} of as many rows as a plan has."""


class Stacked:
    """As `Batching`, for batches of `size`."""

    def __init__(self, size: int) -> None:
        self._size = size

    def rows(self, plans: tf.data.Dataset) -> tf.data.Dataset:
        return plans.unbatch()

    def rows_by_window(self, plans: tf.data.Dataset, windows: tf.data.Dataset) -> tf.data.Dataset:
        @as_written
        def taken(records: tf.Tensor, places: tf.Tensor, first: tf.Tensor) -> tf.data.Dataset:
            return tf.data.Dataset.from_tensor_slices(places).map(
                as_written(lambda place: (records, place))
            )

        return _zipped(self.rows(plans), windows.flat_map(taken))

    def batches(self, rows: tf.data.Dataset, image: ImageOf) -> tf.data.Dataset:
        @as_written
        def example(row: Rows, *records: tf.Tensor) -> Batch:
            named = {"labels": row["labels"], "example_ids": row["example_ids"]}
            return {"images": image(row, *records, into=None), **named}

        return parallel(rows, example).batch(self._size, drop_remainder=True)


class InPlace:
    """As `Batching`, for batches of `size` images of `side` pixels.

    Rows are a plan with all its rows, and which piece of them is to be made: those from `first`
    to `end`. Nothing is cut out for a single image: the ops find their row themselves.
    """

    def __init__(self, ops: CompiledOps, size: int, side: int) -> None:
        self._ops = ops
        self._size = size
        self._side = side

    def rows(self, plans: tf.data.Dataset) -> tf.data.Dataset:
        return plans.flat_map(self._pieces)

    def rows_by_window(self, plans: tf.data.Dataset, windows: tf.data.Dataset) -> tf.data.Dataset:
        @as_written
        def taken(records: tf.Tensor, places: tf.Tensor, first: tf.Tensor) -> tf.data.Dataset:
            count = tf.size(places, tf.int64)
            numbers = (first + tf.range(count)) % self._size
            begins = tf.range(count) == 0

            @as_written
            def in_their_rows(first: tf.Tensor, end: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                return records, tf.pad(places[first:end], [[numbers[first], 0]])

            return _cut(begins, numbers).map(in_their_rows)

        return _zipped(self.rows(plans), windows.flat_map(taken))

    def batches(self, rows: tf.data.Dataset, image: ImageOf) -> tf.data.Dataset:
        @as_written
        def written(rows: Rows, *records: tf.Tensor) -> tuple[Batch, tf.Tensor]:
            batch = rows["batch"]

            def write(row: tf.Tensor, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                into = BatchRow(images, batch["written"], row)
                return row + 1, image(rows, *records, into=into)

            _, images = tf.while_loop(
                lambda row, images: row < rows["end"],
                write,
                (rows["first"], batch["images"]),
                parallel_iterations=1,
            )
            return {**batch, "images": images}, tf.equal(rows["end"], self._size)

        # Pieces come in order: the last one is the time to look whether all rows are written.
        batches = parallel(rows, written).filter(as_written(lambda batch, last: last))
        # They are not where an image was damaged and somebody goes on after that error. A filter
        # of its own: the first needs no call of a function.
        whole = batches.filter(
            as_written(lambda batch, last: tf.equal(batch["written"], self._size))
        )
        return whole.map(as_written(lambda batch, last: {name: batch[name] for name in _BATCH}))

    @as_written
    def _pieces(self, plan: Rows) -> tf.data.Dataset:
        size, side = self._size, self._side
        ids = tf.ensure_shape(plan["example_ids"], [size])
        images, written = self._ops.new_images(ids, side=side)
        batch = {
            "images": tf.ensure_shape(images, [size, side, side, 3]),
            "labels": tf.ensure_shape(plan["labels"], [size]),
            "example_ids": ids,
            "written": written,
        }
        rows = {"stored": plan["stored"], "augmentation": plan["augmentation"], "batch": batch}
        begins = plan.get("window_begins", tf.zeros([size], tf.bool))
        return _cut(begins, tf.range(size, dtype=tf.int64)).map(
            as_written(lambda first, end: {**rows, "first": first, "end": end})
        )


def _cut(begins: tf.Tensor, numbers: tf.Tensor) -> tf.data.Dataset:
    """First and end of pieces: new ones where a window begins, and at every _PIECE rows of a batch.

    Args:
      begins: where a window begins, bool [m].
      numbers: of the rows in their batches, int64 [m].
    """
    count = tf.size(numbers, tf.int64)
    firsts = tf.where(begins | (numbers % _PIECE == 0) | (tf.range(count) == 0))[:, 0]
    return tf.data.Dataset.from_tensor_slices((firsts, tf.concat([firsts[1:], [count]], 0)))


def _zipped(rows: tf.data.Dataset, windows: tf.data.Dataset) -> tf.data.Dataset:
    return tf.data.Dataset.zip((rows, windows)).map(
        as_written(lambda row, window: ({**row, "stored": (window[1],)}, window[0]))
    )
