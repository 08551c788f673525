"""From a step's telemetry row to the numbers that hooks and metrics.jsonl show."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diagnostics.guard import SCALAR_COLUMNS, GuardLayout

_WINDOW = 20
ON_THE_CLOCK = ("images_per_second", "data_wait_share")  # what no replay repeats


class StepMetrics:
    """Names a step's numbers and keeps the clock.

    Args:
      batch_size: examples a step, for images per second.
      precision: type of pre-activations, for their headroom.
    """

    def __init__(self, layout: GuardLayout, batch_size: int, precision: str = "float32") -> None:
        self._layers, self._extra = layout.layers, layout.extra
        self._largest = float(np.log2(float(tf.as_dtype(precision).max)))
        self._columns = layout.columns()
        self._batch_size = batch_size
        self._times: deque[float] = deque(maxlen=_WINDOW + 1)
        self._waits: deque[float] = deque(maxlen=_WINDOW)

    def start_clock(self) -> None:
        """The first step begins now."""
        self._times.append(time.perf_counter())

    def after_loop(self, steps: int, waited: float) -> None:
        """Some steps have just come back from the device together.

        Args:
          waited: seconds spent waiting for their batches.
        """
        begun, now = self._times[-1], time.perf_counter()
        self._times.extend(np.linspace(begun, now, steps + 1)[1:].tolist())
        self._waits.extend([waited / steps] * steps)

    def of_step(self, telemetry: np.ndarray) -> dict[str, Any]:
        """All numbers of one step of the last loop.

        Args:
          telemetry: float32 [columns].

        Returns:
          The telemetry by column name, plus per layer `preactivation_absmax`;
          `headroom` in bits (log2 of the largest number of the compute type over
          the largest pre-activation) with `headroom_layer`; `input_absmax`;
          `images_per_second` and `data_wait_share` over the last 20 steps.
        """
        named: dict[str, Any] = dict(zip(self._columns, telemetry.tolist(), strict=True))
        for layer in self._layers:
            named[f"{layer}/preactivation_absmax"] = _absmax(
                named[f"{layer}/preactivation_max"], named[f"{layer}/preactivation_min"]
            )
        named["input_absmax"] = _absmax(named["input_max"], named["input_min"])
        named["headroom"], named["headroom_layer"] = min(
            (headroom(named[f"{layer}/preactivation_absmax"], self._largest), layer)
            for layer in self._layers
        )
        elapsed = max(self._times[-1] - self._times[0], 1e-9)
        steps = len(self._times) - 1
        named["images_per_second"] = self._batch_size * steps / elapsed
        named["data_wait_share"] = min(1.0, sum(self._waits) / elapsed)
        return named

    def brief(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The part for metrics.jsonl; per-layer numbers are in telemetry/."""
        names = (*SCALAR_COLUMNS, *self._extra, "headroom", "headroom_layer", *ON_THE_CLOCK)
        return {name: metrics[name] for name in names}


def headroom(absmax: float, largest: float) -> float:
    """Bits between an absolute maximum and overflow; 0 for a non-finite one.

    Args:
      largest: log2 of the largest finite number.
    """
    if not np.isfinite(absmax):
        return 0.0
    return largest - float(np.log2(absmax)) if absmax > 0 else 2 * largest


def _absmax(maximum: float, minimum: float) -> float:
    return float(np.maximum(np.abs(maximum), np.abs(minimum)))
