"""A fix is a claim: replay with one thing changed and see whether it survives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from diagnostics.diagnosis import Counterfactual
from diagnostics.errors import ToolError
from diagnostics.protocol import Batch, Change, Program, ReplayableRun, State
from diagnostics.replay import needed_batch
from diagnostics.survival import (
    bottomless,
    faint_signal,
    not_learning,
    only_slower,
    runaway,
)

CONTROL = Change("none", None, "nothing changed (control)", rank=0)
MARGIN = 3  # steps that a fix must outlast the failing step by, or its own warm-up
CUT_SHORT = "cut short by the budget"
_CAPTURED_ONLY = "on the captured batch only"
_STILL_WARMING = "the warm-up lasts longer than this replay"
_NEW_WEIGHTS = ("init", "init_scale")
_BISECTIONS = 3
_LOWER_RATES, _LOWER_FACTOR = 3, 30.0
_CACHE_BYTES = 256 * 1024**2  # of batches kept for the next replay

MatrixProgress = Callable[[int, int, str], None]


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
      failing_step: the step that the guard refused, or where the run ran away.
      budget_seconds: no replay starts after that; the one under way is cut at a
        step once half as much again is spent. At least one change is tried.
      step_seconds: of one compiled step, to judge what the budget allows.
      progress: called with (done, planned, label) before each step.
      must_learn: a replay survives only if its loss leaves that of guessing.
      clock: seconds.

    Attributes:
      results: in the order of the replays.
      changes: what was tried, by label.
      dropped: labels that the budget left no time for.
    """

    def __init__(
        self,
        run: ReplayableRun,
        failing_step: int,
        budget_seconds: float,
        step_seconds: float = 0.0,
        progress: MatrixProgress = lambda done, planned, label: None,
        must_learn: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._run = run
        self._failing = failing_step
        self._clock = clock or time.monotonic
        self._deadline = self._clock() + budget_seconds
        self._budget, self._step_seconds = budget_seconds, step_seconds
        self._progress = progress
        self._recorded = run.telemetry() if must_learn else None
        self._falls = bottomless(run.telemetry())
        self._batches: dict[int, Batch] = {}
        self._cached_bytes = 0
        self._captured_only = False
        self._planned = 0
        self.results: list[Counterfactual] = []
        self.changes: dict[str, Change] = {}
        self.dropped: list[str] = []

    def explore(self, changes: Sequence[Change], plan: Plan) -> list[Counterfactual]:
        """Runs the control and every change.

        Stops after a control that survives: then no change can be proven a fix. A run
        that must learn needs no control: the recorded steps are it.
        """
        self._planned = len(changes) + int(self._recorded is None)
        if self._recorded is None and self.attempt(CONTROL, plan).survived:
            return self.results
        least = len(self.results) + 1
        # Where the plan does not begin at step 0, a replay from there is dear.
        dear = plan.origin > 0
        for change in sorted(changes, key=lambda one: (dear and one.from_start, one.rank)):
            if len(self.results) >= least and self._clock() > self._deadline:
                self.dropped.append(change.label)
                continue
            self.attempt(change, Plan(0, plan.end) if change.from_start else plan)
        if self._recorded is None:  # a run that stands still needs no smaller rate
            self._largest_learning_rate(changes, plan)
        return self.results

    def attempt(self, change: Change, plan: Plan) -> Counterfactual:
        """One replay, added to the results."""
        self._planned = max(self._planned, len(self.results) + 1)
        self.changes[change.label] = change
        result = self._replay(change, plan)
        self.results.append(result)
        return result

    def affords(self, steps: int) -> bool:
        """Whether so many more steps end before a replay would be cut."""
        return steps * self._step_seconds <= self._cut_at() - self._clock()

    def _cut_at(self) -> float:
        return self._deadline + 0.5 * self._budget

    def _replay(self, change: Change, plan: Plan) -> Counterfactual:
        losses: list[float] = []
        shown: dict[str, float] = {}
        end, caveat = self._end(change, plan)
        try:
            program = self._run.program(change)
            program.load(self._origin_state(change, plan))
            note = self._run_steps(program, change, Plan(plan.origin, end), losses, shown)
            program.release()
        except ToolError as error:
            note = f"cannot be replayed: {error.message}"
        note = note or runaway(losses, self._run.facts) or self._idle(losses)
        note = note or (only_slower(change.kind, losses) if self._falls else "")
        reached = self._recorded is not None or plan.origin + len(losses) > self._failing
        caveats = [caveat, _CAPTURED_ONLY if self._captured_only else ""]
        if change.kind in _NEW_WEIGHTS:
            caveats.append(faint_signal(shown, self._run.facts))
        return Counterfactual(
            change=change.label,
            kind=change.kind,
            value=change.value,
            survived=not note and reached,
            steps=len(losses),
            first_step=plan.origin,
            loss=losses[-1] if losses else None,
            note="; ".join(filter(None, [note, *caveats])),
        )

    def _run_steps(
        self,
        program: Program,
        change: Change,
        plan: Plan,
        losses: list[float],
        shown: dict[str, float],
    ) -> str:
        """Appends each step's loss; returns why it ended early, or ''.

        Args:
          shown: becomes the telemetry of the last step that was applied.
        """
        for step in range(plan.origin, plan.end):
            if losses and self._clock() > self._cut_at():
                return CUT_SHORT
            where = f"{change.label}, step {step} of {plan.end - 1}"
            self._progress(len(self.results), self._planned, where)
            outcome = program.run(self._batch(step), step)
            if not outcome.applied:
                where = outcome.failed[0].describe() if outcome.failed else "something"
                return f"step {step}: {where} not finite"
            shown.update(outcome.telemetry)
            losses.append(float(outcome.telemetry["loss"]))
            if self._recorded is not None and not self._idle(losses):
                break  # it has begun to learn: more steps prove no more
        return ""

    def _idle(self, losses: Sequence[float]) -> str:
        """Why a replay that must learn does not; '' if it does or need not."""
        if self._recorded is None:
            return ""
        return not_learning(losses, self._run.facts, self._recorded)

    def _end(self, change: Change, plan: Plan) -> tuple[int, str]:
        """Where a replay ends, and a caveat: while a warm-up lasts, surviving proves little."""
        if change.kind != "warmup" or plan.end >= change.value + MARGIN:
            return plan.end, ""
        end = int(change.value) + MARGIN
        left = max(0.0, self._deadline - self._clock())
        if (end - plan.origin) * self._step_seconds > 0.25 * left:
            return plan.end, _STILL_WARMING
        return end, ""

    def _origin_state(self, change: Change, plan: Plan) -> State:
        if plan.origin == 0:
            return self._run.start_state(change)
        return self._run.state_before(plan.origin)

    def _batch(self, step: int) -> Batch:
        if step in self._batches:
            return self._batches[step]
        batch = self._run.batch(step)
        if batch is None:
            self._captured_only = True
            batch = needed_batch(self._run, self._failing)
        self._cached_bytes += sum(array.nbytes for array in batch.values())
        if self._cached_bytes <= _CACHE_BYTES:
            self._batches[step] = batch
        return batch

    def _largest_learning_rate(self, changes: Iterable[Change], plan: Plan) -> None:
        """Bisects (in log scale) between the largest surviving rate and the next above."""
        rates = {r.value: r.survived for r in self.results if r.kind == "learning_rate"}
        full = self._run.facts.learning_rate
        if not rates or not full:
            return
        rank = min(change.rank for change in changes if change.kind == "learning_rate")
        if not any(one.survived for one in self.results):
            self._lower_rates(rates, rank, plan)
        alive = [rate for rate, survived in rates.items() if survived]
        if not alive:
            return
        low = max(alive)
        high = min([rate for rate, survived in rates.items() if rate > low] + [full])
        for _ in range(_BISECTIONS):
            if self._clock() > self._deadline or high / low < 1.5:
                break
            middle = _neat(math.sqrt(low * high))
            if self._try_rate(middle, rank, plan):
                low = middle
            else:
                high = middle

    def _lower_rates(self, rates: dict[float, bool], rank: int, plan: Plan) -> None:
        """Where nothing at all survived: still smaller rates, until one does."""
        rate = min(rates)
        for _ in range(_LOWER_RATES):
            if self._clock() > self._deadline:
                break
            rate = _neat(rate / _LOWER_FACTOR)
            rates[rate] = self._try_rate(rate, rank, plan)
            if rates[rate]:
                break

    def _try_rate(self, rate: float, rank: int, plan: Plan) -> bool:
        change = Change("learning_rate", rate, f"learning rate {rate:g}", rank=rank)
        return self.attempt(change, plan).survived


def _neat(rate: float) -> float:
    """Two digits, as a person would type it."""
    return float(f"{rate:.2g}")
