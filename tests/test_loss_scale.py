"""float16's loss scale: what is skipped, what is an incident, and that both repeat bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from small_runs import (
    random_tensors,
    replaced,
    run_outcome,
    tiny_config,
    tiny_data,
    tiny_network,
    tiny_step,
)

from diagnostics.diagnose import diagnose
from diagnostics.errors import StoppedByGuard
from diagnostics.examine import examine
from diagnostics.guard_self_test import self_test
from diagnostics.protocol import Change
from diagnostics.snapshot import hash_arrays
from vggrepro import loss_scale, step_core, trainer
from vggrepro.loss_scale import GOOD_STEPS, LARGEST_SCALE, SCALE
from vggrepro.replay_adapter import VggRun
from vggrepro.run_directory import RunDirectory
from vggrepro.step_state import initial_state
from vggrepro.train_step import TrainStep
from vggrepro.verification import verify

pytestmark = pytest.mark.usefixtures("shared_training")

CONFIG = tiny_config(precision="float16", warmup_steps=0)
NETWORK = tiny_network(CONFIG)
START = initial_state(CONFIG, NETWORK)
OVERFLOWS = 2.0**24  # a scale at which the gradients of these tiny nets overflow float16


@pytest.fixture(scope="module")
def step() -> TrainStep:
    return tiny_step(CONFIG)


def scaled(scale: float, good_steps: int = 0) -> dict[str, np.ndarray]:
    return {
        **START,
        SCALE: np.array(scale, np.float32),
        GOOD_STEPS: np.array(good_steps, np.int32),
    }


def run(step: TrainStep, seed: int = 0):
    """(result, its telemetry by column)."""
    result = step(*random_tensors(CONFIG, seed))
    return result, dict(zip(step.layout.columns(), result.telemetry.tolist(), strict=True))


def weights(state) -> str:
    """Hash of what a skip must not touch."""
    return hash_arrays({n: a for n, a in state.items() if n.startswith(("params/", "momentum/"))})


def test_only_float16_has_a_loss_scale_in_its_state_and_telemetry():
    for precision in ("float32", "bfloat16"):
        other = tiny_step(replaced(CONFIG, precision=precision))
        assert not any(name.startswith("loss_scale") for name in other.variables)
        assert not other.layout.extra
    assert START[SCALE] == 2**15 and START[GOOD_STEPS] == 0


def test_an_overflow_of_the_scaled_gradients_is_skipped_and_the_scale_recovers(step):
    step.load(scaled(OVERFLOWS, good_steps=7))
    before, skips = step.state(), 0
    while True:
        result, told = run(step)
        assert result.applied and result.passed.all()
        if not told["skipped"]:
            break
        skips += 1
        after = step.state()
        assert weights(after) == weights(before)
        assert after[SCALE] == OVERFLOWS / 2**skips and after[GOOD_STEPS] == 0
        assert after["counters/step"] == skips
        assert all(np.isfinite(value) for value in told.values())
    assert skips >= 3
    assert step.state()[GOOD_STEPS] == 1 and weights(step.state()) != weights(before)
    assert told["loss_scale"] == OVERFLOWS / 2**skips


def test_a_skip_tells_the_gradients_at_scale_one(step):
    step.load(scaled(OVERFLOWS))
    _, skipped = run(step)
    step.load(scaled(1.0))
    _, plain = run(step)
    assert skipped["skipped"] == 1 and plain["skipped"] == 0
    # The look at every element sums in another order than the glance that is enough elsewhere.
    assert skipped["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-6)
    assert plain["grad_norm"] > 0


def test_without_the_skip_the_same_step_would_be_refused(step, monkeypatch):
    monkeypatch.setattr(loss_scale, "overflowed", lambda gradients: tf.constant(False))
    unskipping = tiny_step(CONFIG)
    unskipping.load(scaled(OVERFLOWS))
    result, _ = run(unskipping)
    assert not result.applied and not result.passed.all()


@given(power=st.integers(0, 12), seed=st.integers(0, 3))
def test_a_power_of_two_only_shifts_the_gradients(step, power, seed):
    """Unscaled, they differ by what the scale saves from rounding to 0."""
    step.load(scaled(2.0**power))
    result, told = run(step, seed)
    step.load(scaled(2.0**12))
    _, reference = run(step, seed)
    assert result.applied and told["loss"] == reference["loss"]
    assert told["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-2)


@given(
    history=st.lists(st.booleans(), max_size=60),
    power=st.integers(0, 24),
    period=st.integers(1, 5),
)
def test_the_scale_follows_its_rule(history, power, period):
    """Against the rule in plain Python: halved, never below 1; doubled after a period."""
    expected, good = 2.0**power, 0
    state = {SCALE: tf.constant(expected), GOOD_STEPS: tf.constant(0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "GROWTH_STEPS", period)
        for skipped in history:
            state = loss_scale.after_step(state, tf.constant(skipped))
            good = 0 if skipped else good + 1
            if skipped:
                expected = max(1.0, expected / 2)
            elif good == period:
                expected, good = min(2 * expected, LARGEST_SCALE), 0
            assert (float(state[SCALE]), int(state[GOOD_STEPS])) == (expected, good)


def poisoned_backward(monkeypatch) -> TrainStep:
    """A step whose backward pass alone makes a NaN, as 0/0 in a gradient would."""

    @tf.custom_gradient
    def faulty(values):
        return tf.identity(values), lambda upstream: upstream * np.nan

    real = step_core.cross_entropy
    monkeypatch.setattr(
        step_core, "cross_entropy", lambda logits, *rest: real(faulty(logits), *rest)
    )
    return tiny_step(CONFIG)


@pytest.mark.parametrize("scale", [1.0, 2.0**15])
def test_a_fault_of_the_backward_pass_is_an_incident_at_once(monkeypatch, scale):
    step = poisoned_backward(monkeypatch)
    step.load(scaled(scale))
    before = hash_arrays(step.state())
    result, _ = run(step)
    assert not result.applied and hash_arrays(step.state()) == before
    failed = [c.stage for c, ok in zip(step.layout.checks(), result.passed, strict=True) if not ok]
    assert failed[0] == "backward"
    assert not run(step)[0].applied


def test_an_overflow_of_the_forward_pass_is_an_incident_at_every_scale(step):
    state = scaled(OVERFLOWS)
    state["params/fc1/kernel"] = state["params/fc1/kernel"] * np.float32(1e5)
    step.load(state)
    result, told = run(step)
    assert not result.applied and told["skipped"] == 0
    assert step.state()[SCALE] == OVERFLOWS


def test_gradients_that_overflow_at_scale_one_are_an_incident(step):
    """A finite forward pass whose gradient float16 cannot hold: scaling cannot help."""
    state = scaled(2.0)
    kernels = {n: a for n, a in state.items() if n.startswith("params/") and n.endswith("/kernel")}
    state |= {name: kernel * np.float32(4.0) for name, kernel in kernels.items()}
    state["params/block1_conv1/kernel"] = state["params/block1_conv1/kernel"] * np.float32(1e-5)
    step.load(state)
    result, _ = run(step)
    checks = list(zip(step.layout.checks(), result.passed, strict=True))
    assert not result.applied and step.state()[SCALE] == 2.0
    assert {c.stage for c, ok in checks if not ok} <= {"backward", "update"}


def test_the_self_test_fires_every_check_and_leaves_the_scale(step):
    step.load(scaled(OVERFLOWS, good_steps=3))
    before = hash_arrays(step.state())
    assert self_test(step, *random_tensors(CONFIG)) == len(step.layout.checks())
    assert hash_arrays(step.state()) == before


@pytest.mark.slow
def test_a_host_loop_skips_inside(step):
    """Four steps in one call: the same bits as one by one, skips included."""
    batches = [random_tensors(CONFIG, seed) for seed in range(4)]
    step.load(scaled(OVERFLOWS))
    single = [step(*batch) for batch in batches]
    state = step.state()
    step.load(scaled(OVERFLOWS))
    together = step.loop(batches)
    assert hash_arrays(step.state()) == hash_arrays(state)
    assert [a.telemetry.tobytes() for a in single] == [b.telemetry.tobytes() for b in together]


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    """(config, directory) of a run whose first steps are skipped."""
    home = tmp_path_factory.mktemp("float16")
    config = replaced(CONFIG, data=str(tiny_data(home)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "INITIAL_SCALE", OVERFLOWS)
        patch.setattr(loss_scale, "GROWTH_STEPS", 2)
        trainer.train(config, home / "whole")
        short = replaced(config, steps=3)
        trainer.train(short, home / "parts")
        trainer.train(config, home / "parts", resume=True)
        yield config, home


def test_resuming_in_the_middle_of_the_scales_history_is_exact(skipping):
    _, home = skipping
    assert run_outcome(home / "whole") == run_outcome(home / "parts")


def test_skips_are_recorded_and_are_no_incident(skipping):
    _, home = skipping
    with RunDirectory.open(home / "whole") as stored:
        records = [one for one in stored.metrics() if "loss" in one]
        assert not stored.incidents()
        steps, columns, rows = stored.telemetry.read()
    skipped = rows[:, list(columns).index("skipped")]
    assert skipped[0] == 1 and np.isfinite(rows).all()
    assert [one["skipped"] for one in records] == skipped.tolist()
    assert records[0]["loss_scale"] == OVERFLOWS and records[1]["loss_scale"] == OVERFLOWS / 2


def test_a_run_with_skips_is_verified_and_its_skip_examined(skipping):
    _, home = skipping
    assert verify(home / "whole").identical
    healthy = examine(VggRun(home / "whole"), 0)
    assert healthy is not None and not healthy.differences
    assert healthy.outcome.telemetry["skipped"] == 1


def test_a_state_is_replayed_in_the_other_precision(skipping):
    """Counterfactuals of precision, up and down: the loss scale goes, or begins anew."""
    _, home = skipping
    run = VggRun(home / "whole")
    state = run.state_before(run.state_steps()[-1])
    up = run.program(Change("precision", "float32", "precision float32"))
    up.load(state)
    assert SCALE not in up.state() and weights(up.state()) == weights(state)
    assert up.run(run.batch(6), 6).applied
    wide = loss_scale.state_for("float32", state)
    assert not wide.keys() & {SCALE, GOOD_STEPS}
    assert loss_scale.state_for("float16", state) == state
    down = run.program()
    down.load(wide)
    assert down.state()[SCALE] == OVERFLOWS and down.state()[GOOD_STEPS] == 0
    assert down.run(run.batch(6), 6).telemetry["skipped"] == 1
    assert weights(down.state()) == weights(state)


@pytest.fixture(scope="module")
def stopped(skipping):
    """A run whose weights float32 trains and float16 cannot: one layer's signal ends beyond 65504.

    One kernel is large and the next as much smaller; behind a ReLU that is the same function.
    """
    config, home = skipping
    tensors = {n.removeprefix("params/"): a for n, a in START.items() if n.startswith("params/")}
    tensors["block1_conv1/kernel"] = tensors["block1_conv1/kernel"] * np.float32(1e3)
    tensors["block2_conv1/kernel"] = tensors["block2_conv1/kernel"] * np.float32(1e-3)
    save_file(tensors, home / "lopsided.safetensors")
    config = replaced(config, init_from=str(home / "lopsided.safetensors"), lr=1e-9, eval_every=0)
    with pytest.raises(StoppedByGuard):
        trainer.train(config, home / "stopped")
    return home / "stopped"


def test_an_overflow_of_float16_is_diagnosed_with_a_verified_fix(stopped):
    run = VggRun(stopped)
    assert run.state_before(0)[SCALE] == OVERFLOWS  # as patched: an incident leaves it
    found = diagnose(run, budget_seconds=60.0)
    assert (found.verdict, found.step) == ("reproduced", 0)
    assert (found.first_nonfinite.stage, found.first_nonfinite.layer) == ("forward", "block1_conv1")
    assert found.cause.kind == "precision"
    assert found.recommendation.verified and "--precision float32" in found.recommendation.command
