"""Rules about runs that stay finite and do not learn."""

from __future__ import annotations

import math
from collections.abc import Iterator

from diagnostics.evidence import Evidence, Finding
from diagnostics.report_words import number
from diagnostics.signals import gain_bits, input_arrays, layer_gains
from diagnostics.stall import StallSignals, stall_signals

_FAINT = 1e-2  # absolute pre-activations at the output
_SLOW = 1e-5  # update ratio


def stall_findings(evidence: Evidence) -> Iterator[Finding]:
    """Why a loss never left that of guessing."""
    signals = stall_signals(evidence.telemetry, evidence.facts)
    yield from _vanishing(evidence, signals)
    yield from _constant_weights(evidence)
    yield from _dead_layers(evidence, signals)
    yield from _slow(evidence, signals)
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
            f"sqrt(fan-in {weakest.fan_in:,} x {weakest.std:.3g}^2 / 2) = {weakest.gain:.2g}); "
            "gradients shrink in the same way on their way back",
        )
    if signals.output_scale is not None and 0 < signals.output_scale < _FAINT:
        yield Finding(
            "init",
            1.5 if shrunk < -6 else 0.5,
            f"At the output ({signals.output_layer}) the signal is "
            f"{number(signals.output_scale)}: every input gets the same answer",
        )
    if survived:
        names = ", ".join(one.change for one in survived[:3])
        yield Finding("init", 3.0, f"From step 0 with {names} the loss falls")
    elif evidence.tried("init"):
        yield Finding("init", -2.0)


def _constant_weights(evidence: Evidence) -> Iterator[Finding]:
    for layer in evidence.facts.layers:
        stats = evidence.initial_weight_stats.get(layer.weight or "")
        hidden = layer is not evidence.facts.layers[-1]
        if stats is not None and stats.size > 1 and stats.minimum == stats.maximum and hidden:
            yield Finding(
                "init",
                5.0,
                f"All {stats.size:,} initial weights of {layer.name} are "
                f"{number(stats.minimum)}: its units are the same and stay the same",
            )
            return


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
        yield Finding("learning_rate", 3.0, f"{text}: an update before that pushed it there")
    else:
        yield Finding("architecture", 2.0, f"{text}: nothing behind it ever gets a gradient")
        if not evidence.survivors("init"):
            yield Finding("architecture", 1.0)


def _slow(evidence: Evidence, signals: StallSignals) -> Iterator[Finding]:
    rate = evidence.facts.learning_rate
    if rate == 0:
        yield Finding("learning_rate", 7.0, "The learning rate is 0")
        return
    faster = [one for one in evidence.survivors("learning_rate") if _above(one.value, rate)]
    if faster:
        yield Finding("learning_rate", 3.0, f"With {faster[0].change} the loss falls")
    if signals.update_ratio is not None and signals.update_ratio < _SLOW:
        share = number(signals.update_ratio)
        healthy = signals.gradient_norm is not None and signals.gradient_norm > 1e-3
        if healthy:
            yield Finding(
                "learning_rate",
                1.5,
                f"An update changes the weights by {share} of their size (0.001 is usual), "
                f"although the gradient norm is {number(signals.gradient_norm)}",
            )


def _above(value: object, rate: float | None) -> bool:
    return isinstance(value, (int, float)) and rate is not None and value > rate


def _constant_input(evidence: Evidence) -> Iterator[Finding]:
    arrays = input_arrays(evidence)
    flat = [name for name, s in arrays.items() if s.size > 1 and s.minimum == s.maximum]
    if arrays and len(flat) == len(arrays):
        yield Finding("data", 5.0, f"Every number of '{flat[0]}' is the same: nothing to learn")


def _detached(evidence: Evidence, signals: StallSignals) -> Iterator[Finding]:
    """A loss that has no gradient although a signal reaches it."""
    alive = signals.output_scale is not None and signals.output_scale > _FAINT
    if signals.gradient_norm == 0 and alive and not signals.dead_layers:
        yield Finding(
            "loss_formula",
            3.0,
            "The gradient is exactly 0 although the output is "
            f"{number(signals.output_scale)}: nothing connects the loss to the weights "
            "(rounding, argmax, a comparison, or saturation)",
        )
    elif signals.gradient_norm is not None and math.isfinite(signals.gradient_norm):
        yield Finding("loss_formula", -1.0)
