"""The first bad step, out of stored states alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_run import ScriptedRun

from diagnostics.bisection import all_finite, first_bad_step, first_true
from diagnostics.errors import InputError


@given(st.integers(0, 200), st.integers(0, 200))
def test_bisection_finds_the_first_in_few_questions(size, first):
    first = min(first, size)
    asked = []
    assert first_true(range(size), lambda item: asked.append(item) or item >= first) == first
    assert len(asked) <= max(1, size).bit_length() and len(set(asked)) == len(asked)


@pytest.mark.parametrize(
    "name, value, finite",
    [
        ("params/a/kernel", np.array([1.0, np.nan], np.float32), False),
        ("momentum/a/kernel", np.array([-np.inf], np.float16), False),
        ("params/a/kernel", np.array([3e38], np.float32), True),
        ("schedule/best", np.array(np.inf), True),
        ("counters/step", np.array(2**62), True),
        ("names", np.array(["nan"]), True),
        ("params/empty", np.zeros(0, np.float32), True),
    ],
)
def test_finite_states(name, value, finite):
    assert all_finite({"params/b": np.ones(2, np.float32), name: value}) is finite


def test_finite_in_float64_beyond_float32_is_finite():
    assert all_finite({"params/a": np.array([1e300])})


class ForeignRun(ScriptedRun):
    """No incident and no telemetry; from `broken` on its stored states hold NaN."""

    broken = 10**9

    def __init__(self, fails_at, states, broken):
        super().__init__(lambda kind, value, step: None if step == fails_at else 0.9, 0, states)
        self.broken = broken

    def state_before(self, step):
        state = super().state_before(step)
        weight = np.nan if step >= self.broken else 1.0
        return {**state, "params/dense": np.array([weight], np.float32)}


STATES = tuple(range(0, 100, 10))


@pytest.mark.parametrize("fails_at", [0, 9, 10, 37, 89])
def test_only_the_steps_after_the_last_good_state_are_replayed(fails_at):
    run = ForeignRun(fails_at, STATES, broken=fails_at + 1)
    heard = []
    assert first_bad_step(run, 90, lambda step, _: heard.append(step)) == fails_at
    assert heard == run.steps_run() == list(range(fails_at // 10 * 10, fails_at + 1))


def test_nothing_bad_is_none_after_the_last_stretch_alone():
    run = ForeignRun(None, STATES, broken=1000)
    assert first_bad_step(run, 95) is None
    assert run.steps_run() == list(range(90, 96))


def test_a_failure_after_the_last_state_is_found():
    assert first_bad_step(ForeignRun(93, STATES, broken=1000), 95) == 93


def test_a_first_state_that_is_bad_is_the_answer():
    run = ForeignRun(None, STATES, broken=0)
    assert first_bad_step(run, 90) == 0 and run.ran == []


def test_a_state_overwritten_between_two_clean_steps_is_the_answer():
    assert first_bad_step(ForeignRun(None, STATES, broken=40), 90) == 40


@pytest.mark.parametrize("damaged", [{30}, {40}, {20, 30, 40}, {50}])
def test_states_that_cannot_be_read_are_replayed_through(damaged):
    run = ForeignRun(37, STATES, broken=38)
    run.damaged = damaged
    assert first_bad_step(run, 90) == 37


def test_missing_data_on_the_way_is_named():
    run = ForeignRun(37, STATES, broken=38)
    run.gone = {33}
    with pytest.raises(InputError, match="batch of step 33 cannot be rebuilt"):
        first_bad_step(run, 90)
