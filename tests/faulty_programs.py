"""Programs and data with mistakes in them, as people make them; each a context or an edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
import toy_run
from fault_injection import patched
from fault_runs import Damage, edited_data, inputs_of, of_examples

from diagnostics.protocol import State
from vggrepro import step_core

CULPRIT = 11  # the example that is bad, where one is; in both programs' first epoch
Patch = Callable[[], AbstractContextManager[Any]]


def all_of(*patches: Patch) -> Patch:
    """Several mistakes at once."""

    @contextmanager
    def together() -> Iterator[None]:
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch())
            yield

    return together


def culprit(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """The inputs of example CULPRIT become `change` of themselves."""

    def edit(batch: dict[str, np.ndarray], rows: np.ndarray) -> None:
        inputs_of(batch)[rows] = change(inputs_of(batch)[rows])

    return lambda: edited_data(of_examples([CULPRIT], edit))


def one_number(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """One of the numbers of an example is this."""

    def change(inputs: np.ndarray) -> np.ndarray:
        return np.where(np.arange(inputs.shape[1]) == 2, np.float32(value), inputs)

    return change


def culprit_label(label: int) -> Patch:
    """The label of example CULPRIT is this."""

    def edit(batch: dict[str, np.ndarray], rows: np.ndarray) -> None:
        batch["labels"][rows] = label

    return lambda: edited_data(of_examples([CULPRIT], edit))


def all_inputs(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """Every input becomes `change` of itself."""

    def edit(batch: dict[str, np.ndarray], step: int) -> None:
        inputs_of(batch)[:] = change(inputs_of(batch))

    return lambda: edited_data(edit)


def vgg_loss(formula: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> Patch:
    """VGG with another loss: `formula` of (logits, labels), one number an example."""

    def cross_entropy(
        logits: tf.Tensor, labels: tf.Tensor, classes: int, global_rows: int
    ) -> tuple[tf.Tensor, tf.Tensor]:
        valid = tf.reduce_all(tf.logical_and(labels >= 0, labels < classes))
        known = tf.clip_by_value(labels, 0, classes - 1)  # the self-test feeds wrong ones
        return tf.reduce_sum(formula(logits, known)) / global_rows, valid

    return lambda: patched((step_core, "cross_entropy", cross_entropy))


def log_of_softmax(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Cross-entropy by its definition: a softmax that underflows has no logarithm."""
    return -tf.math.log(tf.gather(tf.nn.softmax(logits), labels, batch_dims=1))


def with_norm_of_logits(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """A penalty whose gradient does not exist at logits of 0."""
    per_example = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return per_example + 0.01 * tf.norm(logits, axis=1)


@contextmanager
def standardised_images() -> Iterator[None]:
    """VGG behind a standardisation of every image by itself: 0/0 for a plain one."""
    real = step_core.forward

    def forward(network: Any, parameters: Any, images: tf.Tensor, **rest: Any) -> tf.Tensor:
        mean = tf.reduce_mean(images, axis=[1, 2, 3], keepdims=True)
        spread = tf.math.reduce_std(images, axis=[1, 2, 3], keepdims=True)
        return real(network, parameters, (images - mean) / spread, **rest)

    with patched((step_core, "forward", forward)):
        yield


@contextmanager
def energy_of_logits() -> Iterator[None]:
    """The toy with a penalty on its logits, squared in the type of its activations."""
    real = toy_run.loss_of

    def loss_of(config: Any, logits: tf.Tensor, *rest: Any) -> tuple[tf.Tensor, tf.Tensor]:
        loss, valid = real(config, logits, *rest)
        energy = tf.square(tf.cast(100.0 * logits, config.precision))
        return loss + 1e-8 * tf.reduce_mean(tf.cast(energy, tf.float32)), valid

    with patched((toy_run, "loss_of", loss_of)):
        yield


def nan_in(name: str, before: int) -> Damage:
    """The first number of a state array becomes NaN."""

    def overwritten(state: State) -> State:
        array = state[name].copy()
        array.reshape(-1)[0] = np.nan
        return {name: array}

    return Damage(before, overwritten)


def flipped_bit(name: str, before: int) -> Damage:
    """The highest bit of one weight's exponent turns on: a finite number around 1e37."""

    def overwritten(state: State) -> State:
        array = state[name].copy()
        array.reshape(-1).view(np.uint32)[0] |= np.uint32(1 << 30)
        return {name: array}

    return Damage(before, overwritten)
