"""The words and numbers that the terminal report and the HTML page share."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diagnostics.diagnosis import (
    Counterfactual,
    Diagnosis,
    FirstNonfinite,
    InputRange,
    Onset,
    Recommendation,
)
from diagnostics.protocol import RunFacts

VERDICT_TITLES: Mapping[str, str] = {
    "reproduced": "reproduced",
    "not_reproduced": "did not recur",
    "replay_differs": "replay differs",
    "diverged": "diverged",
    "stalled": "stalled",
}
VERDICT_SENTENCES: Mapping[str, str] = {
    "reproduced": "Replayed from the saved state, the step failed again with the same bits.",
    "not_reproduced": "Replayed from the saved state, the step was clean this time.",
    "replay_differs": "Replayed from the saved state, the step gave other numbers than recorded.",
    "diverged": "No value is NaN or infinite, but the loss ran away.",
    "stalled": "No value is NaN or infinite, but the loss never left where guessing puts it.",
}
CAUSE_TITLES: Mapping[str, str] = {
    "data": "the data",
    "labels": "the labels",
    "init": "the initialiser",
    "learning_rate": "the learning rate",
    "loss_formula": "the loss formula",
    "precision": "the number format",
    "optimizer": "the optimizer",
    "architecture": "the architecture",
    "weights": "the weights the step was given",
    "hardware": "the hardware",
    "unknown": "no cause found",
}
STAGE_TITLES: Mapping[str, str] = {
    "data": "the input data",
    "weights": "the weights before the step",
    "forward": "the forward pass",
    "loss": "the loss",
    "backward": "the backward pass",
    "update": "the weight update",
}
QUANTITY_TITLES: Mapping[str, str] = {
    "preactivation_absmax": "the largest pre-activation",
    "preactivation_max": "the largest pre-activation",
    "preactivation_min": "the smallest pre-activation",
    "gradient_norm": "the gradient norm",
    "grad_norm": "the gradient norm",
    "weight_norm": "the weight norm",
    "update_ratio": "the update relative to the weights",
    "loss": "the loss",
}
_KIND_TITLES = {"nan": "NaN", "inf": "Inf"}
_EXAMPLES_SHOWN = 4


class Fact(NamedTuple):
    """A labelled line of a report."""

    label: str
    text: str


def printable(text: str) -> str:
    """The text with control, direction-changing and broken characters written as escapes.

    Names come from files: they may hold terminal commands or undecodable bytes.
    """
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else character
        for character in text
    )


def number(value: float | None) -> str:
    """Two to four significant digits: '6.91', '4e8', '-3.7e-5', 'NaN', 'Inf', '-'."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    plain = f"{value:.4g}"
    if "e" not in plain and (value == 0 or abs(value) >= 1e-3):
        return plain
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def bits(headroom: float | None) -> str:
    """Headroom as '66 bits'; 'none' once a value overflowed, '-' if not recorded."""
    if headroom is None or math.isnan(headroom):
        return "-"
    if headroom == -math.inf:
        return "none"
    return "all 0" if headroom == math.inf else f"{headroom:.0f} bits"


def plural(count: int, noun: str) -> str:
    """'1 step', '1,200 steps'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def kind_title(kind: str) -> str:
    """'NaN' or 'Inf'."""
    return _KIND_TITLES.get(kind, kind)


def headline(diagnosis: Diagnosis) -> str:
    """What happened, in one line."""
    first = diagnosis.first_nonfinite
    step = f"step {diagnosis.step:,}"
    if first is not None:
        where = first.layer or STAGE_TITLES.get(first.stage, first.stage)
        return f"{kind_title(first.kind)} at {step}, first in {where}"
    return {
        "stalled": f"Stalled: after {step} the loss is still that of guessing",
        "diverged": f"Diverged: the loss ran away by {step}",
        "not_reproduced": f"The failure of {step} did not recur",
    }.get(diagnosis.verdict, f"{step.capitalize()}: no non-finite value was found")


def confidence(value: float) -> str:
    """As in '95 % sure'."""
    return f"{100 * value:.0f} % sure"


def place(first: FirstNonfinite) -> list[Fact]:
    """Where the first non-finite value is, line by line."""
    parts = [STAGE_TITLES.get(first.stage, first.stage)]
    parts += [f"layer {first.layer}"] if first.layer else []
    parts += [f"op {first.op}"] if first.op else []
    facts = [Fact("stage", ", ".join(parts))]
    if first.source:
        facts.append(Fact("source", first.source))
    share = f" ({100 * first.count / first.size:.3g} %)" if first.size else ""
    facts.append(
        Fact(
            "values",
            f"{first.count:,} of {first.size:,}{share} not finite, seen in the {first.seen_in}",
        )
    )
    if first.examples or first.stage in ("data", "forward", "loss"):
        facts.append(Fact("examples", _examples(first)))
    return facts


def _examples(first: FirstNonfinite) -> str:
    if not first.examples:
        return "none in particular: no single row of the batch is to blame"
    names = list(first.example_names) + [""] * len(first.examples)
    shown = [
        f"{name} (example {example})" if name else f"example {example}"
        for example, name in zip(first.examples, names, strict=False)
    ]
    more = len(shown) - _EXAMPLES_SHOWN
    return ", ".join(shown[:_EXAMPLES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def input_range(inputs: InputRange) -> str:
    """'16 x 28 x 28 x 512, from -2.1e27 to 3.4e28, all finite'."""
    shape = " x ".join(str(size) for size in inputs.shape) or "scalar"
    finite = f"{inputs.nonfinite:,} not finite" if inputs.nonfinite else "all finite"
    return f"{shape}, from {number(inputs.minimum)} to {number(inputs.maximum)}, {finite}"


def onset_sentence(onset: Onset) -> str:
    """Since when and where it went wrong, and how fast."""
    where = f" in {onset.layer}" if onset.layer else ""
    quantity = QUANTITY_TITLES.get(onset.quantity, onset.quantity)
    growth = onset.growth_per_step
    if not math.isfinite(growth):
        after = ""
    elif 0.95 < growth < 1.05:
        after = " and stayed there"
    else:
        after = f", then {number(growth)} times as much at each step"
    return f"It began at step {onset.step:,}{where}: {quantity} was {number(onset.value)}{after}."


def configuration(facts: RunFacts) -> list[tuple[str, str]]:
    """What the run was asked to do, as far as it is known."""
    values: dict[str, Any] = {
        "initialiser": facts.init,
        "optimizer": facts.optimizer or None,
        "learning rate": facts.learning_rate,
        "warm-up steps": facts.warmup_steps or None,
        "gradient norm clipped to": facts.clip_norm or None,
        "momentum": facts.momentum or None,
        "weight decay": facts.weight_decay or None,
        "number format": facts.precision,
        "loss": facts.loss or None,
        "classes": facts.classes,
        "batch size": facts.batch_size,
    }
    # Rows, not one mapping: an extra fact of the same name would hide one of these.
    return [
        row
        for group in (values, facts.extra)
        for row in flatten({name: one for name, one in group.items() if one is not None})
    ]


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON values as (dotted name, text) rows."""
    if isinstance(value, Mapping):
        return [
            row
            for key, item in value.items()
            for row in flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [(prefix, ", ".join(str(item) for item in value))]
    return [(prefix, "-" if value is None else str(value))]


def steps_run(tried: Counterfactual) -> str:
    """'20', or '20 from 200' where the replay did not begin at step 0."""
    return f"{tried.steps:,}" + (f" from {tried.first_step:,}" if tried.first_step else "")


def remark(tried: Counterfactual) -> str:
    """What is worth saying of one replay."""
    smallest = "smallest fix" if tried.minimal else ""
    return "; ".join(part for part in (smallest, tried.note) if part)


def verified(advice: Recommendation) -> str:
    """Whether the command has been tried out."""
    if advice.verified:
        return "verified: this very command was replayed and survived"
    return "not verified: this very command was not replayed from its start"


def most_telling(tried: Sequence[Counterfactual], limit: int) -> list[Counterfactual]:
    """At most `limit` replays, in their own order: the smallest fix, survivors, then others."""
    order = sorted(tried, key=lambda one: (not one.minimal, not one.survived))
    kept = [id(one) for one in order[:limit]]
    return [one for one in tried if id(one) in kept]


def no_advice(diagnosis: Diagnosis) -> str:
    """Why no command is recommended."""
    survivors = [one for one in diagnosis.counterfactuals if one.survived]
    if any(one.kind == "none" for one in survivors):
        return "Nothing was changed and the replay survived, so no command is recommended."
    if survivors:
        return f"It survives {survivors[0].change}, but no option of the program does that."
    if diagnosis.counterfactuals:
        return "Nothing that was tried is a fix, so no command is recommended."
    return "No change was tried, so no command is recommended."


def headroom_note(stalled: bool) -> str:
    """What headroom is; `stalled`: in a run whose signal is too faint, not too large."""
    if stalled:
        return "signal: the layer's largest pre-activation; a healthy one is near 1"
    return "headroom: how often the layer's largest value can double before it overflows"
