"""The flight recorder against a list in memory, and against cut and damaged files."""

import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics import flight_recorder
from diagnostics.errors import InputError, SnapshotDamaged
from diagnostics.flight_recorder import FILE, FlightRecorder

COLUMNS = ["loss", "block1_conv1/gradient_norm", "größe"]


def row_of(step: int) -> np.ndarray:
    """A row that names its step; every third one holds a NaN with a payload."""
    row = np.array([step, -step, 0.5], np.float32)
    if step % 3 == 0:
        row[2:].view(np.uint32)[0] = 0x7FC00000 + step
    return row


def record(directory: Path, steps: range) -> FlightRecorder:
    recorder = FlightRecorder(directory)
    recorder.start(COLUMNS, steps.start)
    for step in steps:
        recorder.append(step, row_of(step))
    return recorder


def assert_holds(recorder: FlightRecorder, steps: list[int]) -> None:
    found, columns, rows = recorder.read()
    assert found.dtype == np.int64 and rows.dtype == np.float32
    assert found.tolist() == steps
    assert columns == COLUMNS
    assert rows.shape == (len(steps), len(COLUMNS))
    assert rows.tobytes() == b"".join(row_of(step).tobytes() for step in steps)


OPERATIONS = st.lists(
    st.tuples(st.just("append"), st.integers(1, 3))
    | st.tuples(st.sampled_from(["truncate", "restart"]), st.integers(0, 40))
    | st.tuples(st.sampled_from(["flush", "close and restart", "killed"]), st.just(0)),
    max_size=40,
)


@given(operations=OPERATIONS, rows_buffered=st.sampled_from([1, 3, 64]))
def test_any_history_reads_back(operations, rows_buffered):
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(flight_recorder, "_ROWS_BUFFERED", rows_buffered)
        recorder = FlightRecorder(directory)
        recorder.start(COLUMNS, 0)
        model: list[int] = []
        following = 0  # the first step that may come next
        for operation, number in operations:
            if operation == "append":
                step = following + number - 1
                recorder.append(step, row_of(step))
                model.append(step)
                following = step + 1
            elif operation == "truncate":
                recorder.truncate(number)
                model = [step for step in model if step < number]
                following = min(following, number)
            elif operation == "restart":
                recorder.start(COLUMNS, number)
                model = [step for step in model if step < number]
                following = number
            elif operation == "flush":
                recorder.flush()
                assert_holds(FlightRecorder(directory), model)
            elif operation == "close and restart":
                recorder.close()
                recorder = FlightRecorder(directory)
                recorder.start(COLUMNS, following)
            else:  # what is on disk is all that a killed process leaves
                survived = FlightRecorder(directory).read()[0].tolist()
                assert survived == model[: len(survived)]
                assert len(model) - len(survived) < rows_buffered
                model = survived
                os.close(recorder._descriptor)  # as the system does; the buffer is lost
                following = survived[-1] + 1 if survived else 0
                recorder = FlightRecorder(directory)
                recorder.start(COLUMNS, following)
        assert_holds(recorder, model)
        recorder.close()
        assert_holds(FlightRecorder(directory), model)


@given(missing=st.integers(0, 400))
def test_a_file_cut_anywhere_keeps_its_whole_records(missing):
    with tempfile.TemporaryDirectory() as directory:
        record(Path(directory), range(10)).close()
        file = Path(directory) / FILE
        header = file.read_bytes().index(b"\n") + 1
        size = (file.stat().st_size - header) // 10
        os.truncate(file, max(header, file.stat().st_size - missing))
        kept = (file.stat().st_size - header) // size
        assert_holds(FlightRecorder(directory), list(range(kept)))
        # Going on there loses nothing more and is aligned again.
        recorder = FlightRecorder(directory)
        recorder.start(COLUMNS, kept)
        recorder.append(kept, row_of(kept))
        assert_holds(recorder, list(range(kept + 1)))
        recorder.close()


@given(record_number=st.integers(0, 9), byte=st.integers(0, 23), flip=st.integers(1, 255))
def test_a_damaged_record_is_left_out_with_a_warning(record_number, byte, flip):
    with tempfile.TemporaryDirectory() as directory:
        record(Path(directory), range(10)).close()
        file = Path(directory) / FILE
        data = bytearray(file.read_bytes())
        assert (len(data) - data.index(b"\n") - 1) == 10 * 24
        data[data.index(b"\n") + 1 + record_number * 24 + byte] ^= flip
        file.write_bytes(data)
        warnings: list[str] = []
        recorder = FlightRecorder(directory, warnings.append)
        assert_holds(recorder, [step for step in range(10) if step != record_number])
        assert warnings == [f"{file}: 1 damaged record left out"]


def test_a_damaged_record_does_not_confuse_truncation(tmp_path):
    record(tmp_path, range(10)).close()
    data = bytearray((tmp_path / FILE).read_bytes())
    data[data.index(b"\n") + 1 + 5 * 24 + 7] ^= 1  # step 5 now says 2^56 + 5
    (tmp_path / FILE).write_bytes(data)
    recorder = FlightRecorder(tmp_path)
    recorder.truncate(8)
    assert_holds(recorder, [0, 1, 2, 3, 4, 6, 7])


def test_nothing_recorded_yet(tmp_path):
    steps, columns, rows = FlightRecorder(tmp_path / "telemetry").read()
    assert (steps.shape, columns, rows.shape) == ((0,), [], (0, 0))
    FlightRecorder(tmp_path / "telemetry").truncate(3)
    FlightRecorder(tmp_path / "telemetry").flush()
    assert not (tmp_path / "telemetry").exists()


def test_unflushed_rows_are_seen_by_the_writer_itself(tmp_path):
    recorder = record(tmp_path, range(5))
    assert_holds(FlightRecorder(tmp_path), [])
    assert_holds(recorder, [0, 1, 2, 3, 4])
    recorder.close()


def test_no_columns(tmp_path):
    recorder = FlightRecorder(tmp_path)
    recorder.start([], 0)
    recorder.append(0, np.zeros(0))
    assert recorder.read()[2].shape == (1, 0)
    recorder.close()


def test_wrong_use_is_refused(tmp_path):
    recorder = FlightRecorder(tmp_path)
    with pytest.raises(ValueError, match="before start"):
        recorder.append(0, row_of(0))
    recorder.start(COLUMNS, 4)
    with pytest.raises(ValueError, match="row of shape"):
        recorder.append(4, np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="step 3 is not after the last one, 3"):
        recorder.append(3, row_of(3))
    recorder.append(np.int64(4), row_of(4))
    with pytest.raises(ValueError, match="step 4 is not after"):
        recorder.append(4, row_of(4))
    assert_holds(recorder, [4])
    recorder.close()


def test_other_columns_are_named(tmp_path):
    record(tmp_path, range(3)).close()
    with pytest.raises(InputError, match="other columns .lr") as caught:
        FlightRecorder(tmp_path).start([*COLUMNS, "lr"], 3)
    assert "Move that file away" in caught.value.remedy
    with pytest.raises(InputError, match="their order"):
        FlightRecorder(tmp_path).start(COLUMNS[::-1], 3)
    assert_holds(FlightRecorder(tmp_path), [0, 1, 2])


@pytest.mark.parametrize("header", [b"\x00\xffgarbage\n", b"[]\n", b'{"columns": 3}\n', b"", b"{"])
def test_a_damaged_header_is_an_error(tmp_path, header):
    (tmp_path / FILE).write_bytes(header)
    with pytest.raises(SnapshotDamaged, match="first line is not a recorder's header"):
        FlightRecorder(tmp_path).read()


def test_a_newer_schema_is_an_error(tmp_path):
    (tmp_path / FILE).write_bytes(b'{"schema": 2, "columns": []}\n')
    with pytest.raises(InputError, match="schema 2, this version reads 1") as caught:
        FlightRecorder(tmp_path).read()
    assert not isinstance(caught.value, SnapshotDamaged)


def test_a_full_disk_loses_no_row(tmp_path):
    recorder = record(tmp_path, range(3))
    recorder.flush()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for one and a half more records.
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / FILE).stat().st_size + 36, hard))
    try:
        for step in (3, 4):
            recorder.append(step, row_of(step))
        with pytest.raises(InputError, match=f"cannot write {tmp_path / FILE}"):
            recorder.flush()
        assert_holds(FlightRecorder(tmp_path), [0, 1, 2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recorder.append(5, row_of(5))
    assert_holds(recorder, [0, 1, 2, 3, 4, 5])
    recorder.close()


def test_append_is_cheap(tmp_path):
    recorder = FlightRecorder(tmp_path)
    recorder.start([f"c{i}" for i in range(100)], 0)
    row = np.ones(100, np.float32)
    seconds = []
    for step in range(2000):
        began = time.perf_counter()
        recorder.append(step, row)
        seconds.append(time.perf_counter() - began)
    recorder.close()
    assert np.median(seconds) < 50e-6
    assert (tmp_path / FILE).stat().st_size < 2000 * 420
