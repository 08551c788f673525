"""Rules about labels and targets, and about losses that do not fit them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from diagnostics.evidence import Evidence, Finding
from diagnostics.report_words import number
from diagnostics.signals import (
    UNSCALED_TARGET,
    exploded,
    failed_checks,
    first_loss,
    is_integer,
    label_arrays,
    lonely_peak,
    lonely_sentence,
    takes_probabilities,
    target_scale,
    weight_arrays,
)
from diagnostics.survival import DIFFERENCE_LOSSES, bottomless
from diagnostics.telemetry_view import layer_names, preactivations_of_row, scalar_column

_LARGE_WEIGHT = 100.0


def label_findings(evidence: Evidence) -> Iterator[Finding]:
    """Labels out of range, outliers among them, targets and losses out of proportion."""
    yield from _label_range(evidence)
    yield from _no_such_class(evidence)
    yield from _lonely_label(evidence)
    yield from _bottomless_loss(evidence)
    yield from _loss_out_of_proportion(evidence)
    if exploded(evidence):
        yield from _weighted(evidence)
        yield from _unscaled_targets(evidence)


def _label_range(evidence: Evidence) -> Iterator[Finding]:
    if evidence.label_range is None or not all(map(math.isfinite, evidence.label_range)):
        return
    low, high = evidence.label_range
    classes = _known_classes(evidence)
    if classes:
        if _beyond_classes(evidence):
            hint = ""
            if low >= 1 and high == classes:
                hint = "; they look numbered from 1: subtract 1"
            text = f"Labels run from {low:g} to {high:g}, but the net has {classes} classes "
            yield Finding("labels", 7.0, f"{text}(0 to {classes - 1}){hint}")
        return
    if _beyond_probability(evidence):
        loss = scalar_column(evidence.telemetry, "loss")
        below = loss is not None and bool((loss < 0).any())  # no cross-entropy is
        yield Finding(
            "labels",
            8.0 if below else 5.0,
            f"The loss '{evidence.facts.loss}' takes labels between 0 and 1, and these run "
            f"from {number(low)} to {number(high)}: it has no lower bound then",
        )
    first = evidence.first_nonfinite
    if first is not None and first.stage == "loss" and low < 0:
        for given in first.inputs:
            if (given.minimum, given.maximum) == (low, high):
                yield Finding(
                    "labels", 5.0, f"{first.op} is applied to labels as low as {number(low)}"
                )


def _no_such_class(evidence: Evidence) -> Iterator[Finding]:
    """A class number was refused, where the number of classes is not known: several outputs."""
    refused = ("data", "labels") in failed_checks(evidence)
    arrays = label_arrays(evidence)
    if not refused or evidence.facts.classes or not all(s.finite for s in arrays.values()):
        return
    spans = ", ".join(
        f"'{name}' runs from {stats.minimum:g} to {stats.maximum:g}"
        for name, stats in arrays.items()
        if is_integer(stats)
    )
    yield Finding("labels", 7.0, f"A label names a class that its output does not have: {spans}")


def _beyond_probability(evidence: Evidence) -> bool:
    """Whether labels that ought to be probabilities are not."""
    fits = takes_probabilities(evidence.facts) and not _class_numbers(evidence)
    if evidence.label_range is None or not fits:
        return False
    return evidence.label_range[0] < 0 or evidence.label_range[1] > 1


def _known_classes(evidence: Evidence) -> int:
    """How many classes the labels may name; 0 where they are not class numbers."""
    refused = ("data", "labels") in failed_checks(evidence)
    return (evidence.facts.classes or 0) if _class_numbers(evidence) or refused else 0


def _beyond_classes(evidence: Evidence) -> bool:
    """Whether labels that ought to be class numbers are none."""
    classes, span = _known_classes(evidence), evidence.label_range
    return classes > 0 and span is not None and (span[0] < 0 or span[1] >= classes)


def _class_numbers(evidence: Evidence) -> bool:
    """Whether the labels are class numbers, as against probabilities or targets."""
    if "sparse" in evidence.facts.loss.lower():
        return True
    return any(is_integer(stats) for stats in label_arrays(evidence).values())


def _lonely_label(evidence: Evidence) -> Iterator[Finding]:
    if target_scale(evidence)[1]:
        for name, stats in label_arrays(evidence).items():
            if lonely_peak(stats):
                yield Finding("labels", 5.0, lonely_sentence(name, stats))


def _weighted(evidence: Evidence) -> Iterator[Finding]:
    """Weights of the losses in the hundreds multiply every gradient."""
    weights = evidence.facts.extra.get("loss weights")
    if weights is not None:
        began = first_loss(evidence)
        text = "" if began is None else f", so it began at {number(began)}"
        yield Finding("loss_formula", 4.5, f"The loss is weighted with {weights}{text}")
    heaviest = max(_example_weights(evidence), default=0.0)
    if heaviest > _LARGE_WEIGHT:
        yield Finding(
            "loss_formula",
            4.5,
            f"Some examples of the batch are weighted with {number(heaviest)}, and their "
            "gradients with it",
        )
    for one in (*evidence.survivors("loss_weights"), *evidence.survivors("example_weights")):
        yield Finding("loss_formula", 3.0, f"With {one.change} the same steps survive")


def _example_weights(evidence: Evidence) -> list[float]:
    arrays = weight_arrays(evidence).values()
    return [stats.absmax for stats in arrays if math.isfinite(stats.absmax)]


def _loss_out_of_proportion(evidence: Evidence) -> Iterator[Finding]:
    """A loss that outputs and labels of ordinary size cannot have, where it all began."""
    facts, telemetry, onset = evidence.facts, evidence.telemetry, evidence.onset
    loss, names = scalar_column(telemetry, "loss"), layer_names(telemetry)
    if facts.classes or facts.chance_loss or loss is None or not loss.size or not names:
        return
    # Without an onset the last step came out of the blue.
    began = int(telemetry.steps[-1]) if onset is None else onset.step
    row = int(np.searchsorted(telemetry.steps, began))
    outputs = preactivations_of_row(telemetry, row).get(names[-1], math.nan)
    targets = [s.absmax for s in label_arrays(evidence).values() if math.isfinite(s.absmax)]
    usual = outputs**2 + max(targets, default=0.0) ** 2 + 1.0
    if not targets or not outputs < 1e3 or not usual < 1e8 or not abs(loss[row]) > 1e4 * usual:
        return
    text = (
        f"Step {began}, where it began, has loss {number(float(loss[row]))}, although its "
        f"outputs are at most {number(outputs)} and the labels of this batch {number(max(targets))}"
    )
    if facts.extra.get("loss weights"):
        return  # they did it, see `_weighted`
    if any(word in facts.loss.lower() for word in DIFFERENCE_LOSSES):
        yield Finding("labels", 4.0, f"{text}: labels of that step must have been far larger")
    else:
        yield Finding("loss_formula", 3.0, f"{text}: the formula blows them up")


def _bottomless_loss(evidence: Evidence) -> Iterator[Finding]:
    loss = scalar_column(evidence.telemetry, "loss")
    finite = np.zeros(0) if loss is None else loss[np.isfinite(loss)]
    if _beyond_probability(evidence) or _beyond_classes(evidence) or not finite.size:
        return  # which explains it
    if bottomless(evidence.telemetry):
        yield Finding(
            "loss_formula",
            8.0,
            f"The loss falls to {number(float(finite[-1]))} and would fall for ever: it has no "
            "lower bound (a wrong sign, or a term that rewards growth)",
        )


def _unscaled_targets(evidence: Evidence) -> Iterator[Finding]:
    """Regression towards numbers of hundreds and more."""
    rms, name = target_scale(evidence)
    if rms <= UNSCALED_TARGET or lonely_peak(label_arrays(evidence)[name]):
        return
    loss = first_loss(evidence)
    began = f", so the loss began at {number(loss)}" if loss else ""
    yield Finding(
        "data",
        min(4.0, 0.9 * (math.log10(rms) - 1.0)),
        f"The targets '{name}' are not scaled: RMS {number(rms)}{began}",
    )
    for result in evidence.tried("target_scale"):
        survived = f"With {result.change} the same steps survive" if result.survived else ""
        yield Finding("data", 2.0 if result.survived else -2.0, survived)
