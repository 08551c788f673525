"""Random small models with one non-finite value at a random place: that place is found."""

import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keras_models import BATCH, CLASSES, FEATURES, STEPS, Fitted, L, compiled, data

from diagnostics.incident import read_incident


class Faulty(L.Layer):
    """Passes its input on; at one iteration the first value or gradient is `bad`."""

    def __init__(self, optimizer: Any, step: int, bad: float, backward: bool, **options: Any):
        super().__init__(**options)
        self._optimizer, self._step, self._bad, self._backward = optimizer, step, bad, backward

    def call(self, x: tf.Tensor) -> tf.Tensor:
        hit = tf.equal(tf.cast(self._optimizer.iterations, tf.int32), self._step)
        first = tf.reshape(tf.one_hot(0, tf.size(x), True, False), tf.shape(x))
        struck = tf.logical_and(hit, first)

        @tf.custom_gradient
        def passed(values: tf.Tensor) -> tuple[tf.Tensor, Any]:
            if self._backward:
                return tf.identity(values), lambda upstream: tf.where(struck, self._bad, upstream)
            return tf.where(struck, self._bad, values), lambda upstream: upstream

        return passed(x)


places = st.fixed_dictionaries(
    {
        "depth": st.integers(1, 3),
        "activation": st.sampled_from(["relu", "tanh", "gelu", "linear"]),
        "normalised": st.booleans(),
        # Mostly none: their loops take long to trace, and have tests of their own.
        "recurrent": st.sampled_from(["", "", "", "", "", "SimpleRNN", "LSTM", "GRU"]),
        "stage": st.sampled_from(["data", "weights", "forward", "backward"]),
        "at": st.integers(0, 2),
        "step": st.integers(0, STEPS - 1),
        "bad": st.sampled_from([float("nan"), float("inf"), -float("inf")]),
        "momentum": st.sampled_from([0.0, 0.9]),
    }
)


def build(place: dict) -> keras.Model:
    optimizer = keras.optimizers.SGD(0.01, momentum=place["momentum"])
    layers: list[Any] = [keras.Input((FEATURES,))]
    if place["recurrent"]:
        layers.append(L.Reshape((FEATURES // 2, 2)))
        layers.append(getattr(L, place["recurrent"])(4, name="memory"))
    for i in range(place["depth"]):
        layers.append(L.Dense(6, activation=place["activation"], name=f"dense_{i}"))
        if place["normalised"]:
            layers.append(L.LayerNormalization(name=f"norm_{i}"))
        if place["stage"] in ("forward", "backward") and i == place["at"] % place["depth"]:
            backward = place["stage"] == "backward"
            options = {"step": place["step"], "bad": place["bad"], "backward": backward}
            layers.append(Faulty(optimizer, name="faulty", **options))
    layers.append(L.Dense(CLASSES, name="logits"))
    return compiled(keras.Sequential(layers), optimizer=optimizer)


class Poison(keras.callbacks.Callback):
    """Writes a bad number into a kernel in front of a step."""

    def __init__(self, layer: str, step: int, bad: float) -> None:
        super().__init__()
        self._place, self._bad = (layer, step), bad

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if batch == self._place[1]:
            # Of a recurrent layer the kernel of its state.
            *_, kernel, _ = self.model.get_layer(self._place[0]).trainable_variables
            values = kernel.numpy()
            values[0, 0] = self._bad
            kernel.assign(values)


@settings(max_examples=max(5, settings().max_examples // 4))
@example(
    place={
        **{"depth": 2, "activation": "tanh", "normalised": False, "recurrent": ""},
        **{"stage": "forward", "at": 0, "step": 0, "bad": -float("inf"), "momentum": 0.0},
    }
)
@given(place=places)
def test_the_injected_place_is_the_first_check_that_trips(place):
    x, y = data()
    layer = f"dense_{place['at'] % place['depth']}"
    if place["recurrent"] and (place["stage"], place["at"]) == ("weights", 2):
        layer = "memory"
    callbacks = []
    if place["stage"] == "data":
        x[place["step"] * BATCH + place["at"], 1] = place["bad"]
    if place["stage"] == "weights":
        callbacks = [Poison(layer, place["step"], place["bad"])]
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        fitted = Fitted(lambda: build(place), x, y, run_dir, callbacks=callbacks)
        assert fitted.guard.step == place["step"]
        first = read_incident(fitted.guard.incident).record["failed_checks"][0]
    if place["stage"] == "backward":
        # The gradient of the layer behind the fault is computed first, and is finite.
        before = f"norm_{place['at'] % place['depth']}" if place["normalised"] else layer
        assert (first["stage"], first["layer"]) == ("backward", before)
        return
    stage = place["stage"]
    expected = {"data": "", "weights": layer, "forward": "faulty"}[stage]
    if (place["stage"], place["bad"]) == ("forward", -np.inf):
        # Let pass as in a mask; the next layer is the first that it spoils.
        behind = place["at"] % place["depth"] + 1
        expected = f"dense_{behind}" if behind < place["depth"] else "logits"
        if place["activation"] == "tanh" and behind < place["depth"]:
            stage = "backward"  # Infinities become the limits of the tanh, which is read.
    assert (first["stage"], first["layer"]) == (stage, expected)
    if place["stage"] != "weights":
        assert all(np.isfinite(w).all() for w in fitted.model.get_weights())
