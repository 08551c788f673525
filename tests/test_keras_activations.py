"""Activations that cannot work where they stand: what they do, and the line that mends them."""

import keras
import numpy as np
from keras_models import FEATURES, Fitted, L, compiled, data

from diagnostics import NumericGuard


def regression(*layers, rate=0.01):
    model = keras.Sequential([keras.Input((FEATURES,)), *layers])
    return compiled(model, loss="mse", optimizer=keras.optimizers.SGD(rate))


def test_a_softmax_over_one_unit_is_the_architecture(tmp_path):
    x, _ = data()
    y = (x[:, :1] > 0).astype("float32")

    def build():
        return regression(L.Dense(8, "relu"), L.Dense(1, "softmax", name="out"))

    found = Fitted(build, x, y, tmp_path / "run", epochs=6).guard.diagnose(budget_seconds=4)
    assert (found.verdict, found.cause.kind) == ("stalled", "architecture")
    assert "out ends in a softmax over a single unit" in found.cause.evidence[0]
    assert found.recommendation.verified and 'activation="sigmoid"' in found.recommendation.command


def test_units_that_an_update_killed_are_the_rate(tmp_path):
    x = 0.1 * data()[0]
    y = x[:, :1] - 30

    def build():
        hidden = L.Dense(8, "relu", name="hidden", bias_initializer="ones")
        return regression(hidden, L.Dense(1, name="out", kernel_initializer="ones"), rate=0.1)

    found = Fitted(build, x, y, tmp_path / "run", epochs=12).guard.diagnose(budget_seconds=4)
    assert (found.verdict, found.cause.kind) == ("stalled", "learning_rate")
    assert "hidden is dead since step" in " ".join(found.cause.evidence)
    assert found.recommendation.verified and "learning_rate=" in found.recommendation.command


def test_a_recurrence_without_bound_is_the_architecture(tmp_path):
    x = np.random.default_rng(0).random((32, 300, 3)).astype("float32") * 4

    def build():
        memory = L.LSTM(24, activation="relu", name="memory")
        model = keras.Sequential([keras.Input(x.shape[1:]), memory, L.Dense(1, name="value")])
        return compiled(model, loss="mse", optimizer=keras.optimizers.SGD(0.03))

    found = Fitted(build, x, x.mean((1, 2)), tmp_path / "run", epochs=3).guard.diagnose(6)
    assert found.cause.kind == "architecture" and "memory is recurrent" in found.cause.evidence[0]
    bounded = next(one for one in found.counterfactuals if one.kind == "activation")
    assert bounded.survived and "tanh instead of relu in memory" in bounded.change


def test_what_a_recurrent_layer_puts_out_is_seen(tmp_path):
    """Its loop hides what its cell does: without a look at the output the next layer is blamed."""

    class Cell(L.Layer):
        state_size = output_size = 3
        activation = staticmethod(keras.activations.relu)

        def call(self, v, states):
            new = self.activation(keras.ops.log(v - 10.0) + states[0])
            return new, [new]

    x = np.ones((16, 4, 3), "float32")
    model = keras.Sequential([keras.Input((4, 3)), L.RNN(Cell(), name="memory"), L.Dense(1)])
    guard = NumericGuard(tmp_path / "run")
    compiled(model, loss="mse").fit(x, x[:, 0, :1], verbose=0, callbacks=[guard])
    assert guard.diagnose(budget_seconds=0).first_nonfinite.layer == "memory"
