"""A fix is a claim: replay with one thing changed and see whether it survives."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from diagnostics.diagnosis import Cause, Counterfactual, Recommendation
from diagnostics.protocol import Batch, Change, ReplayableRun, State

CONTROL = Change("none", None, "nothing changed (control)", rank=0)
# A finite loss may still be a dead run: this many times the loss of guessing.
RUNAWAY_LOSS = 10.0
# A stalled run has begun to learn once the loss is below this part of guessing.
_LEARNT = 0.97
_TAIL = 9  # steps whose median loss counts as the last loss
_BISECTIONS = 3
_MAX_CACHED_BATCHES = 64
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


@dataclass(frozen=True)
class Plan:
    """Where the replays begin and how far they go.

    Attributes:
      origin: the step whose state they start from.
      end: they run steps origin..end-1.
    """

    origin: int
    end: int


class Matrix:
    """All counterfactuals of one failure, within a time budget.

    Args:
      failing_step: the step that the guard refused.
      budget_seconds: no replay starts after that; the one under way is cut at a
        step. At least the control and one change are run.
      progress: called with (done, planned, label) before each replay.
      must_learn: a replay survives only if its loss leaves that of guessing.
    """

    def __init__(
        self,
        run: ReplayableRun,
        failing_step: int,
        budget_seconds: float,
        progress: Callable[[int, int, str], None] = lambda done, planned, label: None,
        must_learn: bool = False,
    ) -> None:
        self._run = run
        self._failing = failing_step
        self._deadline = time.monotonic() + budget_seconds
        self._budget = budget_seconds
        self._progress = progress
        self._must_learn = must_learn
        self._batches: dict[int, Batch] = {}
        self._captured_only = False
        self.results: list[Counterfactual] = []
        self.dropped: list[str] = []

    def explore(self, changes: Sequence[Change], plan: Plan) -> list[Counterfactual]:
        """Runs the control and every change; marks the smallest that survived.

        A run that must learn needs no control: the recorded steps are it.
        """
        planned = len(changes) + 1
        if not self._must_learn:
            self._try(CONTROL, plan, planned)
        for change in sorted(changes, key=lambda change: change.rank):
            if self.results and time.monotonic() > self._deadline:
                self.dropped.append(change.label)
                continue
            begin = Plan(0, plan.end) if change.from_start else plan
            self._try(change, begin, planned)
        self._largest_learning_rate(changes, plan)
        self._mark_minimal(changes)
        return self.results

    def replay(self, change: Change, plan: Plan) -> Counterfactual:
        """One replay: survived, how far it came, its last loss, and why it ended."""
        program = self._run.program(change)
        program.load(self._origin_state(change, plan))
        losses: list[float] = []
        note, ran = "", 0
        for step in range(plan.origin, plan.end):
            if losses and time.monotonic() > self._deadline + 0.5 * self._budget:
                note = "cut short by the budget"
                break
            outcome = program.run(self._batch(step), step)
            if not outcome.applied:
                where = outcome.failed[0].describe() if outcome.failed else "refused"
                note = f"step {step}: {where} not finite"
                break
            losses.append(float(outcome.telemetry["loss"]))
            ran += 1
            if self._must_learn and ran >= _TAIL and not self._runaway(losses):
                break  # it has begun to learn: more steps prove no more
        reached = self._must_learn or plan.origin + ran > self._failing
        runaway = self._runaway(losses)
        survived = not note and reached and not runaway
        program.release()
        return Counterfactual(
            change=change.label,
            kind=change.kind,
            value=change.value,
            survived=survived,
            steps=ran,
            first_step=plan.origin,
            loss=losses[-1] if losses else None,
            note="; ".join(filter(None, [note or runaway, self._data_note()])),
        )

    def _try(self, change: Change, plan: Plan, planned: int) -> Counterfactual:
        self._progress(len(self.results), planned, change.label)
        result = self.replay(change, plan)
        self.results.append(result)
        return result

    def _origin_state(self, change: Change, plan: Plan) -> State:
        if plan.origin == 0:
            return self._run.start_state(change)
        return self._run.state_before(plan.origin)

    def _batch(self, step: int) -> Batch:
        if step not in self._batches:
            batch = self._run.batch(step)
            if batch is None:
                self._captured_only = True
                batch = self._run.batch(self._failing)
                assert batch is not None, "an incident always holds its batch"
            if len(self._batches) >= _MAX_CACHED_BATCHES:
                return batch
            self._batches[step] = batch
        return self._batches[step]

    def _data_note(self) -> str:
        return "on the captured batch only" if self._captured_only else ""

    def _runaway(self, losses: Sequence[float]) -> str:
        """Why a finite run still counts as dead; '' if it does not."""
        if not losses:
            return "no step ran"
        chance = self._run.facts.chance_loss
        tail = statistics.median(losses[-_TAIL:])
        usual = chance if chance is not None else max(abs(losses[0]), 1e-3)
        if not math.isfinite(tail) or tail > RUNAWAY_LOSS * usual:
            return f"finite, but the loss stands at {tail:.3g}"
        if self._must_learn and tail > _LEARNT * usual:
            return f"does not learn: the loss stands at {tail:.4g}"
        return ""

    def _largest_learning_rate(self, changes: Iterable[Change], plan: Plan) -> None:
        """Bisects (in log scale) between the largest surviving rate and the next above."""
        rates = {r.value: r.survived for r in self.results if r.kind == "learning_rate"}
        alive = [rate for rate, survived in rates.items() if survived]
        full = self._run.facts.learning_rate
        if not alive or not full:
            return
        low = max(alive)
        high = min([rate for rate, survived in rates.items() if rate > low] + [full])
        for _ in range(_BISECTIONS):
            if time.monotonic() > self._deadline or high / low < 1.5:
                break
            middle = float(f"{math.sqrt(low * high):.2g}")
            change = Change("learning_rate", middle, f"learning rate {middle:g}", rank=3)
            if self._try(change, plan, len(self.results) + 1).survived:
                low = middle
            else:
                high = middle

    def _mark_minimal(self, changes: Sequence[Change]) -> None:
        """The surviving change of lowest rank; of learning rates the largest."""
        rank = {change.label: change.rank for change in changes}
        survivors = [r for r in self.results if r.survived and r.kind != "none"]
        if not survivors:
            return
        best = min(survivors, key=lambda r: (rank.get(r.change, 3), -_magnitude(r)))
        place = self.results.index(best)
        self.results[place] = dataclasses.replace(best, minimal=True)


def _magnitude(result: Counterfactual) -> float:
    return result.value if isinstance(result.value, float) else 0.0


def recommend(
    run: ReplayableRun, cause: Cause, results: Sequence[Counterfactual], changes: Sequence[Change]
) -> Recommendation | None:
    """The surviving change that answers the cause, as a command; None if none survived.

    `verified` only if this very change ran from step 0 past the failing step.
    """
    by_kind = ANSWERS.get(cause.kind, ())
    rank = {change.label: change.rank for change in changes}

    def order(result: Counterfactual) -> tuple[int, int, float]:
        place = by_kind.index(result.kind) if result.kind in by_kind else len(by_kind)
        return place, rank.get(result.change, 3), -_magnitude(result)

    survivors = sorted((r for r in results if r.survived and r.kind != "none"), key=order)
    for result in survivors:
        change = Change(result.kind, result.value, result.change)
        command = run.command(change)
        if command:
            whole = result.first_step == 0 and "captured" not in result.note
            ran = f"steps {result.first_step} to {result.first_step + result.steps - 1}"
            return Recommendation(
                command, whole, f"{result.change}: replayed {ran}, last loss {result.loss:.4g}"
            )
    return None
