"""The flight recorder: one row of numbers per step, safe against a kill.

`steps.bin` starts with one line of JSON (schema, column names); fixed-size
records follow: step (int64), the row (float32 each), CRC-32 of both, all
little-endian. A kill loses at most the rows not yet flushed; a half-written
last record is ignored.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from diagnostics.durable_files import append_whole, disk_errors, json_text, write_whole
from diagnostics.errors import InputError, SnapshotDamaged

SCHEMA = 1
FILE = "steps.bin"
_ROWS_BUFFERED = 64


class FlightRecorder:
    """Telemetry of every step in one directory.

    Reading needs no `start` and may go on while another process writes.

    Args:
      directory: made by `start` if it is not there.
      on_warning: is told of records in the middle of the file that are damaged.
    """

    def __init__(
        self, directory: str | os.PathLike, on_warning: Callable[[str], None] | None = None
    ) -> None:
        self._file = Path(directory) / FILE
        self._on_warning = on_warning
        self._descriptor: int | None = None
        self._width = 0
        self._buffer: list[bytes] = []
        self._last_step = -1

    def start(self, columns: Sequence[str], first_step: int) -> None:
        """Opens the file for rows from `first_step` on; recorded later ones are dropped.

        Raises:
          InputError: the recording there has other columns, or cannot be written.
        """
        self.close()
        if self._file.exists():
            recorded, _ = self._header()
            if recorded != list(columns):
                changed = sorted(set(recorded) ^ set(columns)) or ["their order"]
                raise InputError(
                    f"{self._file} was recorded with other columns ({', '.join(changed[:3])})",
                    "Move that file away to go on without the earlier numbers",
                )
            self.truncate(first_step)
        else:
            header = json_text({"schema": SCHEMA, "columns": list(columns)}) + "\n"
            write_whole(self._file, header.encode())
        with disk_errors(self._file):
            self._descriptor = os.open(self._file, os.O_WRONLY)
        self._width = len(columns)
        self._last_step = first_step - 1

    def append(self, step: int, row: np.ndarray) -> None:
        """Records one step; `row` holds one number per column. Cheap: buffered.

        Raises:
          ValueError: the row's shape does not fit, or the step is not after the last.
          InputError: the disk is full; the rows stay in the buffer.
        """
        if self._descriptor is None:
            raise ValueError("append before start")
        values = np.asarray(row, "<f4")
        if values.shape != (self._width,):
            raise ValueError(f"row of shape {values.shape} for {self._width} columns")
        if step <= self._last_step:
            raise ValueError(f"step {step} is not after the last one, {self._last_step}")
        payload = int(step).to_bytes(8, "little", signed=True) + values.tobytes()
        self._buffer.append(payload + zlib.crc32(payload).to_bytes(4, "little"))
        self._last_step = step
        if len(self._buffer) >= _ROWS_BUFFERED:
            self._write()

    def flush(self) -> None:
        """Puts every appended row on the disk, safe against power loss too."""
        if self._descriptor is not None:
            self._write()
            with disk_errors(self._file):
                os.fsync(self._descriptor)

    def _write(self) -> None:
        if self._buffer and self._descriptor is not None:
            append_whole(self._descriptor, b"".join(self._buffer), self._file)
            self._buffer.clear()

    def close(self) -> None:
        """Flushes and closes; the recorder can be started again."""
        if self._descriptor is not None:
            try:
                self.flush()
            finally:
                os.close(self._descriptor)
                self._descriptor = None
                self._buffer.clear()

    def truncate(self, first_step: int) -> None:
        """Drops every row of `first_step` or later, and a half-written last record."""
        self._write()
        if not self._file.exists():
            return
        columns, start = self._header()
        records, valid = self._records(columns, start)
        kept = np.flatnonzero(valid & (records["step"] < first_step))
        count = int(kept[-1]) + 1 if kept.size else 0
        with disk_errors(self._file):
            os.truncate(self._file, start + count * records.dtype.itemsize)
        self._last_step = min(self._last_step, first_step - 1)

    def read(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Steps (int64 [n]), column names, and rows (float32 [n, columns]).

        Empty if nothing was recorded. A damaged record is left out, with a warning.
        Rows that another process has not flushed yet are not seen.
        """
        self._write()
        if not self._file.exists():
            return np.zeros(0, np.int64), [], np.zeros((0, 0), np.float32)
        columns, start = self._header()
        records, valid = self._records(columns, start)
        damaged = int(np.count_nonzero(~valid))
        if damaged and self._on_warning is not None:
            noun = "record" if damaged == 1 else "records"
            self._on_warning(f"{self._file}: {damaged} damaged {noun} left out")
        return (
            records["step"][valid].astype(np.int64),
            columns,
            records["row"][valid].astype(np.float32),
        )

    def _header(self) -> tuple[list[str], int]:
        """Column names and the offset of the first record."""
        with open(self._file, "rb") as file:
            line = file.readline()
        try:
            header = json.loads(line)
            columns = [str(name) for name in header["columns"]]
        except (ValueError, KeyError, TypeError) as error:
            raise SnapshotDamaged(
                f"{self._file}: its first line is not a recorder's header",
                "Move that file away to go on without the earlier numbers",
            ) from error
        if header.get("schema") != SCHEMA:
            raise InputError(
                f"{self._file} has schema {header.get('schema')}, this version reads {SCHEMA}",
                "Read it with the version that wrote it",
            )
        return columns, len(line)

    def _records(self, columns: list[str], start: int) -> tuple[np.ndarray, np.ndarray]:
        """All whole records, and which of them match their CRC."""
        record = np.dtype([("step", "<i8"), ("row", "<f4", (len(columns),)), ("crc", "<u4")])
        data = self._file.read_bytes()
        count = (len(data) - start) // record.itemsize
        records = np.frombuffer(data, record, count, start)
        view = memoryview(data)
        starts = range(start, start + count * record.itemsize, record.itemsize)
        checks = [zlib.crc32(view[at : at + record.itemsize - 4]) for at in starts]
        return records, records["crc"] == np.array(checks, np.uint32)
