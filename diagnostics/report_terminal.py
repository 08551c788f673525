"""The diagnosis on one terminal screen."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from diagnostics import report_words as words
from diagnostics.diagnosis import Diagnosis
from diagnostics.protocol import RunFacts, Telemetry


def render(diagnosis: Diagnosis, telemetry: Telemetry, facts: RunFacts) -> RenderableType:
    """Verdict, place, story, cause, what was tried, and the command to run."""
    lines = [words.headline(diagnosis), words.VERDICT_SENTENCES[diagnosis.verdict]]
    return Group(*(Text(words.printable(line)) for line in lines))
