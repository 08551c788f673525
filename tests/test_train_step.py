"""The guarded step: what it refuses, what it lets through, and that it writes nothing."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from small_runs import random_batch, replaced, tiny_config, tiny_network

from diagnostics.errors import GuardFailure, InputError
from diagnostics.guard import Forward
from diagnostics.guard_self_test import self_test
from diagnostics.snapshot import hash_arrays
from vggrepro.replica_evidence import added_in_order
from vggrepro.step_core import CoreResult, true_class_rank
from vggrepro.train_step import TrainStep

CONFIG = tiny_config(warmup_steps=0)
NETWORK = tiny_network(CONFIG)
LAYERS = [layer.name for layer in NETWORK.weight_layers]
NONFINITE = st.sampled_from([np.nan, np.inf, -np.inf])


@pytest.fixture(scope="module")
def step() -> TrainStep:
    return TrainStep(CONFIG, NETWORK)


@pytest.fixture(scope="module")
def gate(step):
    """The gated update alone, compiled, fed with gradients of the test's choice."""

    @tf.function(autograph=False)
    def run(gradients):
        seen = Forward(
            tf.zeros([2]), tf.constant(True), tf.zeros([len(LAYERS), 2]), tf.constant(1.0)
        )
        core = CoreResult(seen, list(gradients), tf.constant(0.0), tf.constant(0.0))
        return step._gated_update(core, step.variables["counters/step"].read_value(), 8)

    return run


def small_gradients(seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = NETWORK.parameter_shapes().values()
    return [random.normal(0, 1e-3, shape).astype(np.float32) for shape in shapes]


def fed(step: TrainStep, images: np.ndarray, labels: np.ndarray):
    return step(tf.constant(images), tf.constant(labels))


def failed(step: TrainStep, result) -> list[tuple[str, str]]:
    pairs = zip(step.layout.checks(), result.passed, strict=True)
    return [(check.stage, check.layer) for check, passed in pairs if not passed]


@given(data=st.data(), value=NONFINITE)
def test_any_single_nonfinite_gradient_element_stops_the_update(step, gate, data, value):
    step.rearm()
    gradients = small_gradients(0)
    place = data.draw(st.integers(0, len(gradients) - 1))
    element = data.draw(st.integers(0, gradients[place].size - 1))
    gradients[place].reshape(-1)[element] = value
    before = hash_arrays(step.state())
    applied, passed, _ = gate([tf.constant(g) for g in gradients])
    assert not applied
    assert hash_arrays(step.state()) == before
    names = [c for c, ok in zip(step.layout.checks(), passed.numpy(), strict=True) if not ok]
    layer = list(NETWORK.parameter_shapes())[place].partition("/")[0]
    assert ("backward", layer, "gradient") in names
    assert all(check.layer == layer for check in names)


@given(seed=st.integers(0, 1000), exponent=st.integers(-30, 30))
def test_finite_gradients_never_stop_the_update(step, gate, seed, exponent):
    """Also those whose norm overflows float32: from about 1e19 on."""
    step.load(TrainStep(CONFIG, NETWORK).state()) if exponent > 0 else step.rearm()
    gradients = [g * np.float32(10.0) ** exponent for g in small_gradients(seed)]
    assert all(np.isfinite(g).all() for g in gradients)
    before = int(step.variables["counters/step"].numpy())
    applied, passed, _ = gate([tf.constant(g) for g in gradients])
    assert applied and passed.numpy().all()
    assert int(step.variables["counters/step"].numpy()) == before + 1
    assert all(np.isfinite(a).all() for n, a in step.state().items() if "schedule" not in n)
    if exponent > 0:
        step.load(TrainStep(CONFIG, NETWORK).state())


def test_a_finite_gradient_that_would_overflow_the_weights_is_refused(step, gate):
    step.load(TrainStep(replaced(CONFIG, lr=10.0), NETWORK).state())
    hot = TrainStep(replaced(CONFIG, lr=10.0), NETWORK)
    images, labels = random_batch(CONFIG)
    state = hot.state()
    name = "momentum/fc1/kernel"
    state[name] = np.full_like(state[name], 3e38)
    state["params/fc1/kernel"] = np.full_like(state["params/fc1/kernel"], 3e38)
    hot.load(state)
    before = hash_arrays(hot.state())
    result = fed(hot, images * 0, labels)
    assert not result.applied
    assert ("update", "fc1") in failed(hot, result)
    assert hash_arrays(hot.state()) == before


@given(
    value=NONFINITE, row=st.integers(0, 7), channel=st.integers(0, 2), pixel=st.integers(0, 1023)
)
def test_any_nonfinite_pixel_is_seen_although_the_fused_relu_hides_it(
    step, value, row, channel, pixel
):
    step.rearm()
    images, labels = random_batch(CONFIG)
    images[row].reshape(-1, 3)[pixel, channel] = value
    before = hash_arrays(step.state())
    result = fed(step, images, labels)
    assert not result.applied and failed(step, result)[0] == ("data", "")
    assert hash_arrays(step.state()) == before


@given(layer=st.sampled_from(LAYERS), part=st.sampled_from(["kernel", "bias"]), value=NONFINITE)
def test_any_nonfinite_weight_is_seen(step, layer, part, value):
    clean = step.state()
    poisoned = {name: array.copy() for name, array in clean.items()}
    array = poisoned[f"params/{layer}/{part}"].reshape(-1)
    array[array.size // 2] = value
    step.load(poisoned)
    images, labels = random_batch(CONFIG)
    result = fed(step, images, labels)
    step.load(clean)
    assert not result.applied
    assert ("weights", layer) in failed(step, result)


@pytest.mark.parametrize("label", [-1, CONFIG.classes, 10**6])
def test_a_label_out_of_range_is_seen(step, label):
    step.rearm()
    images, labels = random_batch(CONFIG)
    labels[3] = label
    result = fed(step, images, labels)
    assert failed(step, result)[:2] == [("data", ""), ("loss", "")]


def test_steps_after_a_refused_one_are_refused_until_rearmed(step):
    step.rearm()
    images, labels = random_batch(CONFIG)
    bad = images.copy()
    bad[0, 0, 0, 0] = np.nan
    before = hash_arrays(step.state())
    assert not fed(step, bad, labels).applied
    assert not fed(step, images, labels).applied
    assert hash_arrays(step.state()) == before
    step.rearm()
    assert fed(step, images, labels).applied
    assert hash_arrays(step.state()) != before


def test_the_same_state_and_batch_give_the_same_bits():
    images, labels = random_batch(CONFIG)
    hashes, rows = set(), []
    for _ in range(2):
        other = TrainStep(CONFIG, NETWORK)
        for _ in range(3):
            result = fed(other, images, labels)
        hashes.add(hash_arrays(other.state()))
        rows.append(result.telemetry.tobytes())
    assert len(hashes) == 1 and rows[0] == rows[1]


def test_gradients_are_added_in_order_whatever_else_still_reads_them():
    """Of AddN's inputs here only the third and fourth have a buffer it may write to."""
    random = np.random.default_rng(0)
    squares = [np.square(random.normal(size=30_000)).astype(np.float32) for _ in range(4)]
    in_order = functools.reduce(np.add, [np.sqrt(square) for square in squares])

    @tf.function
    def added(*squares):
        parts = [tf.sqrt(tf.abs(square)) for square in squares]
        return added_in_order(parts), *parts[:2]

    for _ in range(20):
        np.testing.assert_array_equal(added(*map(tf.constant, squares))[0], in_order)


def test_dropout_follows_from_the_step_counter():
    images, labels = random_batch(CONFIG)
    losses = []
    for counter in (0, 0, 5):
        other = TrainStep(CONFIG, NETWORK)
        state = other.state()
        state["counters/step"] = np.array(counter, np.int64)
        other.load(state)
        losses.append(float(fed(other, images, labels).telemetry[0]))
    assert losses[0] == losses[1] != losses[2]


def test_telemetry_matches_numpy(step):
    step.load(TrainStep(CONFIG, NETWORK).state())
    state = step.state()
    images, labels = random_batch(CONFIG)
    result = fed(step, images, labels)
    row = dict(zip(step.layout.columns(), result.telemetry.tolist(), strict=True))
    assert row["input_max"] == images.max() and row["input_min"] == images.min()
    after = step.state()
    for layer in LAYERS:
        weights = [state[f"params/{layer}/{part}"].ravel() for part in ("kernel", "bias")]
        norm = np.linalg.norm(np.concatenate(weights))
        assert row[f"{layer}/weight_norm"] == pytest.approx(norm, rel=1e-5)
        # First step, no momentum: w' = w - lr (g + lambda w), lambda on kernels only.
        moved = [
            (state[f"params/{layer}/{part}"] - after[f"params/{layer}/{part}"]) / CONFIG.lr
            - (CONFIG.weight_decay * state[f"params/{layer}/{part}"] if part == "kernel" else 0)
            for part in ("kernel", "bias")
        ]
        gradient = np.linalg.norm(np.concatenate([part.ravel() for part in moved]))
        assert row[f"{layer}/gradient_norm"] == pytest.approx(gradient, rel=2e-2, abs=1e-3)
    norms = [row[f"{layer}/gradient_norm"] for layer in LAYERS]
    assert row["grad_norm"] == pytest.approx(np.linalg.norm(norms), rel=1e-5)


def test_the_self_test_fires_every_check_and_puts_the_state_back(step):
    step.load(TrainStep(CONFIG, NETWORK).state())
    before = hash_arrays(step.state())
    images, labels = random_batch(CONFIG)
    fired = self_test(step, tf.constant(images), tf.constant(labels))
    assert fired == len(step.layout.checks())
    assert hash_arrays(step.state()) == before
    assert fed(step, images, labels).applied


@pytest.mark.parametrize("blind", ["input", "preactivation", "gradient", "gate"])
def test_the_self_test_refuses_a_guard_that_is_blind(monkeypatch, blind):
    """Takes one detector out and expects the self-test to notice."""
    from diagnostics import guard

    if blind == "input":
        real = guard.passed_vector
        monkeypatch.setattr(
            guard,
            "passed_vector",
            lambda seen, *rest: real(seen._replace(input_extremes=tf.zeros([2])), *rest),
        )
    elif blind == "preactivation":
        monkeypatch.setattr(guard, "extremes", lambda tensor: tf.zeros([2]))
    elif blind == "gradient":
        monkeypatch.setattr(guard, "all_finite", lambda groups: tf.fill([len(groups)], True))
    else:
        monkeypatch.setattr(TrainStep, "_write_if_passed", _write_anyway)
    images, labels = random_batch(CONFIG)
    with pytest.raises(GuardFailure):
        self_test(TrainStep(CONFIG, NETWORK), tf.constant(images), tf.constant(labels))


def _write_anyway(self, passed, gradients, rate, global_norm, step, overflow):
    self._write(dict(zip(self._names, gradients, strict=True)), rate, global_norm)
    return tf.constant(True)


def test_a_state_of_another_net_is_refused_by_name(step):
    other = tiny_config(arch="B")
    state = TrainStep(other, tiny_network(other)).state()
    with pytest.raises(InputError, match="block1_conv2"):
        step.load(state)
    wider = tiny_config(width=0.1)
    with pytest.raises(InputError, match="has shape"):
        step.load(TrainStep(wider, tiny_network(wider)).state())


def test_bfloat16_trains_with_float32_master_weights():
    config = tiny_config(precision="bfloat16")
    other = TrainStep(config, NETWORK)
    images, labels = random_batch(config)
    losses = [float(fed(other, images, labels).telemetry[0]) for _ in range(3)]
    assert np.isfinite(losses).all()
    assert all(a.dtype == np.float32 for n, a in other.state().items() if n.startswith("params"))


def test_ranks_break_ties_by_class_number_and_put_nan_beyond_all():
    logits = tf.constant([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0], [np.nan, 0.0, 1.0], [3.0, np.nan, 1.0]])
    assert true_class_rank(logits, tf.constant([1, 2, 0, 0])).numpy().tolist() == [
        1,
        1,
        2**31 - 1,
        1,
    ]
