"""Rules about number formats and the optimizer's own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator

from diagnostics.evidence import Evidence, Finding
from diagnostics.op_domains import UNCAST, domain_fault, op_name
from diagnostics.report_words import number
from diagnostics.signals import half_precision, largest_signal
from diagnostics.telemetry_view import LARGEST_FLOAT16, is_half

_SMALLEST_FLOAT16 = 2.0**-24
_LARGEST_LOG2_FLOAT16 = math.log2(LARGEST_FLOAT16)
_LARGE_PENALTY = 10.0
_DIVIDING = ("realdiv", "div", "rsqrt", "reciprocal", "inv", "divide")


def number_findings(evidence: Evidence) -> Iterator[Finding]:
    """Precision and optimizer."""
    half = half_precision(evidence)
    if half:
        yield from _cast(evidence)
        yield from _near_the_limit(evidence)
        yield from _lost_to_zero(evidence)
    yield from _precision_replays(evidence, half)
    yield from _uncast(evidence)
    yield from setting_findings(evidence)
    yield from _update_stage(evidence, half)


def _cast(evidence: Evidence) -> Iterator[Finding]:
    """A number of a wider format that float16 cannot hold, as the -1e9 of a mask."""
    first = evidence.first_nonfinite
    if first is None or first.op is None or op_name(first.op) != "cast":
        return
    for given in first.inputs:
        largest = max(abs(given.minimum), abs(given.maximum))
        if not given.nonfinite and largest > LARGEST_FLOAT16:
            yield Finding(
                "precision",
                5.0,
                f"{first.op} to float16, which ends at 65504, makes infinity of "
                f"{number(largest)}{f', at {first.source}' if first.source else ''}",
            )


def _near_the_limit(evidence: Evidence) -> Iterator[Finding]:
    first = evidence.first_nonfinite
    if first is None or first.stage == "data":
        return
    signal = largest_signal(evidence)
    distance = _LARGEST_LOG2_FLOAT16 - math.log2(signal) if signal > 0 else math.inf
    within = domain_fault(first, half=False) is None
    if within and distance < 12:
        yield Finding(
            "precision",
            2.5 if distance > -10 else 1.0,
            f"Numbers of {number(signal)} were computed in float16, which ends at 65504; "
            "float32 goes to 3.4e38",
        )


def _lost_to_zero(evidence: Evidence) -> Iterator[Finding]:
    """A zero that float32 need not have, in a logarithm or under a division."""
    first = evidence.first_nonfinite
    fault = None if first is None else domain_fault(first, half=True)
    if first is not None and fault is not None and fault.at_zero and first.stage != "update":
        yield Finding(
            "precision",
            1.5,
            f"{first.op} met an exact 0 in float16, where everything below "
            f"{_SMALLEST_FLOAT16 / 2:.0e} is 0",
        )


def _precision_replays(evidence: Evidence, half: bool) -> Iterator[Finding]:
    if evidence.facts.precision == "float32" and not half:
        return
    for result in evidence.tried("precision"):
        if result.value not in ("float32", "bfloat16", "mixed_bfloat16"):
            continue
        if result.survived:
            yield Finding("precision", 3.5, f"With {result.change} the same steps survive")
            yield Finding("loss_formula", -1.0)
        elif result.value == "float32" and evidence.step == 0 and result.steps > 0:
            # No update did that: what overflowed before any was the format's own limit.
            text = f"With {result.change} the first step is finite"
            yield Finding("precision", 2.5, f"{text}, though the run goes wrong there as well")
        elif result.value == "float32":
            yield Finding("precision", -4.0)


def _uncast(evidence: Evidence) -> Iterator[Finding]:
    """A float32 program with an op of its own in float16."""
    first = evidence.first_nonfinite
    if first is None or first.dtype != "float16" or is_half(evidence.facts.precision):
        return
    for one in evidence.survivors("domain"):
        if one.value == UNCAST:
            text = f"{first.op} computed in float16, which ends at 65504"
            yield Finding("precision", 4.0, f"{text}: with {one.change} the same steps survive")


def setting_findings(evidence: Evidence) -> Iterator[Finding]:
    """Settings of the optimizer that no run can survive, whatever went wrong."""
    facts = evidence.facts
    if facts.momentum >= 1:
        yield Finding(
            "optimizer",
            7.0,
            f"Momentum {facts.momentum:g} forgets nothing: below 1 is needed, "
            "or every update is added to all the earlier ones for ever",
        )
    elif facts.momentum < 0:
        yield Finding("optimizer", 2.0, f"Momentum is negative: {facts.momentum:g}")
    bad = False
    for name in ("beta_1", "beta_2", "rho"):
        value = _extra_number(evidence, name)
        if value is not None and not 0 <= value < 1:
            yield Finding("optimizer", 5.0, f"{name} is {value:g}, it must lie in [0, 1)")
            bad = True
    for one in evidence.survivors("optimizer_setting") if bad else ():
        # Nothing else is to be explained, not even weights that were broken by it.
        yield Finding("optimizer", 6.0, f"With {one.change} the same steps survive")
    settings = facts.extra.get("layer settings")
    if settings is not None:
        yield Finding("architecture", 7.0, f"A layer has a setting out of its range: {settings}")
    yield from _penalty(evidence)
    yield from _activity_penalty(evidence)
    decay = facts.weight_decay * (facts.learning_rate or 0.0)
    if decay > 1 or facts.weight_decay < 0:
        # Beyond 2 the weights change sign and grow at every step, whatever the gradient.
        yield Finding(
            "optimizer",
            8.0 if decay > 2 or facts.weight_decay < 0 else 4.0,
            f"Weight decay {facts.weight_decay:g} with learning rate {facts.learning_rate:g} "
            f"changes the weights by {number(decay)} times themselves a step",
        )


def _penalty(evidence: Evidence) -> Iterator[Finding]:
    """An L2 penalty whose gradient alone throws the weights across zero."""
    facts, factor = evidence.facts, _extra_number(evidence, "l2 penalty")
    if factor is None or "sgd" not in facts.optimizer.lower():
        return
    moved = 2.0 * factor * (facts.learning_rate or 0.0)
    if moved > 1:
        yield Finding(
            "loss_formula",
            8.0 if moved > 2 else 4.0,
            f"The L2 penalty {factor:g} with learning rate {facts.learning_rate:g} changes the "
            f"weights by {number(moved)} times themselves a step",
        )


def _activity_penalty(evidence: Evidence) -> Iterator[Finding]:
    """A penalty on what a layer puts out, of another order than any loss."""
    factor = _extra_number(evidence, "activity penalty")
    if factor is not None and factor > _LARGE_PENALTY and evidence.survivors("regulariser"):
        yield Finding(
            "loss_formula",
            8.0,
            f"The penalty on the output of a layer has the factor {factor:g} (0.01 and less is "
            "usual), and without it the same steps survive",
        )


def _extra_number(evidence: Evidence, name: str) -> float | None:
    try:
        return float(evidence.facts.extra[name])
    except (KeyError, ValueError):
        return None


def _update_stage(evidence: Evidence, half: bool) -> Iterator[Finding]:
    first, epsilon = evidence.first_nonfinite, evidence.facts.optimizer_epsilon
    if first is None or first.stage != "update":
        return
    divides = first.op is not None and op_name(first.op) in _DIVIDING
    where = f" of {first.layer}" if first.layer else ""
    if half and epsilon is not None and 0 < epsilon < _SMALLEST_FLOAT16:
        yield Finding(
            "precision",
            5.5,
            f"The gradients are finite but the update{where} is not: the optimizer's epsilon "
            f"{epsilon:g} is below float16's smallest number {_SMALLEST_FLOAT16:.1e} and rounds "
            "to 0, so a gradient of 0 gives 0/0",
        )
        return
    rescued = evidence.survivors("optimizer_epsilon")
    if epsilon is not None and epsilon < 1e-12:
        yield Finding(
            "optimizer",
            5.0,
            f"The gradients are finite but the update{where} is not: with epsilon {epsilon:g} "
            "the optimizer divides by 0 wherever a gradient has been 0",
        )
    elif divides or rescued:
        yield Finding(
            "optimizer", 3.0, f"The gradients are finite, but the optimizer's {first.op} is not"
        )
    elif largest_signal(evidence) < 1e6:
        yield Finding("optimizer", 2.0, f"All gradients are finite, but the update{where} is not")
    for result in rescued:
        yield Finding("optimizer", 2.5, f"With {result.change} the same steps survive")
