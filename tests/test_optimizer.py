"""Momentum SGD against a plain numpy reference; warm-up; the plateau rule."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from vggrepro.config import TrainConfig
from vggrepro.optimizer import MomentumSGD, PlateauSchedule, RateSettings, learning_rate

RATES = [0.1, 0.1, 0.01, 0.05]


def reference(form: str, decay: float, gradients: np.ndarray) -> np.ndarray:
    weight, velocity = np.float64(1.5), np.float64(0.0)
    for gradient, rate in zip(gradients, RATES, strict=True):
        step = gradient + decay * weight
        if form == "caffe":
            velocity = 0.9 * velocity - rate * step
            weight = weight + velocity
        else:
            velocity = 0.9 * velocity + step
            weight = weight - rate * velocity
    return weight


@pytest.mark.parametrize("form", ["caffe", "pytorch"])
@pytest.mark.parametrize(("name", "decay_biases"), [("fc1/kernel", False), ("fc1/bias", True)])
def test_both_momentum_forms_match_numpy_when_the_rate_changes(form, name, decay_biases):
    optimizer = MomentumSGD(0.9, 5e-4, 0.0, form, decay_biases)
    gradients = np.array([0.3, -0.2, 0.5, 0.1])
    weight, velocity = tf.Variable([1.5]), tf.Variable([0.0])
    plain = (tf.constant([1.5]), tf.constant([0.0]))
    for gradient, rate in zip(gradients, RATES, strict=True):
        given_gradient, given_rate = tf.constant([gradient], tf.float32), tf.constant(rate)
        plain = optimizer.proposal(name, *plain, given_gradient, given_rate, None)
        optimizer.apply(name, weight, velocity, given_gradient, given_rate, None)
    expected = reference(form, 5e-4, gradients)
    assert weight.numpy()[0] == pytest.approx(expected, rel=1e-6)
    assert plain[0].numpy()[0] == pytest.approx(expected, rel=1e-6)


def test_biases_are_not_decayed_by_default():
    optimizer = MomentumSGD.from_config(TrainConfig())
    weight, gradient = tf.constant([2.0]), tf.constant([1.0])
    assert optimizer.decayed_gradient("a/bias", weight, gradient, None).numpy()[0] == 1.0
    assert optimizer.decayed_gradient("a/kernel", weight, gradient, None).numpy()[0] == (
        pytest.approx(1.0 + 5e-4 * 2.0)
    )


@given(norm=st.floats(0.0, 1e6), limit=st.floats(0.1, 100.0))
def test_clipping_shrinks_to_the_limit_and_never_stretches(norm, limit):
    optimizer = MomentumSGD(0.9, 0.0, limit, "caffe", False)
    scale = float(optimizer.clip_scale(tf.constant(norm, tf.float32)))
    assert scale <= 1.0
    assert norm * scale <= limit * 1.0001
    if norm <= limit:
        assert scale == 1.0


@given(
    values=st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=3, max_size=3),
    rate=st.floats(0.0, 10.0, width=32),
    form=st.sampled_from(["caffe", "pytorch"]),
)
def test_the_bound_is_above_the_new_state(values, rate, form):
    optimizer = MomentumSGD(0.9, 5e-4, 0.0, form, True)
    weight, velocity, gradient = (tf.constant([v], tf.float32) for v in values)
    new = optimizer.proposal("a/kernel", weight, velocity, gradient, tf.constant(rate), None)
    norms = [tf.abs(tensor)[0] for tensor in (weight, velocity, gradient)]
    bound = float(optimizer.norm_bound(*norms, tf.constant(rate)))
    assert max(abs(float(tensor[0])) for tensor in new) <= bound * (1 + 1e-5)


def test_warm_up_is_linear_and_ends_at_the_rate():
    settings = RateSettings(0.4, 4.0, 0.1)
    rates = [
        float(learning_rate(settings, tf.constant(step, tf.int64), tf.constant(0)))
        for step in range(6)
    ]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_each_drop_divides_the_rate_by_ten():
    settings = RateSettings(0.01, 0.0, 0.1)
    rates = [
        float(learning_rate(settings, tf.constant(9, tf.int64), tf.constant(d))) for d in range(4)
    ]
    assert rates == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5], rel=1e-5)


def test_the_plateau_rule_drops_three_times_and_no_more():
    schedule = PlateauSchedule(patience=2, max_drops=3)
    memory = schedule.initial_state()
    drops = []
    for error in [50, 40, 41, 40, 39, 39, 39, 39, 39, 39, 39, 39]:
        memory = schedule.after_evaluation(memory, error)
        drops.append(int(memory["schedule/drops"]))
    assert drops == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3]
    assert float(memory["schedule/best_error"]) == 39.0
