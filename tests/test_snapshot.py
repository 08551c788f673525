"""Snapshots: exact to the bit, every damage noticed, nothing half-written."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from diagnostics import snapshot
from diagnostics.errors import InputError, SnapshotDamaged
from diagnostics.snapshot import (
    MANIFEST_FILE,
    STATE_FILE,
    STORABLE,
    hash_array,
    hash_arrays,
    read_snapshot,
    write_snapshot,
)

ROOT = Path(snapshot.__file__).parents[1]
SPECIAL = [np.nan, -np.nan, 0.0, -0.0, np.inf, -np.inf, 1e-40]
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def any_array(draw) -> np.ndarray:
    """Random bits of any storable type, any shape (0-d and empty too), any layout."""
    dtype = np.dtype(draw(st.sampled_from(sorted(STORABLE))))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = (data % 2 if dtype == np.bool_ else data).view(dtype).reshape(shape)
    layout = draw(st.sampled_from(["C", "F", "strided"]))
    if layout == "strided" and shape:
        return np.repeat(array, 2, axis=-1)[..., ::2]
    return np.asarray(array, order="F" if layout == "F" else "C")


def assert_same_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert left[name].shape == right[name].shape
        assert left[name].tobytes() == right[name].tobytes()


@given(arrays=st.dictionaries(NAMES, any_array(), max_size=4))
def test_round_trip_is_exact(arrays):
    with tempfile.TemporaryDirectory() as parent:
        total = write_snapshot(Path(parent) / "snapshot", arrays, {"step": 7})
        found, manifest = read_snapshot(Path(parent) / "snapshot")
        assert os.listdir(parent) == ["snapshot"]
    assert_same_bits(found, arrays)
    assert manifest == {"step": 7}
    assert total == hash_arrays(arrays) == hash_arrays(found)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
def test_special_values_keep_their_bits(tmp_path, dtype):
    values = np.array(SPECIAL, dtype)
    payloads = np.frombuffer(b"\x01\xff\xff\x7f\x34\x12\xff\xff" * 2, dtype)
    assert np.isnan(payloads.astype(np.float64)).any()
    arrays = {"values": values, "payloads": payloads, "scalar": values[3], "none": values[:0]}
    write_snapshot(tmp_path / "s", arrays, {})
    assert_same_bits(
        read_snapshot(tmp_path / "s")[0], {k: np.asarray(v) for k, v in arrays.items()}
    )


def test_bfloat16_is_read_by_a_process_that_has_seen_none(tmp_path):
    write_snapshot(tmp_path / "s", {"a": np.array([1.5, -0.0], ml_dtypes.bfloat16)}, {})
    code = "import sys; from diagnostics.snapshot import read_snapshot as r; "
    code += "a = r(sys.argv[1])[0]['a']; print(a.dtype.name, a.tobytes().hex())"
    command = [sys.executable, "-c", code, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["bfloat16", "c03f0080"]


def test_big_endian_is_stored_and_hashed_as_little_endian(tmp_path):
    big = np.array([1.5, np.nan, -0.0], ">f4")
    big.view(np.uint8)[7] = 5  # a NaN payload
    write_snapshot(tmp_path / "s", {"a": big}, {})
    found = read_snapshot(tmp_path / "s")[0]["a"]
    assert found.tobytes() == big.byteswap().tobytes()
    assert hash_array(big) == hash_array(found)


def test_hash_depends_on_every_bit_type_shape_and_name():
    zeros = np.zeros(4, np.float32)
    distinct = [
        {"a": zeros},
        {"a": -zeros},
        {"a": zeros.reshape(2, 2)},
        {"a": zeros.reshape(1, 4)},
        {"a": zeros.view(np.int32)},
        {"a": zeros[:3]},
        {"b": zeros},
        {"a": zeros, "b": zeros[:0]},
        {"a": np.array([np.nan, 0, 0, 0], np.float32)},
        {"a": np.array([0x7FC00001, 0, 0, 0], np.uint32).view(np.float32)},
    ]
    assert len({hash_arrays(arrays) for arrays in distinct}) == len(distinct)


def test_hash_ignores_order_and_layout():
    a, b = np.arange(6.0).reshape(2, 3), np.arange(3)
    assert hash_arrays({"a": a, "b": b}) == hash_arrays({"b": b, "a": np.asfortranarray(a)})


def test_hash_is_the_same_in_every_version():
    # A run's manifest records it: a change would call every older run damaged.
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(3)}
    assert hash_arrays(arrays) == "e3dc31a89af9d325dd048897f76129433a5c0f1f320688ee28b947efb396a787"


@given(
    file=st.sampled_from([MANIFEST_FILE, STATE_FILE]),
    where=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
)
def test_a_changed_byte_is_noticed(damage_subject, file, where, flip):
    directory, arrays = damage_subject
    original = (directory / file).read_bytes()
    data = bytearray(original)
    data[int(where * len(data))] ^= flip
    (directory / file).write_bytes(data)
    try:
        try:
            found, manifest = read_snapshot(directory)
        except SnapshotDamaged as error:
            assert str(directory) in error.message
            assert error.remedy
        else:  # a blank between two JSON tokens carries nothing
            assert_same_bits(found, arrays)
            assert manifest == {"step": 3, "note": "text"}
            assert chr(data[int(where * len(data))]).isspace()
    finally:
        (directory / file).write_bytes(original)


@pytest.fixture(scope="module")
def damage_subject(tmp_path_factory):
    directory = tmp_path_factory.mktemp("damage") / "s"
    arrays = {
        "weights": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
        "step": np.array(3),
        "half": np.ones(3, ml_dtypes.bfloat16),
        "mask": np.array([True, False]),
    }
    write_snapshot(directory, arrays, {"step": 3, "note": "text"})
    return directory, arrays


@given(file=st.sampled_from([MANIFEST_FILE, STATE_FILE]), share=st.floats(0, 0.99))
def test_a_file_cut_short_is_noticed(damage_subject, file, share):
    directory, _ = damage_subject
    original = (directory / file).read_bytes()
    (directory / file).write_bytes(original[: int(share * len(original))])
    try:
        with pytest.raises(SnapshotDamaged, match=file):
            read_snapshot(directory)
    finally:
        (directory / file).write_bytes(original)


def test_damage_names_the_array(tmp_path):
    write_snapshot(tmp_path / "s", {"params/fc1/bias": np.zeros(3), "other": np.zeros(3)}, {})
    write_snapshot(tmp_path / "t", {"params/fc1/bias": np.ones(3), "other": np.zeros(3)}, {})
    shutil.copy(tmp_path / "t" / STATE_FILE, tmp_path / "s" / STATE_FILE)
    with pytest.raises(SnapshotDamaged, match="'params/fc1/bias' does not match its hash"):
        read_snapshot(tmp_path / "s")


def test_missing_and_foreign_arrays_are_named(tmp_path):
    write_snapshot(tmp_path / "one", {"a": np.zeros(3)}, {})
    write_snapshot(tmp_path / "two", {"a": np.zeros(3), "b": np.zeros(3)}, {})
    shutil.copytree(tmp_path / "one", tmp_path / "extra")
    shutil.copy(tmp_path / "two" / STATE_FILE, tmp_path / "extra" / STATE_FILE)
    with pytest.raises(SnapshotDamaged, match="'b' is not in manifest.json"):
        read_snapshot(tmp_path / "extra")
    shutil.copy(tmp_path / "one" / STATE_FILE, tmp_path / "two" / STATE_FILE)
    with pytest.raises(SnapshotDamaged, match="'b' is missing"):
        read_snapshot(tmp_path / "two")


@pytest.mark.parametrize("file", [MANIFEST_FILE, STATE_FILE])
def test_a_missing_file_is_named(tmp_path, file):
    write_snapshot(tmp_path / "s", {"a": np.zeros(3)}, {})
    (tmp_path / "s" / file).unlink()
    with pytest.raises(SnapshotDamaged, match=f"{file}: the file is missing"):
        read_snapshot(tmp_path / "s")
    with pytest.raises(SnapshotDamaged, match="is missing"):
        read_snapshot(tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F4", "no such type"])
def test_a_type_that_numpy_lacks_is_damage(tmp_path, dtype):
    write_snapshot(tmp_path / "s", {"a": np.zeros(3, np.uint8)}, {})
    header = json.dumps({"a": {"dtype": dtype, "shape": [3], "data_offsets": [0, 3]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(3)
    (tmp_path / "s" / STATE_FILE).write_bytes(data)
    with pytest.raises(SnapshotDamaged, match=STATE_FILE):
        read_snapshot(tmp_path / "s")


def test_a_newer_schema_is_not_called_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "SCHEMA", 2)
    write_snapshot(tmp_path / "s", {"a": np.zeros(3)}, {})
    monkeypatch.undo()
    with pytest.raises(InputError, match="has schema 2, this version reads 1") as caught:
        read_snapshot(tmp_path / "s")
    assert not isinstance(caught.value, SnapshotDamaged)


def test_an_unreadable_file_is_not_called_damage(tmp_path, monkeypatch):
    write_snapshot(tmp_path / "s", {"a": np.zeros(3)}, {})

    def refuse(file):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(snapshot, "load_file", refuse)
    with pytest.raises(InputError, match="cannot read .*: Permission denied") as caught:
        read_snapshot(tmp_path / "s")
    assert not isinstance(caught.value, SnapshotDamaged)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    for array in (np.array([None]), np.array(["text"]), np.zeros(2, np.complex64)):
        with pytest.raises(TypeError, match="array 'x' of type"):
            write_snapshot(tmp_path / "s", {"x": array}, {})
    with pytest.raises(ValueError, match="__metadata__"):
        write_snapshot(tmp_path / "s", {"__metadata__": np.zeros(2)}, {})
    assert os.listdir(tmp_path) == []


def test_both_files_have_the_mode_that_the_umask_gives(tmp_path):
    previous = os.umask(0o022)
    try:
        write_snapshot(tmp_path / "s", {"a": np.zeros(3)}, {})
    finally:
        os.umask(previous)
    for file in (STATE_FILE, MANIFEST_FILE):
        assert (tmp_path / "s" / file).stat().st_mode & 0o777 == 0o644


def test_manifest_is_strict_json_with_type_and_shape(tmp_path):
    write_snapshot(tmp_path / "s", {"a": np.zeros((2, 3), np.float16)}, {"loss": float("nan")})
    content = json.loads((tmp_path / "s" / MANIFEST_FILE).read_text(), parse_constant=pytest.fail)
    assert content["arrays"]["a"]["dtype"] == "float16"
    assert content["arrays"]["a"]["shape"] == [2, 3]
    assert content["manifest"] == {"loss": "NaN"}


def test_writing_makes_no_copy_of_the_arrays(tmp_path):
    arrays = {f"a{i}": np.ones(1 << 20, np.float32) for i in range(8)}  # 32 MiB
    tracemalloc.start()
    try:
        write_snapshot(tmp_path / "s", arrays, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20


def _assert_earlier_survives(directory: Path, writes_too_much) -> None:
    """A failed write names the path, leaves no trace, and harms no earlier snapshot."""
    earlier = {"a": np.arange(5)}
    write_snapshot(directory / "one", earlier, {"step": 1})
    for name in ("one", "two"):
        with pytest.raises(InputError) as caught:
            writes_too_much(directory / name)
        assert str(directory / name) in caught.value.message
        assert caught.value.remedy
        assert os.listdir(directory) == ["one"]
    found, manifest = read_snapshot(directory / "one")
    assert_same_bits(found, earlier)
    assert manifest == {"step": 1}


@pytest.mark.parametrize(
    "words",
    ["I/O error: No space left on device (os error 28)", "IoError(Os { code: 28, kind: ..."],
)
def test_a_full_disk_reported_by_safetensors(tmp_path, monkeypatch, words):
    def write(path):
        with monkeypatch.context() as patch:
            patch.setattr(
                snapshot, "save_file", lambda arrays, file: raise_(SafetensorError(words))
            )
            write_snapshot(path, {"a": np.zeros(9)}, {})

    _assert_earlier_survives(tmp_path, write)


def raise_(error: Exception) -> None:
    raise error


def test_a_full_disk_reported_only_by_the_sync(tmp_path, monkeypatch):
    def write(path):
        with monkeypatch.context() as patch:
            error = OSError(errno.ENOSPC, "No space left on device")
            patch.setattr(os, "fsync", lambda descriptor: raise_(error))
            write_snapshot(path, {"a": np.zeros(9)}, {})

    _assert_earlier_survives(tmp_path, write)


def test_a_real_file_size_limit(tmp_path):
    def write(path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            write_snapshot(path, {"a": np.ones(1 << 18)}, {})  # 2 MiB
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    _assert_earlier_survives(tmp_path, write)


@contextlib.contextmanager
def _tiny_disk(mount_point: Path):
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


@pytest.mark.parametrize("doubles", [1 << 18, (1 << 17) - 1200])
def test_a_really_full_disk(tmp_path, doubles):
    # 2 MiB fail in the arrays; a little less than 1 MiB leaves no room for the manifest.
    with _tiny_disk(tmp_path / "disk") as disk:
        _assert_earlier_survives(
            disk, lambda path: write_snapshot(path, {"a": np.ones(doubles)}, {"x": "y" * 9000})
        )
