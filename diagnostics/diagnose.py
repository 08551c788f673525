"""From a stopped, diverged or stalled run to a tested fix: the order of the work."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from diagnostics.causes import Evidence, judge
from diagnostics.counterfactual import Matrix, Plan, recommend
from diagnostics.diagnosis import Cause, Counterfactual, Diagnosis, FirstNonfinite, Onset
from diagnostics.errors import NothingToDiagnose
from diagnostics.examine import Progress, no_progress
from diagnostics.onset import find_onset
from diagnostics.protocol import (
    Batch,
    Change,
    Program,
    ReplayableRun,
    RunFacts,
    State,
    StepOutcome,
    Telemetry,
)
from diagnostics.replay import (
    needed_batch,
    replay_telemetry,
    reproduce,
    state_at,
    telemetry_differences,
)
from diagnostics.stall import detect_divergence, detect_stall
from diagnostics.tensor_stats import TensorStats, describe
from diagnostics.trace import locate

DEFAULT_BUDGET = 180.0  # seconds for all counterfactuals together
_MIN_MARGIN = 3  # steps that a fix must outlast the failing step by
_USUAL_MARGIN = 8
_STALL_STEPS = 400  # that a fix may take to begin to learn


def diagnose(
    run: ReplayableRun,
    *,
    step: int | None = None,
    budget_seconds: float = DEFAULT_BUDGET,
    progress: Progress = no_progress,
) -> Diagnosis:
    """Replays, locates, dates, explains, and tests fixes.

    Args:
      step: diagnose this step; default: the incident's, or the last recorded one
        of a run that diverged or stalled.
      budget_seconds: for the counterfactual replays; 0 runs none.
      progress: called with (what, done, total); total 0 where it is not known.

    Raises:
      NothingToDiagnose: there is no incident and the recorded run is healthy, or
        the step asked for is healthy.
      InputError: the state or batch of the step cannot be had.
    """
    target = run.incident_step() if step is None else step
    if target is None:
        return _unhealthy_without_incident(run, budget_seconds, progress)
    return _Session(run, target, budget_seconds, progress).failure()


def _unhealthy_without_incident(
    run: ReplayableRun, budget_seconds: float, progress: Progress
) -> Diagnosis:
    telemetry = run.telemetry()
    for verdict, detect in (("diverged", detect_divergence), ("stalled", detect_stall)):
        reason = detect(telemetry, run.facts)
        if reason is not None:
            last = int(telemetry.steps[-1])
            session = _Session(run, last, budget_seconds, progress)
            return session.finite_trouble(verdict, str(reason))
    raise NothingToDiagnose(
        f"{run.name} left no incident, and its recorded steps are healthy",
        "Use --step N to look at one step",
    )


class _Session:
    """One diagnosis; keeps what its stages share."""

    def __init__(
        self, run: ReplayableRun, step: int, budget_seconds: float, progress: Progress
    ) -> None:
        self._run, self._step = run, step
        self._budget, self._progress = budget_seconds, progress
        self._seconds: dict[str, float] = {}
        self._notes: list[str] = list(run.conditions())

    def failure(self) -> Diagnosis:
        """The diagnosis of a step that the guard refused (or that was asked for)."""
        run, step = self._run, self._step
        with self._timed("state and batch"):
            state = state_at(run, step, lambda now, _: self._progress("rewinding", now, step))
            batch = needed_batch(run, step)
        with self._timed("replay"):
            program = run.program()
            found = reproduce(run, program, state, batch, step)
        if found.outcome.applied and step != run.incident_step():
            raise NothingToDiagnose(f"step {step} of {run.name} is healthy")
        self._notes += found.differences[:5]
        with self._timed("location"):
            place = None
            if not found.outcome.applied:
                place = locate(run, program, state, batch, step, found.outcome)
        with self._timed("onset"):
            telemetry = self._telemetry()
            onset = find_onset(telemetry, run.facts)
        evidence = self._evidence(
            found.verdict, place, onset, telemetry, found.outcome, state, batch
        )
        with self._timed("cause"):
            cause = judge(evidence)
        if found.verdict == "not_reproduced":
            return self._diagnosis("not_reproduced", place, onset, cause)
        with self._timed("counterfactuals"):
            step_seconds = _time_of_step(program, batch, step)
            program.release()
            results, changes = self._counterfactuals(place, onset, step_seconds, cause)
            cause = judge(dataclasses.replace(evidence, counterfactuals=tuple(results)))
        return self._diagnosis(found.verdict, place, onset, cause, results, changes)

    def finite_trouble(self, verdict: str, reason: str) -> Diagnosis:
        """The diagnosis of a run that is finite but runs away or does not learn."""
        run = self._run
        telemetry = run.telemetry()
        onset = find_onset(telemetry, run.facts)
        first = int(telemetry.steps[0])
        state, batch = run.start_state(), needed_batch(run, first)
        program = run.program()
        program.load(state)
        outcome = program.run(batch, first)
        self._notes.append(reason)
        self._notes += telemetry_differences(telemetry, first, outcome)[:3]
        evidence = self._evidence(verdict, None, onset, telemetry, outcome, state, batch)
        with self._timed("counterfactuals"):
            step_seconds = _time_of_step(program, batch, first)
            program.release()
            changes = self._finite_changes(verdict)
            room = self._budget / (len(changes) + 1) / max(step_seconds, 1e-4)
            stalled = verdict == "stalled"
            steps = int(min(_STALL_STEPS if stalled else len(telemetry.steps), max(room, 10)))
            matrix = self._matrix(must_learn=stalled)
            results = matrix.explore(changes, Plan(0, steps)) if self._budget else []
        cause = judge(dataclasses.replace(evidence, counterfactuals=tuple(results)))
        return self._diagnosis(verdict, None, onset, cause, results, changes)

    def _finite_changes(self, verdict: str) -> list[Change]:
        rate = self._run.facts.learning_rate
        changes = list(self._run.changes(self._step, ()))
        if verdict == "stalled":
            changes = [c for c in changes if c.kind in ("init", "init_scale", "input_scale")]
            if rate:
                label = f"learning rate {rate * 10:g}"
                changes.append(Change("learning_rate", rate * 10, label, rank=3))
        return changes

    def _telemetry(self) -> Telemetry:
        """The recording; where it is missing, replayed from the nearest earlier state."""
        recorded = self._run.telemetry()
        if recorded.steps.size:
            return recorded
        start = max(s for s in self._run.state_steps() if s <= self._step)
        if start == self._step and self._step > 0:
            earlier = [s for s in self._run.state_steps() if s < self._step]
            start = earlier[-1] if earlier else start
        self._notes.append(f"no telemetry was recorded; replayed from step {start}")
        return replay_telemetry(self._run, start, self._step + 1)

    def _evidence(
        self,
        verdict: str,
        place: FirstNonfinite | None,
        onset: Onset | None,
        telemetry: Telemetry,
        outcome: StepOutcome,
        state: State,
        batch: Batch,
    ) -> Evidence:
        with self._timed("statistics"):
            labels = batch.get("labels")
            return Evidence(
                facts=self._run.facts,
                verdict=verdict,
                step=self._step,
                first_nonfinite=place,
                onset=onset,
                telemetry=telemetry,
                outcome=outcome,
                weight_stats=_statistics(state),
                initial_weight_stats=_statistics(self._run.start_state()),
                batch_stats=_statistics(batch),
                label_range=_range(labels),
                counterfactuals=(),
            )

    def _counterfactuals(
        self,
        place: FirstNonfinite | None,
        onset: Onset | None,
        step_seconds: float,
        cause: Cause,
    ) -> tuple[list[Counterfactual], list[Change]]:
        if not self._budget:
            return [], []
        suspects = place.examples if place is not None else ()
        changes = list(self._run.changes(self._step, suspects))
        plan = self._plan(len(changes) + 1, step_seconds, onset)
        matrix = self._matrix()
        results = matrix.explore(changes, plan)
        if matrix.dropped:
            self._notes.append(f"the budget ended before: {', '.join(matrix.dropped)}")
        if results[0].survived:
            self._notes.append(
                f"the control survived from step {plan.origin} on: the failure does not "
                "follow from these states alone, so no replay proves a fix"
            )
            return results[:1], []
        best = recommend(self._run, cause, results, changes)
        if best is not None and not best.verified and plan.origin > 0:
            results = self._confirm_from_start(matrix, results, changes, cause, step_seconds)
        return results, changes

    def _confirm_from_start(
        self,
        matrix: Matrix,
        results: list[Counterfactual],
        changes: Sequence[Change],
        cause: Cause,
        step_seconds: float,
    ) -> list[Counterfactual]:
        """Replays the best change from step 0, if the budget's half again allows it."""
        end = self._step + 1 + _MIN_MARGIN
        if end * step_seconds > 0.5 * self._budget:
            return results
        best = recommend(self._run, cause, results, changes)
        if best is None:
            return results
        for result in results:
            if result.survived and best.sentence.startswith(result.change):
                change = Change(result.kind, result.value, result.change, rank=0)
                results.append(matrix.replay(change, Plan(0, end)))
                break
        return results

    def _plan(self, replays: int, step_seconds: float, onset: Onset | None) -> Plan:
        """From step 0 if the budget allows; else from a state before the onset."""
        room = self._budget / replays / max(step_seconds, 1e-4)
        begun = [s for s in self._run.state_steps() if s <= self._step]
        before = onset.step if onset is not None else self._step
        affordable = [s for s in begun if self._step + 1 + _MIN_MARGIN - s <= room]
        origin = 0 if 0 in affordable else max([s for s in begun if s <= before], default=begun[-1])
        margin = min(max(_USUAL_MARGIN, self._step), room - (self._step + 1 - origin))
        return Plan(origin, self._step + 1 + max(_MIN_MARGIN, int(margin)))

    def _matrix(self, must_learn: bool = False) -> Matrix:
        return Matrix(
            self._run,
            self._step,
            self._budget,
            lambda done, planned, label: self._progress(f"replaying: {label}", done, planned),
            must_learn=must_learn,
        )

    def _diagnosis(
        self,
        verdict: str,
        place: FirstNonfinite | None,
        onset: Onset | None,
        cause: Cause,
        results: Sequence[Counterfactual] = (),
        changes: Sequence[Change] = (),
    ) -> Diagnosis:
        return Diagnosis(
            run_dir=self._run.name,
            step=self._step,
            verdict=verdict,
            first_nonfinite=place,
            onset=onset,
            cause=_with_note(cause, self._run.facts),
            counterfactuals=tuple(results),
            recommendation=recommend(self._run, cause, results, changes) if results else None,
            notes=tuple(self._notes),
            environment=self._run.environment(),
            seconds=self._seconds,
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        self._progress(stage, 0, 0)
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self._seconds[stage] = round(self._seconds.get(stage, 0.0) + spent, 3)


def _with_note(cause: Cause, facts: RunFacts) -> Cause:
    """Where the initialiser is to blame, what is known of it comes second, after the proof."""
    if cause.kind != "init" or not facts.init_note:
        return cause
    first, *rest = cause.evidence
    return dataclasses.replace(cause, evidence=(first, facts.init_note, *rest))


def _time_of_step(program: Program, batch: Batch, step: int) -> float:
    """Seconds of one step that is already compiled."""
    started = time.monotonic()
    program.run(batch, step)
    return time.monotonic() - started


def _statistics(arrays: dict[str, np.ndarray]) -> dict[str, TensorStats]:
    return {
        name: describe(array)
        for name, array in arrays.items()
        if array.size and not name.startswith(("schedule/", "counters/", "example_ids"))
    }


def _range(labels: np.ndarray | None) -> tuple[float, float] | None:
    return None if labels is None else (float(np.min(labels)), float(np.max(labels)))
