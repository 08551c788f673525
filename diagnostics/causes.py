"""From evidence to a cause, or to 'unknown'.

Every rule looks at one mechanism and speaks for or against one kind of cause,
with a weight in log-odds. The weights of a kind add up; a share for 'unknown'
stands beside them, so that one hint decides nothing and two strong causes that
contradict each other end in abstention. `judge` reads no file and runs no step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from diagnostics.cause_rules_data import data_findings
from diagnostics.cause_rules_labels import label_findings
from diagnostics.cause_rules_numbers import number_findings
from diagnostics.cause_rules_place import place_findings
from diagnostics.cause_rules_scale import scale_findings
from diagnostics.cause_rules_stall import stall_findings
from diagnostics.diagnosis import Cause
from diagnostics.evidence import Evidence, Finding

__all__ = ["Evidence", "judge"]

UNKNOWN_WEIGHT = 1.5  # log-odds that what speaks for no cause is given
_NEEDED = 0.5  # share of the best cause, below which we abstain
_SUREST = 0.98
_SENTENCES = 7


def judge(evidence: Evidence) -> Cause:
    """The most likely cause of a failure.

    Called once before and once after the counterfactual replays; those that
    survived tell apart what looks alike in one step.

    Returns:
      kind 'unknown' if no cause has at least half of the weight.
    """
    findings = list(_findings(evidence))
    scores: dict[str, float] = defaultdict(float)
    for finding in findings:
        scores[finding.kind] += finding.weight
    shares = {kind: math.exp(score) for kind, score in scores.items() if score > 0}
    total = math.exp(UNKNOWN_WEIGHT) + sum(shares.values())
    best = max(shares, key=lambda kind: shares[kind], default="unknown")
    share = shares.get(best, 0.0) / total
    if evidence.verdict == "replay_differs":
        share *= 0.8
    if share < _NEEDED:
        return _abstention(findings, shares, total)
    return Cause(best, round(min(share, _SUREST), 2), _sentences(findings, best))


def _findings(evidence: Evidence) -> Iterable[Finding]:
    if evidence.verdict == "stalled":
        yield from stall_findings(evidence)
        return
    yield from place_findings(evidence)
    if evidence.verdict != "not_reproduced":
        yield from data_findings(evidence)
        yield from label_findings(evidence)
        yield from scale_findings(evidence)
        yield from number_findings(evidence)


def _sentences(findings: Iterable[Finding], kind: str) -> tuple[str, ...]:
    """What speaks for a kind, strongest first, each once."""
    said = [one for one in findings if one.kind == kind and one.weight > 0 and one.sentence]
    ordered = sorted(said, key=lambda one: -(one.weight if one.place is None else one.place))
    return tuple(dict.fromkeys(one.sentence for one in ordered))[:_SENTENCES]


def _abstention(findings: list[Finding], shares: dict[str, float], total: float) -> Cause:
    """'unknown', with what little there is."""
    likeliest = sorted(shares, key=lambda kind: -shares[kind])[:2]
    hints = [f"{kind}: {text}" for kind in likeliest for text in _sentences(findings, kind)[:2]]
    lead = "The evidence does not single out one cause"
    if not hints:
        lead = "Nothing in the recording or the replay points to a cause"
    return Cause(
        "unknown", round(min(math.exp(UNKNOWN_WEIGHT) / total, _SUREST), 2), (lead, *hints)
    )
