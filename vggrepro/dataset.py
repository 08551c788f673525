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

import os
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro.example_index import ExampleIndex
from vggrepro.example_reader import Plan, Rows, example_reader, example_rows
from vggrepro.graph_functions import as_written
from vggrepro.order import WindowShuffle, example_order
from vggrepro.preprocessing import Preprocessing
from vggrepro.rng import STREAM_AUGMENT, fold_in, fold_in_tensor
from vggrepro.window_reader import window_records

Batch = dict[str, tf.Tensor]


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
        self._augment_key = fold_in(seed, STREAM_AUGMENT)
        self._one_batch = tf.function(
            lambda step: self._batches(
                self._reader.rows(self._planned(step, step + 1))
            ).get_single_element(),
            input_signature=[tf.TensorSpec([], tf.int64)],
            autograph=False,
        )

    def batch(self, step: int) -> Batch:
        """The batch of one step; the same bits as `stream` gives, in any order of calls."""
        return self._one_batch(tf.constant(step, tf.int64))

    def stream(self, first_step: int) -> tf.data.Dataset:
        """An endless dataset of the batches from `first_step` on, prefetched."""
        plans = self._planned(tf.constant(first_step, tf.int64), tf.int64.max)
        return self._batches(self._read_ahead(plans, first_step)).prefetch(2)

    def example_ids(self, step: int) -> list[int]:
        """Which examples a step takes, without reading them."""
        return [int(i) for i in self._taken(tf.constant(step, tf.int64))[1]]

    def name_of(self, example_id: int) -> str:
        """Path of an example, relative to the data directory."""
        return self.index.name_of(example_id)

    def _planned(self, first_step: tf.Tensor, end_step: tf.Tensor | int) -> tf.data.Dataset:
        return tf.data.Dataset.range(first_step, end_step).map(self._plan)

    def _read_ahead(self, plans: tf.data.Dataset, first_step: int) -> tf.data.Dataset:
        """The rows with their bytes: window by window where all rows of a window are taken."""
        whole = len(self._rows) == self.batch_size
        if not (whole and isinstance(self._order, WindowShuffle) and self.index.records):
            return self._reader.rows(plans)
        data = window_records(self._order, self.index.records, first_step * self.batch_size)
        rows = plans.map(as_written(lambda row, places: row)).unbatch()
        return tf.data.Dataset.zip((rows, data))

    def _batches(self, rows: tf.data.Dataset) -> tf.data.Dataset:
        examples = rows.map(self._example, num_parallel_calls=_threads(), deterministic=True)
        return _with_options(examples.batch(len(self._rows), drop_remainder=True))

    @as_written
    def _plan(self, step: tf.Tensor) -> Plan:
        """What a step's rows read and how they are augmented."""
        epochs, example_ids = self._taken(step)
        seeds = tf.stack([fold_in_tensor(self._augment_key, epochs), example_ids], axis=1)
        sizes = self._reader.image_sizes(example_ids)
        row, places = self._reader.look_up(example_ids)
        return {**row, "augmentation": self.preprocessing.augmentation(seeds, sizes)}, places

    def _taken(self, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Epoch and example id of every row of a step; int64 [b]."""
        rows = tf.range(self._rows.start, self._rows.stop, dtype=tf.int64)
        positions = step * self.batch_size + rows
        epochs = positions // len(self.index)
        return epochs, self._order.example_ids(epochs, positions % len(self.index))

    @as_written
    def _example(self, row: Rows, stored: tf.Tensor) -> Batch:
        jpeg = self._reader.jpeg(stored)
        return {
            "images": self.preprocessing.training_image(jpeg, row["augmentation"]),
            "labels": row["labels"],
            "example_ids": row["example_ids"],
        }


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
        examples = example_rows(self._reader, ids[ids < len(self.index)]).map(
            self._example, num_parallel_calls=_threads(), deterministic=True
        )
        side = self.preprocessing.image_size
        padding = {
            "images": tf.zeros([side, side, 3]),
            "labels": tf.constant(0),
            "example_ids": tf.constant(-1, tf.int64),
            "weights": tf.constant(0.0),
        }
        missing = int((ids >= len(self.index)).sum())
        padded = examples.concatenate(tf.data.Dataset.from_tensors(padding).repeat(missing))
        return _with_options(padded.batch(len(self._rows), drop_remainder=True)).prefetch(2)

    def _example_ids(self) -> np.ndarray:
        """Rising ids of this replica's rows; those of padding are beyond the last example."""
        firsts = np.arange(len(self), dtype=np.int64) * self.batch_size
        return (firsts[:, None] + np.array(self._rows)).reshape(-1)

    @as_written
    def _example(self, row: Rows, stored: tf.Tensor) -> Batch:
        side = self.preprocessing.evaluation_side
        return {
            "images": self.preprocessing.evaluation_image(self._reader.jpeg(stored), side),
            "labels": row["labels"],
            "example_ids": row["example_ids"],
            "weights": tf.constant(1.0),
        }


def example_files(index: ExampleIndex, example_ids: np.ndarray) -> tf.data.Dataset:
    """The content of these examples (int64 [n]), scalar strings in the same order."""
    reader = example_reader(index)
    rows = example_rows(reader, example_ids)
    return rows.map(
        as_written(lambda row, stored: reader.jpeg(stored)),
        num_parallel_calls=_threads(),
        deterministic=True,
    )


def _threads() -> int:
    return os.cpu_count() or 1


def _with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = _threads()
    return dataset.with_options(options)
