"""Replays with one change: what survives, what the budget cuts, what counts as proven."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_run import FACTS, Clock, ScriptedProgram, ScriptedRun

from diagnostics.counterfactual import CONTROL, Matrix, Plan
from diagnostics.diagnosis import Cause, Onset
from diagnostics.errors import InputError
from diagnostics.fix_search import plan_replays, search_fixes
from diagnostics.protocol import Change, LayerFacts, Telemetry
from diagnostics.survival import not_learning, runaway

FAILING = 5
PLAN = Plan(0, 10)


def rate(value, rank=3):
    return Change("learning_rate", value, f"learning rate {value:g}", rank=rank)


def clip(value, rank=2):
    return Change("clip_norm", value, f"clipped to {value:g}", rank=rank)


def rule_of(limit, others=()):
    """Fails at FAILING unless the learning rate is at most `limit` or the kind is in `others`."""

    def rule(kind, value, step):
        alive = kind in others or (kind == "learning_rate" and value <= limit)
        return 0.9 if alive or step != FAILING else None

    return rule


def explored(run, changes, plan=PLAN, failing=FAILING, **options):
    matrix = Matrix(run, failing, options.pop("budget", 100.0), **options)
    matrix.explore(changes, plan)
    return matrix


def searched(run, changes, kind="learning_rate", plan=PLAN, failing=FAILING, **options):
    matrix = Matrix(run, failing, options.pop("budget", 100.0), **options)
    judge = lambda tried: Cause(kind, 0.9, ("because",))  # noqa: E731
    return search_fixes(run, matrix, changes, plan, failing, judge)


def by_label(results):
    return {one.change: one for one in results}


def test_the_control_fails_where_the_run_failed_and_a_fix_outlasts_it():
    run = ScriptedRun(rule_of(0.1))
    results = by_label(explored(run, [rate(0.1)]).results)
    control, fixed = results[CONTROL.label], results["learning rate 0.1"]
    assert (control.survived, control.steps, control.loss) == (False, 5, pytest.approx(0.9))
    assert control.note == "step 5: loss not finite"
    assert (fixed.survived, fixed.steps, fixed.first_step, fixed.note) == (True, 10, 0, "")


def test_a_control_that_survives_ends_the_search_and_nothing_is_recommended():
    run = ScriptedRun(lambda kind, value, step: 0.9)
    fixes = searched(run, [rate(0.1), clip(1.0)])
    assert [one.kind for one in fixes.results] == ["none"]
    assert fixes.recommendation is None
    assert "the control survived from step 0 on" in fixes.notes[0]
    assert not any(one.minimal for one in fixes.results)


def test_a_control_that_fails_elsewhere_is_said():
    run = ScriptedRun(lambda kind, value, step: None if kind == "none" and step == 2 else 0.9)
    fixes = searched(run, [rate(0.1)])
    assert fixes.notes == (
        "the control failed at step 2, the recorded run at step 5: "
        "the replays are like the run, not the same",
    )


def test_a_control_that_the_budget_cuts_proves_nothing():
    run = ScriptedRun(rule_of(0.1))
    run.clock, run.step_seconds = Clock(), 10.0
    fixes = searched(run, [rate(0.1)], budget=10.0, clock=run.clock)
    assert fixes.recommendation is None
    assert "longer --budget-seconds" in " ".join(fixes.notes)


@given(limit=st.floats(1.05e-3, 0.9))
def test_the_largest_surviving_rate_lies_between_a_survivor_and_a_casualty(limit):
    run = ScriptedRun(rule_of(limit))
    results = explored(run, [rate(0.1), rate(0.01), rate(0.001)]).results
    rates = {one.value: one.survived for one in results if one.kind == "learning_rate"}
    assert all(survived == (value <= limit) for value, survived in rates.items())
    alive = max(value for value, survived in rates.items() if survived)
    dead = min([value for value, survived in rates.items() if not survived] + [1.0])
    assert alive <= limit < dead
    # Three halvings of a factor of ten, in log scale; rates have two digits.
    assert dead / alive < 1.5


def test_where_every_rate_dies_smaller_ones_are_tried():
    results = explored(ScriptedRun(rule_of(2e-5)), [rate(0.1), rate(0.01)]).results
    alive = [one.value for one in results if one.survived]
    assert alive and max(alive) <= 2e-5
    nothing = explored(ScriptedRun(rule_of(0.0)), [rate(0.1), rate(0.01)]).results
    assert len(nothing) == 6 and not any(one.survived for one in nothing)


def test_no_smaller_rate_is_tried_where_another_change_survived():
    run = ScriptedRun(rule_of(0.0, others=("clip_norm",)))
    results = explored(run, [rate(0.1), clip(1.0)]).results
    assert [one.kind for one in results] == ["none", "clip_norm", "learning_rate"]


def minimal(fixes):
    return [(one.kind, one.value) for one in fixes.results if one.minimal]


def test_the_smallest_change_that_answers_the_cause_is_marked_and_of_rates_the_largest():
    run = ScriptedRun(rule_of(0.5, others=("clip_norm",)))
    changes = [rate(0.1), clip(1.0)]
    fixes = searched(run, changes, "learning_rate")
    alive = [one.value for one in fixes.results if one.survived and one.kind == "learning_rate"]
    assert minimal(fixes) == [("learning_rate", max(alive))] and max(alive) > 0.1
    assert f"={max(alive)}" in fixes.recommendation.command
    # A cause that neither answers: the smaller change.
    assert minimal(searched(run, changes, "hardware")) == [("clip_norm", 1.0)]


def test_the_recommendation_answers_the_cause_before_it_is_small():
    run = ScriptedRun(rule_of(0.1, others=("clip_norm", "init")))
    init = Change("init", "small", "init small", from_start=True, rank=5)
    changes = [rate(0.1), clip(1.0), init]
    assert searched(run, changes, "init").recommendation.command == "train --init=small"
    assert "--learning_rate" in searched(run, changes, "learning_rate").recommendation.command
    # A cause that no kind of change answers: the smallest.
    assert "--clip_norm" in searched(run, changes, "hardware").recommendation.command


def test_weights_that_let_no_signal_through_give_way_to_those_that_do():
    facts = dataclasses.replace(FACTS, layers=(LayerFacts("dense", "dense", weight="kernel"),))
    run = ScriptedRun(rule_of(0.0, others=("init",)), facts=facts)
    run.signals = {"tiny": 1e-5}
    tiny = Change("init", "tiny", "init tiny", from_start=True, rank=1)
    usual = Change("init", "usual", "init usual", from_start=True, rank=2)
    fixes = searched(run, [tiny, usual], "init")
    assert fixes.recommendation.command == "train --init=usual" and fixes.recommendation.verified
    note = "may never learn: the largest pre-activation of dense is 1e-5"
    assert by_label(fixes.results)["init tiny"].note == note
    alone = searched(run, [tiny], "init").recommendation
    assert not alone.verified and note in alone.sentence
    # What a regression's numbers mean nobody knows.
    run.facts = dataclasses.replace(facts, chance_loss=None)
    assert searched(run, [tiny], "init").recommendation.verified


def test_a_change_without_a_command_is_not_recommended():
    run = ScriptedRun(rule_of(0.1, others=("without_examples",)))
    run.without_command = {"without_examples"}
    out = Change("without_examples", (1,), "without example 1", rank=0)
    alone = searched(run, [out], "data")
    assert alone.recommendation is None and minimal(alone) == [("without_examples", (1,))]
    assert "--learning_rate" in searched(run, [out, rate(0.1)], "data").recommendation.command


def test_a_rate_that_barely_lives_gives_way_to_one_that_trains():
    def rule(kind, value, step):
        if kind == "none":
            return None if step == FAILING else 0.9
        return 5.0 if value > 0.1 else 0.8

    recommendation = searched(ScriptedRun(rule), [rate(0.1), rate(0.5)]).recommendation
    assert recommendation.command == "train --learning_rate=0.1"


def test_verified_needs_the_whole_way_from_step_0():
    run = ScriptedRun(rule_of(0.1), states=(0, 4))
    fixes = searched(run, [rate(0.1)])
    assert fixes.recommendation.verified
    assert fixes.recommendation.sentence.startswith("learning rate 0.")
    # From a later state it is replayed once more from step 0, and the control too ...
    later = searched(run, [rate(0.1)], plan=Plan(4, 10))
    assert later.recommendation.verified
    fix, control = later.results[-2:]
    assert (fix.kind, fix.first_step, fix.survived) == ("learning_rate", 0, True)
    assert (control.kind, control.first_step, control.survived) == ("none", 0, False)
    # ... unless there is no time for that.
    clock = Clock()
    late = searched(run, [rate(0.1)], plan=Plan(4, 10), step_seconds=20.0, clock=clock)
    assert late.recommendation is not None and not late.recommendation.verified


class DamagedLater(ScriptedRun):
    """Its later states were damaged from outside: what begins with one of them dies."""

    def program(self, change=None):
        run = self

        class Program(ScriptedProgram):
            def load(self, state):
                super().load(state)
                damaged = self._step > 0
                run.rule = lambda kind, value, step: None if damaged and step == FAILING else 0.9

        return Program(self, change)


def test_what_survives_from_step_0_is_no_fix_where_the_control_survives_too():
    run = DamagedLater(lambda kind, value, step: 0.9, states=(0, 4))
    init = Change("init", "small", "init small", from_start=True, rank=0)
    fixes = searched(run, [init, rate(0.1)], "weights", plan=Plan(4, 10))
    assert by_label(fixes.results)["init small"].survived
    last = fixes.results[-1]
    assert (last.kind, last.first_step, last.survived) == ("none", 0, True)
    assert fixes.recommendation is None
    assert any("the control survived from step 0 on" in note for note in fixes.notes)


def test_without_time_for_the_control_nothing_is_verified():
    run = ScriptedRun(rule_of(0.0, others=("init",)), states=(0, 4))
    init = Change("init", "small", "init small", from_start=True, rank=0)
    whole = searched(run, [init], "init", plan=Plan(4, 10))
    assert whole.recommendation.verified
    assert [(one.kind, one.first_step) for one in whole.results] == [
        ("none", 4),
        ("init", 0),
        ("none", 0),
    ]
    late = searched(run, [init], "init", plan=Plan(4, 10), step_seconds=20.0, clock=Clock())
    assert late.recommendation is not None and not late.recommendation.verified


def test_a_fix_that_dies_on_its_way_from_step_0_makes_way_for_the_next():
    def rule(kind, value, step):
        if kind == "clip_norm":
            return None if step == 1 else 0.9
        return rule_of(0.1)(kind, value, step)

    run = ScriptedRun(rule, states=(0, 4))
    fixes = searched(run, [rate(0.1), clip(1.0)], "hardware", plan=Plan(4, 10))
    assert fixes.recommendation.verified and "--learning_rate" in fixes.recommendation.command
    assert [kind for kind, _ in minimal(fixes)] == ["learning_rate"]


def test_a_replay_that_ends_before_the_failing_step_has_not_survived():
    results = by_label(explored(ScriptedRun(rule_of(0.1)), [rate(0.1)], Plan(0, 5)).results)
    assert not results[CONTROL.label].survived and not results["learning rate 0.1"].survived


def test_a_replay_on_the_captured_batch_is_never_verified():
    run = ScriptedRun(rule_of(0.1))
    run.gone = {0, 1}
    fixes = searched(run, [rate(0.1)])
    assert all("on the captured batch only" in one.note for one in fixes.results)
    assert fixes.recommendation is not None and not fixes.recommendation.verified
    assert "captured batch" in fixes.recommendation.sentence


def test_a_warm_up_is_replayed_beyond_its_end_or_not_verified():
    warm = Change("warmup", 20, "20 steps of warm-up", rank=1)

    def cold_again(kind, value, step):
        return None if step == (19 if kind == "warmup" else FAILING) else 0.9

    run = ScriptedRun(cold_again)
    died = by_label(searched(run, [warm]).results)[warm.label]
    assert (died.survived, died.note) == (False, "step 19: loss not finite")
    slow = searched(run, [warm], step_seconds=2.0)
    assert "the warm-up lasts longer than this replay" in by_label(slow.results)[warm.label].note
    assert slow.recommendation is not None and not slow.recommendation.verified


def test_one_replay_that_cannot_run_does_not_end_the_others():
    def rule(kind, value, step):
        if kind == "clip_norm":
            raise InputError("every example of the batch is suspect")
        return rule_of(0.1)(kind, value, step)

    run = ScriptedRun(rule)
    results = by_label(searched(run, [clip(1.0), rate(0.1)]).results)
    assert results["clipped to 1"].note == (
        "cannot be replayed: every example of the batch is suspect"
    )
    assert not results["clipped to 1"].survived and results["learning rate 0.1"].survived


@pytest.mark.parametrize("budget", [5.0, 60.0, 200.0])
def test_the_budget_holds_within_half_again_and_a_step(budget):
    run = ScriptedRun(lambda kind, value, step: 0.9 if kind != "none" or step != FAILING else None)
    run.clock, run.step_seconds = Clock(), 4.0
    matrix = explored(
        run,
        [rate(0.1 / n) for n in range(1, 9)],
        budget=budget,
        clock=run.clock,
        step_seconds=run.step_seconds,
    )
    # The control and one change always get their first step.
    assert run.clock.now <= 1.5 * budget + 2 * run.step_seconds
    assert len(matrix.results) >= 2
    if budget < 200:
        assert matrix.dropped
    for one in matrix.results:
        assert one.survived == (one.steps == 10)


def test_what_the_budget_dropped_is_named():
    run = ScriptedRun(rule_of(0.1))
    run.clock, run.step_seconds = Clock(), 1.0
    fixes = searched(run, [rate(0.1), clip(1.0), clip(2.0)], budget=8.0, clock=run.clock)
    assert any(note.startswith("the budget ended before: ") for note in fixes.notes)
    assert any("learning rate 0.1" in note for note in fixes.notes)


def test_a_finite_run_that_ran_away_did_not_survive():
    losses = {"none": 1e6, "learning_rate": 9.9, "clip_norm": 10.1}
    run = ScriptedRun(lambda kind, value, step: losses[kind])
    results = by_label(explored(run, [rate(0.1), clip(1.0)]).results)
    assert results[CONTROL.label].note == "finite, but the loss stands at 1e+06"
    assert results["learning rate 0.1"].survived
    assert not results["clipped to 1"].survived


def test_runaway_of_a_loss_without_a_known_chance_is_measured_by_its_first():
    facts = dataclasses.replace(FACTS, chance_loss=None)
    assert runaway([100.0] * 9, facts) == ""
    assert "1.1e+03" in runaway([100.0] + [1100.0] * 9, facts)
    assert "-1.1e+03" in runaway([100.0] + [-1100.0] * 9, facts)
    assert runaway([], facts) == "no step ran"
    # A spike that was survived is none.
    assert runaway([1.0, 1e9] + [1.0] * 8, facts) == ""


def test_of_a_loss_without_lower_bound_what_only_delays_is_no_fix():
    def rule(kind, value, step):
        if kind == "loss_formula":
            return 1.0 / (1 + step)
        if kind == "learning_rate":
            return 1.0 - value * step
        return None if step == FAILING else 1.0 - 10.0 ** (2 * step)

    formula = Change("loss_formula", "the other sign", "the other sign", rank=3)
    fixes = searched(ScriptedRun(rule), [rate(0.5), formula], "loss_formula")
    slower = by_label(fixes.results)["learning rate 0.5"]
    assert not slower.survived and slower.note.startswith("only slower: the loss still falls")
    assert "--loss_formula" in fixes.recommendation.command and fixes.recommendation.verified
    # A loss that may well be negative, in a run that did not run away downwards.
    healthy = ScriptedRun(
        lambda kind, value, step: None if kind == "none" and step == FAILING else 1.0 - 0.5 * step
    )
    assert by_label(searched(healthy, [rate(0.5)]).results)["learning rate 0.5"].survived


def test_of_a_loss_without_lower_bound_a_change_of_pace_is_no_fix_though_noise_hides_the_fall():
    noisy = ScriptedRun(
        lambda kind, value, step: (
            (None if step == FAILING else 1.0 - 10.0 ** (2 * step)) if kind == "none" else step % 3
        )
    )
    slower = by_label(searched(noisy, [rate(0.5)]).results)["learning rate 0.5"]
    assert not slower.survived and "no lower bound" in slower.note


def telemetry_of(losses):
    return Telemetry(np.arange(len(losses)), ("loss",), np.array(losses, np.float32)[:, None])


def test_learning_is_a_loss_below_guessing_and_below_the_recorded_one():
    stuck = telemetry_of([1.0] * 40)
    assert not_learning([0.9] * 20, FACTS, stuck) == ""
    assert "too few steps" in not_learning([0.9] * 19, FACTS, stuck)
    assert "does not learn" in not_learning([0.98] * 20, FACTS, stuck)
    # Easy batches: the stalled run had the same losses on them.
    easy = telemetry_of([1.0] * 20 + [0.9] * 20)
    assert "does not learn" in not_learning([1.0] * 20 + [0.9] * 20, FACTS, easy)
    assert not_learning([1.0] * 20 + [0.8] * 20, FACTS, easy) == ""
    assert not_learning([0.9] * 20, FACTS, telemetry_of([])) == ""


def test_a_stalled_run_needs_no_control_and_ends_once_it_learns():
    run = ScriptedRun(lambda kind, value, step: 0.99**step if kind == "init" else 1.0, 40)
    init = Change("init", "large", "init large", from_start=True, rank=1)
    fixes = searched(run, [init, rate(10.0)], "init", plan=Plan(0, 60), must_learn=True)
    results = by_label(fixes.results)
    assert CONTROL.label not in results
    assert results["init large"].survived and 20 <= results["init large"].steps < 40
    assert not results["learning rate 10"].survived
    assert fixes.recommendation.command == "train --init=large" and fixes.recommendation.verified


def test_an_unaffordable_start_is_replaced_by_a_state_before_the_onset():
    run = ScriptedRun(lambda kind, value, step: 0.9, states=(0, 40, 80, 90))
    onset = Onset(70, "dense", "loss", 1.0, 2.0)
    assert plan_replays(run, 95, onset, affordable_steps=1000) == Plan(0, 95 + 1 + 95)
    assert plan_replays(run, 95, onset, affordable_steps=60) == Plan(40, 95 + 1 + 4)
    assert plan_replays(run, 95, None, affordable_steps=20) == Plan(90, 95 + 1 + 14)
    run.damaged = {40}
    assert plan_replays(run, 95, onset, affordable_steps=60).origin == 0


def test_from_step_0_is_dear_and_comes_last_where_the_plan_begins_later():
    run = ScriptedRun(rule_of(0.1), states=(0, 4))
    init = Change("init", "small", "init small", from_start=True, rank=0)
    matrix = explored(run, [init, rate(0.1)], plan=Plan(4, 10))
    firsts = [(one.kind, one.first_step) for one in matrix.results[:3]]
    assert firsts == [("none", 4), ("learning_rate", 4), ("init", 0)]


def test_batches_are_rebuilt_once_and_only_as_many_kept_as_memory_allows(monkeypatch):
    built = []

    class Counting(ScriptedRun):
        def batch(self, step):
            built.append(step)
            return super().batch(step)

    explored(Counting(rule_of(0.1)), [rate(0.1)])
    assert sorted(built) == list(range(10))
    built.clear()
    monkeypatch.setattr("diagnostics.counterfactual._CACHE_BYTES", 60)
    explored(Counting(rule_of(0.1)), [rate(0.1)])
    # Two of them fit.
    assert [built.count(step) > 1 for step in range(5)] == [False, False, True, True, True]


def test_progress_counts_the_replays_and_names_the_step():
    heard = []
    explored(
        ScriptedRun(rule_of(0.1)),
        [rate(0.1)],
        progress=lambda done, planned, label: heard.append((done, planned, label)),
    )
    assert heard[0] == (0, 2, f"{CONTROL.label}, step 0 of 9")
    assert all(done < planned for done, planned, _ in heard)
    assert any(label == "learning rate 0.1, step 9 of 9" for _, _, label in heard)
