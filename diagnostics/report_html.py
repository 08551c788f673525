"""The diagnosis as one self-contained HTML page."""

from __future__ import annotations

from html import escape

from diagnostics import report_words as words
from diagnostics.diagnosis import Diagnosis
from diagnostics.protocol import RunFacts, Telemetry


def render_html(diagnosis: Diagnosis, telemetry: Telemetry, facts: RunFacts) -> str:
    """The page as text; no network, no script."""
    title = escape(words.printable(words.headline(diagnosis)))
    return f"<!doctype html><html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
