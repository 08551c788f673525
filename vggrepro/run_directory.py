"""What lies where in a run directory, and who may write it.

    config.json  manifest.json  metrics.jsonl  telemetry/  tensorboard/
    checkpoints/step-00001200/   incidents/step-00000001/   diagnosis/step-00000001/

Checkpoint "step k" is the state before step k runs (after k steps). Everything is
written under a temporary name and renamed. One process writes at a time: it holds
an operating-system lock on `.lock`, which dies with the process.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.durable_files import (
    TEMPORARY_PREFIX,
    disk_errors,
    remove_directory,
    remove_temporaries,
    write_json,
)
from diagnostics.errors import InputError, SnapshotDamaged
from diagnostics.flight_recorder import FlightRecorder
from diagnostics.snapshot import read_snapshot, write_snapshot
from vggrepro.metrics_log import MetricsLog
from vggrepro.run_lock import LOCK_FILE, acquire_lock

_STEP_NAME = re.compile(r"step-(\d{8,})")


class RunDirectory:
    """One run on disk; made by `create` or `open`, used as a context manager.

    Attributes:
      path: the directory.
      telemetry: the flight recorder in `telemetry/`.
      warnings: what went wrong and was got around, oldest first; `on_warning` is
        told at once.
    """

    def __init__(
        self, path: Path, writable: bool, on_warning: Callable[[str], None] | None
    ) -> None:
        self.path = path
        self.warnings: list[str] = []
        self._on_warning = on_warning
        self._lock: int | None = acquire_lock(path) if writable else None
        self._metrics = MetricsLog(path / "metrics.jsonl", self._warn)
        self.telemetry = FlightRecorder(path / "telemetry", self._warn)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        config: dict[str, Any],
        manifest: dict[str, Any],
        on_warning: Callable[[str], None] | None = None,
    ) -> RunDirectory:
        """Makes a new run and opens it for writing.

        Raises:
          InputError: `path` is a file or holds something, or cannot be written.
          RunLocked: another process is making a run there.
        """
        path = Path(path)
        check_free(path)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        run = cls(path, writable=True, on_warning=on_warning)
        try:
            check_free(path)
            remove_temporaries(path)
            write_json(path / "manifest.json", manifest)
            # Last, because a directory with a config counts as a run.
            write_json(path / "config.json", config)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        writable: bool = False,
        on_warning: Callable[[str], None] | None = None,
    ) -> RunDirectory:
        """Opens an existing run; for writing, leftovers of a killed process are removed.

        Raises:
          InputError: `path` is not a run directory.
          RunLocked: `writable`, and another process is writing it.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            what = "it has no config.json" if path.is_dir() else "no such directory"
            raise InputError(
                f"{path} is not a run directory: {what}",
                "Give the directory that `vggrepro train` named at its end",
            )
        run = cls(path, writable, on_warning)
        if writable:
            for part in (".", "checkpoints", "incidents", "diagnosis", "telemetry"):
                remove_temporaries(path / part)
        return run

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Flushes telemetry, closes the files and gives the lock back."""
        try:
            self.telemetry.close()
        finally:
            self._metrics.close()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def config(self) -> dict[str, Any]:
        """The run's configuration as written."""
        return _read_json(self.path / "config.json")

    def manifest(self) -> dict[str, Any]:
        """The run's manifest; NaN and infinities in it are strings."""
        return _read_json(self.path / "manifest.json")

    def update_manifest(self, **changes: Any) -> None:
        """Replaces top-level entries of the manifest, atomically."""
        self._check_writable()
        write_json(self.path / "manifest.json", {**self.manifest(), **changes})

    def checkpoints(self) -> list[int]:
        """Steps of all checkpoints, ascending; they are not verified here."""
        return _steps_in(self.path / "checkpoints")

    def save_checkpoint(self, step: int, state: dict[str, np.ndarray], keep: int) -> str:
        """Saves the state before `step`, then deletes all but the newest `keep`.

        Telemetry and metrics so far reach the disk first, so that a run resumed here
        has its whole history.

        Returns:
          `hash_arrays(state)`.

        Raises:
          InputError: the disk is full; earlier checkpoints are untouched.
        """
        self._check_writable()
        self.telemetry.flush()
        self._metrics.sync()
        digest = write_snapshot(self._checkpoint(step), state, {"step": step})
        others = [other for other in self.checkpoints() if other != step]
        for old in others[: max(0, len(others) + 1 - keep)]:
            remove_directory(self._checkpoint(old))
        return digest

    def latest_checkpoint(
        self, at_most: int | None = None
    ) -> tuple[int, dict[str, np.ndarray]] | None:
        """The newest valid checkpoint, of step `at_most` or earlier; None if none is.

        A damaged one is passed over with a warning. If the run is open for writing
        it is also renamed to `damaged-step-...`: nothing is lost, nor tried again.
        """
        for step in reversed(self.checkpoints()):
            if at_most is not None and step > at_most:
                continue
            try:
                return step, self._read_checkpoint(step)
            except SnapshotDamaged as error:
                self._warn(f"{error.message}; taking the checkpoint before it")
                self._set_aside(self._checkpoint(step))
        return None

    def _read_checkpoint(self, step: int) -> dict[str, np.ndarray]:
        state, manifest = read_snapshot(self._checkpoint(step))
        if manifest.get("step") != step:
            raise SnapshotDamaged(
                f"checkpoint {self._checkpoint(step)} holds step {manifest.get('step')}",
                "Give it back its name",
            )
        return state

    def _set_aside(self, checkpoint: Path) -> None:
        if self._lock is None:
            return
        name = target = f"damaged-{checkpoint.name}"
        taken = set(os.listdir(checkpoint.parent))
        number = 1
        while target in taken:
            number += 1
            target = f"{name}-{number}"
        with disk_errors(checkpoint):
            checkpoint.rename(checkpoint.with_name(target))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl; NaN becomes the string "NaN" (strict JSON).

        Raises:
          InputError: the disk is full; no half line is left.
        """
        self._check_writable()
        self._metrics.append(record)

    def metrics(self) -> list[dict[str, Any]]:
        """All whole records of metrics.jsonl, "NaN" and infinities as floats again."""
        return self._metrics.read()

    def truncate_metrics(self, first_step: int) -> None:
        """Drops the first record with "step" >= `first_step`, what follows, and a half line.

        So whatever a checkpoint at step k stands for must be recorded with a smaller
        step, or it is dropped on resume and has to be recorded again.
        """
        self._check_writable()
        self._metrics.truncate(first_step)

    def incidents(self) -> list[Path]:
        """Directories of complete incidents, by step."""
        return [self.incident_directory(step) for step in _steps_in(self.path / "incidents")]

    def incident_directory(self, step: int) -> Path:
        """Where the incident of a step belongs; write it through `new_directory`."""
        return self.path / "incidents" / _step_name(step)

    def diagnosis_directory(self, step: int) -> Path:
        """Where the diagnosis of a step belongs; not made here."""
        return self.path / "diagnosis" / _step_name(step)

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / _step_name(step)

    def _check_writable(self) -> None:
        if self._lock is None:
            raise ValueError(f"run {self.path} is not open for writing")

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        if self._on_warning is not None:
            self._on_warning(text)


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _steps_in(directory: Path) -> list[int]:
    names = os.listdir(directory) if directory.is_dir() else []
    return sorted(int(match.group(1)) for name in names if (match := _STEP_NAME.fullmatch(name)))


def check_free(path: Path) -> None:
    """A directory with nothing but what a process killed inside `create` leaves is free."""
    if path.exists() and not path.is_dir():
        raise InputError(f"run directory {path} is a file", "Choose another --run-dir")
    names = set(os.listdir(path)) if path.is_dir() else set()
    if LOCK_FILE in names and "config.json" not in names:
        names -= {LOCK_FILE, "manifest.json"}
    if any(not name.startswith(TEMPORARY_PREFIX) for name in names):
        raise InputError(
            f"run directory {path} exists and is not empty",
            "Choose another --run-dir, or continue the run in it with --resume",
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot read {file}: {error.strerror}", "Restore it from a copy of the run"
        ) from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON", "Restore it from a copy of the run") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} is not a JSON object", "Restore it from a copy of the run")
    return value
