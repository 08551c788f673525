"""Rules about signals that grow: the initialiser against the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from diagnostics.evidence import Evidence, Finding
from diagnostics.layer_gain import LayerGain, gain_bits, layer_gains
from diagnostics.report_words import number
from diagnostics.signals import (
    absurd_start,
    amplification,
    exploded,
    first_loss,
    largest_update,
    learnt_first,
    loss_over_chance,
    unscaled,
)
from diagnostics.telemetry_view import scalar_column

_LARGE_PARAMETER = 30.0  # RMS
_EXPLODES = 3.0  # bits of amplification that a net may have and still train
_ADAPTIVE = ("adam", "rmsprop", "adagrad", "nadam", "adamw", "adamax", "ftrl", "lion", "lamb")
# Of SGD it is rate / (1 - momentum) that counts.
_LARGE_RATE = {"adaptive": 0.03, "sgd": 1.0}


def scale_findings(evidence: Evidence) -> Iterator[Finding]:
    """Initialiser and learning rate, where something grew out of bounds."""
    yield from _impossible_rate(evidence)
    if not exploded(evidence):
        return
    gains = layer_gains(evidence)
    amplified = gain_bits(gains)[0]
    yield from _gains(evidence, gains, amplified)
    yield from _first_step(evidence, amplified)
    yield from _large_parameters(evidence)
    yield from _init_replays(evidence, amplified)
    yield from _rate(evidence)
    yield from _schedule(evidence)
    # An ordinary rate on unscaled numbers makes large updates, and a smaller one survives.
    innocent = _ordinary_rate(evidence) and unscaled(evidence) and not learnt_first(evidence)
    share = 0.4 if innocent else 1.0
    for finding in (*_updates(evidence), *_rate_replays(evidence, amplified)):
        yield finding._replace(weight=finding.weight * (share if finding.weight > 0 else 1.0))


def _gains(evidence: Evidence, gains: list[LayerGain], amplified: float) -> Iterator[Finding]:
    if not gains:
        return
    if amplified < 2.0:
        yield Finding("init", -1.5)
        return
    yield Finding("init", min(5.0, 0.5 * (amplified - 1.5)), _gain_sentence(gains, amplified))
    if amplified > 2 * _EXPLODES:
        yield from _initialiser(evidence, gains)


def _gain_sentence(gains: list[LayerGain], amplified: float) -> str:
    strongest = max(gains, key=lambda layer: layer.bits)
    return (
        f"The initial weights multiply the signal by {number(2.0**amplified)} from input to "
        f"output: up to {strongest.gain:.2g} times in one layer ({strongest.name}: "
        f"{strongest.formula}), where 1 keeps it"
    )


def _initialiser(evidence: Evidence, gains: list[LayerGain]) -> Iterator[Finding]:
    """What was asked for, and what it ought to have been."""
    spreads = [layer.std for layer in gains]
    alike = max(spreads) < 1.15 * min(spreads)
    asked = f" (asked for: {evidence.facts.init})" if evidence.facts.init else ""
    if alike and len(gains) >= 3:
        widest = max(gains, key=lambda layer: layer.fan_in)
        yield Finding(
            "init",
            0.5,
            f"Every layer has the same standard deviation {spreads[0]:.3g}{asked}, whatever its "
            f"fan-in; {widest.name} would keep its signal at "
            f"sqrt(2/{widest.fan_in:,}) = {math.sqrt(2 / widest.fan_in):.2g}",
        )
    note = evidence.facts.extra.get("init_note")
    if note:
        yield Finding("init", 0.5, note, place=2.9)


def _first_step(evidence: Evidence, amplified: float) -> Iterator[Finding]:
    """Whether step 0 was already absurd, before anything was learnt."""
    ratio, seen, loss = loss_over_chance(evidence), amplification(evidence), first_loss(evidence)
    absurd_loss = absurd_start(evidence)
    if absurd_loss and amplified > 2.0:
        yield Finding("init", min(3.0, 0.8 * math.log10(ratio or 1.0) + 0.7), absurd_loss)
    if seen is not None and seen[0] > 300:
        text = (
            f"At step 0 the pre-activations of {seen[1]} are already {number(seen[0])} times "
            "as large as the input"
        )
        weight = min(2.5, 0.4 * math.log10(seen[0]))
        if layer_gains(evidence) and amplified < 2.0:
            # Kernels that keep the scale did not do that.
            text += ", although the kernels keep its scale: an activation or layer multiplies it"
            yield Finding("architecture", weight, text)
            for one in evidence.survivors("layer_scale"):
                yield Finding("architecture", 3.0, f"With the {one.change} the same steps survive")
        else:
            yield Finding("init", weight, text)
    absurd = absurd_loss is not None or (seen is not None and seen[0] > 300)
    if evidence.onset is not None and not absurd and amplified < 2 * _EXPLODES:
        if not unscaled(evidence) or learnt_first(evidence):
            yield Finding("learning_rate", 2.0, _sane_start(evidence, loss))
        if evidence.onset.step > 0:
            yield Finding("init", -1.5)


def _sane_start(evidence: Evidence, loss: float | None) -> str:
    onset = evidence.onset
    assert onset is not None
    began = "" if loss is None else f"Step 0 is sane (loss {number(loss)}); "
    where = f" of {onset.layer}" if onset.layer else ""
    return (
        f"{began}from step {onset.step} on the {onset.quantity.replace('_', ' ')}{where} grows "
        f"{number(onset.growth_per_step)} times a step"
    )


def _large_parameters(evidence: Evidence) -> Iterator[Finding]:
    """Embeddings, biases and the like that begin far from 1; kernels have a gain of their own."""
    kernels = {e.weight for e in evidence.facts.layers if e.weight and e.kind != "Embedding"}
    for name, stats in evidence.initial_weight_stats.items():
        if name.startswith("params/") and name not in kernels and stats.rms > _LARGE_PARAMETER:
            yield Finding(
                "init",
                min(5.0, 2.0 + math.log10(stats.rms)),
                f"{name.removeprefix('params/')} begins with RMS {number(stats.rms)}, "
                "where layers are made for about 1",
            )


def _init_replays(evidence: Evidence, amplified: float) -> Iterator[Finding]:
    tried = evidence.tried("init") + evidence.tried("init_scale")
    survived = [one for one in tried if one.survived]
    if survived:
        names = ", ".join(one.change for one in survived[:3])
        yield Finding(
            "init",
            3.0 if amplified > _EXPLODES else 1.0,
            f"From step 0 with {names} and nothing else changed, the run survives",
        )
    elif tried:
        yield Finding("init", -2.5)


def _updates(evidence: Evidence) -> Iterator[Finding]:
    found = largest_update(evidence)
    if found is not None and found[0] > 0.2:
        ratio, layer, step = found
        yield Finding(
            "learning_rate",
            1.5,
            f"The update of step {step} was {ratio:.2g} times the size of the weights of "
            f"{layer} themselves (0.001 is usual)",
        )


def _impossible_rate(evidence: Evidence) -> Iterator[Finding]:
    """A rate that no run survives, asked for or made by a schedule."""
    rates = scalar_column(evidence.telemetry, "lr")
    asked = evidence.facts.learning_rate
    used = asked if rates is None or not rates.size else float(rates[-1])
    for rate in dict.fromkeys((asked, used)):
        if rate is not None and (rate < 0 or not math.isfinite(rate)):
            yield Finding("learning_rate", 8.0, f"The learning rate is {rate:g}")
            return


def _rate(evidence: Evidence) -> Iterator[Finding]:
    rate = evidence.facts.learning_rate
    if rate is None or rate < 0 or not math.isfinite(rate):
        return
    excess = _rate_excess(evidence)
    if excess > 1:
        yield Finding(
            "learning_rate",
            min(3.0, 1.2 + math.log10(excess)),
            f"The learning rate {rate:g} is large for {evidence.facts.optimizer or 'SGD'}",
        )


def _schedule(evidence: Evidence) -> Iterator[Finding]:
    """A schedule that raised the rate, beyond a warm-up."""
    rates = scalar_column(evidence.telemetry, "lr")
    asked = evidence.facts.learning_rate
    if rates is None or rates.size < 2 or not np.isfinite(rates).all() or rates[0] <= 0:
        return
    usual = max(float(rates[0]), asked or 0.0)
    if evidence.facts.warmup_steps == 0 and rates[-1] > 5 * usual:
        yield Finding(
            "learning_rate",
            3.0,
            f"The schedule raised the learning rate from {rates[0]:.3g} to {rates[-1]:.3g}",
        )


def _rate_excess(evidence: Evidence) -> float:
    """The learning rate over what is large for the optimizer; 0 if unknown."""
    facts = evidence.facts
    rate = facts.learning_rate or 0.0
    if any(word in facts.optimizer.lower() for word in _ADAPTIVE):
        return rate / _LARGE_RATE["adaptive"]
    return rate / (1.0 - min(max(facts.momentum, 0.0), 0.99)) / _LARGE_RATE["sgd"]


def _ordinary_rate(evidence: Evidence) -> bool:
    return evidence.facts.learning_rate is not None and _rate_excess(evidence) <= 0.3


def _rate_replays(evidence: Evidence, amplified: float) -> Iterator[Finding]:
    tried = evidence.tried("learning_rate")
    survived = [one for one in tried if one.survived]
    if survived:
        largest = max(survived, key=lambda one: float(one.value or 0.0))
        weight = 2.5 if amplified < _EXPLODES else 1.0
        yield Finding("learning_rate", weight, f"With {largest.change} the same steps survive")
    elif tried:
        smallest = min(float(one.value or 0.0) for one in tried)
        yield Finding("learning_rate", -3.0)
        if amplified > _EXPLODES:
            yield Finding("init", 1.0, f"No learning rate down to {smallest:g} survives")
    gentle = evidence.survivors("warmup") + evidence.survivors("clip_norm")
    if gentle and amplified < _EXPLODES:
        names = " and ".join(one.change for one in gentle[:2])
        yield Finding("learning_rate", 0.7, f"It survives with {names} too")
