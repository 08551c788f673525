"""Finite runs in trouble: those that do not learn, and those that run away.

A flat loss alone proves nothing: a healthy net may sit near ln(classes) for a
hundred steps before it learns. So a stall needs either a reason that the numbers
show (no signal at the output, a dead ReLU layer, updates that change nothing), or
a plateau longer than a healthy start.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.report_words import number
from diagnostics.survival import usual_loss
from diagnostics.telemetry_view import layer_column, layer_names, scalar_column
from diagnostics.update_size import update_ratio

RUNAWAY = 100.0  # times the loss of guessing, or the first loss where that is unknown
GRADIENT_RUNAWAY = 1e6  # times the gradient norm of the first steps
WORSE_THAN_GUESSING = 3.0  # times its loss: a run that ends there has run away
_FLAT = (0.98, WORSE_THAN_GUESSING)  # smoothed loss over the loss of guessing
# Where no update ever changed anything, the loss says less: chance may begin a little
# below guessing or far above it. Smoothed loss over its own start, and over guessing.
_UNMOVED, _UNTRAINED = 0.9, 0.7
_WINDOW = 20
_STANDING = 0.05  # part of a loss that its output layer may still fall by where the rest is dead
# Healthy: pre-activations of 0.1 and more in every layer, update ratios around 1e-3.
FAINT_SIGNAL = 0.01
IDLE_UPDATE = 1e-5
STILL_LAYER = 1e-7
_STEPS_WITH_REASON = 30
_STEPS_WITHOUT_REASON = 300
_RELU_LIKE = ("relu", "relu6")


@dataclass(frozen=True)
class StallSignals:
    """What the last recorded steps say about signal and gradient.

    Attributes:
      output_layer, output_scale: the last layer and the median of its largest
        absolute pre-activation; None if not recorded.
      faintest_layer, faintest_scale: the same for the kernel layer with the smallest
        one. The output's own bias may hide that no signal reaches it.
      gradient_norm: median of the global norm.
      output_gradient: median gradient norm of the last layer.
      update_ratio: median of the largest ratio over the layers.
      still_layer, still_ratio: the layer that is updated least, frozen ones left out.
      dead_layers: ReLU layers with no pre-activation above 0 in all those steps.
      dead_since: first recorded step from which one of them was dead.
      unreached: trainable layers whose gradient is exactly 0 in all those steps,
        while that of others is not.
    """

    output_layer: str | None
    output_scale: float | None
    faintest_layer: str | None
    faintest_scale: float | None
    gradient_norm: float | None
    output_gradient: float | None
    update_ratio: float | None
    still_layer: str | None
    still_ratio: float | None
    dead_layers: tuple[str, ...]
    dead_since: int | None
    unreached: tuple[str, ...] = ()

    def reasons(self, classifies: bool) -> list[str]:
        """Why this run cannot be learning, one clause each; empty if nothing says so.

        Args:
          classifies: signals are compared with logits, so their scale means something.
        """
        found = []
        if classifies and self.faintest_scale is not None and self.faintest_scale < FAINT_SIGNAL:
            found.append(
                f"the largest pre-activation of {self.faintest_layer} is "
                f"{number(self.faintest_scale)} (hardly any signal gets through)"
            )
        if self.dead_layers:
            names = ", ".join(self.dead_layers[:3])
            found.append(f"no unit of {names} is ever above 0 (dead ReLUs)")
        if self.update_ratio is not None and self.update_ratio < IDLE_UPDATE:
            found.append(
                f"an update changes no layer by more than {number(self.update_ratio)} of "
                "its size (0.001 is usual)"
            )
        elif self.still_ratio is not None and self.still_ratio < STILL_LAYER:
            found.append(
                f"an update changes {self.still_layer} by {number(self.still_ratio)} of its "
                "size (0.001 is usual): no gradient reaches it"
            )
        if self.gradient_norm == 0:
            found.append("the gradient is exactly 0")
        elif self.unreached and not self.dead_layers:
            found.append(f"the gradient of {', '.join(self.unreached[:3])} is exactly 0")
        return found


def stall_signals(telemetry: Telemetry, facts: RunFacts) -> StallSignals:
    """Signals over the last 20 recorded steps."""
    names = layer_names(telemetry)
    last = names[-1] if names else None
    peaks = None if last is None else layer_column(telemetry, last, "preactivation_absmax")
    gradients = None if last is None else layer_column(telemetry, last, "gradient_norm")
    kernels = [layer.name for layer in facts.layers if layer.weight is not None]
    signals = _medians(
        {name: layer_column(telemetry, name, "preactivation_absmax") for name in kernels}
    )
    faintest = min(signals, key=lambda name: signals[name], default=None)
    ratios = _medians({name: update_ratio(telemetry, facts, name) for name in names})
    moving = {name: ratio for name, ratio in ratios.items() if ratio > 0}
    still = min(moving, key=lambda name: moving[name], default=None)
    dead = _dead(telemetry, facts)
    return StallSignals(
        output_layer=last,
        output_scale=_recent(peaks),
        faintest_layer=faintest,
        faintest_scale=None if faintest is None else signals[faintest],
        gradient_norm=_recent(scalar_column(telemetry, "grad_norm")),
        output_gradient=_recent(gradients),
        update_ratio=max(ratios.values(), default=None),
        still_layer=still,
        still_ratio=None if still is None else moving[still],
        dead_layers=tuple(dead),
        dead_since=min(dead.values(), default=None),
        unreached=_unreached(telemetry, names),
    )


def _unreached(telemetry: Telemetry, names: Sequence[str]) -> tuple[str, ...]:
    """Layers that no gradient reaches; empty if it reaches none."""
    columns = {name: layer_column(telemetry, name, "gradient_norm") for name in names}
    norms = {n: c[-_WINDOW:] for n, c in columns.items() if c is not None and c.size}
    still = tuple(name for name, norm in norms.items() if not norm.any())
    return still if len(still) < len(norms) else ()


def _medians(columns: Mapping[str, np.ndarray | None]) -> dict[str, float]:
    """Median of each layer's column over the last steps, where it was recorded."""
    found = {}
    for name, column in columns.items():
        if column is not None and column.size > 1:
            # The first row's update ratio is 0: nothing was updated before it.
            median = float(np.median(column[1:][-_WINDOW:]))
            if not math.isnan(median):
                found[name] = median
    return found


def _recent(values: np.ndarray | None) -> float | None:
    if values is None or not values.size:
        return None
    return float(np.median(values[-_WINDOW:]))


def _dead(telemetry: Telemetry, facts: RunFacts) -> dict[str, int]:
    """ReLU layers that end dead, and since which recorded step."""
    found = {}
    for layer in facts.layers:
        peak = telemetry.column(f"{layer.name}/preactivation_max")
        if layer.activation not in _RELU_LIKE or peak is None or not peak.size:
            continue
        alive = np.flatnonzero(~(peak <= 0))
        since = int(alive[-1]) + 1 if alive.size else 0
        if peak.size - since >= min(_WINDOW, peak.size):
            found[layer.name] = int(telemetry.steps[since])
    return found


def detect_stall(telemetry: Telemetry, facts: RunFacts) -> str | None:
    """Says so in a sentence if the loss never left that of guessing; else None.

    Where the loss of guessing is unknown, the first loss stands in, and only a
    reason in the numbers makes it a stall.
    """
    loss = scalar_column(telemetry, "loss")
    if loss is None or loss.size < _STEPS_WITH_REASON or not np.isfinite(loss).all():
        return None
    known = facts.chance_loss is not None
    guess = facts.chance_loss if facts.chance_loss is not None else float(loss[0])
    smooth = _smoothed(loss)
    low, high = _FLAT
    lowest = min((smooth + _chance_below(loss)).min(), smooth[-1])
    flat = low * guess <= lowest and smooth[-1] <= high * guess and (guess != 0 or known)
    untrained = not known or smooth[-1] > _UNTRAINED * guess
    unmoved = smooth[-1] > _UNMOVED * smooth[0] and untrained and _never_moved(telemetry, facts)
    if not flat and not unmoved:
        return _without_gradient(telemetry, loss) or _stopped_by_death(telemetry, facts, loss)
    reasons = stall_signals(telemetry, facts).reasons(classifies=known)
    if not reasons and (not known or loss.size < _STEPS_WITHOUT_REASON):
        return None
    what = f"the loss of guessing, {guess:.4g}" if known else f"its first value, {guess:.4g}"
    text = f"In {loss.size:,} steps the loss never fell below {what} (last: {smooth[-1]:.4g})"
    if not flat:
        text = f"In {loss.size:,} steps the loss stayed where it began, at {smooth[-1]:.4g}"
    return f"{text}: {'; '.join(reasons)}" if reasons else text


def _without_gradient(telemetry: Telemetry, loss: np.ndarray) -> str | None:
    """Says so if there never was a gradient, though a loss was left."""
    gradient = scalar_column(telemetry, "grad_norm")
    if gradient is None or gradient.any() or not loss.all():
        return None
    return f"In {loss.size:,} steps the gradient was exactly 0, with a loss of {loss[-1]:.4g}"


def _stopped_by_death(telemetry: Telemetry, facts: RunFacts, loss: np.ndarray) -> str | None:
    """Says so if a layer died while it trained, nothing behind it learns, and the loss stands."""
    signals = stall_signals(telemetry, facts)
    cut_off = [name for name in signals.dead_layers if name in signals.unreached]
    if not cut_off or not signals.dead_since:
        return None
    since = loss[telemetry.steps >= signals.dead_since]
    if since.size < 2 * _WINDOW:
        return None
    before = float(np.median(since[-2 * _WINDOW : -_WINDOW]))
    now = float(np.median(since[-_WINDOW:]))
    if before - now > _STANDING * abs(before):
        return None
    return (
        f"Since step {signals.dead_since:,} no unit of {', '.join(cut_off[:3])} is above 0 (dead "
        f"ReLUs), and the loss stands at {now:.4g}"
    )


def _never_moved(telemetry: Telemetry, facts: RunFacts) -> bool:
    """Whether no update of the whole run changed any layer by a part worth the name."""
    columns = [
        column[1:]  # nothing was updated before the first row
        for layer in layer_names(telemetry)
        if (column := update_ratio(telemetry, facts, layer)) is not None
    ]
    return bool(columns) and float(np.nanmax(columns, initial=0.0)) < IDLE_UPDATE


def _smoothed(loss: np.ndarray) -> np.ndarray:
    """Running median over 20 steps, float64 [steps - 19]."""
    return np.median(np.lib.stride_tricks.sliding_window_view(loss, _WINDOW), axis=1)


def _chance_below(loss: np.ndarray) -> np.ndarray:
    """How far each of these medians may lie below the level by chance: of thousands one does.

    Four standard errors of a median, which is 1.25 times as uncertain as a mean.
    """
    windows = np.lib.stride_tricks.sliding_window_view(loss, _WINDOW)
    return 4 * 1.25 * np.std(windows, axis=1) / math.sqrt(_WINDOW)


def detect_divergence(telemetry: Telemetry, facts: RunFacts) -> str | None:
    """Says so in a sentence if a finite run ran away; else None.

    The last five steps count, so a spike that was survived is none. A loss below
    zero counts by its size: a loss without lower bound runs away downwards.
    """
    loss, gradient = scalar_column(telemetry, "loss"), scalar_column(telemetry, "grad_norm")
    if loss is None or loss.size < 2 or not np.isfinite(loss[-5:]).all():
        return None
    usual = usual_loss(float(loss[0]), facts)
    now = float(np.median(np.abs(loss[-5:])))
    if facts.chance_loss and _worse_than_guessing(loss, facts.chance_loss):
        times = now / facts.chance_loss
        return f"The loss ends at {now:.4g}, {times:.3g} times the loss of guessing"
    if usual > 0 and now > RUNAWAY * usual:
        what = "the loss of guessing" if facts.chance_loss else "the first one"
        return f"The loss ran away to {number(float(loss[-1]))}, {now / usual:.3g} times {what}"
    if gradient is None or loss.size < 10:
        return None
    before, after = float(np.median(gradient[:5])), float(np.median(gradient[-5:]))
    if before > 0 and after > GRADIENT_RUNAWAY * before:
        return f"The gradient norm ran away to {number(after)}, from {number(before)}"
    return None


def _worse_than_guessing(loss: np.ndarray, guess: float) -> bool:
    """Whether the loss stands far above that of guessing and is not on its way down."""
    if loss.size < 2 * _WINDOW:
        return False
    now, before = np.median(loss[-_WINDOW:]), np.median(loss[-2 * _WINDOW : -_WINDOW])
    return bool(WORSE_THAN_GUESSING * guess < now <= RUNAWAY * guess and now > 0.8 * before)


class StallWatch:
    """Warns once, while it trains, about a run that does not learn.

    It has no part in the training, so its memory need not survive a resume.

    Args:
      facts: of the run; without a `chance_loss` it stays silent.
      patience: steps at the loss of guessing before the numbers are looked at.
      long_patience: steps after which a flat loss alone is worth a warning.
    """

    def __init__(self, facts: RunFacts, patience: int = 100, long_patience: int = 3000) -> None:
        self._facts = facts
        self._patience, self._long_patience = patience, long_patience
        self._columns: tuple[str, ...] = ()
        self._rows: deque[np.ndarray] = deque(maxlen=_WINDOW)
        self._flat_steps = 0
        self._warned = False

    def warning(self, step: int, telemetry: Mapping[str, float]) -> str | None:
        """What to tell the user after this step.

        Args:
          telemetry: the step's numbers by column name.
        """
        guess = self._facts.chance_loss
        if self._warned or guess is None:
            return None
        self._columns = self._columns or tuple(
            name for name, value in telemetry.items() if isinstance(value, (int, float))
        )
        self._rows.append(np.array([telemetry[n] for n in self._columns], np.float32))
        self._flat_steps += 1
        if len(self._rows) < _WINDOW:
            return None
        loss = float(np.median([row[self._columns.index("loss")] for row in self._rows]))
        if not _FLAT[0] * guess <= loss <= _FLAT[1] * guess:
            self._flat_steps = 0
        if self._flat_steps < self._patience:
            return None
        reasons = self._reasons(step)
        if not reasons and self._flat_steps < self._long_patience:
            return None
        self._warned = True
        return self._text(step, loss, reasons)

    def _reasons(self, step: int) -> list[str]:
        return self._signals(step).reasons(classifies=True)

    def _signals(self, step: int) -> StallSignals:
        steps = np.arange(step + 1 - len(self._rows), step + 1)
        return stall_signals(Telemetry(steps, self._columns, np.stack(self._rows)), self._facts)

    def _text(self, step: int, loss: float, reasons: list[str]) -> str:
        signals = self._signals(step)
        numbers = "".join(
            f", {name} {number(value)}"
            for name, value in (
                ("signal at the output", signals.output_scale),
                ("its gradient", signals.output_gradient),
                ("largest update ratio", signals.update_ratio),
            )
            if value is not None
        )
        why = f": {'; '.join(reasons)}" if reasons else ""
        return (
            f"step {step}: the loss, {loss:.4g}, has not fallen below that of guessing for "
            f"{self._flat_steps:,} steps{why} ({numbers.removeprefix(', ')})"
        )
