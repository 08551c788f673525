"""Runs that do not learn or run away while finite, recorded and live."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from evidence_samples import VGG_A, evidence, facts, labels, quiet, stats, telemetry

from diagnostics.causes import judge
from diagnostics.fix_search import livelier_rates
from diagnostics.keras_divergence import DivergenceLimits
from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.stall import StallWatch, _smoothed, detect_divergence, detect_stall, stall_signals

CHANCE = math.log(10)


def plateau(steps: int, leaves: int | None = None) -> Telemetry:
    """A loss at that of guessing, noisy; from step `leaves` on it falls."""
    columns = quiet(steps)
    noise = np.random.default_rng(1).normal(0, 0.02, steps)
    fall = 0.0 if leaves is None else 0.004 * np.maximum(np.arange(steps) - leaves, 0)
    columns["loss"] = CHANCE + noise - fall
    return telemetry(columns)


def faint(recorded: Telemetry, factor: float = 1e-6) -> Telemetry:
    rows = recorded.rows.copy()
    for index, name in enumerate(recorded.columns):
        if "preactivation" in name and name.startswith("predictions"):
            rows[:, index] *= factor
    return Telemetry(recorded.steps, recorded.columns, rows)


def dead_from(recorded: Telemetry, layer: str, step: int) -> Telemetry:
    rows = recorded.rows.copy()
    rows[step:, recorded.columns.index(f"{layer}/preactivation_max")] = -0.1
    return Telemetry(recorded.steps, recorded.columns, rows)


def watched(recorded: Telemetry, run_facts: RunFacts) -> list[tuple[int, str]]:
    watch = StallWatch(run_facts)
    found = []
    for step, row in zip(recorded.steps, recorded.rows, strict=True):
        named = dict(zip(recorded.columns, row.tolist(), strict=True))
        text = watch.warning(int(step), named)
        if text is not None:
            found.append((int(step), text))
    return found


def test_a_healthy_start_at_chance_is_no_stall():
    """The demo stays near ln 10 for 120 steps before it learns."""
    assert detect_stall(plateau(100), facts()) is None
    assert detect_stall(plateau(600, leaves=120), facts()) is None
    assert watched(plateau(600, leaves=120), facts()) == []


def test_no_signal_at_the_output_is_a_stall_with_numbers():
    recorded = faint(plateau(60))
    text = detect_stall(recorded, facts())
    assert "60 steps" in text and "2.303" in text
    assert (
        "predictions" in text
        and f"{stall_signals(recorded, facts()).faintest_scale:.1e}"[:3] in text
    )


def test_live_warning_comes_once_after_a_hundred_steps():
    warnings = watched(faint(plateau(400)), facts())
    assert [step for step, _ in warnings] == [99]
    assert "signal at the output" in warnings[0][1] and "its gradient" in warnings[0][1]


def test_live_watch_starts_anew_when_the_loss_left_and_came_back():
    recorded = faint(plateau(260))
    loss = recorded.columns.index("loss")
    recorded.rows[60:120, loss] = 1.0
    assert watched(recorded, facts())[0][0] > 200


def test_dead_layer_is_named_with_its_step():
    recorded = dead_from(plateau(300), "fc1", 50)
    signals = stall_signals(recorded, facts())
    assert signals.dead_layers == ("fc1",) and signals.dead_since == 50
    assert "fc1" in detect_stall(recorded, facts()) and "dead" in detect_stall(recorded, facts())


def test_the_output_layer_is_never_a_dead_relu():
    recorded = dead_from(plateau(100), "predictions", 0)
    assert stall_signals(recorded, facts()).dead_layers == ()


def test_updates_that_change_nothing_are_a_stall():
    columns = quiet(60)
    columns["loss"] = np.full(60, CHANCE)
    for name, _ in VGG_A:
        columns[f"{name}/update_ratio"] *= 1e-5
    assert "an update changes no layer" in detect_stall(telemetry(columns), facts())


def test_long_plateau_is_a_stall_without_another_reason():
    text = detect_stall(plateau(400), facts())
    assert text.startswith("In 400 steps the loss never fell below the loss of guessing")


def test_a_long_noisy_plateau_is_a_stall_though_some_steps_lie_below_by_chance():
    recorded = plateau(3000)
    loss = recorded.rows[:, recorded.columns.index("loss")]
    loss[:] = CHANCE + 10 * (loss - CHANCE)
    loss[:250] += 0.1
    assert np.min(_smoothed(loss)) < 0.98 * CHANCE
    assert detect_stall(recorded, facts()) is not None
    loss[1500:1560] = 1.5
    assert detect_stall(recorded, facts()) is None


def test_a_loss_that_left_once_is_no_stall():
    recorded = faint(plateau(400))
    recorded.rows[100:160, recorded.columns.index("loss")] = 1.5
    assert detect_stall(recorded, facts()) is None


def test_without_the_loss_of_guessing_only_a_reason_makes_a_stall():
    columns = quiet(400)
    columns["loss"] = np.full(400, 5.0)
    regression = facts(classes=None, chance_loss=None, loss="mse")
    assert detect_stall(telemetry(columns), regression) is None
    columns["grad_norm"] = np.zeros(400)
    assert "its first value, 5" in detect_stall(telemetry(columns), regression)
    assert watched(telemetry(columns), regression) == []


def test_a_gradient_of_exactly_0_is_a_stall_wherever_the_loss_stands():
    loss = np.r_[0.6, np.full(39, 0.4)]  # its batches differ
    columns = {"loss": loss, "grad_norm": np.zeros(40)}
    assert "exactly 0" in detect_stall(telemetry(columns), RunFacts(layers=()))
    columns["grad_norm"] = np.r_[1.0, np.zeros(39)]
    assert detect_stall(telemetry(columns), RunFacts(layers=())) is None
    columns = {"loss": np.r_[0.6, np.zeros(39)], "grad_norm": np.zeros(40)}
    assert detect_stall(telemetry(columns), RunFacts(layers=())) is None, "nothing left to learn"


@pytest.mark.parametrize(("fall", "stalled"), [(0.0, True), (0.5, False)])
def test_a_layer_that_died_is_a_stall_where_the_loss_stands(fall, stalled):
    columns = quiet(80, [("hidden", 8), ("out", 8)])
    columns["loss"] = np.r_[np.full(10, 9.0), np.linspace(5.0, 5.0 - fall * 5.0, 70)]
    columns["hidden/preactivation_max"] = np.r_[np.ones(10), np.zeros(70)]
    columns["hidden/preactivation_min"] = -np.ones(80)
    columns["hidden/gradient_norm"] = np.r_[np.ones(10), np.zeros(70)]
    known = facts([("hidden", 8), ("out", 8)], classes=None, chance_loss=None, loss="mse")
    found = detect_stall(telemetry(columns), known)
    assert (found is not None and "Since step 10" in found) is stalled


def test_finite_runaway_is_divergence():
    columns = quiet(30)
    columns["loss"][15:] *= 1e3
    text = detect_divergence(telemetry(columns), facts())
    assert "ran away" in text and "loss of guessing" in text


def test_survived_spike_is_no_divergence():
    columns = quiet(30)
    columns["loss"][10:20] *= 1e4
    assert detect_divergence(telemetry(columns), facts()) is None


def test_loss_without_lower_bound_runs_away_downwards():
    loss = -np.geomspace(1.0, 1e5, 50)
    unknown = facts(classes=None, chance_loss=None)
    assert detect_divergence(telemetry({"loss": loss}), unknown) is not None


def test_a_similarity_that_is_learnt_does_not_run_away():
    unknown = facts(classes=None, chance_loss=None)
    learnt = -1.0 + 0.995 * np.exp(-np.arange(50) / 10.0)
    assert detect_divergence(telemetry({"loss": learnt}), unknown) is None
    limits = DivergenceLimits(unknown)
    assert all(limits.limits({"loss": loss})[0] > abs(loss) for loss in learnt)
    # Upwards from as small a start it has run away.
    assert detect_divergence(telemetry({"loss": np.abs(learnt)}), unknown) is not None


@pytest.mark.parametrize(("name", "tells"), [("mse", True), ("nll", False)])
def test_a_loss_of_no_known_kind_may_begin_near_0_and_spike(name, tells):
    """A Gaussian likelihood of step 0 may be anything; a squared error of 0.01 is one."""
    loss = np.r_[0.01, np.full(60, 0.02), np.full(20, 40.0)]
    unknown = facts(classes=None, chance_loss=None, loss=name)
    assert (detect_divergence(telemetry({"loss": loss}), unknown) is not None) is tells
    limits = DivergenceLimits(unknown)
    assert any(limits.limits({"loss": one})[0] < abs(one) for one in loss) is tells


def test_runaway_gradient_is_divergence():
    columns = quiet(30)
    columns["grad_norm"][20:] *= 1e9
    assert "gradient norm" in detect_divergence(telemetry(columns), facts())


def test_healthy_run_and_nan_are_no_divergence():
    assert detect_divergence(telemetry(quiet(50)), facts()) is None
    columns = quiet(50)
    columns["loss"][-1] = np.nan
    assert detect_divergence(telemetry(columns), facts()) is None


@pytest.mark.parametrize("steps", [0, 1, 5, 29])
def test_short_runs_say_nothing(steps):
    recorded = faint(plateau(30))
    short = Telemetry(recorded.steps[:steps], recorded.columns, recorded.rows[:steps])
    assert detect_stall(short, facts()) is None
    assert detect_divergence(short, facts()) is None


def _unmoving(optimizer: str, rate: float, start: float) -> Telemetry:
    """Norms and rate of a Keras run, which records no update ratio; the loss stays at `start`."""
    noise = np.random.default_rng(2).normal(0, 0.02, 60)
    columns = {"loss": start + noise, "lr": np.full(60, rate)}
    for name, _ in VGG_A:
        columns[f"{name}/peak"] = np.full(60, 5.0)
        columns[f"{name}/gradient_norm"] = np.full(60, 0.5)
        columns[f"{name}/weight_norm"] = np.full(60, 9.0)
    return telemetry(columns)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("start", [0.97 * CHANCE, 8.0])
def test_updates_that_change_nothing_are_a_stall_wherever_the_loss_began(optimizer, start):
    run_facts = facts(optimizer=optimizer, optimizer_epsilon=1e-7)
    text = detect_stall(_unmoving(optimizer, 1e-9, start), run_facts)
    assert text is not None and "changes no layer" in text
    assert detect_stall(_unmoving(optimizer, 1e-2, start), run_facts) is None
    assert detect_stall(_unmoving(optimizer, 1e-9, 0.3 * CHANCE), run_facts) is None


def test_saturated_units_on_unscaled_inputs_are_the_data():
    spec = (("first", 8), ("head", 16))
    columns = quiet(60, spec)
    columns["loss"] = np.full(60, CHANCE)
    columns["first/gradient_norm"] = np.zeros(60)
    layers = tuple(
        dataclasses.replace(layer, activation="tanh" if layer.name == "first" else "linear")
        for layer in facts(spec).layers
    )
    run_facts = facts(layers=layers)
    recorded = telemetry(columns)
    text = detect_stall(recorded, run_facts)
    assert text is not None and "gradient of first is exactly 0" in text
    given = {"verdict": "stalled", "facts": run_facts, "telemetry": recorded}
    cause = judge(evidence(**given, batch_stats={"x": stats(3e5), "y": labels()}))
    assert cause.kind == "data" and "tanh stands at its ends" in cause.evidence[0]
    assert judge(evidence(**given)).kind != "data"


def test_a_rate_that_moves_the_weights_is_tried():
    recorded = _unmoving("SGD", 1e-9, CHANCE)
    rates = livelier_rates(1e-9, recorded, facts(optimizer="SGD", momentum=0.0))
    assert rates == [1e-8, 0.018, 0.18]  # 0.5 / 9 of the weights a unit of rate
    assert livelier_rates(0.0, recorded, facts()) == []
