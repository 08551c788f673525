"""Warnings while everything is still finite: spikes of the loss or the gradient."""

from __future__ import annotations

from collections import deque

import numpy as np

LOSS_SPIKE = 5.0  # times the running median
GRADIENT_EXPLOSION = 100.0
_WINDOW = 50
_QUIET_STEPS = 100


class DivergenceWatch:
    """Compares each step with the median of the last 50 steps.

    It has no part in the training, so its memory need not survive a resume.
    """

    def __init__(self) -> None:
        self._history: dict[str, deque[float]] = {
            "loss": deque(maxlen=_WINDOW),
            "gradient norm": deque(maxlen=_WINDOW),
        }
        self._quiet_until = {"loss": 0, "gradient norm": 0}

    def warnings(self, step: int, loss: float, gradient_norm: float) -> list[str]:
        """What to tell the user after this step; at most once in 100 steps a kind."""
        found = []
        for name, value, limit in (
            ("loss", loss, LOSS_SPIKE),
            ("gradient norm", gradient_norm, GRADIENT_EXPLOSION),
        ):
            history = self._history[name]
            usual = float(np.median(history)) if len(history) >= 5 else None
            if usual and value > limit * usual and step >= self._quiet_until[name]:
                self._quiet_until[name] = step + _QUIET_STEPS
                found.append(
                    f"step {step}: {name} {value:.3g} is {value / usual:.0f} times "
                    f"its recent median {usual:.3g}"
                )
            history.append(value)
        return found
