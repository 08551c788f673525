"""Batches of a Keras fit: as named arrays, and the few that are kept.

A batch stays on its device; keeping one is holding a reference. Only the batch
of a refused step, and those kept for replays, are ever copied to the host.
"""

from __future__ import annotations

import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from diagnostics.protocol import Batch

KEPT_BYTES = 64 << 20  # for the first batches of a fit, and as much again for the last
FIRST_BATCHES, LAST_BATCHES = 1024, 8
ARRAYS, DATASET, GENERATOR = "arrays", "dataset", "generator"


class KeptBatches:
    """The first batches of a training and the last ones, bounded in bytes.

    The first ones let a replay start at step 0; the last ones lead up to a failure.
    """

    def __init__(self, bound: int = KEPT_BYTES) -> None:
        self._begin: int | None = None
        self._bound = bound
        self._first: dict[int, Any] = {}
        self._last: deque[tuple[int, Any, int]] = deque(maxlen=LAST_BATCHES)
        self._first_bytes = 0

    def add(self, step: int, data: Any) -> None:
        """Holds a reference to the batch of a step; steps ascend by one."""
        size = _bytes(data)
        self._begin = step if self._begin is None else self._begin
        room = len(self._first) < FIRST_BATCHES and self._first_bytes + size <= self._bound
        if room and step == self._begin + len(self._first):
            self._first[step] = data
            self._first_bytes += size
            return
        self._last.append((step, data, size))
        while len(self._last) > 1 and sum(kept for _, _, kept in self._last) > self._bound:
            self._last.popleft()

    def items(self) -> Iterator[tuple[int, Any]]:
        """(step, batch as Keras fed it), ascending."""
        yield from self._first.items()
        yield from ((step, data) for step, data, _ in self._last)

    def arrays(self) -> Batch:
        """Host copies of all of them, as '<step>:<name>'."""
        return {
            f"{step}:{name}": array
            for step, data in self.items()
            for name, array in flatten_batch(data)[0].items()
        }


def batches_of(arrays: Batch) -> dict[int, Batch]:
    """Batches by step, from what `KeptBatches.arrays` made."""
    found: dict[int, Batch] = {}
    for key, array in arrays.items():
        step, _, name = key.partition(":")
        found.setdefault(int(step), {})[name] = array
    return dict(sorted(found.items()))


class DataSource:
    """What `fit` was given: to tell the number of a row.

    `fit` tells its callbacks nothing of its data, so this looks at the caller's frame.

    Attributes:
      kind: ARRAYS, DATASET, or GENERATOR for a Python generator or a `PyDataset`.
    """

    def __init__(self, model: Any) -> None:
        self.kind = ARRAYS
        self._inputs: np.ndarray | None = None
        self._in_order = False
        frame = sys._getframe(1)
        while frame is not None:
            known = frame.f_locals
            if frame.f_code.co_name == "fit" and known.get("self") is model:
                self._look_at(known.get("x"), known)
                return
            frame = frame.f_back  # type: ignore[assignment]

    def _look_at(self, x: Any, known: Mapping[str, Any]) -> None:
        if isinstance(x, tf.data.Dataset):
            self.kind, self._in_order = DATASET, not _shuffles(x)
        elif isinstance(x, keras.utils.PyDataset) or inspect.isgenerator(x):
            shuffled = known.get("shuffle") and not inspect.isgenerator(x)
            self.kind, self._in_order = GENERATOR, not shuffled
        else:
            first = next(iter(keras.tree.flatten(x)), None)
            if isinstance(first, (np.ndarray, tf.Tensor)) and len(first.shape):
                self._inputs = np.asarray(first)
            self._in_order = not known.get("shuffle") and not known.get("validation_split")

    def rows(self, batch: Batch, first_row: int) -> np.ndarray | None:
        """Number in the data of each row of a batch, int64; None if it is not known.

        Of a dataset or a generator, the number in the epoch.

        Args:
          first_row: rows of the epoch that came before, which counts if nothing shuffles.
            Else rows are found by their content; of equal ones the first.
        """
        fed = next((a for name, a in batch.items() if name.startswith("inputs")), None)
        known = self._inputs is not None or self.kind != ARRAYS
        if not known or fed is None or not fed.ndim:
            return None
        if self._in_order:
            return np.arange(first_row, first_row + len(fed), dtype=np.int64)
        if self._inputs is None or self._inputs.shape[1:] != fed.shape[1:]:
            return None
        own = self._inputs.astype(fed.dtype, copy=False)
        places: dict[bytes, int] = {}
        for place in range(len(own) - 1, -1, -1):
            places[own[place].tobytes()] = place
        found = [places.get(row.tobytes()) for row in fed]
        return None if None in found else np.array(found, np.int64)


def _shuffles(dataset: tf.data.Dataset) -> bool:
    """Whether the dataset, or one that it is made from, draws at random."""
    name = type(dataset).__name__
    if "Shuffle" in name or "Random" in name:
        return True
    return any(_shuffles(one) for one in dataset._inputs())


def flatten_batch(data: Any) -> tuple[Batch, Any]:
    """Named host arrays of a batch, and its structure with names for the leaves.

    `inputs`, `labels` and `sample_weight`, followed by '/<path>' where there are
    several. Parts of one batch that went to several replicas are put together.
    The structure is JSON: see `unflatten_batch`.
    """
    arrays: Batch = {}
    parts = keras.utils.unpack_x_y_sample_weight(data)
    wrapped = isinstance(data, (tuple, list))
    named = []
    for name, part in zip(("inputs", "labels", "sample_weight"), parts, strict=True):
        named.append(_encode(part, name, arrays))
    structure = {"tuple": named[: len(data)]} if wrapped else named[0]
    return arrays, structure


def _encode(part: Any, name: str, arrays: Batch) -> Any:
    """JSON of a structure; fills `arrays`."""
    if part is None:
        return None
    if isinstance(part, dict):
        return {"dict": {str(k): _encode(v, f"{name}/{k}", arrays) for k, v in part.items()}}
    if isinstance(part, (list, tuple)):
        kind = "tuple" if isinstance(part, tuple) else "list"
        return {kind: [_encode(v, f"{name}/{i}", arrays) for i, v in enumerate(part)]}
    if isinstance(part, tf.experimental.Optional):
        return None  # how Keras carries an absent label through a dataset
    arrays[name] = host_array(part)
    return {"array": name}


def unflatten_batch(structure: Any, arrays: Batch, leaf: Callable[[np.ndarray], Any]) -> Any:
    """The batch in its own structure, with `leaf` applied to every array.

    Raises:
      InputError: an array of the structure is missing.
    """
    if structure is None:
        return None
    kind, content = next(iter(structure.items()))
    if kind == "array":
        if content not in arrays:
            raise InputError(f"the saved batch lacks '{content}'")
        return leaf(arrays[content])
    if kind == "dict":
        return {k: unflatten_batch(v, arrays, leaf) for k, v in content.items()}
    items = [unflatten_batch(v, arrays, leaf) for v in content]
    return tuple(items) if kind == "tuple" else items


def host_array(value: Any) -> np.ndarray:
    """A copy on the host of a tensor, dense, sparse or ragged, of one or more replicas."""
    if isinstance(value, tf.distribute.DistributedValues):
        parts = [host_array(part) for part in value.values]
        return np.concatenate([part for part in parts if part.shape[:1] != (0,)])
    if isinstance(value, tf.SparseTensor):
        value = tf.sparse.to_dense(value)
    if isinstance(value, tf.RaggedTensor):
        value = value.to_tensor()
    array = np.array(value)
    return array.astype("S") if array.dtype.kind == "O" else array


def row_count(data: Any) -> int:
    """Rows of a batch, over all replicas; 0 if it has none."""
    for leaf in keras.tree.flatten(data):
        parts = leaf.values if isinstance(leaf, tf.distribute.DistributedValues) else [leaf]
        if all(getattr(part, "shape", None) for part in parts):
            return sum(int(part.shape[0]) for part in parts)
    return 0


def _bytes(data: Any) -> int:
    """Bytes of the tensors of a batch; those without a known shape count as 1 MB."""
    total = 0
    for tensor in keras.tree.flatten(data):
        shape = getattr(tensor, "shape", None)
        known = shape is not None and getattr(shape, "rank", 0) is not None
        total += int(np.prod(shape)) * tensor.dtype.size if known and shape is not None else 1 << 20
    return total
