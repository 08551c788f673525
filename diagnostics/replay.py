"""Run recorded steps again with the same compiled step, and compare bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diagnostics.errors import InputError
from diagnostics.protocol import Batch, Program, ReplayableRun, State, StepOutcome, Telemetry


@dataclass(frozen=True)
class Reproduction:
    """What came of replaying one recorded step.

    Attributes:
      verdict: 'reproduced': it failed again, with the same bits; 'replay_differs':
        with other bits (or a recorded healthy step came out otherwise);
        'not_reproduced': two clean replays of a recorded failure.
      outcome: of the (first) replay.
      differences: sentences, largest difference first; empty if bits are the same.
    """

    verdict: str
    outcome: StepOutcome
    differences: tuple[str, ...]


def reproduce(
    run: ReplayableRun, program: Program, state: State, batch: Batch, step: int
) -> Reproduction:
    """Replays `step` from `state` on `batch` and compares it with the recording.

    Compared are the applied flag, which checks failed (for the incident's step)
    and every telemetry column, bit for bit; two NaN count as equal.
    """
    program.load(state)
    outcome = program.run(batch, step)
    recorded_failed = step == run.incident_step()
    if recorded_failed and outcome.applied:
        program.load(state)
        again = program.run(batch, step)
        if again.applied:
            said = ", ".join(check.describe() for check in run.recorded_failures()[:3])
            return Reproduction(
                "not_reproduced",
                outcome,
                (f"recorded: {said} not finite; two replays of the same bits were clean",),
            )
        outcome = again
    found = telemetry_differences(run.telemetry(), step, outcome)
    if recorded_failed and outcome.failed != run.recorded_failures():
        now = ", ".join(check.describe() for check in outcome.failed[:3]) or "none"
        then = ", ".join(check.describe() for check in run.recorded_failures()[:3])
        found = (f"failed checks: {then} when recorded, {now} now", *found)
    return Reproduction("replay_differs" if found else "reproduced", outcome, found)


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
        found.append((relative, f"{name}: {old:.9g} when recorded, {new:.9g} now"))
    found.sort(key=lambda pair: -pair[0])
    return tuple(text for _, text in found)


def state_at(
    run: ReplayableRun,
    step: int,
    on_step: Callable[[int, StepOutcome], None] = lambda step, outcome: None,
) -> State:
    """The exact state before `step`: the nearest earlier one, replayed forward.

    Args:
      on_step: told every replayed step, for progress and telemetry.

    Raises:
      InputError: a batch on the way is gone, or a replayed step was refused.
    """
    start = max(known for known in run.state_steps() if known <= step)
    state = run.state_before(start)
    if start == step:
        return state
    program = run.program()
    program.load(state)
    for now in range(start, step):
        outcome = program.run(needed_batch(run, now), now)
        on_step(now, outcome)
        if not outcome.applied:
            raise InputError(
                f"the replay stopped at step {now}: {outcome.failed[0].describe()} is not finite",
                f"Diagnose that step: --step {now}",
            )
    return program.state()


def needed_batch(run: ReplayableRun, step: int) -> Batch:
    """The batch of a step.

    Raises:
      InputError: the data is gone.
    """
    batch = run.batch(step)
    if batch is None:
        raise InputError(
            f"the batch of step {step} cannot be rebuilt: the data is gone",
            "Restore the data directory of the run",
        )
    return batch


def replay_telemetry(
    run: ReplayableRun,
    first: int,
    last: int,
    on_step: Callable[[int, StepOutcome], None] = lambda step, outcome: None,
) -> Telemetry:
    """Telemetry of steps first..last-1, made by replaying them from `first`'s state.

    For a run whose recording is missing. Stops early at a refused step, which is
    the last row then.
    """
    program = run.program()
    program.load(run.state_before(first))
    steps: list[int] = []
    rows: list[list[float]] = []
    columns: tuple[str, ...] = ()
    for step in range(first, last):
        outcome = program.run(needed_batch(run, step), step)
        on_step(step, outcome)
        columns = tuple(outcome.telemetry)
        steps.append(step)
        rows.append([outcome.telemetry[name] for name in columns])
        if not outcome.applied:
            break
    return Telemetry(np.array(steps, np.int64), columns, np.array(rows, np.float32))
