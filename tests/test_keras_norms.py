"""Norms of weights and slots that are carried from step to step instead of read."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from keras_models import BATCH, FEATURES, compiled, data, mlp

from diagnostics import NumericGuard
from diagnostics.incident import read_incident
from diagnostics.keras_norms import READ_EVERY, Norms
from diagnostics.keras_products import gradient_square
from diagnostics.keras_update import reached_norms

OPTIMIZERS = {
    "sgd": lambda rate: keras.optimizers.SGD(rate),
    "nesterov": lambda rate: keras.optimizers.SGD(
        rate, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "ema": lambda rate: keras.optimizers.SGD(rate, use_ema=True, ema_overwrite_frequency=3),
    "adam": lambda rate: keras.optimizers.Adam(rate, amsgrad=True),
    "adamw": lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.1),
    "adamax": lambda rate: keras.optimizers.Adamax(rate),
    "nadam": lambda rate: keras.optimizers.Nadam(rate),
    "rmsprop": lambda rate: keras.optimizers.RMSprop(rate, momentum=0.9),
    "adagrad": lambda rate: keras.optimizers.Adagrad(rate),
    "accumulated": lambda rate: keras.optimizers.SGD(
        rate, momentum=0.9, gradient_accumulation_steps=2
    ),
    "accumulated_adam": lambda rate: keras.optimizers.Adam(rate, gradient_accumulation_steps=3),
}


def norm(arrays) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.float64(a))) for a in arrays)))


class Norming(keras.callbacks.Callback):
    """Of every step, true norms and bounds of all weights and of all slots."""

    def __init__(self, guard: NumericGuard) -> None:
        super().__init__()
        self.guard, self.true, self.bounds = guard, [], []

    def on_train_batch_end(self, batch, logs=None):
        optimizer = self.model.optimizer
        slots = [v for v in optimizer.variables if len(v.shape)]
        self.true.append([norm(self.model.get_weights()), norm(v.numpy() for v in slots)])
        carried = self.guard._guarded.bounds._carried
        self.bounds.append([norm([row]) for row in carried._norms.numpy()[:2]])


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(
    rate=st.floats(1e-4, 10.0),
    scales=st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_an_update_reaches_no_further_than_its_bound(name, rate, scales, seed):
    draw = np.random.default_rng(seed)
    weight = keras.Variable(draw.normal(size=6).astype(np.float32))
    optimizer = OPTIMIZERS[name](rate)
    optimizer.build([weight])
    slots = [v for v in optimizer.variables if len(v.shape)]
    for scale in scales:
        gradient = (scale * draw.normal(size=6)).astype(np.float32)
        before = [np.float32([norm(a)]) for a in ([gradient], [weight], slots)]
        bounds = reached_norms(optimizer, Norms(*before, before[1], before[0]))
        optimizer.apply([tf.constant(gradient)], [weight])
        for after, bound in zip(([weight], slots), bounds, strict=True):
            assert norm(v.numpy() for v in after) <= 1.00001 * float(bound[0])


@pytest.mark.parametrize("name", ["nesterov", "ema", "adam", "nadam", "rmsprop"])
def test_bounds_hold_over_a_fit_that_reads_now_and_then(tmp_path, name):
    keras.utils.set_random_seed(7)
    guard = NumericGuard(tmp_path / "run")
    watched = Norming(guard)
    model = compiled(mlp(), optimizer=OPTIMIZERS[name](1e-3))
    x, y = data()
    model.fit(np.tile(x, (8, 1)), np.tile(y, 8), batch_size=BATCH, shuffle=False, verbose=0,
              callbacks=[guard, watched])  # fmt: skip
    assert guard.incident is None
    assert np.all(np.array(watched.true) <= np.array(watched.bounds))
    shown = guard.telemetry()
    column = shown.rows[:, list(shown.columns).index("first/weight_norm")]
    readings = 1 + np.count_nonzero(np.diff(column))
    assert len(column) // READ_EVERY <= readings < len(column) / 2


@pytest.mark.parametrize("rows", [1, 8, 32, 33])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15, 1e25, np.nan, np.inf])
def test_the_norm_of_a_large_gradient_follows_from_its_factors(rows, scale):
    """Of rows that cancel too; beyond its bound, and if not finite, it is not finite."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(rows, 1024)).astype(np.float32)
    x[1::2] = x[: rows // 2]
    d = draw.normal(size=(rows, 1024)).astype(np.float32)
    d[1::2] = -(1 + 1e-3) * d[: rows // 2]
    d[0, 3] *= scale

    @tf.function
    def both(x, d):
        gradient = tf.matmul(x, d, transpose_a=True)
        return gradient_square(gradient), tf.norm(tf.cast(gradient, tf.float64)), gradient

    square, norm, gradient = both(x, d)
    if np.isfinite(gradient).all() and float(norm) < 1e17:
        assert np.sqrt(square) == pytest.approx(float(norm), rel=1e-4)
    else:
        assert not np.isfinite(square) or float(square) > 1e34


class Meddling(keras.callbacks.Callback):
    """Writes NaN after the sixth step of the epoch."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def on_train_batch_end(self, batch, logs=None):
        owner = self.model if self.target == "weights" else self.model.optimizer
        victim = next(v for v in owner.variables if v.shape == (FEATURES, 8))
        if batch == 5:
            victim.assign(victim.numpy() * np.nan)


@pytest.mark.parametrize("target,steps", [("weights", 6), ("slots", 7)])
def test_what_something_else_wrote_is_seen_before_it_spreads(tmp_path, target, steps):
    """NaN in a slot reaches its weight at once, and shows there a step later."""
    guard = NumericGuard(tmp_path / "run")
    model = compiled(mlp(), optimizer=keras.optimizers.SGD(1e-3, momentum=0.9))
    x, y = data()
    model.fit(np.tile(x, (4, 1)), np.tile(y, 4), batch_size=BATCH, verbose=0,
              callbacks=[guard, Meddling(target)])  # fmt: skip
    assert guard.step == steps
    checks = read_incident(guard.incident).record["failed_checks"]
    assert checks[0] == {"stage": "weights", "layer": "first", "quantity": "weights"}
    assert "second" not in {check["layer"] for check in checks if check["stage"] == "weights"}


class WritesItself(keras.Model):
    """Its step scales its own weights before it updates them."""

    def __init__(self) -> None:
        super().__init__()
        self.only = keras.layers.Dense(3, name="only")
        self.only.build((None, FEATURES))

    def call(self, x):
        return self.only(x)

    def train_step(self, data):
        self.only.kernel.assign(self.only.kernel * 3.0)
        return super().train_step(data)


def test_weights_that_a_step_writes_itself_are_read_at_every_step(tmp_path):
    guard = NumericGuard(tmp_path / "run")
    model = compiled(WritesItself(), optimizer=keras.optimizers.SGD(1e-6))
    model.fit(*data(), batch_size=BATCH, verbose=0, callbacks=[guard])
    shown = guard.telemetry()
    column = shown.rows[:, list(shown.columns).index("only/weight_norm")]
    np.testing.assert_allclose(column[1:] / column[:-1], 3.0, rtol=1e-3)


def test_every_step_of_a_run_that_diverges_has_its_weights(tmp_path):
    guard = NumericGuard(tmp_path / "run")
    model = compiled(mlp("linear"), loss="mse", optimizer=keras.optimizers.SGD(2.0))
    x, _ = data()
    norms: list[float] = []
    told = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: norms.append(norm(model.layers[0].weights))
    )
    model.fit(x, x[:, :3], batch_size=BATCH, epochs=4, verbose=0, callbacks=[told, guard])
    shown = guard.telemetry()
    column = shown.rows[:, list(shown.columns).index("first/weight_norm")]
    assert guard.incident is not None and len(column) > 3
    grown = np.array(norms[: len(column)])
    late = grown > 2 * grown[0]
    np.testing.assert_allclose(column[late], grown[late], rtol=0.2)


def scaled_apart() -> keras.Model:
    """Finite throughout, but no bound says so."""
    model = mlp("linear")
    for name, scale in (("first", 1e19), ("second", 1e-19)):
        kernel = model.get_layer(name).kernel
        kernel.assign(scale * kernel)
    return model


@pytest.mark.usefixtures("without_op_determinism")
@pytest.mark.parametrize(("build", "bounded"), [(mlp, True), (scaled_apart, False)])
def test_under_xla_weights_are_bounded_too_or_else_looked_at(tmp_path, build, bounded):
    weights = []
    for guard in (None, NumericGuard(tmp_path / "run")):
        keras.utils.set_random_seed(7)
        model = compiled(build(), jit_compile=True, optimizer=keras.optimizers.SGD(1e-30))
        callbacks = [guard] if guard else []
        model.fit(*data(), batch_size=BATCH, epochs=4, verbose=0, callbacks=callbacks)
        weights.append(b"".join(array.tobytes() for array in model.get_weights()))
    assert weights[0] == weights[1] and guard.incident is None and guard.step == 24
    assert guard._guarded.bounds.active is bounded


@pytest.mark.usefixtures("without_op_determinism")
@pytest.mark.parametrize("target", ["weights", "slots"])
def test_under_xla_a_refused_step_is_looked_at(tmp_path, target):
    guard = NumericGuard(tmp_path / "run")
    model = compiled(mlp(), jit_compile=True, optimizer=keras.optimizers.SGD(1e-3, momentum=0.9))
    model.fit(*data(), batch_size=2, verbose=0, callbacks=[guard, Meddling(target)])
    assert guard.step == (6 if target == "weights" else 7)
    checks = read_incident(guard.incident).record["failed_checks"]
    assert checks[0] == {"stage": "weights", "layer": "first", "quantity": "weights"}
