"""The whole diagnosis, on the toy run and on a narrow VGG-A."""

from __future__ import annotations

import json

import numpy as np
import pytest
from recorded_toy import RecordedToy, as_trained, exploding_toy
from small_runs import replaced, tiny_config, tiny_data
from toy_run import Fault, ToyConfig

from diagnostics.diagnose import diagnose
from diagnostics.diagnosis import VERDICTS
from diagnostics.durable_files import json_text
from diagnostics.errors import InputError, NothingToDiagnose, StoppedByGuard
from diagnostics.protocol import Telemetry

# The keys of schema version 1, as DESIGN.md has them.
KEYS = {
    "schema",
    "run_dir",
    "step",
    "verdict",
    "first_nonfinite",
    "onset",
    "cause",
    "counterfactuals",
    "recommendation",
    "environment",
    "seconds",
}
PLACE_KEYS = {"stage", "layer", "op", "source", "kind", "count", "size", "examples"}
REPLAY_KEYS = {"change", "survived", "steps", "loss", "minimal"}


AMPLE = 1e5  # seconds: a busy machine must not cut a replay


@pytest.fixture(scope="module")
def trained():
    return exploding_toy()


@pytest.fixture
def failed(trained):
    return as_trained(trained)


@pytest.fixture(scope="module")
def found(trained):
    """Its diagnosis, and what the progress display was told."""
    heard = []
    diagnosis = diagnose(
        as_trained(trained),
        budget_seconds=AMPLE,
        progress=lambda *told: heard.append(told),
    )
    return diagnosis, heard


def nothing_recorded(run):
    telemetry = run.telemetry()
    return Telemetry(telemetry.steps[:0], telemetry.columns, telemetry.rows[:0])


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_failure_is_reproduced_located_dated_explained_and_mended(found, trained):
    diagnosis, _ = found
    assert diagnosis.verdict == "reproduced" and diagnosis.step == trained.stopped_at
    assert diagnosis.first_nonfinite.stage == "forward"
    assert diagnosis.onset is not None and diagnosis.onset.step < diagnosis.step
    assert diagnosis.onset.growth_per_step > 2
    assert diagnosis.cause.kind == "learning_rate"
    control = diagnosis.counterfactuals[0]
    assert control.kind == "none" and not control.survived
    assert control.first_step + control.steps == diagnosis.step
    assert diagnosis.recommendation.verified
    assert "learning-rate" in diagnosis.recommendation.command
    assert sum(one.minimal for one in diagnosis.counterfactuals) == 1


def test_the_largest_surviving_rate_has_a_casualty_right_above_it(found):
    rates = [one for one in found[0].counterfactuals if one.kind == "learning_rate"]
    alive = max(one.value for one in rates if one.survived)
    dead = min([one.value for one in rates if not one.survived] + [6.0])
    assert alive < dead <= 1.5 * alive
    assert f" {alive:g}" in found[0].recommendation.sentence


def test_a_verified_fix_ran_from_step_0_past_the_failing_step(found):
    diagnosis, _ = found
    replay = next(
        one
        for one in diagnosis.counterfactuals
        if diagnosis.recommendation.sentence.startswith(f"{one.change}:")
    )
    assert replay.survived and replay.first_step == 0 and replay.note == ""
    assert replay.steps > diagnosis.step + 1


def test_the_result_has_the_keys_of_the_schema_and_is_strict_json(found):
    value = strict(json_text(found[0].to_dict()))
    assert value.keys() >= KEYS and value["schema"] == 1
    assert value["first_nonfinite"].keys() >= PLACE_KEYS
    assert value["onset"].keys() == {"step", "layer", "quantity", "value", "growth_per_step"}
    assert value["cause"].keys() == {"kind", "confidence", "evidence"}
    assert all(one.keys() >= REPLAY_KEYS for one in value["counterfactuals"])
    assert {"command", "verified"} <= value["recommendation"].keys()
    assert value["verdict"] in VERDICTS
    assert all(seconds >= 0 for seconds in value["seconds"].values())


def test_progress_tells_every_stage_and_every_replay(found):
    stages = [what for what, _, _ in found[1]]
    for stage in ("state and batch", "replay", "location", "onset", "counterfactuals"):
        assert stage in stages
    assert any(what.startswith("replaying: gradients clipped") for what in stages)


def test_two_diagnoses_differ_in_seconds_only(failed):
    failed.kinds = ("clip_norm",)
    first, second = (
        json.loads(json_text(diagnose(failed, budget_seconds=AMPLE).to_dict())) for _ in range(2)
    )
    assert first.pop("seconds").keys() == second.pop("seconds").keys()
    assert first == second


def test_without_a_budget_nothing_is_tried(failed):
    diagnosis = diagnose(failed, budget_seconds=0)
    assert diagnosis.counterfactuals == () and diagnosis.recommendation is None
    assert diagnosis.first_nonfinite is not None and diagnosis.cause.evidence


def test_one_altered_bit_is_a_replay_that_differs(failed):
    telemetry = failed.telemetry()
    rows = telemetry.rows.copy()
    column = telemetry.columns.index("lr")
    rows[failed.stopped_at, column] = np.nextafter(rows[failed.stopped_at, column], np.float32(0))
    failed.recorded = Telemetry(telemetry.steps, telemetry.columns, rows)
    diagnosis = diagnose(failed, budget_seconds=0)
    assert diagnosis.verdict == "replay_differs"
    assert diagnosis.notes == ("lr: 5.99999952 when recorded, 6 now",)
    assert diagnosis.first_nonfinite is not None


@pytest.mark.parametrize("differs", [False, True])
def test_a_transient_failure_is_not_reproduced_and_blamed_on_the_hardware(failed, differs):
    failures = failed.recorded_failures()
    failed.stopped, failed.recorded_failures = 3, lambda: failures
    failed.said = ["keras: 3.0 when recorded, 3.15 now"] if differs else []
    diagnosis = diagnose(failed, budget_seconds=AMPLE)
    assert diagnosis.verdict == "not_reproduced"
    assert diagnosis.cause.kind == "hardware"
    assert diagnosis.first_nonfinite is None and diagnosis.recommendation is None
    assert diagnosis.counterfactuals == ()
    assert any("two replays of the same bits were clean" in note for note in diagnosis.notes)
    # Under other conditions a clean replay says less about the hardware.
    assert (diagnosis.cause.confidence <= 0.5) is differs
    assert any("3.15 now" in line for line in diagnosis.cause.evidence) is differs


def test_weights_overwritten_from_outside_have_no_proven_fix():
    config = ToyConfig(overwritten=(5, "params/dense3/kernel"))
    run = RecordedToy(config, checkpoint_every=3).train(20)
    diagnosis = diagnose(run, budget_seconds=AMPLE)
    assert diagnosis.verdict == "reproduced" and diagnosis.step == 5
    assert diagnosis.first_nonfinite.stage == "weights"
    assert diagnosis.cause.kind == "weights"
    # From step 0 the training alone never comes to that state: the control survives.
    assert [one.kind for one in diagnosis.counterfactuals] == ["none"]
    assert diagnosis.counterfactuals[0].survived
    assert diagnosis.recommendation is None
    assert any("the control survived" in note for note in diagnosis.notes)


def test_without_data_the_captured_batch_locates_but_verifies_nothing(failed):
    failed.batches_gone = [step for step in range(99) if step != failed.stopped_at]
    failed.kinds = ("clip_norm",)
    diagnosis = diagnose(failed, budget_seconds=AMPLE)
    assert diagnosis.verdict == "reproduced" and diagnosis.first_nonfinite is not None
    tried = diagnosis.counterfactuals
    assert tried and all("captured batch only" in one.note for one in tried)
    assert diagnosis.recommendation is None or not diagnosis.recommendation.verified


def test_missing_telemetry_is_rewound_and_gives_the_same_onset(failed, found):
    failed.recorded = nothing_recorded(failed)
    seen = []
    diagnosis = diagnose(failed, budget_seconds=0, on_telemetry=seen.append)
    assert diagnosis.onset == found[0].onset
    assert any("is replayed, not recorded" in note for note in diagnosis.notes)
    assert seen[-1].steps.tolist() == list(range(failed.stopped_at + 1))


def test_missing_telemetry_and_data_leave_the_onset_open(failed):
    failed.recorded = nothing_recorded(failed)
    failed.batches_gone = [step for step in range(99) if step != failed.stopped_at]
    diagnosis = diagnose(failed, budget_seconds=0)
    assert diagnosis.first_nonfinite is not None and diagnosis.onset is None
    assert any("cannot be replayed" in note for note in diagnosis.notes)


def test_without_an_incident_the_failing_step_is_found_by_bisection(failed, found):
    failed.stopped, failed.recorded = None, nothing_recorded(failed)
    failed.states_gone = [failed.stopped_at]
    told = []
    diagnosis = diagnose(failed, budget_seconds=0, progress=lambda what, *_: told.append(what))
    assert (diagnosis.step, diagnosis.verdict) == (failed.stopped_at, "reproduced")
    assert diagnosis.first_nonfinite == found[0].first_nonfinite
    assert "searching" in told and "rewinding" in told


def test_without_an_incident_the_telemetry_tells_the_failing_step(failed, found):
    failed.stopped, failed.states_gone = None, [failed.stopped_at]
    diagnosis = diagnose(failed, budget_seconds=0)
    assert (diagnosis.step, diagnosis.verdict) == (failed.stopped_at, "reproduced")
    assert diagnosis.first_nonfinite == found[0].first_nonfinite


def test_a_step_that_was_asked_for(failed):
    assert diagnose(failed, step=failed.stopped_at, budget_seconds=0).verdict == "reproduced"
    with pytest.raises(NothingToDiagnose, match="step 4 of toy is healthy"):
        diagnose(failed, step=4)
    with pytest.raises(InputError, match=f"Its steps are 0 to {failed.stopped_at}"):
        diagnose(failed, step=failed.stopped_at + 1)


def test_the_batch_of_the_failing_step_must_be_there(failed):
    failed.stopped, failed.batches_gone = None, [failed.stopped_at]
    with pytest.raises(InputError, match="cannot be rebuilt"):
        diagnose(failed)


def test_a_healthy_run_has_nothing_to_diagnose():
    run = RecordedToy(ToyConfig()).train(40)
    with pytest.raises(NothingToDiagnose, match="toy left no incident") as nothing:
        diagnose(run)
    assert nothing.value.exit_code == 4 and "--step N" in nothing.value.remedy


def test_a_poisoned_example_is_named_and_left_out():
    run = RecordedToy(ToyConfig(poisoned={3: "nan"}, seed=2)).train(20)
    run.kinds = ("without_examples",)
    diagnosis = diagnose(run, budget_seconds=AMPLE)
    assert diagnosis.first_nonfinite.stage == "data"
    assert diagnosis.first_nonfinite.examples == (3,)
    assert diagnosis.first_nonfinite.example_names == ("example-03",)
    assert diagnosis.cause.kind == "data"
    assert diagnosis.recommendation.command == "toy train --without-examples (3,)"
    assert [one.change for one in diagnosis.counterfactuals if one.minimal] == [
        "without examples 3"
    ]


def test_a_fault_that_no_change_mends_has_no_recommendation():
    run = RecordedToy(ToyConfig(fault=Fault("forward", "dense3", step=4))).train(9)
    run.kinds = ("clip_norm",)
    diagnosis = diagnose(run, budget_seconds=AMPLE)
    assert diagnosis.first_nonfinite.layer == "dense3"
    assert diagnosis.recommendation is None
    assert not any(one.minimal or one.survived for one in diagnosis.counterfactuals)


@pytest.fixture(scope="module")
def diverged():
    run = RecordedToy(ToyConfig(learning_rate=3e3, clip_norm=1.0)).train(24)
    assert run.stopped_at is None
    return run


def test_a_finite_run_that_ran_away_is_diverged_and_a_fix_outlasts_it(diverged):
    diverged.kinds = ("learning_rate",)
    diagnosis = diagnose(diverged, budget_seconds=AMPLE)
    assert diagnosis.verdict == "diverged" and diagnosis.first_nonfinite is None
    assert diagnosis.step == 23
    control = diagnosis.counterfactuals[0]
    assert control.kind == "none" and "the loss stands at" in control.note
    assert diagnosis.recommendation.verified
    assert any("ran away" in note for note in diagnosis.notes)


def test_finite_trouble_without_data_is_judged_from_the_recording(diverged):
    diverged.batches_gone = range(99)
    diagnosis = diagnose(diverged, budget_seconds=AMPLE)
    assert diagnosis.verdict == "diverged" and diagnosis.counterfactuals == ()
    assert "without the data no change can be replayed" in diagnosis.notes


def test_a_stalled_run_gets_a_tested_fix():
    run = RecordedToy(ToyConfig(sigma=1e-4)).train(60)
    run.kinds = ("init",)
    diagnosis = diagnose(run, budget_seconds=AMPLE)
    assert (diagnosis.verdict, diagnosis.cause.kind) == ("stalled", "init")
    assert diagnosis.recommendation.verified
    assert diagnosis.counterfactuals[0].change == "He's initialiser"
    # Ten times the rate does not move it.
    rates = [one for one in diagnosis.counterfactuals if one.kind == "learning_rate"]
    assert rates and not rates[0].survived and "does not learn" in rates[0].note


@pytest.fixture(scope="module")
def wide_start(tmp_path_factory):
    """A narrow VGG-A whose initial weights are far too large."""
    from vggrepro import trainer

    directory = tmp_path_factory.mktemp("vgg")
    config = tiny_config(tiny_data(directory), warmup_steps=0, init="normal:3", steps=4)
    with pytest.raises(StoppedByGuard):
        trainer.train(replaced(config, eval_every=0), directory / "run")
    return directory / "run"


def test_vgg_with_an_initialiser_that_explodes(wide_start, monkeypatch):
    from vggrepro.replay_adapter import VggRun

    run = VggRun(wide_start)
    offered = run.changes
    kinds = ("init", "learning_rate")
    monkeypatch.setattr(
        run, "changes", lambda *asked: [one for one in offered(*asked) if one.kind in kinds]
    )
    diagnosis = diagnose(run, budget_seconds=AMPLE)
    assert diagnosis.verdict == "reproduced"
    assert diagnosis.cause.kind == "init"
    assert diagnosis.recommendation.verified
    assert "--init glorot-uniform" in diagnosis.recommendation.command
    # It survives, and in so narrow a net it would stand still.
    small = next(one for one in diagnosis.counterfactuals if one.value == "normal:0.01")
    assert small.survived and "may never learn" in small.note
    assert not any(one.survived for one in diagnosis.counterfactuals if one.kind != "init")
