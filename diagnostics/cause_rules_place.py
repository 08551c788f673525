"""Rules that read the place: which stage, which op, what went into it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from diagnostics.diagnosis import FirstNonfinite
from diagnostics.evidence import Evidence, Finding
from diagnostics.layer_gain import gain_bits, layer_gains
from diagnostics.op_domains import UNCAST, DomainFault, domain_fault, op_name
from diagnostics.protocol import LayerFacts
from diagnostics.report_words import number, plural
from diagnostics.signals import (
    HUGE,
    RECURRENT,
    UNBOUNDED,
    exploded,
    half_precision,
    in_recurrence,
    largest_signal,
    out_of_nowhere,
    unscaled,
)
from diagnostics.telemetry_view import input_absmax, overwritten, preactivations_of_row

_UNBOUNDED_ACTIVATIONS = ("exp", "exponential")
_OUTGROWN = 1e3  # times all that came before


def place_findings(evidence: Evidence) -> Iterator[Finding]:
    """Hardware, damaged weights, formulas outside their domain."""
    if evidence.verdict == "not_reproduced":
        yield Finding(
            "hardware",
            9.0,
            "The same step on the same state and batch, run again twice, came out finite: "
            "the failure was not in the program but passed (memory, device or driver)",
        )
        return
    yield from _weights(evidence)
    first = evidence.first_nonfinite
    if first is not None and first.stage in ("forward", "loss", "backward"):
        yield from _formula(evidence, first)
        yield from _bare_loss(evidence, first)
    if first is not None and first.stage in ("forward", "loss", "backward", "update"):
        yield from _out_of_nowhere(evidence, first)
    yield from _unbounded_activation(evidence)
    yield from _recurrence(evidence)
    yield from _alignment(evidence)
    yield from _at_once(evidence)


def _weights(evidence: Evidence) -> Iterator[Finding]:
    broken = {n: s for n, s in evidence.weight_stats.items() if not s.finite}
    first = evidence.first_nonfinite
    if broken or (first is not None and first.stage == "weights"):
        yield Finding("weights", 8.0, _broken_weights(evidence, broken))
    onset = evidence.onset
    if onset is None or broken or onset.quantity != "weight_norm":
        return
    row = int(np.searchsorted(evidence.telemetry.steps, onset.step))
    if overwritten(evidence.telemetry, onset.layer or "", row):
        yield Finding(
            "weights",
            6.0,
            f"The weights of {onset.layer} entered step {onset.step} with norm "
            f"{number(onset.value)}, {number(onset.growth_per_step)} times that of the step "
            "before, which no recorded update explains: they were overwritten",
        )


def _broken_weights(evidence: Evidence, broken: dict) -> str:
    count = sum(s.nan + s.pos_inf + s.neg_inf for s in broken.values())
    names = ", ".join(list(broken)[:3]) or "the weights"
    text = f"{names} held {plural(count, 'non-finite number')} before step {evidence.step} ran"
    if evidence.step == 0:
        return f"{text}: they were loaded or drawn that way"
    return (
        f"{text}, although every earlier update was checked to be finite: a damaged "
        "checkpoint, or something wrote to them from outside the training step"
    )


def _formula(evidence: Evidence, first: FirstNonfinite) -> Iterator[Finding]:
    half = half_precision(evidence)
    fault = domain_fault(first, half)
    if fault is None:
        return
    kind = _owner(evidence, first)
    sane = _sanity(evidence, fault)
    if half and any(one.value == "float32" for one in evidence.survivors("precision")):
        sane *= 0.4  # the formula is sound where numbers are not rounded to 0 or infinity
    where = f"layer {first.layer}" if first.layer else "the model"
    if kind == "loss_formula":
        where = "the loss"
    rows = ""
    if first.examples:
        rows = f" (in {plural(len(first.examples), 'example')} of the batch)"
    sentence = f"{first.op} in {where} computes {fault.what}{rows}"
    if first.source:
        sentence += f", at {first.source}"
    if sane == 1.0:
        sentence += f"; what goes into it is no larger than {number(fault.magnitude)}"
    yield Finding(kind, 4.5 * sane, sentence)
    if half and any(given.nonfinite for given in first.inputs):
        yield Finding(
            "precision",
            5.0,
            "In float16, which ends at 65504, a constant such as -1e9 is itself infinite",
        )
    domain = [one for one in evidence.survivors("domain") if one.value != UNCAST]
    for survivor in (*evidence.survivors("loss_formula"), *domain):
        yield Finding(kind, 3.0 * sane, f"With {survivor.change} the same steps stay finite")
    yield from _unbounded_output(evidence, kind)


def _unbounded_output(evidence: Evidence, kind: str) -> Iterator[Finding]:
    """Which layer feeds the loss, where nothing keeps its output between 0 and 1."""
    name = evidence.facts.extra.get("output layer")
    last = next((layer for layer in evidence.facts.layers if layer.name == name), None)
    if kind != "loss_formula" or last is None or last.activation in ("sigmoid", "softmax"):
        return
    plain = last.activation in (None, "linear")
    ends = "has no activation" if plain else f"ends in {last.activation}"
    value = "0" if last.activation == "relu" else "any number"
    sentence = f"The loss is fed by {last.name}, which {ends}: its output may be {value}"
    yield Finding(kind, 0.1, sentence)


def _out_of_nowhere(evidence: Evidence, first: FirstNonfinite) -> Iterator[Finding]:
    """A number that the op's surroundings do not explain."""
    if not out_of_nowhere(evidence) or domain_fault(first, half_precision(evidence)) is not None:
        return
    fed = max(max(abs(given.minimum), abs(given.maximum)) for given in first.inputs)
    kind = "optimizer" if first.stage == "update" else _owner(evidence, first)
    where = {"loss": " of the loss", "update": " of the update"}.get(first.stage, "")
    if not where and first.layer:
        where = f" in {first.layer}"
    sentence = (
        f"{first.op}{where} was fed {number(fed)}, although weights, gradients and signals around "
        "it are of ordinary size: a constant or a formula in there made that number"
    )
    if first.source:
        sentence += f", at {first.source}"
    yield Finding(kind, 2.0, sentence)


def _owner(evidence: Evidence, first: FirstNonfinite) -> str:
    """Whose formula it is: the loss's, or a layer's."""
    layers = {layer.name for layer in evidence.facts.layers}
    if first.stage == "forward" or (first.stage == "backward" and first.layer in layers):
        return "architecture"
    return "loss_formula"


def _sanity(evidence: Evidence, fault: DomainFault) -> float:
    """1 for a formula fed with ordinary numbers, less where they had exploded before."""
    signal = max(_signal_before(evidence), 0.0 if fault.at_zero else fault.magnitude)
    if signal <= 1e4:
        return 1.0
    return 0.8 if signal <= HUGE else 0.35


def _signal_before(evidence: Evidence) -> float:
    """Largest finite pre-activation of the failing step, up to the failing layer."""
    if not evidence.telemetry.steps.size:
        return 0.0
    largest = 0.0
    for value in preactivations_of_row(evidence.telemetry, -1).values():
        if not math.isfinite(value):
            break
        largest = max(largest, value)
    return largest


def _bare_loss(evidence: Evidence, first: FirstNonfinite) -> Iterator[Finding]:
    """The loss is not finite although ordinary numbers went into it, by an unknown way."""
    known = domain_fault(first, half_precision(evidence)) is not None
    if first.stage == "loss" and not known and largest_signal(evidence) < 1e4:
        yield Finding(
            "loss_formula",
            2.5,
            f"Everything before the loss is finite and at most "
            f"{number(largest_signal(evidence))}, yet the loss is not finite",
        )


def _unbounded_activation(evidence: Evidence) -> Iterator[Finding]:
    first = evidence.first_nonfinite
    layers = [e for e in evidence.facts.layers if e.activation in _UNBOUNDED_ACTIVATIONS]
    if layers and first is not None and first.stage == "forward":
        in_exp = first.op is not None and op_name(first.op) == "exp"
        names = ", ".join(layer.name for layer in layers[:3])
        yield Finding(
            "architecture",
            2.5 if in_exp or len(layers) > 1 else 1.0,
            f"{plural(len(layers), 'layer')} ({names}) end in an exponential, which turns an "
            "input of 89 into infinity; several in a row overflow for almost any input",
        )


def _recurrence(evidence: Evidence) -> Iterator[Finding]:
    """A recurrent layer multiplies its state by the same weights at every time step."""
    first, kind = evidence.first_nonfinite, in_recurrence(evidence)
    for layer in _unbounded_recurrence(evidence):
        yield Finding(
            "architecture",
            2.5,
            f"{layer.name} is recurrent ({layer.kind}) with the activation {layer.activation}, "
            "which has no bound: its output is more than a thousand times what goes into it",
        )
        for one in evidence.survivors("activation"):
            yield Finding("architecture", 2.5, f"With {one.change} the same steps survive")
    if kind and first is not None and first.stage in ("forward", "backward"):
        yield Finding(
            "architecture",
            2.5,
            f"{first.layer} is recurrent ({kind}): it multiplies its state by the same weights "
            "at every time step, so over a long sequence the state grows without bound",
        )


def _unbounded_recurrence(evidence: Evidence) -> list[LayerFacts]:
    """Recurrent layers without bound whose output had outgrown all before it a thousandfold."""
    telemetry = evidence.telemetry
    inputs = input_absmax(telemetry)
    if inputs is None or not inputs.size or not exploded(evidence):
        return []
    row, found = preactivations_of_row(telemetry, -1), []
    largest = max(1.0, float(inputs[-1]))
    for layer in evidence.facts.layers:
        peak = row.get(layer.name, 0.0)
        recurrent = any(word in layer.kind for word in RECURRENT)
        if recurrent and layer.activation in UNBOUNDED and not peak < _OUTGROWN * largest:
            found.append(layer)
        largest = max(largest, peak)
    return found


def _alignment(evidence: Evidence) -> Iterator[Finding]:
    first = evidence.first_nonfinite
    if first is not None and first.op is not None and "ctc" in op_name(first.op):
        yield Finding(
            "labels",
            4.0,
            f"{first.op} has no alignment for some example: its label sequence is longer than "
            "the output sequence",
        )


def _at_once(evidence: Evidence) -> Iterator[Finding]:
    """A layer that overflows before anything was learnt, on ordinary inputs and weights."""
    first = evidence.first_nonfinite
    if first is None or first.stage != "forward" or evidence.step != 0:
        return
    ordinary = gain_bits(layer_gains(evidence))[0] <= 3.0 and not unscaled(evidence)
    alike = not half_precision(evidence) and domain_fault(first, half=False) is None
    if ordinary and alike and all(s.finite for s in evidence.batch_stats.values()):
        yield Finding(
            "architecture",
            2.0,
            f"Before any update, {first.layer or 'the forward pass'} overflows on inputs and "
            "weights of ordinary size: its own formula multiplies without bound",
        )
