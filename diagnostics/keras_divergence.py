"""When a loss or a gradient counts as running away, as limits for the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

from diagnostics.protocol import RunFacts
from diagnostics.stall import GRADIENT_RUNAWAY, RUNAWAY
from diagnostics.survival import usual_loss

_GROWTH = 10.0  # times the first loss
_FIRST_STEPS = 5
_GRADIENT_STEPS = 10


class DivergenceLimits:
    """The rule of `stall.detect_divergence`, foreseen: the next step that would fulfil it.

    One spike is none: the median of five steps must be beyond the limit, so a
    limit is set once two of the last four steps were.
    """

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._largest_start: float | None = None
        self._first_gradients: list[float] = []
        self._loss: deque[float] = deque(maxlen=4)
        self._gradient: deque[float] = deque(maxlen=4)
        self._steps = 0

    def limits(self, telemetry: Mapping[str, float]) -> tuple[float, float]:
        """(largest |loss|, largest gradient norm) of the next step; infinity where none is set.

        Args:
          telemetry: of the step that was just applied.
        """
        self._steps += 1
        loss, gradient = telemetry.get("loss"), telemetry.get("grad_norm")
        loss_limit = gradient_limit = np.inf
        if loss is not None:
            if self._largest_start is None:
                # A start far above guessing is bad, but only growth is running away.
                usual = RUNAWAY * usual_loss(loss, self._facts)
                self._largest_start = max(usual, _GROWTH * abs(loss))
            self._loss.append(abs(loss))
            loss_limit = _armed(self._loss, self._largest_start)
        if gradient is not None:
            if len(self._first_gradients) < _FIRST_STEPS:
                self._first_gradients.append(gradient)
            self._gradient.append(gradient)
            if self._steps >= _GRADIENT_STEPS - 1:
                usual = float(np.median(self._first_gradients))
                gradient_limit = _armed(self._gradient, GRADIENT_RUNAWAY * usual)
        return loss_limit, gradient_limit


def _armed(recent: deque[float], limit: float) -> float:
    beyond = sum(value > limit for value in recent)
    return limit if limit > 0 and beyond >= 2 else np.inf
