"""The onset: bad starts, trends, sudden events and healthy runs."""

from __future__ import annotations

import numpy as np
import pytest
from evidence_samples import VGG_A, facts, founding, quiet, telemetry
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.onset import find_onset


def test_founding_case_begins_at_step_0_in_its_most_amplified_layer():
    onset = find_onset(founding().telemetry, founding().facts)
    assert (onset.step, onset.layer, onset.quantity) == (0, "predictions", "preactivation_absmax")
    assert onset.value == pytest.approx(4.78e8, rel=1e-3)
    assert onset.growth_per_step > 1e20


def test_healthy_run_has_no_onset():
    assert find_onset(telemetry(quiet(200)), facts()) is None


def test_a_single_recorded_step_has_no_trend():
    columns = quiet(1)
    columns["loss"][:] = np.nan
    assert find_onset(telemetry(columns), facts()) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sudden_event_has_no_onset(value):
    columns = quiet(100)
    for name in columns:
        if name.endswith(("peak", "gradient_norm", "loss", "grad_norm")):
            columns[name][-1] = value
    assert find_onset(telemetry(columns), facts()) is None


def test_weights_thrown_by_the_last_update_date_to_the_step_that_wrote_them():
    columns = quiet(20)
    columns["fc1/weight_norm"][-1], columns["fc1/update_ratio"][-1] = 1e9, 1.0
    columns["predictions/peak"][-1] = np.inf
    onset = find_onset(telemetry(columns), facts())
    assert (onset.step, onset.layer, onset.quantity) == (18, "fc1", "weight_norm")


def test_overwritten_weights_date_to_the_step_they_entered():
    columns = quiet(20)
    columns["fc1/weight_norm"][-1], columns["fc1/update_ratio"][-1] = 1e9, 1e-12
    columns["predictions/peak"][-1] = np.inf
    onset = find_onset(telemetry(columns), facts())
    assert (onset.step, onset.quantity, onset.value) == (19, "weight_norm", 1e9)
    assert onset.growth_per_step == pytest.approx(1e8, rel=0.2)


@given(
    start=st.integers(5, 120),
    length=st.integers(4, 40),
    bits_a_step=st.floats(2.0, 6.0),
    layer=st.sampled_from([name for name, _ in VGG_A]),
    seed=st.integers(0, 5),
)
def test_runaway_is_dated_within_two_steps(start, length, bits_a_step, layer, seed):
    columns = quiet(start + length, seed=seed)
    rise = np.maximum(np.arange(start + length) - start, 0.0)
    columns[f"{layer}/peak"] = columns[f"{layer}/peak"] * 2.0 ** (bits_a_step * rise)
    columns["loss"][-1] = np.nan
    onset = find_onset(telemetry(columns), facts())
    if bits_a_step * (length - 1) > 8:
        assert onset.layer == layer
        assert abs(onset.step - start) <= 2
        assert onset.growth_per_step == pytest.approx(2.0**bits_a_step, rel=0.5)


@pytest.mark.parametrize(("start", "rate"), [(500, 0.01), (100, 0.05), (900, 0.2)])
def test_slow_growth_up_to_the_float16_limit_is_dated(start, rate):
    """From 1 to 65504 at `rate` bits a step, under noise of 0.2 bits."""
    steps = start + int(16 / rate)
    noise = np.random.default_rng(0).normal(0, 0.2, steps)
    bits = noise + rate * np.maximum(np.arange(steps) - start, 0)
    peaks = 2.0**bits
    peaks[-1] = np.inf
    onset = find_onset(
        telemetry({"loss": np.full(steps, 2.3), "a/peak": peaks}), facts(precision="float16")
    )
    assert abs(onset.step - start) < 1.5 / rate
    assert np.log2(onset.growth_per_step) == pytest.approx(rate, rel=0.2)


def test_growth_while_learning_is_not_taken_for_the_runaway_after_it():
    columns = quiet(600)
    columns["predictions/peak"] = np.geomspace(0.2, 40, 600)
    run = {name: np.r_[values, np.repeat(values[-1:], 10)] for name, values in columns.items()}
    growth = 1e3 ** np.arange(1, 11)
    for name in run:
        if name.endswith("peak"):
            run[name][-10:] *= growth
    run["predictions/peak"][-1] = np.inf
    onset = find_onset(telemetry(run), facts())
    assert abs(onset.step - 599) <= 2


def test_without_layer_columns_the_gradient_norm_tells():
    steps = 40
    norm = np.where(np.arange(steps) < 30, 1.0, 10.0 ** (np.arange(steps) - 29.0))
    loss = np.full(steps, 2.3)
    loss[-1] = np.nan
    onset = find_onset(telemetry({"loss": loss, "grad_norm": norm}), facts())
    assert onset.layer is None and onset.quantity == "grad_norm" and abs(onset.step - 29) <= 1
