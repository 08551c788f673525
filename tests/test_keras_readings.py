"""The guard reads nothing between the ops that oneDNN makes one kernel of."""

import keras
import numpy as np
import pytest

from diagnostics import NumericGuard

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
