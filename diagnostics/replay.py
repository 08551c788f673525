"""Run recorded steps again with the same compiled step, and compare bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diagnostics.errors import InputError, SnapshotDamaged
from diagnostics.protocol import Batch, Program, ReplayableRun, State, StepOutcome, Telemetry

OnStep = Callable[[int, StepOutcome], None]


def ignore_step(step: int, outcome: StepOutcome) -> None:
    """The default where nobody wants to hear of each replayed step."""


@dataclass(frozen=True)
class Reproduction:
    """What came of replaying one recorded step.

    Attributes:
      verdict: 'reproduced': it failed again, with the same bits; 'replay_differs':
        with other bits, or one of two replays was clean (or a recorded healthy step
        came out otherwise); 'not_reproduced': two clean replays of a recorded failure.
      outcome: of the (first failing) replay.
      differences: sentences, largest difference first; empty if bits are the same.
      recorded: whether there were recorded numbers to compare with.
    """

    verdict: str
    outcome: StepOutcome
    differences: tuple[str, ...]
    recorded: bool


def reproduce(
    run: ReplayableRun, program: Program, state: State, batch: Batch, step: int
) -> Reproduction:
    """Replays `step` from `state` on `batch` and compares it with the recording.

    Compared are the applied flag, which checks failed (for the incident's step)
    and every telemetry column, bit for bit; two NaN count as equal.
    """
    telemetry = run.telemetry()
    recorded = bool((telemetry.steps == step).any())
    incident = step == run.incident_step()
    then = ", ".join(check.describe() for check in run.recorded_failures()[:3]) or "its numbers"
    program.load(state)
    outcome = program.run(batch, step)
    found: tuple[str, ...] = ()
    if outcome.applied and (incident or failing_row(telemetry) == step):
        program.load(state)
        again = program.run(batch, step)
        if again.applied:
            said = f"recorded: {then} not finite; two replays of the same bits were clean"
            return Reproduction("not_reproduced", outcome, (said,), recorded)
        outcome = again
        found = ("of two replays of the same bits one was clean and one failed",)
    if incident and outcome.failed != run.recorded_failures():
        now = ", ".join(check.describe() for check in outcome.failed[:3]) or "none"
        found = (*found, f"failed checks: {then} when recorded, {now} now")
    found = (*found, *telemetry_differences(telemetry, step, outcome))
    return Reproduction("replay_differs" if found else "reproduced", outcome, found, recorded)


def failing_row(telemetry: Telemetry) -> int | None:
    """The last recorded step, if numbers stopped being finite there; else None.

    Tells a refused step whose incident is missing. Columns that were never finite
    say nothing.
    """
    if telemetry.steps.size == 0:
        return None
    finite = np.isfinite(telemetry.rows[-2:])
    if len(finite) == 2:
        fell = ~finite[-1] & finite[0]
    else:
        fell = ~finite[-1] & np.isin(telemetry.columns, ["loss", "grad_norm"])
    return int(telemetry.steps[-1]) if fell.any() else None


def telemetry_differences(telemetry: Telemetry, step: int, outcome: StepOutcome) -> tuple[str, ...]:
    """Columns whose recorded and replayed values differ in any bit, worst first."""
    rows = np.flatnonzero(telemetry.steps == step)
    if rows.size == 0:
        return ()
    recorded = telemetry.rows[rows[-1]].astype(np.float32)
    found: list[tuple[float, str]] = []
    for name, old in zip(telemetry.columns, recorded, strict=True):
        new = np.float32(outcome.telemetry.get(name, np.nan))
        if old.tobytes() == new.tobytes() or (np.isnan(old) and np.isnan(new)):
            continue
        relative = abs(float(new) - float(old)) / max(abs(float(old)), 1e-30)
        size = relative if math.isfinite(relative) else math.inf
        found.append((size, f"{name}: {old:.9g} when recorded, {new:.9g} now"))
    found.sort(key=lambda pair: -pair[0])
    return tuple(text for _, text in found)


def check_step(run: ReplayableRun, step: int) -> None:
    """Refuses a step that the run never came to.

    Raises:
      InputError: names the steps that there are.
    """
    recorded = run.telemetry().steps
    last = int(recorded[-1]) if recorded.size else run.state_steps()[-1]
    last = max(last, run.incident_step() or 0)
    if not 0 <= step <= last:
        raise InputError(f"step {step} is none of {run.name}", f"Its steps are 0 to {last}")


def nearest_state(run: ReplayableRun, at_most: int) -> tuple[int, State]:
    """The latest state not after a step, as (its step, state); passes over damaged ones.

    Raises:
      SnapshotDamaged: there is none, or none that can be read.
    """
    damage: SnapshotDamaged | None = None
    for step in reversed([known for known in run.state_steps() if known <= at_most]):
        try:
            return step, run.state_before(step)
        except SnapshotDamaged as error:
            damage = damage or error
    raise damage or SnapshotDamaged(f"{run.name} holds no state of step {at_most} or before")


def state_at(run: ReplayableRun, step: int, on_step: OnStep = ignore_step) -> State:
    """The exact state before `step`: the nearest earlier one, replayed forward.

    Args:
      on_step: told every replayed step, for progress and telemetry.

    Raises:
      InputError: a batch on the way is gone, or a replayed step was refused.
    """
    start, state = nearest_state(run, step)
    if start == step:
        return state
    program = run.program()
    program.load(state)
    for now in range(start, step):
        outcome = program.run(needed_batch(run, now), now)
        on_step(now, outcome)
        if not outcome.applied:
            raise InputError(
                f"the replay from step {start} towards step {step} stopped at step {now}: "
                f"{outcome.failed[0].describe()} is not finite",
                f"Diagnose that step: --step {now}",
            )
    state = program.state()
    program.release()
    return state


def needed_batch(run: ReplayableRun, step: int) -> Batch:
    """The batch of a step.

    Raises:
      InputError: the data is gone.
    """
    batch = run.batch(step)
    if batch is None:
        raise InputError(
            f"the batch of step {step} cannot be rebuilt: the data is gone or damaged",
            "Restore the data directory of the run",
        )
    return batch
