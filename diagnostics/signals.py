"""Measures that several rules of the judge share, derived from the evidence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from diagnostics.evidence import Evidence
from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.report_words import number
from diagnostics.telemetry_view import (
    input_absmax,
    is_half,
    layer_column,
    layer_names,
    preactivations_of_row,
    scalar_column,
)
from diagnostics.tensor_stats import TensorStats

HUGE = 1e6  # a finite activation or input beyond this is an explosion under way
ABSURD_START = 4.0  # times the loss of guessing
UNSCALED_INPUT = 10.0  # RMS
UNSCALED_TARGET = 100.0
_LEARNT = 0.7  # times the loss of guessing
_SETTLED = 10  # steps whose median counts
_CROSS_ENTROPIES = ("crossentropy", "cross_entropy", "cross-entropy", "bce")
_LABEL_NAMES = {"label", "labels", "target", "targets", "y"}
_OTHER_NAMES = {"example", "sample", "weights", "weight", "ids", "id", "mask"}
_FLOAT16_LIMIT_BITS = 16.0
RECURRENT = ("RNN", "LSTM", "GRU")
# Activations that follow their input without end.
UNBOUNDED = (
    "relu",
    "linear",
    "elu",
    "selu",
    "leaky_relu",
    "gelu",
    "silu",
    "softplus",
    "exponential",
)


def input_arrays(evidence: Evidence) -> dict[str, TensorStats]:
    """The batch's inputs by name: neither labels nor ids nor weights."""
    return {n: s for n, s in evidence.batch_stats.items() if _role(n) == "input"}


def label_arrays(evidence: Evidence) -> dict[str, TensorStats]:
    """The batch's labels or targets by name."""
    return {n: s for n, s in evidence.batch_stats.items() if _role(n) == "label"}


def weight_arrays(evidence: Evidence) -> dict[str, TensorStats]:
    """The weights of the batch's examples by name."""
    return {n: s for n, s in evidence.batch_stats.items() if n.startswith("sample_weight")}


def _role(name: str) -> str:
    words = set(re.split(r"[^a-z]+", name.partition("/")[0].lower()))
    if words & _LABEL_NAMES:
        return "label"
    return "other" if words & _OTHER_NAMES else "input"


def input_scale(evidence: Evidence) -> tuple[float, float]:
    """(RMS, absolute maximum) of the largest floating-point input; (0, 0) if none.

    Integers are token or category numbers, whose size means nothing.
    """
    floats = [s for s in input_arrays(evidence).values() if not is_integer(s)]
    if not floats:
        return 0.0, 0.0
    largest = max(floats, key=lambda stats: stats.rms)
    return largest.rms, _finite_absmax(largest)


def target_scale(evidence: Evidence) -> tuple[float, str]:
    """(RMS, name) of the largest regression target; (0, '') for a classifier."""
    if evidence.facts.classes or evidence.facts.chance_loss:
        return 0.0, ""
    targets = {n: s.rms for n, s in label_arrays(evidence).items() if not is_integer(s)}
    name = max(targets, key=lambda target: targets[target], default="")
    return (targets[name], name) if name else (0.0, "")


def takes_probabilities(facts: RunFacts) -> bool:
    """Whether the loss is a cross-entropy whose targets lie between 0 and 1."""
    name = facts.loss.lower()
    return "sparse" not in name and any(word in name for word in _CROSS_ENTROPIES)


def unscaled(evidence: Evidence) -> bool:
    """Whether inputs or regression targets are far larger than layers are made for."""
    inputs_rms = input_scale(evidence)[0]
    return inputs_rms > UNSCALED_INPUT or target_scale(evidence)[0] > UNSCALED_TARGET


def is_integer(stats: TensorStats) -> bool:
    """Whether the array is of an integer type (8, 16, 32 or 64 bits)."""
    limit = type_bits(stats)
    return limit is not None and any(abs(limit - bits) < 1e-3 for bits in (7, 8, 15, 31, 32, 63))


def is_half_array(stats: TensorStats) -> bool:
    """Whether the array is float16 (its largest number is 65504)."""
    limit = type_bits(stats)
    return limit is not None and _FLOAT16_LIMIT_BITS - 0.01 < limit < _FLOAT16_LIMIT_BITS


def type_bits(stats: TensorStats) -> float | None:
    """log2 of the type's largest number; None if the statistics do not tell."""
    if not stats.finite or stats.absmax == 0 or not math.isfinite(stats.headroom):
        return None
    return math.log2(stats.absmax) + stats.headroom


def _finite_absmax(stats: TensorStats) -> float:
    bounds = [abs(b) for b in (stats.minimum, stats.maximum) if math.isfinite(b)]
    return max(bounds, default=0.0)


def amplification(evidence: Evidence) -> tuple[float, str] | None:
    """(largest finite pre-activation over largest input, its layer) of the first recorded step.

    None if that was not recorded.
    """
    inputs = input_absmax(evidence.telemetry)
    if not evidence.telemetry.steps.size:
        return None
    row = {
        n: v for n, v in preactivations_of_row(evidence.telemetry, 0).items() if math.isfinite(v)
    }
    if inputs is None or not row or not np.isfinite(inputs[0]) or inputs[0] == 0:
        return None
    layer = max(row, key=lambda name: row[name])
    return row[layer] / float(inputs[0]), layer


def layer_multiples(telemetry: Telemetry, facts: RunFacts) -> Iterator[tuple[str, float]]:
    """(layer, its largest output over the largest thing before it) at the first recorded step."""
    inputs = input_absmax(telemetry)
    if inputs is None or not inputs.size or not np.isfinite(inputs[0]) or not inputs[0]:
        return
    largest, row = float(inputs[0]), preactivations_of_row(telemetry, 0)
    for layer in facts.layers:
        value = row.get(layer.name, math.nan)
        if math.isfinite(value):
            yield layer.name, value / largest
            largest = max(largest, value)


def first_loss(evidence: Evidence) -> float | None:
    """The loss of the first recorded step, if that is step 0 and finite."""
    loss = scalar_column(evidence.telemetry, "loss")
    if loss is None or not loss.size or evidence.telemetry.steps[0] != 0:
        return None
    return float(loss[0]) if np.isfinite(loss[0]) else None


def loss_over_chance(evidence: Evidence) -> float | None:
    """Step 0's loss over the loss of guessing; None if either is unknown."""
    loss, chance = first_loss(evidence), evidence.facts.chance_loss
    return None if loss is None or not chance else loss / chance


def learnt_first(evidence: Evidence) -> bool:
    """Whether the loss had fallen well below its start, and guessing, before the onset."""
    loss, start = scalar_column(evidence.telemetry, "loss"), first_loss(evidence)
    if loss is None or start is None or evidence.onset is None:
        return False
    before = loss[evidence.telemetry.steps < evidence.onset.step]
    before = before[np.isfinite(before)]
    bar = _LEARNT * min(start, evidence.facts.chance_loss or start)
    return before.size >= _SETTLED and float(np.median(before[-_SETTLED:])) < bar


def absurd_start(evidence: Evidence) -> str | None:
    """Says so if step 0's loss was far above that of guessing."""
    ratio = loss_over_chance(evidence)
    if ratio is None or ratio <= ABSURD_START:
        return None
    loss, chance = number(first_loss(evidence)), number(evidence.facts.chance_loss)
    return f"Step 0, before any update, has loss {loss} where guessing has {chance}"


def largest_signal(evidence: Evidence) -> float:
    """The largest finite number seen among pre-activations, loss and the op's inputs."""
    return _largest([*_recorded_signals(evidence), *_op_inputs(evidence)])


def _recorded_signals(evidence: Evidence) -> Iterator[float]:
    """Pre-activations and loss of the last two recorded steps."""
    telemetry = evidence.telemetry
    for row in range(max(0, telemetry.steps.size - 2), telemetry.steps.size):
        yield from preactivations_of_row(telemetry, row).values()
    loss = scalar_column(telemetry, "loss")
    if loss is not None:
        yield from np.abs(loss[-2:]).tolist()


def _op_inputs(evidence: Evidence) -> Iterator[float]:
    """Of the op whose result was not finite."""
    if evidence.first_nonfinite is not None:
        for given in evidence.first_nonfinite.inputs:
            yield from (abs(given.minimum), abs(given.maximum))


def _largest(numbers: Iterable[float]) -> float:
    return max((number for number in numbers if math.isfinite(number)), default=0.0)


def exploded(evidence: Evidence) -> bool:
    """Whether numbers grew out of bounds, as against one bad value or operation."""
    if evidence.verdict == "diverged":
        return True
    if evidence.onset is not None and evidence.onset.quantity != "loss":
        return True
    return largest_signal(evidence) > _limit(evidence) and not out_of_nowhere(evidence)


def _limit(evidence: Evidence) -> float:
    return 1e3 if half_precision(evidence) else HUGE


def out_of_nowhere(evidence: Evidence) -> bool:
    """Whether the op was fed huge numbers while all that is recorded around it is ordinary.

    Signals, gradients and weights of ordinary size do not grow by themselves within one
    layer: a constant or a formula in there made the number.
    """
    telemetry, limit = evidence.telemetry, _limit(evidence)
    if _largest(_op_inputs(evidence)) <= limit or not telemetry.steps.size:
        return False
    if in_recurrence(evidence):
        return False  # which multiplies its own signal at every time step
    if not preactivations_of_row(telemetry, -1):
        return False
    gradients = [
        float(column[-1])
        for layer in layer_names(telemetry)
        if (column := layer_column(telemetry, layer, "gradient_norm")) is not None
    ]
    arrays = [*input_arrays(evidence).values(), *evidence.weight_stats.values()]
    sizes = [_finite_absmax(stats) for stats in arrays if not is_integer(stats)]
    return _largest([*_recorded_signals(evidence), *gradients, *sizes]) <= limit


def in_recurrence(evidence: Evidence) -> str:
    """The kind of the recurrent layer where the first non-finite value is; '' elsewhere."""
    first = evidence.first_nonfinite
    kinds = {layer.name: layer.kind for layer in evidence.facts.layers}
    kind = kinds.get(first.layer or "", "") if first is not None else ""
    return kind if any(word in kind for word in RECURRENT) else ""


def half_precision(evidence: Evidence) -> bool:
    """Whether the run computes in float16, by its facts, its arrays or the op at fault."""
    first = evidence.first_nonfinite
    if is_half(evidence.facts.precision) or (first is not None and first.dtype == "float16"):
        return True
    return any(is_half_array(stats) for stats in evidence.weight_stats.values())


def largest_update(evidence: Evidence) -> tuple[float, str, int] | None:
    """(update ratio, layer, step that wrote it) of the largest early update.

    Of the first two updates after the onset (or the last two recorded); the very
    first update of weights that start at zero does not count.
    """
    telemetry = evidence.telemetry
    if telemetry.steps.size < 2:
        return None
    onset = evidence.onset.step if evidence.onset is not None else int(telemetry.steps[-2])
    rows = np.flatnonzero(telemetry.steps > onset)[:2]
    best: tuple[float, str, int] | None = None
    for layer in layer_names(telemetry):
        ratios = layer_column(telemetry, layer, "update_ratio")
        norms = layer_column(telemetry, layer, "weight_norm")
        for row in rows if ratios is not None else ():
            ratio = float(ratios[row])  # type: ignore[index]
            zero_start = norms is not None and norms[row - 1] == 0
            if math.isfinite(ratio) and not zero_start and (best is None or ratio > best[0]):
                best = ratio, layer, int(telemetry.steps[row - 1])
    return best


def failed_checks(evidence: Evidence) -> list[tuple[str, str]]:
    """(stage, quantity) of every check that tripped in the replayed step."""
    if evidence.outcome is None:
        return []
    return [(check.stage, check.quantity) for check in evidence.outcome.failed]


def lonely_peak(stats: TensorStats) -> bool:
    """Whether a single number makes up most of the sum of squares."""
    if is_integer(stats) or stats.size < 8 or not stats.rms or not math.isfinite(stats.absmax):
        return False
    return stats.absmax > 1e3 and (stats.absmax / stats.rms) ** 2 > 0.5 * stats.size


def lonely_sentence(name: str, stats: TensorStats) -> str:
    """Says so, with the numbers."""
    return (
        f"A single number of '{name}' is {number(stats.absmax)}, "
        f"{number(stats.absmax / stats.rms)} times the RMS of all {stats.size:,}"
    )
