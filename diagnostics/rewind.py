"""Telemetry of steps whose recording is missing, made by replaying from earlier states."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diagnostics.errors import InputError
from diagnostics.onset import find_onset
from diagnostics.protocol import ReplayableRun, StepOutcome, Telemetry
from diagnostics.replay import OnStep, ignore_step, nearest_state, needed_batch

_TELLING = 8  # steps before a failure that show whether anything was growing


class Rewound(NamedTuple):
    """Telemetry up to a step, and what was done to have it.

    Attributes:
      note: a sentence; '' if the recording sufficed.
    """

    telemetry: Telemetry
    note: str


def telemetry_until(run: ReplayableRun, step: int, on_step: OnStep = ignore_step) -> Rewound:
    """The recorded steps up to `step`; where they do not tell the onset, replayed ones before.

    Goes back from stored state to stored state, and stops as soon as the onset lies
    behind the first step it has (so nothing before need be looked at). Each step is
    replayed at most once.

    Args:
      on_step: told every replayed step.
    """
    telemetry = _cut(run.telemetry(), step)
    begun = telemetry.steps.size and telemetry.steps[-1] == step
    first = int(telemetry.steps[0]) if begun else step + 1
    if not begun:
        telemetry = Telemetry(telemetry.steps[:0], telemetry.columns, telemetry.rows[:0])
    replayed_from: int | None = None
    while first > 0 and not _tells(run, telemetry, step):
        try:
            start, before = _replayed(run, first, telemetry.columns, on_step)
        except InputError as error:
            return Rewound(telemetry, f"the steps before {first} cannot be replayed: {error}")
        telemetry = _joined(before, telemetry)
        if before.steps[-1] != first - 1:
            note = f"replayed from step {start}, which was refused at step {before.steps[-1]}"
            return Rewound(telemetry, note)
        first = replayed_from = start
    if replayed_from is None:
        return Rewound(telemetry, "")
    return Rewound(
        telemetry, f"the telemetry of steps {replayed_from} to {step} is replayed, not recorded"
    )


def _tells(run: ReplayableRun, telemetry: Telemetry, step: int) -> bool:
    """Whether these steps show where the trouble began, or that nothing was growing."""
    if telemetry.steps.size < min(_TELLING, step + 1):
        return False
    onset = find_onset(telemetry, run.facts)
    return onset is None or onset.step > int(telemetry.steps[0])


def _cut(telemetry: Telemetry, last: int) -> Telemetry:
    kept = telemetry.steps <= last
    return Telemetry(telemetry.steps[kept], telemetry.columns, telemetry.rows[kept])


def _replayed(
    run: ReplayableRun, end: int, columns: tuple[str, ...], on_step: OnStep
) -> tuple[int, Telemetry]:
    """(first step, telemetry) from the last stored state before `end`; a refused step ends it."""
    start, state = nearest_state(run, end - 1)
    program = run.program()
    program.load(state)
    outcomes: list[StepOutcome] = []
    for step in range(start, end):
        outcomes.append(program.run(needed_batch(run, step), step))
        on_step(step, outcomes[-1])
        if not outcomes[-1].applied:
            break
    program.release()
    names = columns or tuple(outcomes[0].telemetry)
    rows = [[one.telemetry.get(name, np.nan) for name in names] for one in outcomes]
    steps = np.arange(start, start + len(rows))
    return start, Telemetry(steps, names, np.array(rows, np.float32))


def _joined(before: Telemetry, after: Telemetry) -> Telemetry:
    if not after.steps.size:
        return before
    return Telemetry(
        np.concatenate([before.steps, after.steps]),
        after.columns,
        np.concatenate([before.rows, after.rows]),
    )
