"""The compiled ops that read TFRecord files, against TensorFlow's writer."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable
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
    return ops if ops is not None and ops.read_record is not None else None


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


def read(ops: CompiledOps, file: object, offset: object, number: int = 0) -> tf.Tensor:
    assert ops.read_record is not None
    return ops.read_record(file, tf.constant(offset, tf.int64), tf.constant(number, tf.int64))


@given(content=records(), data=st.data())
def test_any_record_is_read(
    ops: CompiledOps,
    tmp_path_factory: pytest.TempPathFactory,
    content: list[bytes],
    data: st.DataObject,
) -> None:
    """Alone, or as one of many that are given."""
    file = written(tmp_path_factory.mktemp("records") / "file", content)
    offsets = [sum(len(one) + OVERHEAD for one in content[:i]) for i in range(len(content))]
    number = data.draw(st.integers(0, len(content) - 1))
    assert read(ops, file, offsets[number]).numpy() == content[number]
    many = read(ops, [file] * len(content), offsets, number)
    assert many.shape == () and many.numpy() == content[number]


@given(content=records(), data=st.data())
def test_any_changed_byte_is_an_error(
    ops: CompiledOps,
    tmp_path_factory: pytest.TempPathFactory,
    content: list[bytes],
    data: st.DataObject,
) -> None:
    file = Path(written(tmp_path_factory.mktemp("records") / "file", content[:1]))
    whole = bytearray(file.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(whole)
    with pytest.raises(tf.errors.DataLossError, match="record at byte 0"):
        read(ops, str(file), 0)


@pytest.mark.parametrize("cut", [1, 4, 5, 20, 100 + OVERHEAD - 1])
def test_a_file_that_was_cut_off_is_an_error(ops: CompiledOps, tmp_path: Path, cut: int) -> None:
    file = Path(written(tmp_path / "file", [bytes(50), bytes(100)]))
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(tf.errors.DataLossError, match="record at byte 66: the file ends"):
        read(ops, str(file), 66)
    assert read(ops, str(file), 0).numpy() == bytes(50)


def test_a_missing_file_is_named(ops: CompiledOps, tmp_path: Path) -> None:
    with pytest.raises(tf.errors.NotFoundError, match="no-such-file"):
        read(ops, str(tmp_path / "no-such-file"), 0)


@pytest.mark.parametrize(
    ("files", "offsets", "number"), [(1, [0], 1), (1, [0], -1), (2, [0], 1), (1, [0, 19], 1)]
)
def test_a_number_without_a_record_is_refused(
    ops: CompiledOps, tmp_path: Path, files: int, offsets: list[int], number: int
) -> None:
    file = written(tmp_path / "file", [b"one", b"two"])
    with pytest.raises(tf.errors.InvalidArgumentError, match="no record of that number"):
        read(ops, [file] * files, offsets, number)


# Reading ahead


def ask(ops: CompiledOps, files: list[str], offsets: list[int], ends: list[int]) -> tf.Tensor:
    assert ops.read_ahead is not None
    places = tf.constant(offsets, tf.int64), tf.constant(ends, tf.int64)
    return ops.read_ahead(tf.constant(files, tf.string), *places, tf.constant(7, tf.int64))


def in_page_cache(file: Path, page: int) -> bool:
    """Whether the kernel holds a page of a file."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    descriptor = os.open(file, os.O_RDONLY)
    size = mmap.PAGESIZE
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, page * size)
    os.close(descriptor)
    if address == ctypes.c_void_p(-1).value:
        pytest.skip("files of this file system cannot be mapped")
    state = ctypes.c_ubyte()
    assert libc.mincore(ctypes.c_void_p(address), size, ctypes.byref(state)) == 0
    libc.munmap(ctypes.c_void_p(address), size)
    return bool(state.value & 1)


def advised(file: Path, advice: int) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(
        descriptor, 0, mmap.PAGESIZE if advice == os.POSIX_FADV_WILLNEED else 0, advice
    )
    os.close(descriptor)


def come_true(what: Callable[[], bool], seconds: float) -> bool:
    """Whether it does; the kernel does not say when it is done."""
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return what()


def forgotten_file(path: Path, size: int) -> Path:
    """A file that is not in the page cache; skips the test where the kernel takes no advice."""
    path.write_bytes(bytes(size))
    advised(path, os.POSIX_FADV_DONTNEED)
    if in_page_cache(path, 0):
        pytest.skip("this file system keeps its files in memory")
    advised(path, os.POSIX_FADV_WILLNEED)
    if not come_true(lambda: in_page_cache(path, 0), 5):
        pytest.skip("this file system does not read ahead")
    advised(path, os.POSIX_FADV_DONTNEED)
    return path


def test_the_kernel_reads_what_it_is_asked_for(ops: CompiledOps, tmp_path: Path) -> None:
    """All of it, and of a long run more than one request of the kernel takes, and no more.

    Of neighbours in two files, too, although the one ends where the other begins.
    """
    size, third = 40 * 2**20, 30 * 2**20
    file, other = (forgotten_file(tmp_path / name, size) for name in ("file", "other"))
    borders = [0, 100_000, 3_000_000, third, third + 2**20]
    found = ask(ops, [*[str(file)] * 3, str(other)], borders[:4], borders[1:])
    assert found.numpy() == 7
    pages = range(0, third // mmap.PAGESIZE, 50)
    assert come_true(lambda: all(in_page_cache(file, page) for page in pages), 60)
    assert come_true(lambda: in_page_cache(other, third // mmap.PAGESIZE), 60)
    last = (size - 1) // mmap.PAGESIZE
    assert not any(in_page_cache(*where) for where in ((file, last), (other, 0), (other, last)))


def test_files_that_cannot_be_read_are_none_of_its_business(
    ops: CompiledOps, tmp_path: Path
) -> None:
    file = written(tmp_path / "file", [b"one"])
    others = [str(tmp_path / "no-such-file"), str(tmp_path), "/dev/null"]
    assert ask(ops, others, [0] * 3, [2**63 - 1] * 3).numpy() == 7
    assert ask(ops, [file, file], [0, 2**60], [2**40, 2**60 + 1]).numpy() == 7
    assert ask(ops, [], [], []).numpy() == 7
    with pytest.raises(tf.errors.InvalidArgumentError, match="as many"):
        ask(ops, [file], [0, 1], [1, 2])
