"""The diagnosis of a guarded fit, in the process that trained."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from diagnostics.diagnose import diagnose
from diagnostics.diagnosis import Diagnosis
from diagnostics.keras_replay import KerasRun
from diagnostics.report import HTML_FILE, write_reports


@dataclasses.dataclass(frozen=True)
class SavableDiagnosis(Diagnosis):
    """A diagnosis that knows its run: printing it shows the terminal report."""

    def of_run(self, run: KerasRun) -> SavableDiagnosis:
        """Remembers where the recording is."""
        object.__setattr__(self, "_run", run)
        return self

    def save(self, directory: str | Path | None = None) -> Path:
        """Writes diagnosis.json and report.html; returns the report.

        Args:
          directory: default: `diagnosis/step-…` in the run directory.
        """
        run: KerasRun = self._run  # type: ignore[attr-defined]
        place = Path(directory or Path(run.name) / "diagnosis" / f"step-{self.step:08d}")
        write_reports(self, run.telemetry(), run.facts, place)
        return place / HTML_FILE

    def __str__(self) -> str:
        from rich.console import Console

        from diagnostics.report_terminal import render

        run: KerasRun = self._run  # type: ignore[attr-defined]
        text = io.StringIO()
        Console(file=text, width=100).print(render(self, run.telemetry(), run.facts))
        return text.getvalue()


def diagnose_live(run: KerasRun, budget_seconds: float) -> SavableDiagnosis:
    """Diagnoses with the live model, whose state is the same afterwards."""
    before = run.live_state()
    try:
        found = diagnose(run, budget_seconds=budget_seconds)
    finally:
        run.put_back(before)
    parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return SavableDiagnosis(**parts).of_run(run)
