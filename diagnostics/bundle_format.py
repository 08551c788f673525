"""What a bundle may hold: names, limits, and the words for one that is refused."""

from __future__ import annotations

import re
from pathlib import Path

from diagnostics.errors import InputError
from diagnostics.incident import INCIDENT_FILE
from diagnostics.snapshot import MANIFEST_FILE, STATE_FILE

SCHEMA = 1
FORMAT = "failing-step bundle"
CONTENTS = "bundle.json"
METRICS = "metrics.jsonl"
TELEMETRY = "telemetry/steps.bin"
RUN_FILES = ("config.json", "manifest.json")
SNAPSHOT_FILES = tuple(
    f"{part}/{name}" for part in ("state", "batch") for name in (STATE_FILE, MANIFEST_FILE)
)
# What step 0 cannot be made from the seed without; only some runs have it.
INHERITED_FILES = tuple(f"inherited/{name}" for name in (STATE_FILE, MANIFEST_FILE))
JSON_LIMIT = 64 * 1024**2  # bytes
CHUNK = 1 << 20

_IN_INCIDENT = "|".join(map(re.escape, (INCIDENT_FILE, *SNAPSHOT_FILES)))
_INHERITED = "|".join(map(re.escape, INHERITED_FILES))
_TOP_LEVEL = rf"[A-Za-z0-9_-]+\.json|{re.escape(METRICS)}|{re.escape(TELEMETRY)}|{_INHERITED}"
ALLOWED = re.compile(rf"{_TOP_LEVEL}|incidents/step-\d{{8,}}/(?:{_IN_INCIDENT})", re.ASCII)


def incident_name(step: int) -> str:
    """The incident's directory within a run and within a bundle."""
    return f"incidents/step-{step:08d}"


def size_text(count: int) -> str:
    """Bytes as '1.1 GB'."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def refused(file: Path, reason: str) -> InputError:
    """The error for a file that is no sound bundle."""
    return InputError(f"{file} is not a sound bundle: {reason}", "Ask for the bundle again")
