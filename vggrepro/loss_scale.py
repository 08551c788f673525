"""Dynamic loss scaling of float16 (Micikevicius et al., Mixed Precision Training, ICLR 2018).

float16 ends at 6e-8 below and 65504 above. The gradient is computed of scale * loss and
divided by the scale in float32, so that small gradients do not round to 0. If the scale
itself makes gradients overflow, the update is skipped and the scale halved; it doubles
after `GROWTH_STEPS` steps without that. Scale and counter are part of the state.

A step is skipped exactly if its gradients are not finite at the present scale and all of
it is finite at scale 1, from the same state and batch. What is not finite at scale 1 is
no doing of the scale: an incident, at once and at every scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

SCALE, GOOD_STEPS = "loss_scale/scale", "loss_scale/good_steps"
# Start, factor 2 and period: tf.keras.mixed_precision.LossScaleOptimizer, as Micikevicius
# et al. and NVIDIA's guide. The ceiling is that of NVIDIA's Apex: without one the scale of
# a net whose gradients have died grows to infinity.
INITIAL_SCALE, LARGEST_SCALE = 2.0**15, 2.0**24
GROWTH_STEPS = 2000
COLUMNS = ("loss_scale", "skipped")  # of the telemetry: the scale a step had, 1 for a skip


def has_loss_scale(precision: str) -> bool:
    """Whether a precision needs it: bfloat16 has the range of float32."""
    return precision == "float16"


def initial_loss_scale(precision: str) -> dict[str, np.ndarray]:
    """The arrays of step 0's state; none for a precision without a loss scale."""
    if not has_loss_scale(precision):
        return {}
    return {SCALE: np.array(INITIAL_SCALE, np.float32), GOOD_STEPS: np.array(0, np.int32)}


def state_for(precision: str, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state of any precision as a step of this one needs it: with a loss scale or without."""
    kept = {name: array for name, array in state.items() if name not in (SCALE, GOOD_STEPS)}
    return kept | {n: state.get(n, fresh) for n, fresh in initial_loss_scale(precision).items()}


def overflowed(gradients: Sequence[tf.Tensor]) -> tf.Tensor:
    """bool: whether any element is not finite."""
    finite = [tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients]
    return tf.logical_not(tf.reduce_all(tf.stack(finite)))


def after_step(state: Mapping[str, Any], skipped: tf.Tensor) -> dict[str, tf.Tensor]:
    """The arrays after a step that was applied or skipped.

    Args:
      state: tensors or variables by name.
    """
    scale, good = tf.convert_to_tensor(state[SCALE]), tf.convert_to_tensor(state[GOOD_STEPS])
    grows = tf.equal(good + 1, GROWTH_STEPS)
    grown = tf.where(grows, tf.minimum(scale * 2.0, LARGEST_SCALE), scale)
    counted = tf.where(grows, 0, good + 1)
    return {
        SCALE: tf.where(skipped, tf.maximum(scale / 2.0, 1.0), grown),
        GOOD_STEPS: tf.where(skipped, 0, counted),
    }


def telemetry_of(scale: tf.Tensor, skipped: tf.Tensor) -> list[tf.Tensor]:
    """The values of `COLUMNS`."""
    return [scale, tf.cast(skipped, tf.float32)]
