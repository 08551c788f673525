"""The first bad step of a run, from its stored states: bisect, then replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from diagnostics.errors import SnapshotDamaged
from diagnostics.protocol import ReplayableRun, State
from diagnostics.replay import OnStep, ignore_step, needed_batch

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
        bool(np.isfinite(array.astype(np.promote_types(array.dtype, np.float32), copy=False)).all())
        for name, array in state.items()
        if not name.startswith("schedule/") and array.dtype.kind not in "biuSU"
    )


def first_bad_step(run: ReplayableRun, last: int, on_step: OnStep = ignore_step) -> int | None:
    """The first step up to `last` that is refused when replayed; None if none is.

    Stored states are bisected for the first that holds a non-finite value (a NaN
    in a state never leaves it); then only the steps after the last good one are
    replayed. A state that is bad although the replay up to it was clean was
    overwritten: its step is the answer.

    Raises:
      InputError: a batch on the way is gone.
    """
    stored = [step for step in run.state_steps() if step <= last]
    bad = first_true(stored, lambda step: _finite(run, step) is False)
    start = next((step for step in reversed(stored[:bad]) if _finite(run, step)), None)
    if start is None:
        return stored[0]
    end = stored[bad] if bad < len(stored) else last + 1
    program = run.program()
    program.load(run.state_before(start))
    for step in range(start, end):
        outcome = program.run(needed_batch(run, step), step)
        on_step(step, outcome)
        if not outcome.applied:
            return step
    program.release()
    return None if bad == len(stored) else end


def _finite(run: ReplayableRun, step: int) -> bool | None:
    """Whether a stored state is finite; None if it cannot be read."""
    try:
        return all_finite(run.state_before(step))
    except SnapshotDamaged:
        return None
