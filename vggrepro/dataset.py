"""Examples by index: any step's batch, without reading the ones before it.

Row r of step k is position p = k * batch_size + r. Epoch e = p // n is a stateless
permutation of the n examples, keyed by (run seed, STREAM_ORDER, e); position p takes
its element p % n. Batches run across the ends of epochs, so each example comes exactly
once an epoch and none is dropped. Augmentation is keyed by (run seed, STREAM_AUGMENT,
e, example). No Python function runs inside the tf.data graph.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import tensorflow as tf

from vggrepro.image_folder import ExampleIndex
from vggrepro.preprocessing import Preprocessing
from vggrepro.rng import STREAM_AUGMENT, STREAM_ORDER, fold_in, fold_in_tensor

Batch = dict[str, tf.Tensor]


class TrainingStream:
    """Augmented training batches, by step.

    A batch is {"images": float32 [B, s, s, 3], "labels": int32 [B], "example_ids": int64 [B]}.

    Args:
      index: the training split.
      preprocessing: settings and statistics.
      batch_size: examples a step, B.
      seed: the run's seed.
    """

    def __init__(
        self, index: ExampleIndex, preprocessing: Preprocessing, batch_size: int, seed: int
    ) -> None:
        self.index = index
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self._files = _Files(index)
        self._order_key = fold_in(seed, STREAM_ORDER)
        self._augment_key = fold_in(seed, STREAM_AUGMENT)
        self._one_batch = tf.function(
            lambda step: self._batches(step, step + 1).get_single_element(),
            input_signature=[tf.TensorSpec([], tf.int64)],
        )

    def batch(self, step: int) -> Batch:
        """The batch of one step; the same bits as `stream` gives, in any order of calls."""
        return self._one_batch(tf.constant(step, tf.int64))

    def stream(self, first_step: int) -> tf.data.Dataset:
        """An endless dataset of the batches from `first_step` on, prefetched."""
        return self._batches(tf.constant(first_step, tf.int64), tf.int64.max).prefetch(2)

    def example_ids(self, step: int) -> list[int]:
        """Which examples a step takes, without reading them."""
        return [int(i) for i in self._plan(tf.constant(step, tf.int64))["example_ids"]]

    def name_of(self, example_id: int) -> str:
        """Path of an example, relative to the data directory."""
        return self.index.name_of(example_id)

    def _batches(self, first_step: tf.Tensor, end_step: tf.Tensor | int) -> tf.data.Dataset:
        rows = tf.data.Dataset.range(first_step, end_step).map(self._plan).unbatch()
        examples = rows.map(self._example, num_parallel_calls=_threads(), deterministic=True)
        return _with_options(examples.batch(self.batch_size, drop_remainder=True))

    def _plan(self, step: tf.Tensor) -> Batch:
        """What a step's rows read and how they are augmented; each value is [B, ...]."""
        positions = step * self.batch_size + tf.range(self.batch_size, dtype=tf.int64)
        epochs = positions // len(self.index)
        example_ids = shuffled(
            positions % len(self.index), fold_in_tensor(self._order_key, epochs), len(self.index)
        )
        seeds = tf.stack([fold_in_tensor(self._augment_key, epochs), example_ids], axis=1)
        return {"example_ids": example_ids, "seeds": seeds, **self._files.look_up(example_ids)}

    def _example(self, row: Batch) -> Batch:
        jpeg = tf.io.read_file(row["paths"])
        return {
            "images": self.preprocessing.training_image(jpeg, row["seeds"]),
            "labels": row["labels"],
            "example_ids": row["example_ids"],
        }


def shuffled(indices: tf.Tensor, seeds: tf.Tensor, count: int) -> tf.Tensor:
    """Element `indices[i]` of the permutation of range(count) that `seeds[i]` names.

    Args:
      indices: int64 [n], each in [0, count).
      seeds: int64 [n], each in [0, 2^63) and hashed (`fold_in`): the op gives related
        seeds related permutations.
    Returns:
      int64 [n].
    """
    low, high = seeds % 2**32, seeds // 2**32  # the op takes three words of 32 bits
    return tf.raw_ops.RandomIndexShuffle(
        index=indices,
        seed=tf.stack([low, high, tf.zeros_like(low)], axis=1),
        max_index=tf.constant(count - 1, tf.int64),
        rounds=4,
    )


class EvaluationStream:
    """Centre crops of every example exactly once, in order; iterate as often as you like.

    A batch is a training batch plus {"weights": float32 [B]}: 1, or 0 for the rows that
    pad the last batch (their image is zero, their label 0, their example id -1).
    """

    def __init__(self, index: ExampleIndex, preprocessing: Preprocessing, batch_size: int) -> None:
        self.index = index
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self._files = _Files(index)
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
        examples = tf.data.Dataset.range(len(self.index)).map(
            self._example, num_parallel_calls=_threads(), deterministic=True
        )
        side = self.preprocessing.image_size
        padding = {
            "images": tf.zeros([side, side, 3]),
            "labels": tf.constant(0),
            "example_ids": tf.constant(-1, tf.int64),
            "weights": tf.constant(0.0),
        }
        missing = len(self) * self.batch_size - len(self.index)
        padded = examples.concatenate(tf.data.Dataset.from_tensors(padding).repeat(missing))
        return _with_options(padded.batch(self.batch_size, drop_remainder=True)).prefetch(2)

    def _example(self, example_id: tf.Tensor) -> Batch:
        row = self._files.look_up(example_id)
        side = self.preprocessing.evaluation_side
        return {
            "images": self.preprocessing.evaluation_image(tf.io.read_file(row["paths"]), side),
            "labels": row["labels"],
            "example_ids": example_id,
            "weights": tf.constant(1.0),
        }


def example_files(index: ExampleIndex) -> tf.data.Dataset:
    """The content of every file (scalar strings), in the order of the index."""
    files = _Files(index)
    return tf.data.Dataset.range(len(index)).map(
        lambda example_id: tf.io.read_file(files.look_up(example_id)["paths"]),
        num_parallel_calls=_threads(),
        deterministic=True,
    )


class _Files:
    """Paths and labels as captured tensors: a graph constant may not exceed 2 GB."""

    def __init__(self, index: ExampleIndex) -> None:
        with tf.device("CPU:0"):  # where the pipeline runs, whatever the default device
            self._paths = tf.constant([f"{index.root}/{path}" for path in index.paths])
            self._labels = tf.constant(index.labels)

    def look_up(self, example_ids: tf.Tensor) -> Batch:
        """Absolute paths (string) and labels (int32) of examples, of the ids' shape."""
        return {
            "paths": tf.gather(self._paths, example_ids),
            "labels": tf.gather(self._labels, example_ids),
        }


def _threads() -> int:
    return os.cpu_count() or 1


def _with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = _threads()
    return dataset.with_options(options)
