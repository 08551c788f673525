"""The guard reads nothing between the ops that oneDNN makes one kernel of."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from diagnostics import NumericGuard
from diagnostics.incident import read_incident

L = keras.layers


def residual() -> keras.Model:
    """Fused with tanh, ELU and sigmoid, and summed, where oneDNN is on."""
    inputs = keras.Input((6,))
    values = L.Dense(6, "tanh")(inputs)
    values = L.Add()([values, L.Dense(6)(values)])
    values = L.Activation("elu")(L.Dense(6)(values))
    return keras.Model(inputs, L.Dense(1, "sigmoid")(values))


def pictures() -> keras.Model:
    """The same with convolutions, whose sums end in a ReLU."""
    inputs = keras.Input((6, 6, 2))
    values = L.Conv2D(3, 3, padding="same", activation="elu")(inputs)
    values = L.Add()([values, L.Conv2D(3, 3, padding="same")(values)])
    values = L.GlobalAveragePooling2D()(L.Activation("relu")(values))
    return keras.Model(inputs, L.Dense(1, "sigmoid", dtype="float32")(values))


def trained(build, policy: str, guard: NumericGuard | None, bad: bool = False) -> list[bytes]:
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(3)
        model = build()
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(32, *model.input_shape[1:])).astype("float32")
    x[20] = np.nan if bad else x[20]
    y = draw.normal(size=(32, 1)).astype("float32")
    callbacks = [guard] if guard else []
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False, callbacks=callbacks)
    return [array.tobytes() for array in model.get_weights()]


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("build", [residual, pictures])
def test_fused_nets_have_the_same_bits_with_and_without(tmp_path, build, policy):
    guard = NumericGuard(tmp_path / "run")
    assert trained(build, policy, guard) == trained(build, policy, None)
    assert guard.incident is None and guard.step == 4


@pytest.mark.parametrize("build", [residual, pictures])
def test_and_a_nan_stops_them(tmp_path, build):
    guard = NumericGuard(tmp_path / "run")
    trained(build, "float32", guard, bad=True)
    assert guard.incident is not None and guard.step == 2


def rectified(place: int = 0, changed=lambda kernel: kernel) -> keras.Model:
    """Three convolutions with their ReLUs; the kernel of one is changed."""
    inputs = keras.Input((8, 8, 2))
    values = inputs
    for number in range(3):
        values = L.Conv2D(8, 3, padding="same", activation="relu", name=f"conv{number}")(values)
        values = L.MaxPooling2D()(values) if number == 1 else values
    model = keras.Model(inputs, L.Dense(1)(L.Flatten()(values)))
    kernel = model.get_layer(f"conv{place}").kernel
    kernel.assign(changed(kernel.numpy()))
    return model


def test_a_convolution_is_bounded_and_its_relu_stays_with_it(tmp_path):
    guard = NumericGuard(tmp_path / "run")
    assert trained(rectified, "float32", guard) == trained(rectified, "float32", None)
    shown = guard.telemetry()
    for number in range(3):
        column = list(shown.columns).index(f"conv{number}/preactivation_min")
        assert not shown.rows[:, column].any()  # of what the ReLU gave


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("scale", [1e19, -1e19])
def test_one_that_is_not_bounded_is_computed_again(tmp_path, place, scale):
    """Finite, and negative in part: its ReLU's result would have shown no more."""
    guard = NumericGuard(tmp_path / "run")
    model = rectified(place, lambda kernel: scale * kernel)
    model.compile(keras.optimizers.SGD(0.0), loss=lambda y, p: 1e-36 * p, jit_compile=False)
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 2)).astype("float32")
    model.fit(x, np.zeros((8, 1)), batch_size=8, verbose=0, callbacks=[guard])
    shown = guard.telemetry()
    lowest = shown.column(f"conv{place}/preactivation_min")
    assert guard.incident is None and lowest is not None and lowest[0] < -1e18


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("scale", [np.nan, np.inf, -3e38])
def test_what_a_fused_relu_hides_is_seen(tmp_path, place, scale):
    """All sums of -3e38 overflow to -Inf, which a ReLU makes 0."""
    guard = NumericGuard(tmp_path / "run")
    model = rectified(place, lambda kernel: scale * np.abs(kernel))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    x = np.abs(np.random.default_rng(0).normal(size=(8, 8, 8, 2))).astype("float32") + 500.0
    model.fit(x, np.zeros((8, 1)), batch_size=8, verbose=0, callbacks=[guard])
    assert guard.incident is not None
    first = read_incident(guard.incident).record["failed_checks"][0]
    assert first["layer"] == f"conv{place}"


def normalised(changed=lambda kernel: kernel) -> keras.Model:
    """Three convolutions with batch normalisation behind them; the second's kernel is changed."""
    inputs = keras.Input((8, 8, 2))
    values = inputs
    for number in range(3):
        values = L.Conv2D(8, 3, padding="same", name=f"conv{number}")(values)
        values = L.MaxPooling2D()(L.ReLU()(L.BatchNormalization()(values)))
    model = keras.Model(inputs, L.Dense(1)(L.Flatten()(values)))
    kernel = model.get_layer("conv1").kernel
    kernel.assign(changed(kernel.numpy()))
    return model


def fitted(model: keras.Model, guard: NumericGuard | None, *callbacks) -> keras.Model:
    """Forty steps of which no gradient is twice as large as an earlier one."""
    keras.utils.set_random_seed(3)
    model.compile(keras.optimizers.SGD(1e-6), "mse", jit_compile=False)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(8, 8, 8, 2)).astype("float32")
    y = draw.normal(size=(8, 1)).astype("float32")
    data = tf.data.Dataset.from_tensors((x, y)).repeat(40)
    model.fit(data, verbose=0, callbacks=[*([guard] if guard else []), *callbacks])
    return model


def test_what_is_normalised_is_read_now_and_then(tmp_path):
    guard = NumericGuard(tmp_path / "run")
    keras.utils.set_random_seed(3)
    guarded = fitted(normalised(), guard)
    keras.utils.set_random_seed(3)
    plain = fitted(normalised(), None)
    for mine, other in zip(guarded.get_weights(), plain.get_weights(), strict=True):
        assert mine.tobytes() == other.tobytes()
    assert guard.incident is None and guard.step == 40
    for number in range(3):
        shown = guard.telemetry().column(f"conv{number}/preactivation_max")
        changes = np.flatnonzero(np.diff(shown)) + 1
        assert set(changes) <= {1, 16, 17, 32, 33}  # a reading, and the one after it
        assert len(changes) > 2


@pytest.mark.parametrize("value", [pytest.param(np.nan, marks=pytest.mark.slow), np.inf, 1e30])
def test_what_is_normalised_is_read_where_it_is_not_bounded(tmp_path, value):
    """In the middle between two readings; 1e30 is finite, and shown at the very step."""

    class Spoils(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 9:
                kernel = self.model.get_layer("conv1").kernel
                kernel.assign(np.abs(kernel.numpy()) * value)

    guard = NumericGuard(tmp_path / "run")
    fitted(normalised(), guard, Spoils())
    shown = guard.telemetry()
    highest = shown.column("conv1/preactivation_max")
    assert shown.steps[-1] >= 10 and not highest[10] < 1e29 and highest[9] < 1e3
    if not np.isfinite(value):
        first = read_incident(guard.incident).record["failed_checks"][0]
        assert (guard.step, first["layer"]) == (10, "conv1")
