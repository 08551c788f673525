"""The first bad step of a run, from its stored states: bisect, then replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from diagnostics.protocol import ReplayableRun, State, StepOutcome
from diagnostics.replay import needed_batch

T = TypeVar("T")


def first_true(items: Sequence[T], holds: Callable[[T], bool]) -> int:
    """Index of the first item for which `holds` is true, by bisection.

    `holds` must be false up to some item and true from there on; len(items) if it
    never is. Calls it O(log n) times.
    """
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        if holds(items[middle]):
            high = middle
        else:
            low = middle + 1
    return low


def all_finite(state: State) -> bool:
    """Whether every floating-point element of the state is finite.

    Memory of the schedule (`schedule/…`) may hold infinity before its first use.
    """
    return all(
        bool(np.isfinite(array.astype(np.float32)).all())
        for name, array in state.items()
        if not name.startswith("schedule/") and array.dtype.kind not in "biuSU"
    )


def first_bad_step(
    run: ReplayableRun,
    last: int,
    on_step: Callable[[int, StepOutcome], None] = lambda step, outcome: None,
) -> int | None:
    """The first step up to `last` that is refused when replayed; None if none is.

    Stored states are bisected for the first that holds a non-finite value (a NaN
    in a state never leaves it); then only the steps after the last good one are
    replayed.
    """
    stored = [step for step in run.state_steps() if step <= last]
    bad = first_true(stored, lambda step: not all_finite(run.state_before(step)))
    if bad == 0:
        return stored[0]
    start = stored[bad - 1]
    end = stored[bad] if bad < len(stored) else last + 1
    program = run.program()
    program.load(run.state_before(start))
    for step in range(start, end):
        outcome = program.run(needed_batch(run, step), step)
        on_step(step, outcome)
        if not outcome.applied:
            return step
    return None if bad == len(stored) else end
