"""From a stopped, diverged or stalled run to a tested fix: the order of the work."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from diagnostics.bisection import first_bad_step
from diagnostics.causes import Evidence, judge
from diagnostics.counterfactual import Matrix, Plan
from diagnostics.diagnosis import Cause, Diagnosis, FirstNonfinite, Onset
from diagnostics.errors import NothingToDiagnose
from diagnostics.examine import Progress, no_progress
from diagnostics.fix_search import Fixes, livelier_rates, plan_replays, search_fixes
from diagnostics.onset import find_onset
from diagnostics.protocol import (
    Batch,
    Change,
    Program,
    RepairsFormulas,
    ReplayableRun,
    RunFacts,
    State,
    StepOutcome,
    Telemetry,
)
from diagnostics.replay import (
    check_step,
    failing_row,
    needed_batch,
    reproduce,
    state_at,
    telemetry_differences,
)
from diagnostics.rewind import telemetry_until
from diagnostics.stall import detect_divergence, detect_stall, stall_signals
from diagnostics.survival import RUNAWAY_LOSS, usual_loss
from diagnostics.telemetry_view import scalar_column
from diagnostics.tensor_stats import TensorStats, describe
from diagnostics.trace import locate

DEFAULT_BUDGET = 180.0  # seconds for all counterfactuals together
_STALL_STEPS = 400  # that a fix may take to begin to learn
_LEAST_STEPS = 30
# Kinds of change that may set a stalled run in motion.
_WAKING = (
    "init",
    "init_scale",
    "input_scale",
    "constant_rate",
    "optimizer_setting",
    "activation",
    "batch_size",
)
# Arrays whose size says nothing about the health of a run.
_NO_TENSORS = ("schedule/", "counters/", "loss_scale/", "optimizer/learning_rate", "example_ids")


def diagnose(
    run: ReplayableRun,
    *,
    step: int | None = None,
    budget_seconds: float = DEFAULT_BUDGET,
    progress: Progress = no_progress,
    on_telemetry: Callable[[Telemetry], None] = lambda telemetry: None,
) -> Diagnosis:
    """Replays, locates, dates, explains, and tests fixes.

    Args:
      step: diagnose this step; default: the incident's, or the last recorded one
        of a run that diverged or stalled.
      budget_seconds: for the counterfactual replays; 0 runs none.
      progress: called with (what, done, total); total 0 where it is not known.
      on_telemetry: told the telemetry that the onset was looked for in: the
        recorded one, or a replayed one where it is missing.

    Raises:
      NothingToDiagnose: there is no incident and the recorded run is healthy, or
        the step asked for is healthy.
      InputError: the run has no such step, or its state or batch cannot be had.
    """
    if step is not None:
        check_step(run, step)
    target = _failing_step(run, progress) if step is None else step
    session = _Session(run, target, budget_seconds, progress, on_telemetry)
    return session.finite_trouble() if target is None else session.failure()


def _failing_step(run: ReplayableRun, progress: Progress) -> int | None:
    """The incident's step; without an incident the step whose numbers stopped being finite."""
    telemetry, incident = run.telemetry(), run.incident_step()
    if incident is not None:
        return incident
    if telemetry.steps.size:
        return failing_row(telemetry)
    # It may have failed on its way to the next state that it would have stored.
    *_, before, last = (0, *run.state_steps())
    end = last + last - before
    return first_bad_step(run, end, lambda now, _: progress("searching", now, end))


class _Session:
    """One diagnosis; keeps what its stages share."""

    def __init__(
        self,
        run: ReplayableRun,
        step: int | None,
        budget_seconds: float,
        progress: Progress,
        on_telemetry: Callable[[Telemetry], None],
    ) -> None:
        self._run = run
        self._step = 0 if step is None else step
        self._budget, self._progress = budget_seconds, progress
        self._on_telemetry = on_telemetry
        self._seconds: dict[str, float] = {}
        self._notes: list[str] = []

    def failure(self) -> Diagnosis:
        """The diagnosis of a step that the guard refused (or that was asked for)."""
        run, step = self._run, self._step
        with self._timed("state and batch"):
            state = state_at(run, step, self._rewinding)
            batch = needed_batch(run, step)
        with self._timed("replay"):
            program = run.program()
            found = reproduce(run, program, state, batch, step)
        recurred = found.verdict != "not_reproduced"
        if found.outcome.applied and recurred:
            raise NothingToDiagnose(f"step {step} of {run.name} is healthy")
        self._notes += found.differences[:5]
        with self._timed("location"):
            place = locate(run, program, state, batch, step, found.outcome) if recurred else None
        with self._timed("onset"):
            telemetry = self._telemetry_until_failure()
            onset = find_onset(telemetry, run.facts)
        evidence = self._evidence(
            found.verdict, place, onset, telemetry, found.outcome, state, batch
        )
        if not recurred:
            fixes = Fixes(self._passed_over(judge(evidence)), (), None, ())
        else:
            seconds = _time_of_step(program, state, batch, step)
            program.release()
            fixes = self._tested_fixes(evidence, seconds)
        return self._diagnosis(evidence, fixes)

    def finite_trouble(self) -> Diagnosis:
        """The diagnosis of a run that is finite but runs away or does not learn.

        Raises:
          NothingToDiagnose: it does neither.
        """
        run = self._run
        telemetry = run.telemetry()
        verdict, reason = self._unhealthy(telemetry)
        self._step = int(telemetry.steps[-1])
        self._on_telemetry(telemetry)
        self._notes.append(reason)
        with self._timed("replay"):
            state, batch = run.start_state(), run.batch(0)
            program = run.program()
            outcome, seconds = None, 0.0
            if batch is not None:
                program.load(state)
                outcome = program.run(batch, 0)
                seconds = _time_of_step(program, state, batch, 0)
                self._notes += telemetry_differences(telemetry, 0, outcome)[:3]
            program.release()
        onset = find_onset(telemetry, run.facts)
        evidence = self._evidence(verdict, None, onset, telemetry, outcome, state, batch or {})
        if batch is None:
            self._notes.append("without the data no change can be replayed")
            return self._diagnosis(evidence, Fixes(judge(evidence), (), None, ()))
        return self._diagnosis(evidence, self._tested_fixes(evidence, seconds))

    def _unhealthy(self, telemetry: Telemetry) -> tuple[str, str]:
        """(verdict, reason) of a finite run in trouble."""
        for verdict, detect in (("diverged", detect_divergence), ("stalled", detect_stall)):
            reason = detect(telemetry, self._run.facts)
            if reason is not None:
                return verdict, reason
        what = "its recorded steps are" if telemetry.steps.size else "what it stored is"
        raise NothingToDiagnose(
            f"{self._run.name} left no incident, and {what} healthy",
            "Use --step N to look at one step",
        )

    def _rewinding(self, now: int, _: StepOutcome) -> None:
        self._progress("rewinding", now, self._step)

    def _telemetry_until_failure(self) -> Telemetry:
        rewound = telemetry_until(self._run, self._step, self._rewinding)
        self._notes += [rewound.note] if rewound.note else []
        self._on_telemetry(rewound.telemetry)
        return rewound.telemetry

    def _passed_over(self, cause: Cause) -> Cause:
        """The cause of a failure that did not recur; unsure if the replay ran on something else."""
        conditions = self._run.conditions()
        if not conditions:
            return cause
        caveat = f"Or it needs the conditions of the recording, which differ: {conditions[0]}"
        return Cause(cause.kind, min(cause.confidence, 0.5), (*cause.evidence, caveat))

    def _evidence(
        self,
        verdict: str,
        place: FirstNonfinite | None,
        onset: Onset | None,
        telemetry: Telemetry,
        outcome: StepOutcome | None,
        state: State,
        batch: Batch,
    ) -> Evidence:
        with self._timed("statistics"):
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
                label_range=_range(batch.get("labels")),
                counterfactuals=(),
            )

    def _tested_fixes(self, evidence: Evidence, step_seconds: float) -> Fixes:
        """The cause, and the changes that were replayed within the budget."""
        if not self._budget:
            return Fixes(judge(evidence), (), None, ())
        changes = self._changes(evidence)
        affordable = self._budget / (len(changes) + 1) / max(step_seconds, 1e-4)
        stalled = evidence.verdict == "stalled"
        if stalled:
            failing = self._step
            plan = Plan(0, int(min(_STALL_STEPS, max(affordable, _LEAST_STEPS))))
        else:
            failing = _dead_from(evidence)
            plan = plan_replays(self._run, failing, evidence.onset, affordable)
        matrix = Matrix(
            self._run,
            failing,
            self._budget,
            step_seconds,
            lambda done, planned, label: self._progress(f"replaying: {label}", done, planned),
            must_learn=stalled,
        )
        with self._timed("counterfactuals"):
            return search_fixes(
                self._run,
                matrix,
                changes,
                plan,
                failing,
                lambda tried: judge(dataclasses.replace(evidence, counterfactuals=tuple(tried))),
            )

    def _changes(self, evidence: Evidence) -> list[Change]:
        place = evidence.first_nonfinite
        changes = list(self._run.changes(self._step, place.examples if place else ()))
        if place is not None and isinstance(self._run, RepairsFormulas):
            changes += self._run.formula_changes(place)
        rate = self._run.facts.learning_rate
        if evidence.verdict == "stalled":
            died = stall_signals(evidence.telemetry, self._run.facts).dead_since
            kinds = (*_WAKING, "learning_rate", "clip_norm") if died else _WAKING
            changes = [c for c in changes if c.kind in kinds]
            for larger in livelier_rates(rate or 0.0, evidence.telemetry, self._run.facts):
                label = f"learning rate {larger:g}"
                changes.append(Change("learning_rate", larger, label, rank=3))
        return changes

    def _diagnosis(self, evidence: Evidence, fixes: Fixes) -> Diagnosis:
        return Diagnosis(
            run_dir=self._run.name,
            step=self._step,
            verdict=evidence.verdict,
            first_nonfinite=evidence.first_nonfinite,
            onset=evidence.onset,
            cause=_with_note(fixes.cause, self._run.facts),
            counterfactuals=fixes.results,
            recommendation=fixes.recommendation,
            # Last, because reading damaged checkpoints adds to the conditions.
            notes=(*self._run.conditions(), *self._notes, *fixes.notes),
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


def _dead_from(evidence: Evidence) -> int:
    """The step that a fix must outlast: the refused one, or where the loss ran away for good."""
    loss = scalar_column(evidence.telemetry, "loss")
    if evidence.verdict != "diverged" or loss is None:
        return evidence.step
    usual = usual_loss(float(loss[0]), evidence.facts)
    alive = np.flatnonzero(np.abs(loss) <= RUNAWAY_LOSS * usual)
    row = int(alive[-1]) + 1 if alive.size else 0
    return int(evidence.telemetry.steps[min(row, loss.size - 1)])


def _time_of_step(program: Program, state: State, batch: Batch, step: int) -> float:
    """Seconds of one step that is already compiled."""
    program.load(state)
    started = time.monotonic()
    program.run(batch, step)
    return time.monotonic() - started


def _statistics(arrays: Mapping[str, np.ndarray]) -> dict[str, TensorStats]:
    return {
        name: describe(array)
        for name, array in arrays.items()
        if array.size and not name.startswith(_NO_TENSORS)
    }


def _range(labels: np.ndarray | None) -> tuple[float, float] | None:
    return None if labels is None else (float(np.min(labels)), float(np.max(labels)))
