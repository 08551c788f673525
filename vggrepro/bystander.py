"""What a worker has in place of the run directory, which the chief alone writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.flight_recorder import FlightRecorder
from vggrepro.run_directory import RunDirectory


class Bystander(RunDirectory):
    """A run directory of which nothing is read or written; the state comes from the chief."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warnings = []
        self.telemetry = _NoRecorder(path)

    def close(self) -> None: ...

    def manifest(self) -> dict[str, Any]:
        return {}

    def update_manifest(self, **changes: Any) -> None: ...

    def checkpoints(self) -> list[int]:
        return []

    def save_checkpoint(self, step: int, state: dict[str, np.ndarray], keep: int) -> str:
        return ""

    def append_metrics(self, record: dict[str, Any]) -> None: ...

    def metrics(self) -> list[dict[str, Any]]:
        return []

    def truncate_metrics(self, first_step: int) -> None: ...


class _NoRecorder(FlightRecorder):
    def start(self, columns: Sequence[str], first_step: int) -> None: ...

    def append(self, step: int, row: np.ndarray) -> None: ...

    def flush(self) -> None: ...
