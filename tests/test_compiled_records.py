"""The compiled ops that read TFRecord files, against TensorFlow's writer."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from vggrepro import compiled_ops
from vggrepro.compiled_ops import CompiledOps

OVERHEAD = 16  # bytes a record: length, two checksums
sizes = st.integers(0, 300) | st.integers(3 * 4096 - 9, 3 * 4096 + 9) | st.integers(0, 60_000)


def loaded() -> CompiledOps | None:
    ops = compiled_ops.load()
    return ops if ops is not None and ops.read_records is not None else None


pytestmark = pytest.mark.skipif(
    loaded() is None, reason="no C compiler here, or a processor without the checksum"
)


@pytest.fixture(scope="module")
def ops() -> CompiledOps:
    found = loaded()
    assert found is not None
    return found


def written(path: Path, records: list[bytes]) -> str:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return str(path)


@st.composite
def records(draw: st.DrawFn) -> list[bytes]:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))  # not 60,000 draws a record
    return [random.bytes(size) for size in draw(st.lists(sizes, min_size=1, max_size=5))]


@given(content=records(), data=st.data())
def test_any_run_of_records_is_read(
    ops: CompiledOps,
    tmp_path_factory: pytest.TempPathFactory,
    content: list[bytes],
    data: st.DataObject,
) -> None:
    """From any of several files, from any record on, any number of them."""
    file = written(tmp_path_factory.mktemp("records") / "file", content)
    runs = data.draw(
        st.lists(
            st.integers(0, len(content) - 1).flatmap(
                lambda first: st.tuples(st.just(first), st.integers(0, len(content) - first))
            ),
            max_size=4,
        )
    )
    offsets = [sum(len(one) + OVERHEAD for one in content[:first]) for first, _ in runs]
    found = ops.read_records(
        tf.constant([file] * len(runs), tf.string),
        tf.constant(offsets, tf.int64),
        tf.constant([count for _, count in runs], tf.int64),
    )
    assert [*found.numpy()] == [
        one for first, count in runs for one in content[first : first + count]
    ]


@given(content=records(), data=st.data())
def test_any_changed_byte_is_an_error(
    ops: CompiledOps,
    tmp_path_factory: pytest.TempPathFactory,
    content: list[bytes],
    data: st.DataObject,
) -> None:
    file = Path(written(tmp_path_factory.mktemp("records") / "file", content))
    whole = bytearray(file.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(whole)
    with pytest.raises(tf.errors.DataLossError, match="record at byte"):
        ops.read_records([str(file)], [0], [len(content)])


@pytest.mark.parametrize("cut", [1, 4, 5, 20, 100 + OVERHEAD - 1])
def test_a_file_that_was_cut_off_is_an_error(ops: CompiledOps, tmp_path: Path, cut: int) -> None:
    file = Path(written(tmp_path / "file", [bytes(50), bytes(100)]))
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(tf.errors.DataLossError, match="record at byte 66: the file ends"):
        ops.read_records([str(file)], [0], [2])
    assert ops.read_records([str(file)], [0], [1]).numpy()[0] == bytes(50)


def test_a_missing_file_is_named(ops: CompiledOps, tmp_path: Path) -> None:
    with pytest.raises(tf.errors.NotFoundError, match="no-such-file"):
        ops.read_records([str(tmp_path / "no-such-file")], [0], [1])


@pytest.mark.parametrize(
    ("files", "offsets", "counts", "complaint"),
    [
        (1, [0], [-1], "no such number"),
        (2, [0, 0], [2**62, 2**62], "no such number"),
        (1, [0, 0], [1], "as many"),
        (1, [0], [1, 1], "as many"),
        (0, 0, 2, "not one record"),
    ],
)
def test_what_makes_no_sense_is_refused(
    ops: CompiledOps, tmp_path: Path, files: int, offsets: object, counts: object, complaint: str
) -> None:
    file = written(tmp_path / "file", [b"one", b"two"])
    with pytest.raises(tf.errors.InvalidArgumentError, match=complaint):
        ops.read_records([file] * files if files else file, offsets, counts)


def test_one_record_is_a_scalar(ops: CompiledOps, tmp_path: Path) -> None:
    file = written(tmp_path / "file", [b"one", b"two"])
    found = ops.read_records(file, 3 + OVERHEAD, 1)
    assert found.shape == () and found.numpy() == b"two"


def test_a_record_is_moved_out_of_its_window(ops: CompiledOps) -> None:
    """No copy: the window is left without it."""
    assert ops.take_record is not None
    window = tf.constant([b"short", b"long " * 1000, b"other"])
    place = tf.constant(1, tf.int64)
    assert ops.take_record(window, place).numpy() == b"long " * 1000
    assert [*window.numpy()] == [b"short", b"", b"other"]
    for outside in (-1, 3):
        with pytest.raises(tf.errors.InvalidArgumentError, match="no such record"):
            ops.take_record(window, tf.constant(outside, tf.int64))
