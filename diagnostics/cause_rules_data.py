"""Rules about what was fed: bad numbers, outliers, scale, labels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from diagnostics.evidence import Evidence, Finding
from diagnostics.report_words import number, plural
from diagnostics.signals import (
    UNSCALED_INPUT,
    UNSCALED_TARGET,
    exploded,
    first_loss,
    gain_bits,
    input_arrays,
    input_scale,
    is_integer,
    label_arrays,
    layer_gains,
    loss_over_chance,
    target_scale,
)
from diagnostics.telemetry_view import input_absmax
from diagnostics.tensor_stats import TensorStats

_OUTLIER = 30.0  # times the usual largest input
_PROBABILITY_LOSSES = ("crossentropy", "cross_entropy", "cross-entropy", "bce", "nll", "kl")


def data_findings(evidence: Evidence) -> Iterator[Finding]:
    """Inputs and labels."""
    yield from _not_finite(evidence)
    yield from _label_range(evidence)
    yield from _outlier(evidence)
    yield from _suspect_examples(evidence)
    if exploded(evidence):
        yield from _unscaled_inputs(evidence)
        yield from _unscaled_targets(evidence)


def _not_finite(evidence: Evidence) -> Iterator[Finding]:
    first = evidence.first_nonfinite
    rows = ""
    if first is not None and first.stage == "data" and first.examples:
        names = ", ".join(first.example_names[:3]) or ", ".join(map(str, first.examples[:3]))
        rows = f", in {plural(len(first.examples), 'example')}: {names}"
    for kind, arrays in (("data", input_arrays(evidence)), ("labels", label_arrays(evidence))):
        for name, stats in arrays.items():
            if not stats.finite:
                yield Finding(kind, 8.0, f"{_broken(name, stats)} as fed to the step{rows}")
    tripped = [check for check in _failed(evidence) if check[0] == "data"]
    if ("data", "input") in tripped and all(s.finite for s in input_arrays(evidence).values()):
        yield Finding("data", 4.0, "The input became non-finite on its way into the first layer")


def _failed(evidence: Evidence) -> list[tuple[str, str]]:
    if evidence.outcome is None:
        return []
    return [(check.stage, check.quantity) for check in evidence.outcome.failed]


def _broken(name: str, stats: TensorStats) -> str:
    infinite = stats.pos_inf + stats.neg_inf
    parts = [f"{stats.nan:,} NaN"] if stats.nan else []
    parts += [f"{infinite:,} infinite"] if infinite else []
    return f"'{name}' holds {' and '.join(parts)} of {stats.size:,} numbers"


def _label_range(evidence: Evidence) -> Iterator[Finding]:
    if evidence.label_range is None or not all(map(math.isfinite, evidence.label_range)):
        return
    low, high = evidence.label_range
    classes, loss = evidence.facts.classes, evidence.facts.loss.lower()
    refused = ("data", "labels") in _failed(evidence)
    if classes and (_class_numbers(evidence) or refused):
        if low < 0 or high >= classes:
            hint = ""
            if low >= 1 and high == classes:
                hint = "; they look numbered from 1: subtract 1"
            text = f"Labels run from {low:g} to {high:g}, but the net has {classes} classes "
            yield Finding("labels", 7.0, f"{text}(0 to {classes - 1}){hint}")
        return
    is_probability = any(word in loss for word in _PROBABILITY_LOSSES)
    if is_probability and (low < 0 or high > 1):
        yield Finding(
            "labels",
            5.0,
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


def _class_numbers(evidence: Evidence) -> bool:
    """Whether the labels are class numbers, as against probabilities or targets."""
    if "sparse" in evidence.facts.loss.lower():
        return True
    return any(is_integer(stats) for stats in label_arrays(evidence).values())


def _outlier(evidence: Evidence) -> Iterator[Finding]:
    """An input far beyond what the steps before were fed."""
    recorded = input_absmax(evidence.telemetry)
    if recorded is None:
        return
    _, largest = input_scale(evidence)
    usual, steps = _usual_input(evidence)
    if steps and largest > _OUTLIER * usual:
        yield Finding(
            "data",
            4.0 if largest < 1e3 * usual else 6.0,
            f"This batch holds an input of {number(largest)}; the {steps:,} steps before "
            f"were fed at most {number(usual)} (median)",
        )
    elif not steps:
        yield from _lonely_peak(evidence)
    yield from _outlier_at_onset(evidence, recorded)


def _usual_input(evidence: Evidence) -> tuple[float, int]:
    """(median of the largest inputs, number of steps) before the failing step.

    (0, 0) if fewer than three steps were recorded.
    """
    recorded = input_absmax(evidence.telemetry)
    if recorded is None:
        return 0.0, 0
    before = recorded[(evidence.telemetry.steps < evidence.step) & np.isfinite(recorded)]
    usual = float(np.median(before)) if before.size >= 3 else 0.0
    return (usual, before.size) if usual > 0 else (0.0, 0)


def _outlier_at_onset(evidence: Evidence, recorded: np.ndarray) -> Iterator[Finding]:
    """An outlier whose update threw the weights, so that a later step failed."""
    steps, onset = evidence.telemetry.steps, evidence.onset
    if onset is None or steps.size < 2:
        return
    near = (np.abs(steps - onset.step) <= 1) & (steps < evidence.step) & np.isfinite(recorded)
    if not near.any() or near.all():
        return
    row = int(np.flatnonzero(near)[np.argmax(recorded[near])])
    usual = float(np.median(np.delete(recorded, row)))
    if usual > 0 and recorded[row] > _OUTLIER * usual:
        yield Finding(
            "data",
            8.0 if recorded[row] > 1e3 * usual else 5.0,
            f"Step {steps[row]}, where it began, was fed an input of {number(recorded[row])}; "
            f"the other steps got at most {number(usual)} (median)",
        )
        # The update that followed was large because of that input, not of the rate.
        yield Finding("learning_rate", -2.0)


def _lonely_peak(evidence: Evidence) -> Iterator[Finding]:
    """One number that makes up most of the batch's RMS, where there is no history."""
    for name, stats in input_arrays(evidence).items():
        if is_integer(stats) or stats.size < 100 or not stats.rms:
            continue
        share = (stats.absmax / stats.rms) ** 2 / stats.size
        if share > 0.2 and stats.absmax > 1e3:
            yield Finding(
                "data",
                3.0,
                f"A single number of '{name}' is {number(stats.absmax)}, "
                f"{number(stats.absmax / stats.rms)} times the RMS of all {stats.size:,}",
            )


def _suspect_examples(evidence: Evidence) -> Iterator[Finding]:
    first = evidence.first_nonfinite
    for result in evidence.tried("without_examples"):
        if result.survived:
            yield Finding("data", 3.0, f"Replayed {result.change}, the step is finite")
        else:
            yield Finding("data", -2.0)
    if first is not None and first.examples and first.stage == "forward":
        yield Finding(
            "data",
            1.0,
            f"Only {plural(len(first.examples), 'example')} of the batch "
            f"({', '.join(map(str, first.examples[:4]))}) went wrong, the rest is finite",
        )


def _unscaled_inputs(evidence: Evidence) -> Iterator[Finding]:
    rms, largest = input_scale(evidence)
    usual, steps = _usual_input(evidence)
    if steps and largest > _OUTLIER * usual:
        return  # one outlier, not the scale of all
    if rms < UNSCALED_INPUT:
        yield Finding("data", -1.0)
        return
    amplified = gain_bits(layer_gains(evidence))[0]
    weight = min(4.5, 0.6 + 1.6 * (math.log10(rms) - 1.0))
    if amplified > 3.0:
        weight *= 0.4
    ratio = loss_over_chance(evidence)
    if ratio is not None and ratio > 4 and amplified <= 3.0:
        weight += 1.5
    yield Finding(
        "data",
        weight,
        f"The inputs are not scaled: RMS {number(rms)}, largest {number(largest)}, "
        "where layers are made for about 1",
    )
    for result in evidence.tried("input_scale"):
        if result.survived:
            yield Finding("data", 2.0, f"With {result.change} the same steps survive")
        else:
            yield Finding("data", -2.5)


def _unscaled_targets(evidence: Evidence) -> Iterator[Finding]:
    """Regression towards numbers of hundreds and more."""
    rms, name = target_scale(evidence)
    if rms <= UNSCALED_TARGET:
        return
    loss = first_loss(evidence)
    began = f", so the loss began at {number(loss)}" if loss else ""
    yield Finding(
        "data",
        min(4.0, 0.9 * (math.log10(rms) - 1.0)),
        f"The targets '{name}' are not scaled: RMS {number(rms)}{began}",
    )
