"""Replay: the same bits or a verdict that says so; states and telemetry that were not stored."""

from __future__ import annotations

import numpy as np
import pytest
from recorded_toy import as_trained, exploding_toy
from scripted_run import ScriptedRun

from diagnostics.errors import InputError, SnapshotDamaged
from diagnostics.onset import find_onset
from diagnostics.protocol import StepOutcome, Telemetry
from diagnostics.replay import (
    check_step,
    failing_row,
    nearest_state,
    needed_batch,
    reproduce,
    state_at,
    telemetry_differences,
)
from diagnostics.rewind import telemetry_until
from diagnostics.snapshot import hash_arrays


@pytest.fixture(scope="module")
def trained():
    return exploding_toy()


@pytest.fixture
def failed(trained):
    return as_trained(trained)


def replayed(run, step):
    return reproduce(run, run.program(), state_at(run, step), needed_batch(run, step), step)


def altered(telemetry, step, column, value):
    rows = telemetry.rows.copy()
    rows[step, telemetry.columns.index(column)] = value
    return Telemetry(telemetry.steps, telemetry.columns, rows)


def without_rows(telemetry, kept):
    return Telemetry(telemetry.steps[kept], telemetry.columns, telemetry.rows[kept])


def test_a_recorded_failure_recurs_with_the_same_bits(failed):
    found = replayed(failed, failed.stopped_at)
    assert found.verdict == "reproduced" and found.recorded
    assert found.differences == ()
    assert found.outcome.failed == failed.recorded_failures()


def test_a_healthy_step_is_reproduced_as_well(failed):
    found = replayed(failed, 3)
    assert (found.verdict, found.differences, found.outcome.applied) == ("reproduced", (), True)


def test_one_bit_of_the_recording_makes_the_replay_differ(failed):
    step, telemetry = failed.stopped_at, failed.telemetry()
    old = telemetry.column("input_max")[step]
    failed.recorded = altered(telemetry, step, "input_max", np.nextafter(old, np.float32(9e9)))
    found = replayed(failed, step)
    assert found.verdict == "replay_differs"
    assert len(found.differences) == 1 and found.differences[0].startswith("input_max: ")
    assert "when recorded" in found.differences[0]


def test_other_failed_checks_make_the_replay_differ(failed):
    other = failed.recorded_failures()[1:]
    failed.recorded_failures = lambda: other
    found = replayed(failed, failed.stopped_at)
    assert found.verdict == "replay_differs"
    assert found.differences[0].startswith("failed checks: ")


def test_two_clean_replays_of_a_recorded_failure_are_a_transient_one():
    run = ScriptedRun(lambda kind, value, step: None if step == 4 else 0.9)
    run.rule = lambda kind, value, step: 0.9
    found = replayed(run, 4)
    assert found.verdict == "not_reproduced"
    assert found.differences == (
        "recorded: loss not finite; two replays of the same bits were clean",
    )
    # From step 0 to the failing one, which ran twice from the very same state.
    assert run.steps_run() == [0, 1, 2, 3, 4, 4]


def test_one_clean_replay_of_two_is_a_replay_that_differs():
    run = ScriptedRun(lambda kind, value, step: None if step == 4 else 0.9)
    answers = iter([0.9, None])
    run.rule = lambda kind, value, step: next(answers) if step == 4 else 0.9
    found = replayed(run, 4)
    assert found.verdict == "replay_differs"
    assert "of two replays of the same bits one was clean" in found.differences[0]
    assert not found.outcome.applied


def test_a_failure_without_its_incident_is_still_a_recorded_failure(failed):
    step = failed.stopped_at
    failed.stopped = None
    assert replayed(failed, step).verdict == "reproduced"
    run = ScriptedRun(lambda kind, value, step: 0.9)
    run.recorded[4:] = [np.nan]
    run.incident_step = lambda: None
    assert replayed(run, 4).verdict == "not_reproduced"


def test_a_step_without_a_recording_says_that_nothing_was_compared(failed):
    telemetry = failed.telemetry()
    failed.recorded = without_rows(telemetry, telemetry.steps > 3)
    assert replayed(failed, 3).recorded is False
    assert replayed(failed, 4).recorded is True


def outcome_of(**values):
    return StepOutcome(True, (), values)


def row(**values):
    return Telemetry(np.array([7]), tuple(values), np.array([list(values.values())], np.float32))


def test_differences_are_sorted_and_nan_equals_nan():
    recorded = row(a=1.0, b=np.nan, c=1.0, d=2.0, e=0.0, f=np.inf)
    now = outcome_of(a=1.5, b=np.nan, c=np.nan, d=2.0, e=-0.0, f=np.inf)
    found = telemetry_differences(recorded, 7, now)
    assert [text.partition(":")[0] for text in found] == ["c", "a", "e"]
    assert telemetry_differences(recorded, 8, now) == ()


def test_a_column_that_is_no_longer_made_is_a_difference():
    assert telemetry_differences(row(a=1.0), 7, outcome_of()) == ("a: 1 when recorded, nan now",)


@pytest.mark.parametrize("step", [0, 2, 3, 5, 7])
def test_the_state_before_any_step_has_the_bits_of_training(failed, step):
    heard = []
    state = state_at(failed, step, lambda now, _: heard.append(now))
    assert heard == list(range(step - step % 3, step)) or step == failed.stopped_at
    program = failed.program()
    program.load(failed.state_before(0))
    for now in range(step):
        program.run(failed.batch(now), now)
    assert hash_arrays(state) == hash_arrays(program.state())


def test_a_damaged_state_is_passed_over():
    run = ScriptedRun(lambda kind, value, step: 0.9, states=(0, 2, 4))
    run.damaged = {4}
    assert nearest_state(run, 5)[0] == 2
    assert int(state_at(run, 5)["counters/step"]) == 5
    assert run.steps_run() == [2, 3, 4]
    run.damaged = {0, 2, 4}
    with pytest.raises(SnapshotDamaged, match="state of step 4 is damaged"):
        state_at(run, 5)


def test_a_replay_that_is_refused_on_the_way_names_that_step():
    run = ScriptedRun(lambda kind, value, step: None if step == 3 else 0.9)
    with pytest.raises(InputError, match=r"towards step 5 stopped at step 3: loss is not finite"):
        state_at(run, 5)


def test_a_batch_that_is_gone_is_named():
    run = ScriptedRun(lambda kind, value, step: 0.9)
    run.gone = {3}
    with pytest.raises(InputError, match="the batch of step 3 cannot be rebuilt") as error:
        state_at(run, 5)
    assert error.value.remedy == "Restore the data directory of the run"


@pytest.mark.parametrize("step", [-1, 6, 10**9])
def test_a_step_that_the_run_never_came_to_is_refused(step):
    run = ScriptedRun(lambda kind, value, step: 0.9, recorded=6)
    with pytest.raises(InputError, match=rf"step {step} is none of scripted. Its steps are 0 to 5"):
        check_step(run, step)
    check_step(run, 5)
    # Without telemetry the stored states tell how far it came.
    check_step(ScriptedRun(lambda kind, value, step: 0.9, 0, states=(0, 8)), 8)


@pytest.mark.parametrize(
    "losses, step",
    [
        ([], None),
        ([1.0, 1.0], None),
        ([1.0, np.nan], 1),
        ([np.inf], 0),
        ([1.0, np.inf, 1.0], None),
        # A column that never was finite is one that is not made.
        ([np.nan, np.nan], None),
    ],
)
def test_the_last_row_tells_a_refused_step_without_its_incident(losses, step):
    telemetry = Telemetry(
        np.arange(len(losses)), ("loss",), np.array(losses, np.float32).reshape(-1, 1)
    )
    assert failing_row(telemetry) == step


def test_a_recording_that_tells_is_taken_as_it_is(failed):
    heard = []
    found = telemetry_until(failed, failed.stopped_at, lambda step, _: heard.append(step))
    assert (found.note, heard) == ("", [])
    assert found.telemetry.rows.tobytes() == failed.telemetry().rows.tobytes()


def test_later_steps_are_no_evidence(failed):
    heard = []
    found = telemetry_until(failed, 5, lambda step, _: heard.append(step))
    assert found.telemetry.steps.tolist() == list(range(6)) and heard == []


@pytest.mark.parametrize("kept", [[], [0], "the failing step", "the last three"])
def test_missing_telemetry_is_replayed_bit_for_bit_each_step_once(failed, kept):
    step, recorded = failed.stopped_at, failed.telemetry()
    rows = {"the failing step": [step], "the last three": [step - 2, step - 1, step]}
    failed.recorded = without_rows(recorded, np.array(rows.get(str(kept), kept), int))
    heard = []
    found = telemetry_until(failed, step, lambda now, _: heard.append(now))
    assert len(heard) == len(set(heard)) > 0
    first = int(found.telemetry.steps[0])
    assert found.telemetry.steps.tolist() == list(range(first, step + 1))
    assert found.telemetry.rows.tobytes() == recorded.rows[first:].tobytes()
    assert f"telemetry of steps {first} to {step} is replayed" in found.note


def growing(states):
    """Grows 64-fold a step from step 20 on, and fails at step 40."""

    def rule(kind, value, step):
        return None if step == 40 else 1.0 if step < 20 else 64.0 ** (step - 20)

    run = ScriptedRun(rule, recorded=41, states=states)
    run.recorded = []
    run.incident_step = lambda: 40
    return run


def test_rewinding_goes_back_until_the_onset_lies_behind_its_first_step():
    run = growing(states=(0, 12, 24, 36, 40))
    found = telemetry_until(run, 40)
    # 40, then 36 to 39, ... until the steps before the growth are there: never from step 0.
    assert found.telemetry.steps.tolist() == list(range(12, 41))
    assert sorted(run.steps_run()) == list(range(12, 41))
    onset = find_onset(found.telemetry, run.facts)
    assert onset is not None and 19 <= onset.step <= 21


def test_rewinding_without_data_keeps_what_there_is_and_says_so():
    run = growing(states=(0, 24, 40))
    run.gone = set(range(40))
    found = telemetry_until(run, 40)
    assert found.telemetry.steps.tolist() == [40]
    assert "the steps before 40 cannot be replayed" in found.note and "data" in found.note


def test_a_rewound_step_that_is_refused_ends_the_rewinding():
    run = growing(states=(0, 24, 40))
    run.rule = lambda kind, value, step: None if step in (30, 40) else 1.0
    found = telemetry_until(run, 40)
    assert "replayed from step 24, which was refused at step 30" in found.note
    assert 30 in found.telemetry.steps and 29 in found.telemetry.steps
