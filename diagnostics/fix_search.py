"""The search for a fix: which replays the budget allows, in which order, and what they prove."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from diagnostics.counterfactual import CUT_SHORT, MARGIN, Matrix, Plan
from diagnostics.diagnosis import Cause, Counterfactual, Onset, Recommendation
from diagnostics.protocol import Change, ReplayableRun
from diagnostics.replay import nearest_state

# Causes and the kinds of change that answer them, best first.
ANSWERS = {
    "data": ("without_examples", "input_scale"),
    "labels": ("without_examples",),
    "init": ("init", "init_scale"),
    "learning_rate": ("learning_rate", "warmup", "clip_norm"),
    "loss_formula": ("loss_formula",),
    "precision": ("precision", "optimizer_epsilon"),
    "optimizer": ("optimizer_epsilon", "learning_rate", "clip_norm"),
    "architecture": ("init", "learning_rate", "clip_norm"),
}
_BARELY_ALIVE = 2.0  # times the loss of guessing: survived, but others are better advice
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
    recommendation = _confirmed(run, matrix, cause, plan, failing_step)
    marked = mark_minimal(matrix.results, matrix.changes)
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
    run: ReplayableRun, matrix: Matrix, cause: Cause, plan: Plan, failing_step: int
) -> Recommendation | None:
    """The best fix; replayed from step 0, where that was not done and the budget allows it.

    One that dies there makes way for the next best.
    """
    whole = Plan(0, failing_step + 1 + MARGIN)
    while True:
        best = best_fix(run, cause, matrix.results, matrix.changes)
        if best is None:
            return None
        proven = best.recommendation.verified or best.result.first_step == 0
        if proven or not matrix.affords(whole.end):
            return best.recommendation
        matrix.attempt(best.change, whole)


def mark_minimal(
    results: Sequence[Counterfactual], changes: Mapping[str, Change]
) -> list[Counterfactual]:
    """The results with the smallest surviving change marked; of learning rates the largest."""
    survivors = [one for one in _final(results) if one.survived and one.kind != "none"]
    if not survivors:
        return list(results)

    def order(one: Counterfactual) -> tuple[bool, int, float]:
        return bool(one.note), changes[one.change].rank, -_magnitude(one)

    best = min(survivors, key=order)
    return [dataclasses.replace(one, minimal=True) if one is best else one for one in results]


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
    """The surviving change that answers the cause best, as a command; None if none survived.

    `verified` only if this very change ran from step 0 past the failing step, on the
    run's own batches.
    """
    by_kind = ANSWERS.get(cause.kind, ())
    chance = run.facts.chance_loss

    def order(one: Counterfactual) -> tuple[int, bool, bool, int, float]:
        place = by_kind.index(one.kind) if one.kind in by_kind else len(by_kind)
        barely = chance is not None and (one.loss or 0.0) > _BARELY_ALIVE * chance
        return place, bool(one.note), barely, changes[one.change].rank, -_magnitude(one)

    survivors = [one for one in _final(results) if one.survived and one.kind != "none"]
    for one in sorted(survivors, key=order):
        change = changes[one.change]
        command = run.command(change)
        if command:
            verified = one.first_step == 0 and not one.note
            return Fix(change, one, Recommendation(command, verified, _tested(one)))
    return None


def _tested(one: Counterfactual) -> str:
    last = one.first_step + one.steps - 1
    caveat = f" ({one.note})" if one.note else ""
    return (
        f"{one.change}: replayed steps {one.first_step} to {last}, last loss {one.loss:.4g}{caveat}"
    )


def _final(results: Sequence[Counterfactual]) -> list[Counterfactual]:
    """The last word on each change: a replay from further back overrules one before it."""
    last = {one.change: one for one in results if not one.note.startswith(CUT_SHORT)}
    return list(last.values())


def _magnitude(result: Counterfactual) -> float:
    return result.value if isinstance(result.value, float) else 0.0
