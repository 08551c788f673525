"""metrics.jsonl: one JSON object a line, whole lines only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diagnostics.durable_files import append_whole, disk_errors, json_text


class MetricsLog:
    """Appends and reads records; each is on its way to the disk when `append` returns.

    NaN and infinities are strings in the file (strict JSON) and floats again when read.
    """

    def __init__(self, file: Path, on_warning: Callable[[str], None]) -> None:
        self._file = file
        self._on_warning = on_warning
        self._descriptor: int | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line.

        Raises:
          InputError: the disk is full; no half line is left.
        """
        if self._descriptor is None:
            with disk_errors(self._file):
                self._descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o666)
        append_whole(self._descriptor, (json_text(record) + "\n").encode(), self._file)

    def sync(self) -> None:
        """Makes all records safe against power loss."""
        if self._descriptor is not None:
            with disk_errors(self._file):
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file; `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def read(self) -> list[dict[str, Any]]:
        """All records. A half-written last line is left out; a damaged one, with a warning."""
        records = []
        for number, (line, record) in enumerate(self._lines(), start=1):
            if record is not None:
                records.append({name: _number(value) for name, value in record.items()})
            elif line.endswith(b"\n"):
                self._on_warning(f"{self._file}: line {number} is damaged and left out")
        return records

    def truncate(self, first_step: int) -> None:
        """Drops the first record with "step" >= `first_step` and all that follows it."""
        end = 0
        for line, record in self._lines():
            reached = record is not None and record.get("step", -1) >= first_step
            if reached or not line.endswith(b"\n"):
                break
            end += len(line)
        if self._file.exists():
            with disk_errors(self._file):
                os.truncate(self._file, end)

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """Each line with its record; None where it is damaged or half-written."""
        if not self._file.exists():
            return
        with open(self._file, "rb") as lines:
            for line in lines:
                yield line, _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
