"""Examples by index: any step's batch, without reading the ones before it.

Row r of step k is position p = k * batch_size + r. Epoch e = p // n is a stateless
permutation of the n examples (`vggrepro.order`), keyed by (run seed, STREAM_ORDER, e);
position p takes its element p % n. Batches run across the ends of epochs, so each example
comes exactly once an epoch and none is dropped. Augmentation is keyed by (run seed,
STREAM_AUGMENT, e, example). Of several replicas each takes an equal run of the rows, so
the batch of a step is the same whatever their number. No Python function runs inside the
tf.data graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro.batching import Batch, Rows
from vggrepro.example_index import ExampleIndex, RecordTable
from vggrepro.example_reader import LocalRecordReader, example_reader, example_rows
from vggrepro.graph_functions import as_written, parallel, threads
from vggrepro.order import WindowShuffle, example_order
from vggrepro.preprocessing import Preprocessing
from vggrepro.resampling import BatchRow
from vggrepro.rng import STREAM_AUGMENT, fold_in, fold_in_tensor
from vggrepro.window_reader import from_window, read_ahead, record_windows


class TrainingStream:
    """Augmented training batches, by step.

    A batch is {"images": float32 [b, s, s, 3], "labels": int32 [b], "example_ids": int64 [b]}
    with b = B / replicas.

    Args:
      index: the training split.
      preprocessing: settings and statistics.
      batch_size: examples a step over all replicas, B.
      seed: the run's seed.
      order: 'full' or 'window:N'.
      replica, replicas: which part of every batch this is.
    Raises:
      InputError: the batch cannot be divided, or the order does not fit the data.
    """

    def __init__(
        self,
        index: ExampleIndex,
        preprocessing: Preprocessing,
        batch_size: int,
        seed: int,
        order: str = "full",
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        self.index = index
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self._rows = replica_rows(batch_size, replica, replicas)
        self._reader = example_reader(index)
        self._order = example_order(index, order, seed)
        self._batching = preprocessing.batching(len(self._rows))
        self._augment_key = fold_in(seed, STREAM_AUGMENT)
        self._one_batch = tf.function(
            lambda step: self._batches(tf.data.Dataset.range(step, step + 1)).get_single_element(),
            input_signature=[tf.TensorSpec([], tf.int64)],
            autograph=False,
        )

    def batch(self, step: int) -> Batch:
        """The batch of one step; the same bits as `stream` gives, in any order of calls."""
        return self._one_batch(tf.constant(step, tf.int64))

    def stream(self, first_step: int) -> tf.data.Dataset:
        """An endless dataset of the batches from `first_step` on, prefetched."""
        steps = tf.data.Dataset.range(tf.constant(first_step, tf.int64), tf.int64.max)
        order, records = self._order, self.index.records
        whole = len(self._rows) == self.batch_size
        if whole and records is not None and isinstance(order, WindowShuffle):
            return self._batches_by_window(steps, order, records, first_step).prefetch(2)
        return self._batches(steps).prefetch(2)

    def example_ids(self, step: int) -> list[int]:
        """Which examples a step takes, without reading them."""
        taken = self._order.example_ids(*self._positions(tf.constant(step, tf.int64)))
        return [int(i) for i in taken]

    def name_of(self, example_id: int) -> str:
        """Path of an example, relative to the data directory."""
        return self.index.name_of(example_id)

    def _batches(self, steps: tf.data.Dataset) -> tf.data.Dataset:
        plans = self._reader.read_ahead(self._planned(steps))
        return self._made(self._batching.rows(plans), self._reader.jpeg)

    def _batches_by_window(
        self, steps: tf.data.Dataset, order: WindowShuffle, records: RecordTable, first_step: int
    ) -> tf.data.Dataset:
        """The same, asked for in long runs."""
        if isinstance(self._reader, LocalRecordReader):
            steps = read_ahead(order, self._reader, first_step, self.batch_size)
            return self._made(self._batching.rows(self._planned(steps)), self._reader.jpeg)
        windows = record_windows(order, records, first_step * self.batch_size)
        plans = self._planned(steps)
        return self._made(self._batching.rows_by_window(plans, windows), from_window)

    def _planned(self, steps: tf.data.Dataset) -> tf.data.Dataset:
        """Made in the background: meanwhile the threads that make images would wait."""
        return steps.map(self._plan).prefetch(1)

    def _made(self, rows: tf.data.Dataset, jpeg: Callable[..., tf.Tensor]) -> tf.data.Dataset:
        def image(row: Rows, *records: tf.Tensor, into: BatchRow | None) -> tf.Tensor:
            number = None if into is None else into.number
            content = jpeg(*row["stored"], *records, number=number)
            return self.preprocessing.training_image(content, row["augmentation"], into)

        return _with_options(self._batching.batches(rows, image))

    @as_written
    def _plan(self, step: tf.Tensor) -> Rows:
        """What a step's rows read and how they are augmented."""
        epochs, places = self._positions(step)
        example_ids = self._order.example_ids(epochs, places)
        seeds = tf.stack([fold_in_tensor(self._augment_key, epochs), example_ids], axis=1)
        sizes = self._reader.image_sizes(example_ids)
        augmentation = self.preprocessing.augmentation(seeds, sizes)
        plan = {**self._reader.look_up(example_ids), "augmentation": augmentation}
        if isinstance(self._order, WindowShuffle):
            plan["window_begins"] = places % self._order.window == 0
        return plan

    def _positions(self, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Epoch and place in it of every row of a step; int64 [b]."""
        rows = tf.range(self._rows.start, self._rows.stop, dtype=tf.int64)
        positions = step * self.batch_size + rows
        return positions // len(self.index), positions % len(self.index)


def replica_rows(batch_size: int, replica: int, replicas: int) -> range:
    """The rows of every batch that one of several replicas takes.

    Raises:
      InputError: the batch cannot be divided evenly.
    """
    if batch_size % replicas:
        raise InputError(
            f"batch size {batch_size} cannot be divided among {replicas} replicas",
            f"Choose a multiple of {replicas}",
        )
    share = batch_size // replicas
    return range(replica * share, (replica + 1) * share)


class EvaluationStream:
    """Centre crops of every example exactly once, in order; iterate as often as you like.

    A batch is a training batch plus {"weights": float32 [b]}: 1, or 0 for the rows that
    pad the last batch (their image is zero, their label 0, their example id -1). Of several
    replicas each takes an equal run of the rows of every batch.
    """

    def __init__(
        self,
        index: ExampleIndex,
        preprocessing: Preprocessing,
        batch_size: int,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        self.index = index
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self._rows = replica_rows(batch_size, replica, replicas)
        self._reader = example_reader(index)
        self._dataset = self._batches()

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._dataset)

    def name_of(self, example_id: int) -> str:
        """Path of an example, relative to the data directory."""
        return self.index.name_of(example_id)

    def dataset(self) -> tf.data.Dataset:
        """The finite dataset behind the iteration."""
        return self._dataset

    def _batches(self) -> tf.data.Dataset:
        ids = self._example_ids()
        rows = example_rows(self._reader, ids[ids < len(self.index)])
        examples = parallel(rows, self._example)
        side = self.preprocessing.image_size
        padding = {
            "images": tf.zeros([side, side, 3]),
            "labels": tf.constant(0),
            "example_ids": tf.constant(-1, tf.int64),
            "weights": tf.constant(0.0),
        }
        missing = int((ids >= len(self.index)).sum())
        # Of a range: where a function makes a dataset of tensors, op determinism makes the
        # pipeline serial. Here it would not, but so the test can ask that there be none.
        blank = tf.data.Dataset.range(missing).map(as_written(lambda i: padding))
        padded = examples.concatenate(blank)
        return _with_options(padded.batch(len(self._rows), drop_remainder=True)).prefetch(2)

    def _example_ids(self) -> np.ndarray:
        """Rising ids of this replica's rows; those of padding are beyond the last example."""
        firsts = np.arange(len(self), dtype=np.int64) * self.batch_size
        return (firsts[:, None] + np.array(self._rows)).reshape(-1)

    @as_written
    def _example(self, row: Rows) -> Batch:
        side = self.preprocessing.evaluation_side
        return {
            "images": self.preprocessing.evaluation_image(self._reader.jpeg(*row["stored"]), side),
            "labels": row["labels"],
            "example_ids": row["example_ids"],
            "weights": tf.constant(1.0),
        }


def example_files(index: ExampleIndex, example_ids: np.ndarray) -> tf.data.Dataset:
    """The content of these examples (int64 [n]), scalar strings in the same order."""
    reader = example_reader(index)
    rows = example_rows(reader, example_ids)
    return parallel(rows, as_written(lambda row: reader.jpeg(*row["stored"])))


def _with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads()
    return dataset.with_options(options)
