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
    ran = _engine_at(manifest, step)
    return ran[0]["replicas"] if ran and ran[0]["strategy"] in _REPEATABLE else 1


def engine_between(manifest: Mapping[str, Any], start: int, end: int) -> Mapping[str, Any] | None:
    """The one engine that ran steps start..end-1; None if there were several, or is no record."""
    later = [one for one in manifest.get(ENTRY, ()) if start < one["first_step"] < end]
    entries = [*_engine_at(manifest, start), *later]
    ran = [{name: one[name] for name in one if name != "first_step"} for one in entries]
    return ran[0] if ran and all(one == ran[0] for one in ran) else None


def _engine_at(manifest: Mapping[str, Any], step: int) -> Sequence[Mapping[str, Any]]:
    """The entry of the engine that ran a step; empty if there is no record."""
    return [one for one in manifest.get(ENTRY, ()) if one["first_step"] <= step][-1:]
