"""The bytes of examples, in the tf.data graph and outside of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro import resampling
from vggrepro.batching import Rows
from vggrepro.compiled_ops import CompiledOps
from vggrepro.example_index import ExampleIndex, RecordTable
from vggrepro.graph_functions import as_written, parallel, threads
from vggrepro.shards import RECORD_OVERHEAD
from vggrepro.storage import is_url, read_bytes

_PLAN_ROWS = 32
_JPEG_MAGIC = b"\xff\xd8\xff"


class FileReader:
    """Examples that are files. Tables are captured: a graph constant may not exceed 2 GB.

    Args:
      index: of which root is a directory of images.
      ops: if they can have the kernel read these files ahead.
    """

    def __init__(self, index: ExampleIndex, ops: CompiledOps | None) -> None:
        self._read_ahead = None if ops is None else ops.read_ahead
        with tf.device("CPU:0"):  # where the pipeline runs, whatever the default device
            self._labels = tf.constant(index.labels)
            self._paths = tf.constant([index.location(i) for i in range(len(index))])

    @as_written
    def look_up(self, example_ids: tf.Tensor) -> Rows:
        """Rows: the examples (int64 [b]), their labels, and where their images are stored."""
        return {
            "example_ids": example_ids,
            "labels": tf.gather(self._labels, example_ids),
            "stored": (tf.gather(self._paths, example_ids),),
        }

    def image_sizes(self, example_ids: tf.Tensor) -> tf.Tensor | None:
        """Height and width of the images, int32 [b, 2]; None: only their headers say."""
        return None

    def read_ahead(self, plans: tf.data.Dataset) -> tf.data.Dataset:
        """Plans whose rows have stored what `jpeg` takes."""
        return plans if self._read_ahead is None else _asked_ahead(plans, self.will_need)

    def will_need(self, rows: Rows, passed: tf.Tensor) -> tf.Tensor:
        """As `LocalRecordReader.will_need`."""
        assert self._read_ahead is not None
        (paths,) = rows["stored"]
        start = tf.zeros_like(rows["example_ids"])
        return self._read_ahead(paths, start, start + tf.int64.max, passed)

    def jpeg(self, paths: tf.Tensor, number: tf.Tensor | None = None) -> tf.Tensor:
        """The bytes of one example, scalar string.

        Args:
          paths: what is stored of it; with a number, of several of which it is that one.
        """
        return tf.io.read_file(paths if number is None else tf.gather(paths, number))


class RecordReader:
    """Examples that are records of shards, each read by its offset."""

    def __init__(self, index: ExampleIndex, records: RecordTable) -> None:
        with tf.device("CPU:0"):
            self._labels = tf.constant(index.labels)
            self._files = tf.constant(records.files)
            self._shard = tf.constant(records.shard)
            self._offset = tf.constant(records.offset)
            self._sizes = None if records.image_size is None else tf.constant(records.image_size)

    @as_written
    def look_up(self, example_ids: tf.Tensor) -> Rows:
        """As `FileReader.look_up`."""
        files = tf.gather(self._files, tf.gather(self._shard, example_ids))
        return {
            "example_ids": example_ids,
            "labels": tf.gather(self._labels, example_ids),
            "stored": (files, tf.gather(self._offset, example_ids)),
        }

    def image_sizes(self, example_ids: tf.Tensor) -> tf.Tensor | None:
        """As `FileReader.image_sizes`; None: from an index of an earlier version."""
        return None if self._sizes is None else tf.gather(self._sizes, example_ids)

    def read_ahead(self, plans: tf.data.Dataset) -> tf.data.Dataset:
        """As `FileReader.read_ahead`: reads the records, those of a few plans at a time.

        Not in a parallel map: op determinism, which training turns on, would make a map
        that reads records serial; interleaved record datasets it leaves parallel. A plan is
        read by one thread and handed over whole: record by record costs more than reading.
        """
        return plans.interleave(
            _rows_with_records,
            cycle_length=threads(),
            num_parallel_calls=threads(),
            deterministic=True,
        )

    def jpeg(self, *stored: tf.Tensor, number: tf.Tensor | None = None) -> tf.Tensor:
        """As `FileReader.jpeg`."""
        return stored[0] if number is None else tf.gather(stored[0], number)


class LocalRecordReader(RecordReader):
    """The same with the compiled ops: each record where it is decoded."""

    def __init__(self, index: ExampleIndex, records: RecordTable, ops: CompiledOps) -> None:
        super().__init__(index, records)
        assert ops.read_record is not None and ops.read_ahead is not None
        self._read_record = ops.read_record
        self._read_ahead = ops.read_ahead
        with tf.device("CPU:0"):
            self._end = tf.constant(records.offset + records.size + RECORD_OVERHEAD)

    def read_ahead(self, plans: tf.data.Dataset) -> tf.data.Dataset:
        """As `FileReader.read_ahead`."""
        return _asked_ahead(plans, self.will_need)

    def jpeg(self, *stored: tf.Tensor, number: tf.Tensor | None = None) -> tf.Tensor:
        """As `FileReader.jpeg`."""
        return self._read_record(*stored, tf.constant(0, tf.int64) if number is None else number)

    def will_need(self, rows: Rows, passed: tf.Tensor) -> tf.Tensor:
        """Has the kernel read these records, and does not wait for them; returns `passed`.

        Args:
          rows: as from `look_up`; neighbours in a shard, if in turn, are asked for together.
          passed: int64.
        """
        ends = tf.gather(self._end, rows["example_ids"])
        return self._read_ahead(*rows["stored"], ends, passed)


def _asked_ahead(
    plans: tf.data.Dataset, will_need: Callable[[Rows, tf.Tensor], tf.Tensor]
) -> tf.data.Dataset:
    """Plans, after asking the kernel for what they will read."""

    @as_written
    def asked(plan: Rows) -> Rows:
        ids = plan["example_ids"]
        return {**plan, "example_ids": tf.ensure_shape(will_need(plan, ids), ids.shape)}

    return parallel(plans, asked)


@as_written
def _rows_with_records(plan: Rows) -> tf.data.Dataset:
    """A plan with the records themselves stored, one element."""
    places = plan["stored"]
    # Functions cost more than records: one call a record, to open it, and no other.
    records = tf.data.Dataset.from_tensor_slices(places).flat_map(
        as_written(lambda file, offset: record_dataset(file, offset).take(1))
    )
    count = tf.size(places[0], tf.int64)
    # A shard that was cut off would give fewer, and rows the images of others.
    whole = records.apply(tf.data.experimental.assert_cardinality(count))
    return whole.batch(count, drop_remainder=True).map(
        as_written(lambda stored: {**plan, "stored": (stored,)})
    )


def example_reader(index: ExampleIndex) -> FileReader | RecordReader:
    """The reader of whatever the examples are stored in."""
    ops = None if is_url(index.root) else resampling.compiled_ops()
    if index.records is None:
        return FileReader(index, ops)
    if ops is None or ops.read_record is None:
        return RecordReader(index, index.records)
    return LocalRecordReader(index, index.records, ops)


def example_rows(reader: FileReader | RecordReader, example_ids: np.ndarray) -> tf.data.Dataset:
    """The rows of these examples (int64 [n]), one by one, with what `jpeg` takes."""
    with tf.device("CPU:0"):
        ids = tf.data.Dataset.from_tensor_slices(example_ids)
    return reader.read_ahead(ids.batch(_PLAN_ROWS).map(reader.look_up)).unbatch()


class _RecordDataset(tf.data.Dataset):
    def __init__(self, variant: tf.Tensor) -> None:
        super().__init__(variant)

    @property
    def element_spec(self) -> tf.TensorSpec:
        return tf.TensorSpec([], tf.string)

    def _inputs(self) -> list[tf.data.Dataset]:
        return []


def record_dataset(files: tf.Tensor, offsets: tf.Tensor, buffer: int = 0) -> tf.data.Dataset:
    """The records of shards from byte offsets on (`tf.data.TFRecordDataset` has no offsets).

    Args:
      files: string, scalar or [m], read one after the other.
      offsets: int64 of the same shape, where to start in each.
      buffer: bytes to read at a time; 0: record by record.
    """
    return _RecordDataset(
        tf.raw_ops.TFRecordDatasetV2(
            filenames=tf.reshape(files, [-1]),
            compression_type="",
            buffer_size=tf.constant(buffer, tf.int64),
            byte_offsets=tf.reshape(offsets, [-1]),
        )
    )


def stored_records(file: str, offset: int, buffer: int = 0) -> Iterator[bytes]:
    """The records of one shard from a byte offset on, outside of any graph.

    Raises:
      tf.errors.OpError: a record is damaged, or the shard missing.
    """
    start = tf.data.Dataset.from_tensors((file, tf.constant(offset, tf.int64)))
    # Inside a function: TensorFlow 2.21 loses the offsets of an outermost dataset.
    records = start.flat_map(as_written(lambda name, place: record_dataset(name, place, buffer)))
    return iter(records.as_numpy_iterator())


def read_example(index: ExampleIndex, example_id: int) -> bytes:
    """The bytes of one example.

    Raises:
      InputError: it cannot be read; says why, and names it.
    """
    records = index.records
    if records is None:
        return read_bytes(index.location(example_id))
    file = records.files[records.shard[example_id]]
    try:
        return next(stored_records(file, records.offset[example_id]))
    except (tf.errors.OpError, StopIteration) as error:
        raise InputError(
            f"{index.location(example_id)}: the record is damaged or missing",
            f"Build the shards again; `vggrepro data check {index.root}` lists all damage",
        ) from error


def find_bad_example(index: ExampleIndex, example_ids: Iterable[int]) -> InputError | None:
    """Says which of the examples cannot be decoded, and why; None: all can.

    For use after a pipeline failed: it decodes them one by one, whole.
    """
    for example_id in example_ids:
        if example_id < 0:  # padding of the last evaluation batch
            continue
        try:
            fault = image_fault(read_example(index, int(example_id)))
        except InputError as error:
            return error
        if fault:
            return InputError(
                f"{index.location(int(example_id))}: {fault}", "Replace the image or delete it"
            )
    return None


def image_fault(content: bytes) -> str:
    """What keeps bytes from being used as an image; '' if nothing does."""
    if not content:
        return "the file is empty"
    try:
        tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")
    except tf.errors.InvalidArgumentError:
        is_jpeg = content.startswith(_JPEG_MAGIC)
        return "truncated or damaged JPEG data" if is_jpeg else "not a JPEG file"
    return ""
