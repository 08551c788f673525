"""Which engine ran which steps, as the manifest keeps it: a run may be resumed on another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ENTRY = "engines"
# Replicas whose shares TensorFlow on one device computes alike.
_REPEATABLE = ("mirrored", "multiworker")


def with_engine(
    manifest: Mapping[str, Any], first_step: int, engine: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The manifest's list once `engine` runs the steps from `first_step` on."""
    before = [one for one in manifest.get(ENTRY, ()) if one["first_step"] < first_step]
    return [*before, {"first_step": first_step, **engine}]


def replicas_at(manifest: Mapping[str, Any], step: int) -> int:
    """As of how many replicas a replay computes a step, one after the other."""
    engines: Sequence[Mapping[str, Any]] = manifest.get(ENTRY, ())
    ran = [one for one in engines if one["first_step"] <= step]
    return ran[-1]["replicas"] if ran and ran[-1]["strategy"] in _REPEATABLE else 1


def engine_between(manifest: Mapping[str, Any], start: int, end: int) -> Mapping[str, Any] | None:
    """The one engine that ran steps start..end-1; None if there were several, or is no record."""
    engines: Sequence[Mapping[str, Any]] = manifest.get(ENTRY, ())
    earlier = [one for one in engines if one["first_step"] <= start]
    within = [one for one in engines if start < one["first_step"] < end]
    ran = [{**one, "first_step": 0} for one in (*earlier[-1:], *within)]
    return ran[0] if ran and all(one == ran[0] for one in ran) else None
