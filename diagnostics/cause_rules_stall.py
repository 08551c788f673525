"""Rules about runs that stay finite and do not learn."""

from __future__ import annotations

import math
from collections.abc import Iterator

from diagnostics.cause_rules_numbers import setting_findings
from diagnostics.evidence import Evidence, Finding
from diagnostics.layer_gain import gain_bits, layer_gains
from diagnostics.report_words import number
from diagnostics.signals import absurd_start, input_arrays, input_scale, unscaled
from diagnostics.stall import (
    FAINT_SIGNAL,
    IDLE_UPDATE,
    STILL_LAYER,
    StallSignals,
    stall_signals,
)
from diagnostics.tensor_stats import TensorStats

_BOUNCING = 0.05  # update ratio
_SATURATING = ("sigmoid", "tanh", "hard_sigmoid", "softsign")


def stall_findings(evidence: Evidence) -> Iterator[Finding]:
    """Why a loss never left that of guessing."""
    signals = stall_signals(evidence.telemetry, evidence.facts)
    yield from _vanishing(evidence, signals)
    yield from _constant_weights(evidence)
    yield from _dead_layers(evidence, signals)
    yield from _single_softmax(evidence)
    yield from _saturation(evidence, signals)
    yield from _normalised_away(evidence, signals)
    yield from _rate(evidence, signals)
    yield from setting_findings(evidence)
    yield from _constant_input(evidence)
    yield from _detached(evidence, signals)


def _vanishing(evidence: Evidence, signals: StallSignals) -> Iterator[Finding]:
    gains = layer_gains(evidence)
    shrunk = gain_bits(gains)[1]
    survived = [*evidence.survivors("init"), *evidence.survivors("init_scale")]
    if shrunk < -6:
        weakest = min(gains, key=lambda layer: layer.bits)
        yield Finding(
            "init",
            min(4.0, -0.3 * shrunk),
            f"The initial weights shrink the signal {number(2.0**-shrunk)} times from input to "
            f"output, up to {1 / weakest.gain:.2g} times in one layer ({weakest.name}: "
            f"{weakest.formula} = {weakest.gain:.2g}); "
            "gradients shrink in the same way on their way back",
        )
    if signals.faintest_scale is not None and 0 < signals.faintest_scale < FAINT_SIGNAL:
        yield Finding(
            "init",
            1.5 if shrunk < -6 else 0.5,
            f"The largest pre-activation of {signals.faintest_layer} is "
            f"{number(signals.faintest_scale)}: every input gets nearly the same answer",
        )
    if survived:
        names = ", ".join(one.change for one in survived[:3])
        yield Finding("init", 3.0, f"From step 0 with {names} the loss falls")
    elif evidence.tried("init"):
        yield Finding("init", -2.0)


def _constant_weights(evidence: Evidence) -> Iterator[Finding]:
    found = _constant_layer(evidence)
    if found is not None:
        name, stats = found
        yield Finding(
            "init",
            5.0,
            f"All {stats.size:,} initial weights of {name} are "
            f"{number(stats.minimum)}: its units are the same and stay the same",
        )


def _constant_layer(evidence: Evidence) -> tuple[str, TensorStats] | None:
    """The first hidden layer whose initial weights are all the same number."""
    weighted = [layer for layer in evidence.facts.layers if layer.weight is not None]
    for layer in weighted[:-1]:
        stats = evidence.initial_weight_stats.get(layer.weight or "")
        if stats is not None and stats.size > 1 and stats.minimum == stats.maximum:
            return layer.name, stats
    return None


def _dead_layers(evidence: Evidence, signals: StallSignals) -> Iterator[Finding]:
    if not signals.dead_layers:
        return
    names = ", ".join(signals.dead_layers[:3])
    since = signals.dead_since or 0
    text = f"Every unit of {names} is dead since step {since} (no pre-activation above 0)"
    amplified = gain_bits(layer_gains(evidence))[0]
    if since > 0 and amplified > 3.0:
        yield Finding(
            "init",
            3.0,
            f"The initial weights multiply the signal by {number(2.0**amplified)} from input to "
            "output, and the first updates with it",
        )
        yield Finding("init", 0.5, text)
    elif since > 0:
        absurd = absurd_start(evidence)
        if absurd:
            yield Finding("init", 2.0, f"{absurd}, and the gradients are as large")
        yield Finding("learning_rate", 3.0, f"{text}: an update before that pushed it there")
    elif _constant_layer(evidence) is None:  # which explains it
        yield Finding("architecture", 2.0, f"{text}: nothing behind it ever gets a gradient")
        if not evidence.survivors("init"):
            yield Finding("architecture", 1.0)


def _single_softmax(evidence: Evidence) -> Iterator[Finding]:
    """A softmax shares 1 out among its units: with a single one there is nothing to share."""
    for layer in evidence.facts.layers:
        if layer.kind == "dense" and layer.activation == "softmax" and layer.fan_out == 1:
            yield Finding(
                "architecture",
                6.0,
                f"{layer.name} ends in a softmax over a single unit, which is 1 whatever goes into "
                "it: a single unit takes a sigmoid",
            )


def _saturation(evidence: Evidence, signals: StallSignals) -> Iterator[Finding]:
    """A gradient that fades through saturating activations, or ends in one."""
    layers = [e for e in evidence.facts.layers if e.activation in _SATURATING]
    if layers and signals.unreached and not signals.dead_layers:
        text = (
            f"The gradient of {signals.unreached[0]} is exactly 0: {layers[0].activation} stands "
            "at its ends, where it is flat"
        )
        if unscaled(evidence):
            rms = number(input_scale(evidence)[0])
            yield Finding("data", 4.0, f"{text}, because the inputs are not scaled (RMS {rms})")
        else:
            yield Finding("architecture", 2.5, text)
    still = signals.still_ratio is not None and signals.still_ratio < STILL_LAYER
    moves = signals.update_ratio is not None and signals.update_ratio >= IDLE_UPDATE
    if len(layers) >= 3 and still and moves:
        yield Finding(
            "architecture",
            3.0,
            f"Through {len(layers)} layers of {layers[0].activation} the gradient fades: an "
            f"update changes some layer by {number(signals.update_ratio)} of its size, but "
            f"{signals.still_layer} by {number(signals.still_ratio)}",
        )


def _normalised_away(evidence: Evidence, signals: StallSignals) -> Iterator[Finding]:
    """Batch normalisation subtracts the batch's mean: of a single row nothing is left."""
    normalised = [e.name for e in evidence.facts.layers if e.kind == "BatchNormalization"]
    if evidence.facts.batch_size == 1 and normalised and signals.unreached:
        yield Finding(
            "architecture",
            4.0,
            f"{normalised[0]} normalises over a batch of one example, whose mean is the example "
            f"itself: nothing of it is left, and the gradient of {signals.unreached[0]} is exactly "
            "0; take larger batches, or LayerNormalization",
        )


def _rate(evidence: Evidence, signals: StallSignals) -> Iterator[Finding]:
    rate = evidence.facts.learning_rate
    if rate == 0:
        yield Finding("learning_rate", 7.0, "The learning rate is 0")
        return
    survivors = evidence.survivors("learning_rate")
    if survivors:
        # One that moves a run without signal says less than one that moves a healthy one.
        weight = 3.0 if not evidence.survivors("init") else 1.5
        yield Finding("learning_rate", weight, f"With {survivors[0].change} the loss falls")
    ratio, norm = signals.update_ratio, signals.gradient_norm
    if ratio is None or norm is None:
        return
    if 0 < ratio < IDLE_UPDATE and norm > 1e-3:
        yield Finding(
            "learning_rate",
            min(4.0, 1.5 + 0.5 * math.log10(IDLE_UPDATE / ratio)),
            f"An update changes no layer by more than {number(ratio)} of its size (0.001 is "
            f"usual), although the gradient norm is {number(norm)}: the rate "
            f"{'' if rate is None else f'{rate:g} '}is too small",
        )
    if ratio > _BOUNCING:
        yield Finding(
            "learning_rate",
            2.0,
            f"An update changes a layer by {number(ratio)} of its size (0.001 is usual): the "
            "weights jump about and settle nowhere",
        )


def _constant_input(evidence: Evidence) -> Iterator[Finding]:
    arrays = input_arrays(evidence)
    flat = [name for name, s in arrays.items() if s.size > 1 and s.minimum == s.maximum]
    if arrays and len(flat) == len(arrays):
        yield Finding("data", 5.0, f"Every number of '{flat[0]}' is the same: nothing to learn")


def _detached(evidence: Evidence, signals: StallSignals) -> Iterator[Finding]:
    """A loss that has no gradient although a signal reaches it."""
    alive = signals.faintest_scale is None or signals.faintest_scale > FAINT_SIGNAL
    if signals.gradient_norm == 0 and alive and not signals.dead_layers:
        yield Finding(
            "loss_formula",
            3.0,
            "The gradient is exactly 0 although a signal reaches the output: nothing connects "
            "the loss to the weights (rounding, argmax, a comparison, or saturation)",
        )
    elif signals.gradient_norm is not None and math.isfinite(signals.gradient_norm):
        yield Finding("loss_formula", -1.0)
