"""Chooses, among all non-finite values of an op-by-op replay, the one that failed the step.

A step may hold non-finite values that never hurt: the logarithm of zero in the
branch that `tf.where` did not take, the -inf of an attention mask. So the search
starts from the compiled step's own verdict (its first failed check), takes the
non-finite values at that place, and walks back through whatever fed them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diagnostics.op_records import Hit
from diagnostics.op_trace import OpTrace
from diagnostics.protocol import Check


def first_origin(tracer: OpTrace, failed: Sequence[Check]) -> Hit | None:
    """The op where the non-finite value behind the first failed check begins.

    Returns None where the replay showed nothing at the place of that check.
    """
    mark_live(tracer.hits)
    evidence = _at_check(tracer, failed[0])
    live = [hit for hit in evidence if hit.live]
    reached = ancestors(live or evidence)
    beginnings = [hit for hit in reached if hit.origin]
    if not beginnings:  # a constant that is not finite has no op of its own: who took it
        taken = [hit for hit in reached if hit.details is not None and not hit.on_purpose]
        beginnings = taken or [
            hit
            for hit in reached
            if not (hit.parents or hit.bookkeeping) and (hit.live or not hit.on_purpose)
        ]
    return min(beginnings, key=lambda hit: hit.record.order, default=None)


def mark_live(hits: Sequence[Hit]) -> None:
    """Marks the hits whose values some op turned into finite ones as not live."""
    for hit in reversed(hits):  # consumers come after their producers
        if hit.consumers and not hit.bookkeeping:
            hit.live = any(consumer.live for consumer in hit.consumers)
        else:
            hit.live = not hit.removed


def ancestors(hits: Iterable[Hit]) -> list[Hit]:
    """The hits and everything non-finite that fed them."""
    found: dict[int, Hit] = {}
    waiting = list(hits)
    while waiting:
        hit = waiting.pop()
        if id(hit) not in found:
            found[id(hit)] = hit
            waiting.extend(hit.parents)
    return list(found.values())


def _at_check(tracer: OpTrace, check: Check) -> list[Hit]:
    """The hits at the place that a check looks at.

    A program that never entered the check's phase, or whose layers have no name
    scopes, cannot be held to them.
    """
    phases = {record.phase for record in tracer.records}
    hits = tracer.hits
    if check.stage in phases:
        hits = [hit for hit in hits if hit.record.phase == check.stage]
    layers = {record.layer for record in tracer.records if record.phase == check.stage}
    if check.layer not in layers:
        return hits
    here = [hit for hit in hits if hit.record.layer == check.layer]
    if check.stage == "update" and not here:  # its ops may serve all layers at once
        here = [hit for hit in hits if hit.record.layer is None]
    if check.stage == "backward" and not here:  # of a second derivative no layer is sure
        return hits
    return here
