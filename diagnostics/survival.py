"""When a replay counts as alive: finite is not enough, and a stalled run has to learn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.report_words import number
from diagnostics.telemetry_view import scalar_column

# A finite loss may still be a dead run: this many times the loss of guessing.
RUNAWAY_LOSS = 10.0
# Words in the names of losses that are 0 at best.
DIFFERENCE_LOSSES = ("mse", "mae", "squared", "absolute", "huber", "cosh")
LEAST_SIZE = 1.0
_ABYSS = 100.0  # times its first size below zero: no loss with a lower bound goes there
_PACE = (
    "learning_rate",
    "constant_rate",
    "warmup",
    "clip_norm",
    "init",
    "init_scale",
    "optimizer_setting",
    "optimizer_epsilon",
)
_TAIL = 9  # steps whose median loss counts as the last loss
# A stalled run has begun to learn once the median loss of so many steps is below this
# part of guessing, and most of them below the recorded loss of the same batch.
LEARNING_STEPS = 20
_LEARNT, _MOSTLY = 0.97, 0.8
# The paper's net A at sigma 0.01, which did learn, starts with logits of up to 0.003; its
# deeper nets, which needed A's layers, with a hundredth of that and less.
_FAINTEST = 3e-4


def runaway(losses: Sequence[float], facts: RunFacts) -> str:
    """Why a finite run still counts as dead; '' if it does not.

    Args:
      losses: of its steps so far; where the loss of guessing is unknown the first
        stands in.
    """
    if not losses:
        return "no step ran"
    tail = statistics.median(losses[-_TAIL:])
    if not math.isfinite(tail) or abs(tail) > RUNAWAY_LOSS * _usual(losses[0], facts):
        return f"finite, but the loss stands at {tail:.3g}"
    return ""


def not_learning(losses: Sequence[float], facts: RunFacts, recorded: Telemetry) -> str:
    """Why a replay from step 0 of a stalled run does not learn; '' if it does.

    Args:
      recorded: of the stalled run, whose loss on the same batch each step must beat:
        batches differ in how hard they are.
    """
    if len(losses) < LEARNING_STEPS:
        return f"too few steps to tell whether it learns: {len(losses)}"
    usual = _usual(losses[0], facts)
    first = len(losses) - LEARNING_STEPS
    column = recorded.column("loss")
    rivals = {}
    if column is not None:
        rivals = dict(zip(recorded.steps.tolist(), column.tolist(), strict=True))
    tail = losses[first:]
    better = sum(
        loss < min(usual, rivals.get(step, usual)) for step, loss in enumerate(tail, first)
    )
    median = statistics.median(tail)
    if median > _LEARNT * usual or better < _MOSTLY * LEARNING_STEPS:
        return f"does not learn: the loss stands at {median:.4g}"
    return ""


def usual_loss(first: float, facts: RunFacts) -> float:
    """The size that a loss is compared with to say that it ran away.

    That of guessing, or its first value. A loss of no known kind (a likelihood, a critic's
    score) may cross 0 and begin there by chance, so it is given the size 1 at least.
    """
    if facts.chance_loss:
        return facts.chance_loss
    known = any(word in facts.loss.lower() for word in (*DIFFERENCE_LOSSES, "entropy"))
    return first if known and first >= 0 else max(abs(first), LEAST_SIZE)


def bottomless(telemetry: Telemetry) -> bool:
    """Whether the recorded loss fell so far below zero that it has no lower bound."""
    column = scalar_column(telemetry, "loss")
    losses = np.zeros(0) if column is None else column[np.isfinite(column)]
    return losses.size > 0 and bool(losses[-1] < -_ABYSS * max(abs(losses[0]), 1.0))


def only_slower(kind: str, losses: Sequence[float]) -> str:
    """Of a bottomless run: why a change of this kind is no cure; '' if it may be one.

    A loss without lower bound goes down as far as it is followed. Another rate, start or
    clipping says how fast, which a few steps of a noisy loss need not show.
    """
    return still_falling(losses) or (
        "the same loss is minimised at another pace, and it has no lower bound"
        if kind in _PACE
        else ""
    )


def still_falling(losses: Sequence[float]) -> str:
    """Of a bottomless run: why a replay only falls more slowly; '' if it does not fall."""
    half = len(losses) // 2
    if half and statistics.mean(losses[half:]) < min(0.0, statistics.mean(losses[:half])):
        return f"only slower: the loss still falls, to {number(losses[-1])}"
    return ""


def faint_signal(telemetry: Mapping[str, float], facts: RunFacts) -> str:
    """Why a classifier that was given other initial weights may never learn; '' if it may.

    Args:
      telemetry: of its last step.
    """
    if facts.chance_loss is None:
        return ""
    scales = {}
    for layer in facts.layers:
        ends = [telemetry.get(f"{layer.name}/preactivation_{end}") for end in ("max", "min")]
        if layer.weight is not None and None not in ends:
            scales[layer.name] = max(abs(end) for end in ends if end is not None)
    faintest = min(scales, key=lambda name: scales[name], default=None)
    if faintest is None or not scales[faintest] < _FAINTEST:
        return ""
    return (
        f"may never learn: the largest pre-activation of {faintest} is {number(scales[faintest])}"
    )


def _usual(first_loss: float, facts: RunFacts) -> float:
    return facts.chance_loss if facts.chance_loss is not None else max(abs(first_loss), 1e-3)
