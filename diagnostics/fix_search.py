"""The search for a fix: which replays the budget allows, in which order, and what they prove."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from diagnostics.counterfactual import CONTROL, CUT_SHORT, MARGIN, Matrix, Plan
from diagnostics.diagnosis import Cause, Counterfactual, Onset, Recommendation
from diagnostics.protocol import Change, ReplayableRun, RunFacts, Telemetry
from diagnostics.replay import nearest_state
from diagnostics.stall import IDLE_UPDATE, stall_signals

# Causes and the kinds of change that answer them, best first.
ANSWERS = {
    "data": (
        "without_examples",
        "known_indices",
        "finite_statistics",
        "example_weights",
        "valid_examples",
        "usual_examples",
        "finite_inputs",
        "input_scale",
        "target_scale",
    ),
    "labels": ("without_examples", "shift_labels", "label_span", "valid_examples", "target_scale"),
    "init": ("zero_weights", "init", "init_scale"),
    "weights": ("finite_statistics", "init"),
    "learning_rate": ("learning_rate", "constant_rate", "warmup", "clip_norm"),
    "loss_formula": (
        "loss_weights",
        "example_weights",
        "loss_formula",
        "domain",
        "regulariser",
    ),
    "precision": ("precision", "optimizer_epsilon", "domain"),
    "optimizer": ("optimizer_setting", "optimizer_epsilon", "learning_rate", "clip_norm"),
    "architecture": (
        "zero_weights",
        "layer_epsilon",
        "layer_setting",
        "layer_scale",
        "batch_size",
        "domain",
        "activation",
        "init",
        "learning_rate",
        "clip_norm",
    ),
}
_BARELY_ALIVE = 2.0  # times the loss of guessing: survived, but others are better advice
_USUAL_UPDATE = 1e-3  # of the size of the weights
_USUAL_MARGIN = 8  # steps beyond the failing one, or as many again as it took


class Fixes(NamedTuple):
    """What the counterfactual replays showed.

    Attributes:
      cause: as judged with them.
      notes: sentences on what they do not prove.
    """

    cause: Cause
    results: tuple[Counterfactual, ...]
    recommendation: Recommendation | None
    notes: tuple[str, ...]


def plan_replays(
    run: ReplayableRun, step: int, onset: Onset | None, affordable_steps: float
) -> Plan:
    """From step 0 if the budget allows; else from a state before the onset.

    Args:
      step: the failing one.
      affordable_steps: of each replay.
    """
    before = onset.step if onset is not None else step
    origin = 0
    if step + 1 + MARGIN > affordable_steps:
        origin = nearest_state(run, min(before, step))[0]
    margin = min(max(_USUAL_MARGIN, step), affordable_steps - (step + 1 - origin))
    return Plan(origin, step + 1 + max(MARGIN, int(margin)))


def livelier_rates(rate: float, telemetry: Telemetry, facts: RunFacts) -> list[float]:
    """Larger rates that may set a stalled run in motion: ten times, and what moves weights usually.

    Args:
      rate: the one it ran with; with 0 there is nothing to multiply.
    """
    found = [10.0 * rate] if rate > 0 else []
    moved = stall_signals(telemetry, facts).update_ratio
    if found and moved and moved < IDLE_UPDATE:
        found += [rate * _USUAL_UPDATE / moved, 10.0 * rate * _USUAL_UPDATE / moved]
    return [float(f"{value:.2g}") for value in found]


def search_fixes(
    run: ReplayableRun,
    matrix: Matrix,
    changes: Sequence[Change],
    plan: Plan,
    failing_step: int,
    judge_with: Callable[[Sequence[Counterfactual]], Cause],
) -> Fixes:
    """Explores the changes, judges the cause with what they show, and confirms the best fix.

    Args:
      judge_with: the cause, given the results.
    """
    results = matrix.explore(changes, plan)
    cause = judge_with(results)
    notes = []
    if matrix.dropped:
        notes.append(f"the budget ended before: {', '.join(matrix.dropped)}")
    control = results[0] if results and results[0].kind == "none" else None
    if control is not None:
        notes += _on_control(control, plan, failing_step)
    recommendation = _confirmed(run, matrix, cause, failing_step)
    last = matrix.results[-1] if matrix.results else None
    if last is not None and last.kind == "none" and last is not control and last.survived:
        notes += _on_control(last, _whole(failing_step), failing_step)
        cause = judge_with(matrix.results)
    smallest = _survivors(run, cause, matrix.results, matrix.changes)[:1]
    marked = [
        dataclasses.replace(one, minimal=True) if one in smallest else one for one in matrix.results
    ]
    return Fixes(cause, tuple(marked), recommendation, tuple(notes))


def _on_control(control: Counterfactual, plan: Plan, failing_step: int) -> list[str]:
    """What must be said of the control, if it did not simply fail where the run did."""
    if control.survived:
        return [
            f"the control survived from step {plan.origin} on: the failure does not "
            "follow from these states alone, so no replay proves a fix"
        ]
    if control.note.startswith(CUT_SHORT):
        return [
            f"the budget ended before the control came to step {failing_step} again: "
            "no replay proves a fix (a longer --budget-seconds may)"
        ]
    came_to = control.first_step + control.steps
    if came_to < plan.end and came_to != failing_step:
        return [
            f"the control failed at step {came_to}, the recorded run at step {failing_step}: "
            "the replays are like the run, not the same"
        ]
    return []


def _confirmed(
    run: ReplayableRun, matrix: Matrix, cause: Cause, failing_step: int
) -> Recommendation | None:
    """The best fix, with what its proof lacks made up for where the budget allows it.

    It lacks its own replay from step 0, or that of the control: where the state was
    damaged from outside, every change survives from there, and so does none at all. A
    fix that dies on its way makes way for the next best.
    """
    whole = _whole(failing_step)
    while True:
        best = best_fix(run, cause, matrix.results, matrix.changes)
        if best is None or best.recommendation.verified:
            return None if best is None else best.recommendation
        lacking = best.change if best.result.first_step > 0 else CONTROL
        useless = lacking is CONTROL and (best.result.note or _control_died(matrix.results))
        if useless or not matrix.affords(whole.end):
            return best.recommendation
        replayed = matrix.attempt(lacking, whole)
        if lacking is CONTROL and replayed.survived:
            return None
        if lacking is CONTROL and replayed.note.startswith(CUT_SHORT):
            return best.recommendation


def _whole(failing_step: int) -> Plan:
    return Plan(0, failing_step + 1 + MARGIN)


def _control_died(results: Sequence[Counterfactual]) -> bool:
    """Whether without any change the run fails from step 0 on too.

    A run that must learn has no control: its recorded steps are it.
    """
    controls = [one for one in results if one.kind == "none"]
    whole = [one for one in controls if one.first_step == 0 and CUT_SHORT not in one.note]
    return not controls or (bool(whole) and not whole[-1].survived)


class Fix(NamedTuple):
    """A change that survived, its last replay, and how to make it."""

    change: Change
    result: Counterfactual
    recommendation: Recommendation


def best_fix(
    run: ReplayableRun,
    cause: Cause,
    results: Sequence[Counterfactual],
    changes: Mapping[str, Change],
) -> Fix | None:
    """The best surviving change that a command makes; None if there is none.

    `verified` only if this very change ran from step 0 past the failing step, on the
    run's own batches, and without it the run fails from there too.
    """
    for one in _survivors(run, cause, results, changes):
        change = changes[one.change]
        command = run.command(change)
        if command:
            verified = one.first_step == 0 and not one.note and _control_died(results)
            return Fix(change, one, Recommendation(command, verified, _tested(one)))
    return None


def _survivors(
    run: ReplayableRun,
    cause: Cause,
    results: Sequence[Counterfactual],
    changes: Mapping[str, Change],
) -> list[Counterfactual]:
    """Best first: those that answer the cause, then the smallest; of rates the largest.

    The last word on a change is its latest replay that was not cut short: one from
    further back overrules one before it.
    """
    by_kind = ANSWERS.get(cause.kind, ())
    chance = run.facts.chance_loss

    def order(one: Counterfactual) -> tuple[int, bool, bool, int, float]:
        place = by_kind.index(one.kind) if one.kind in by_kind else len(by_kind)
        barely = chance is not None and (one.loss or 0.0) > _BARELY_ALIVE * chance
        value = one.value if isinstance(one.value, float) else 0.0
        return place, bool(one.note), barely, changes[one.change].rank, -value

    last = {one.change: one for one in results if not one.note.startswith(CUT_SHORT)}
    alive = [one for one in last.values() if one.survived and one.kind != "none"]
    return sorted(alive, key=order)


def _tested(one: Counterfactual) -> str:
    last = one.first_step + one.steps - 1
    caveat = f" ({one.note})" if one.note else ""
    return (
        f"{one.change}: replayed steps {one.first_step} to {last}, last loss {one.loss:.4g}{caveat}"
    )
