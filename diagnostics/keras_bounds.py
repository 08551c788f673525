"""When the norms of weights and slots are read, and when their bounds do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from diagnostics.keras_norms import ALARM, READ_EVERY, CarriedNorms
from diagnostics.keras_update import Group, fast_norm, has_bound


class Bounds:
    """Of one guarded step, over its traces.

    Elsewhere the step itself decides when to read (`CarriedNorms.now`); under XLA, where a
    conditional is dear, the host does.

    Attributes:
      active: whether a step under XLA relies on them. Where it is refused, it must be run again
        with a look at everything.

    Args:
      under_xla: whether such a step may.
    """

    def __init__(self, under_xla: bool) -> None:
        self.active = False
        self._under_xla = under_xla
        self._carried = CarriedNorms()
        self._groups: list[Group] = []
        self._age, self._gradients = 0, np.empty(0)

    def of(self, groups: Sequence[Group]) -> CarriedNorms | None:
        """What one step leaves to the next; None in a trace that updates other weights."""
        own = [group._replace(gradients=[]) for group in groups]
        if self._groups and _weights(self._groups) != _weights(own):
            self.forget()
            return None
        self._groups = own
        self._carried.trace(len(own))
        return self._carried

    def suffice(self, optimizer: Any, touched: Sequence[Any]) -> bool:
        """Whether the step that is traced under XLA may rely on them."""
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if not self._under_xla or scaled or tf.executing_eagerly():
            return False
        self.active = has_bound(optimizer, touched)
        self.forget()
        return self.active

    def forget(self) -> None:
        """Weights or slots may have been written by something else."""
        with tf.init_scope():
            self._carried.forget()
            if self.active:
                weights = tf.stack([fast_norm(group.weights) for group in self._groups])
                slots = tf.stack([fast_norm(group.slots) for group in self._groups])
                self._carried.replace(weights, slots)
                self._age, self._gradients = 0, np.empty(0)

    def after_step(self, telemetry: Mapping[str, float]) -> None:
        """Under XLA: reads when it is time to, as `CarriedNorms.now` does."""
        if not self.active:
            return
        gradients = np.array([telemetry[f"{group.layer}/gradient_norm"] for group in self._groups])
        if not self._gradients.size:
            self._gradients = gradients
        self._age += 1
        if self._age >= READ_EVERY or not np.all(gradients <= ALARM * self._gradients):
            self.forget()


def _weights(groups: Sequence[Group]) -> list[int]:
    return [id(weight) for group in groups for weight in group.weights]
