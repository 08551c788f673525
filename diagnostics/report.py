"""A diagnosis as files: diagnosis.json and report.html. Runs no step, needs no TensorFlow."""

from __future__ import annotations

from pathlib import Path

from diagnostics.diagnosis import Diagnosis
from diagnostics.durable_files import write_json, write_whole
from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.report_html import render_html

JSON_FILE = "diagnosis.json"
HTML_FILE = "report.html"


def write_reports(
    diagnosis: Diagnosis, telemetry: Telemetry, facts: RunFacts, directory: Path
) -> None:
    """Writes diagnosis.json and report.html into `directory`, replacing older ones.

    Args:
      telemetry: of every recorded step; may be empty.
      directory: made if it is not there.

    Raises:
      InputError: the disk is full or not writable.
    """
    page = render_html(diagnosis, telemetry, facts)
    write_json(directory / JSON_FILE, diagnosis.to_dict())
    write_whole(directory / HTML_FILE, page.encode("utf-8"))
