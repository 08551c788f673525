"""Momentum SGD with L2 as the paper's code did it, its warm-up and its plateau rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vggrepro.config import TrainConfig


@dataclass(frozen=True)
class MomentumSGD:
    """v = mu v - lr (g + lambda w); w = w + v (Caffe), or PyTorch's form.

    The two forms differ once the learning rate changes: Caffe's velocity keeps
    the old rate, PyTorch's takes the new one at once (PAPER ambiguity 4).

    Attributes:
      weight_decay: lambda; the gradient of (lambda/2) |w|^2 is added before the
        momentum (Caffe's L2, not decoupled weight decay).
      clip_norm: gradients are scaled so that their global norm is at most this;
        0 never scales. The L2 term is not part of the norm.
    """

    momentum: float
    weight_decay: float
    clip_norm: float
    form: str
    decay_biases: bool

    @classmethod
    def from_config(cls, config: TrainConfig) -> MomentumSGD:
        return cls(
            config.momentum,
            config.weight_decay,
            config.clip_norm,
            config.momentum_form,
            config.decay_biases,
        )

    def clip_scale(self, gradient_norm: tf.Tensor) -> tf.Tensor | None:
        """The factor of every gradient, or None where clipping is off."""
        if not self.clip_norm:
            return None
        return tf.minimum(1.0, self.clip_norm / tf.maximum(gradient_norm, 1e-30))

    def decayed_gradient(
        self, name: str, weight: tf.Tensor, gradient: tf.Tensor, scale: tf.Tensor | None
    ) -> tf.Tensor:
        """c g + lambda w, the gradient that enters the momentum."""
        if scale is not None:
            gradient = gradient * scale
        if self.weight_decay and (self.decay_biases or name.endswith("/kernel")):
            gradient = gradient + self.weight_decay * weight
        return gradient

    def apply(
        self,
        name: str,
        weight: tf.Variable,
        velocity: tf.Variable,
        gradient: tf.Tensor,
        learning_rate: tf.Tensor,
        scale: tf.Tensor | None,
    ) -> None:
        """Updates weight and velocity in place with TensorFlow's fused kernel."""
        kernel = (
            tf.raw_ops.ResourceApplyKerasMomentum
            if self.form == "caffe"
            else tf.raw_ops.ResourceApplyMomentum
        )
        kernel(
            var=weight.handle,
            accum=velocity.handle,
            lr=learning_rate,
            grad=self.decayed_gradient(name, weight.read_value(), gradient, scale),
            momentum=self.momentum,
        )

    def proposal(
        self,
        name: str,
        weight: tf.Tensor,
        velocity: tf.Tensor,
        gradient: tf.Tensor,
        learning_rate: tf.Tensor,
        scale: tf.Tensor | None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """(new weight, new velocity) as plain tensors, nothing written."""
        step = self.decayed_gradient(name, weight, gradient, scale)
        if self.form == "caffe":
            velocity = self.momentum * velocity - learning_rate * step
            return weight + velocity, velocity
        velocity = self.momentum * velocity + step
        return weight - learning_rate * velocity, velocity

    def norm_bound(
        self,
        weight_norm: tf.Tensor,
        velocity_norm: tf.Tensor,
        gradient_norm: tf.Tensor,
        learning_rate: tf.Tensor,
    ) -> tf.Tensor:
        """An upper bound of the norms of the new weight and velocity.

        By the triangle inequality (clipping only shrinks). Where it is far below
        the largest float32, no element of the new state can be infinite, which
        saves reading the new state.
        """
        step = gradient_norm + self.weight_decay * weight_norm
        moved = self.momentum * velocity_norm + tf.maximum(learning_rate, 1.0) * step
        return weight_norm + tf.maximum(learning_rate, 1.0) * moved


class RateSettings(NamedTuple):
    """What the learning rate follows from besides the state.

    Scalars or tensors: a replay at another rate or warm-up need not be compiled anew.
    """

    base: float | tf.Tensor
    warmup_steps: float | tf.Tensor
    drop_factor: float


def learning_rate(settings: RateSettings, step: tf.Tensor, drops: tf.Tensor) -> tf.Tensor:
    """float32 rate of a step: base * factor^drops, under a linear warm-up.

    The warm-up rises from base/warmup_steps at step 0 to base at step
    warmup_steps - 1.

    Args:
      step, drops: integer scalars, part of the state.
    """
    rate = settings.base * tf.pow(settings.drop_factor, tf.cast(drops, tf.float32))
    done = tf.cast(step, tf.float32) + 1.0
    return rate * tf.minimum(1.0, done / tf.maximum(1.0, settings.warmup_steps))


@dataclass(frozen=True)
class PlateauSchedule:
    """Drop the rate when the validation error stops falling (paper section 3.1).

    Its memory is three arrays of the state, so that resume and replay see it.
    """

    patience: int
    max_drops: int

    @staticmethod
    def initial_state() -> dict[str, np.ndarray]:
        return {
            "schedule/drops": np.array(0, np.int32),
            "schedule/stale_evaluations": np.array(0, np.int32),
            "schedule/best_error": np.array(np.inf, np.float32),
        }

    def after_evaluation(
        self, state: dict[str, np.ndarray], validation_error: float
    ) -> dict[str, np.ndarray]:
        """The schedule's next memory, given a validation top-1 error (percent)."""
        drops, stale = int(state["schedule/drops"]), int(state["schedule/stale_evaluations"])
        best = float(state["schedule/best_error"])
        if validation_error < best:
            best, stale = validation_error, 0
        else:
            stale += 1
        if stale >= self.patience and drops < self.max_drops:
            drops, stale = drops + 1, 0
        return {
            "schedule/drops": np.array(drops, np.int32),
            "schedule/stale_evaluations": np.array(stale, np.int32),
            "schedule/best_error": np.array(best, np.float32),
        }
