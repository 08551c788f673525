"""Look at any one step of a run, healthy or not, op by op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tensorflow as tf

from diagnostics.debugger_dump import dump_step
from diagnostics.op_records import OpRecord
from diagnostics.op_trace import OpTrace
from diagnostics.protocol import ReplayableRun, StepOutcome
from diagnostics.replay import check_step, needed_batch, reproduce, state_at
from diagnostics.trace import trace_healthy

Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class HealthyStep:
    """A replayed step in which every value is finite.

    Attributes:
      recorded: whether its telemetry was recorded, to compare with.
      differences: from the recorded telemetry; empty if bit-identical.
      records: every op, in order of execution.
    """

    step: int
    outcome: StepOutcome
    recorded: bool
    differences: tuple[str, ...]
    records: tuple[OpRecord, ...]


def examine(run: ReplayableRun, step: int, progress: Progress = no_progress) -> HealthyStep | None:
    """Replays any step op by op; None if it is not healthy (then `diagnose` it).

    Raises:
      InputError: the run has no such step, or its state or batch cannot be had.
    """
    check_step(run, step)
    state = state_at(run, step, lambda now, _: progress("rewinding", now, step))
    batch = needed_batch(run, step)
    progress("replay", 0, 0)
    program = run.program()
    found = reproduce(run, program, state, batch, step)
    if not found.outcome.applied:
        return None
    program.load(state)
    records = trace_healthy(run, program, batch, step)
    return HealthyStep(step, found.outcome, found.recorded, found.differences, tuple(records))


def dump(run: ReplayableRun, step: int, directory: Path) -> str:
    """Leaves a TensorBoard Debugger V2 dump of one step in `directory`.

    Returns:
      Why there is none; '' if there is.
    """
    program = run.program()
    program.load(state_at(run, step))
    batch = needed_batch(run, step)
    try:
        dump_step(directory, lambda: program.trace(batch, step, OpTrace()))
    except tf.errors.OpError as error:  # an op that refuses its input, as a wrong label
        return error.message.splitlines()[0]
    finally:
        program.release()
    return ""
