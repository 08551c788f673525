"""Rules about the inputs: bad numbers, outliers, scale."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from diagnostics.evidence import Evidence, Finding
from diagnostics.layer_gain import gain_bits, layer_gains
from diagnostics.op_domains import domain_fault
from diagnostics.report_words import number, plural
from diagnostics.signals import (
    ABSURD_START,
    UNSCALED_INPUT,
    exploded,
    failed_checks,
    half_precision,
    input_arrays,
    input_scale,
    is_integer,
    label_arrays,
    learnt_first,
    lonely_peak,
    lonely_sentence,
    loss_over_chance,
    weight_arrays,
)
from diagnostics.telemetry_view import (
    input_absmax,
    preactivation_absmax,
)
from diagnostics.tensor_stats import TensorStats

_OUTLIER = 30.0  # times the usual largest input
_OUTGROWN = 1e3  # times the largest input


def data_findings(evidence: Evidence) -> Iterator[Finding]:
    """Inputs, and numbers that are not finite in inputs, labels or weights of examples."""
    yield from _not_finite(evidence)
    yield from _no_such_row(evidence)
    yield from _flat_when_adapted(evidence)
    yield from _outlier(evidence)
    yield from _suspect_examples(evidence)
    if exploded(evidence):
        yield from _unscaled_inputs(evidence)


def _not_finite(evidence: Evidence) -> Iterator[Finding]:
    first = evidence.first_nonfinite
    rows = ""
    if first is not None and first.stage == "data" and first.examples:
        names = ", ".join(first.example_names[:3]) or ", ".join(map(str, first.examples[:3]))
        rows = f", in {plural(len(first.examples), 'example')}: {names}"
    fed = {**input_arrays(evidence), **weight_arrays(evidence)}
    for kind, arrays in (("data", fed), ("labels", label_arrays(evidence))):
        for name, stats in arrays.items():
            if not stats.finite:
                yield Finding(kind, 8.0, f"{_broken(name, stats)} as fed to the step{rows}")
    tripped = [check for check in failed_checks(evidence) if check[0] == "data"]
    if ("data", "input") in tripped and all(s.finite for s in input_arrays(evidence).values()):
        yield Finding("data", 4.0, "The input became non-finite on its way into the first layer")


def _no_such_row(evidence: Evidence) -> Iterator[Finding]:
    """An index that an embedding has no row for."""
    if evidence.outcome is None:
        return
    rows = {layer.name: layer.fan_in for layer in evidence.facts.layers}
    for check in evidence.outcome.failed:
        if check.quantity == "indices":
            given = [s for s in input_arrays(evidence).values() if is_integer(s)]
            among = f" from {given[0].minimum:g} to {given[0].maximum:g}" if len(given) == 1 else ""
            yield Finding(
                "data",
                7.0,
                f"The embedding {check.layer} has {rows.get(check.layer)} rows, and was given "
                f"indices{among} that it has no row for",
            )


def _flat_when_adapted(evidence: Evidence) -> Iterator[Finding]:
    """A normalisation that was adapted to a column that did not vary, and then did."""
    inputs, telemetry = input_absmax(evidence.telemetry), evidence.telemetry
    for layer in evidence.facts.layers:
        variance = evidence.initial_weight_stats.get(f"statistics/{layer.name}/variance")
        peaks = preactivation_absmax(telemetry, layer.name)
        if layer.kind != "Normalization" or variance is None or variance.minimum != 0:
            continue
        if peaks is None or inputs is None:
            continue
        with np.errstate(invalid="ignore"):
            blown = peaks > _OUTGROWN * np.maximum(1.0, inputs)
        if blown.any():
            step = int(telemetry.steps[np.argmax(blown)])
            yield Finding(
                "data",
                6.0,
                f"{layer.name} was adapted to data of which a column never changed: it divides "
                f"that column by next to nothing, and put out {number(float(peaks[blown][0]))} at "
                f"step {step}, where the column did change",
            )


def _broken(name: str, stats: TensorStats) -> str:
    infinite = stats.pos_inf + stats.neg_inf
    parts = [f"{stats.nan:,} NaN"] if stats.nan else []
    parts += [f"{infinite:,} infinite"] if infinite else []
    return f"'{name}' holds {' and '.join(parts)} of {stats.size:,} numbers"


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
        if stats.size >= 100 and lonely_peak(stats):
            yield Finding("data", 3.0, lonely_sentence(name, stats))


def _suspect_examples(evidence: Evidence) -> Iterator[Finding]:
    first = evidence.first_nonfinite
    # A formula that fails on an ordinary row is the formula's fault.
    formula = first is not None and domain_fault(first, half_precision(evidence)) is not None
    for result in evidence.tried("without_examples"):
        if result.survived:
            weight = 0.5 if formula else 3.0
            yield Finding("data", weight, f"Replayed {result.change}, the step is finite")
        else:
            yield Finding("data", -2.0)
    if first is not None and first.examples and first.stage == "forward" and not formula:
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
    if learnt_first(evidence):
        weight *= 0.3  # it had learnt from the same numbers
    ratio = loss_over_chance(evidence)
    if ratio is not None and ratio > ABSURD_START and amplified <= 3.0:
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
