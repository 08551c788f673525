"""What a tripped guard leaves behind: enough to replay the step with the data gone.

incidents/step-00000001/
  incident.json   step, failed checks, example ids and names, seeds, config,
                  environment, the telemetry row of the refused step
  state/          snapshot: every array of the state before the step
  batch/          snapshot: the batch as it was fed
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.durable_files import json_text, new_directory
from diagnostics.errors import SnapshotDamaged
from diagnostics.snapshot import read_snapshot, write_snapshot

SCHEMA = 1
INCIDENT_FILE = "incident.json"


@dataclass(frozen=True)
class Incident:
    """One refused step.

    Attributes:
      step: the step that was refused.
      state: named arrays before the step.
      batch: named arrays as fed to the step.
      record: the JSON part; see `write_incident`.
    """

    step: int
    state: dict[str, np.ndarray]
    batch: dict[str, np.ndarray]
    record: dict[str, Any]


def write_incident(
    directory: Path,
    *,
    state: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    record: Mapping[str, Any],
) -> int:
    """Writes an incident atomically; returns its size in bytes.

    The size is that of the state and one batch: for momentum SGD about eight
    bytes a parameter and four bytes an input number.

    Args:
      record: at least "step"; JSON values, NaN and infinities become strings.
    """
    with new_directory(directory) as temporary:
        write_snapshot(temporary / "state", state, {"step": record["step"]})
        write_snapshot(temporary / "batch", batch, {"step": record["step"]})
        text = json_text({"schema": SCHEMA, **record}, indent=2)
        (temporary / INCIDENT_FILE).write_text(text + "\n", encoding="utf-8")
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def read_incident(directory: Path) -> Incident:
    """Reads and verifies an incident.

    Raises:
      SnapshotDamaged: a file is missing, cut short or changed; names it.
    """
    file = directory / INCIDENT_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        step = int(record["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SnapshotDamaged(
            f"incident damaged: {file} cannot be read ({error})",
            "Restore the directory from a copy, or run the training again",
        ) from error
    state, _ = read_snapshot(directory / "state")
    batch, _ = read_snapshot(directory / "batch")
    return Incident(step, state, batch, record)
