"""A guard that has not been seen to fire is not trusted: inject NaN and look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from diagnostics.errors import GuardFailure
from diagnostics.guard import GuardLayout, StepResult
from diagnostics.protocol import Check


class GuardedStep(Protocol):
    """What the self-test needs of a step: its state, its layout, and to run it."""

    @property
    def layout(self) -> GuardLayout: ...
    @property
    def variables(self) -> Mapping[str, Any]: ...  # values like tf.Variable
    def __call__(self, images: tf.Tensor, labels: tf.Tensor) -> StepResult: ...
    def rearm(self) -> None: ...


def self_test(step: GuardedStep, images: tf.Tensor, labels: tf.Tensor) -> int:
    """Injects NaN through the very compiled step that will train, on its device.

    First a NaN in the last layer's bias, which must trip its pre-activation, the
    loss and the gradients; then a NaN pixel, a label out of range and a NaN in
    every bias and every momentum at once, which must trip all other checks. The
    state is put back bit for bit.

    Args:
      images, labels: a batch as the trainer will feed it.

    Returns:
      The number of checks seen to fire.

    Raises:
      GuardFailure: a check stayed silent, or the refused step wrote something.
    """
    layers = step.layout.layers
    result = _run_poisoned(step, [f"params/{layers[-1]}/bias"], images, labels)
    blind = [str(replica) for replica, sound in enumerate(result.healthy) if sound]
    if blind:
        raise GuardFailure(
            f"replica {', '.join(blind)} did not see a NaN injected into its weights",
            "Training is refused, because a real NaN would pass unseen as well",
        )
    fired = _fired(step.layout, result)
    expected = _expected_gradients(step.layout, result)
    everywhere = [f"{group}/{layer}/bias" for layer in layers for group in ("params", "momentum")]
    bad_images = tf.tensor_scatter_nd_update(images, [[0] * len(images.shape)], [np.nan])
    bad_labels = tf.tensor_scatter_nd_update(labels, [[0]], [-1])
    fired |= _fired(step.layout, _run_poisoned(step, everywhere, bad_images, bad_labels))
    expected |= {check for check in step.layout.checks() if check.stage != "backward"}
    silent = sorted(check.describe() for check in expected - fired)
    if silent:
        raise GuardFailure(
            f"the guard did not see a NaN injected on this device: {', '.join(silent[:4])}",
            "Training is refused, because a real NaN would pass unseen as well",
        )
    return len(expected)


def _fired(layout: GuardLayout, result: StepResult) -> set[Check]:
    return {c for c, ok in zip(layout.checks(), result.passed, strict=True) if not ok}


def _expected_gradients(layout: GuardLayout, result: StepResult) -> set[Check]:
    """Gradient checks that a NaN in the last bias must trip.

    Behind a layer without a live unit every gradient is zero and shows no NaN.
    """
    column = dict(zip(layout.columns(), result.telemetry, strict=True))
    reached = {layout.layers[-1]}
    for layer in reversed(layout.layers[:-1]):
        if not column[f"{layer}/preactivation_max"] > 0:
            break
        reached.add(layer)
    return {c for c in layout.checks() if c.stage == "backward" and c.layer in reached}


def _run_poisoned(
    step: GuardedStep, names: Sequence[str], images: tf.Tensor, labels: tf.Tensor
) -> StepResult:
    """One step with a NaN in the first element of the named arrays; restores them."""
    saved = {name: step.variables[name].numpy() for name in names}
    poisoned = {name: _with_nan(value) for name, value in saved.items()}
    before = step.variables["counters/step"].numpy()
    try:
        for name, value in poisoned.items():
            step.variables[name].assign(value)
        result = step(images, labels)
        wrote = before != step.variables["counters/step"].numpy() or any(
            value.tobytes() != step.variables[name].numpy().tobytes()
            for name, value in poisoned.items()
        )
    finally:
        for name, value in saved.items():
            step.variables[name].assign(value)
        step.rearm()
    if result.applied or wrote:
        raise GuardFailure(
            "the guard let a step with an injected NaN write the state",
            "Training is refused; please report this device and these versions",
        )
    return result


def _with_nan(value: np.ndarray) -> np.ndarray:
    poisoned = value.copy()
    poisoned.reshape(-1)[0] = np.nan
    return poisoned
